"""Images and boxes in, finished masks out: the model's calls at fixed shapes, in bounded memory.

Matrix kernels answer differently in the last bits for one box and for three. So every call has the shape
that `CallShape` says, the last one filled up, and an image's result does not depend on what else is in the
batch. Masks become runs before the next boxes are decoded: an image with 10,000 boxes holds the logits of
one call at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from model import rle
from model.attention import STRIP_LOGITS
from model.compiled import compile_calls
from model.config import SamHQConfig, TinyVisionConfig
from model.geometry import resize_longest_side, target_size_hw
from model.host_work import HostWork
from model.masks import TracedMasks, trace_masks
from model.prompts import box_rows, check_prompts
from model.records import CallShape, ImageEmbedding, Instances, PreparedImage, Prompts, SegmentFailure
from model.sam_hq import SamHQ, check_picture, tokens_needed

Dtype = Literal["float32", "bfloat16"]
UInt8Array = npt.NDArray[np.uint8]

REDUCED_CALL_SHAPE = "reduced_call_shape"
"""Flag of an image that was done at `reduced_shape` because memory ran out at the configured one."""

CALL_SHAPES = tuple(
    CallShape(images_per_call=images, boxes_per_call=boxes)
    for images, boxes in (
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 8),
        (1, 16),
        (2, 16),
        (2, 32),
        (4, 32),
        (4, 64),
        (8, 64),
    )
)
"""What `default_call_shape` chooses from, in the order of memory. Beyond 8 images a GPU hardly gains."""


class Segmenter:
    """A model with all its settings. It keeps no state between calls, and works on after an error."""

    def __init__(
        self,
        model: SamHQ,
        *,
        call_shape: CallShape,
        dtype: Dtype = "float32",
        device: str | torch.device = "cpu",
        multimask: Literal["single", "best"] = "single",
        hq_token_only: bool = False,
        mask_threshold: float = 0.0,
        stability_offset: float = 1.0,
        compiled: bool = False,
    ) -> None:
        """Take `model` over: it is moved to `device`, cast to `dtype` and put in evaluation mode.

        On a CUDA device this also turns TF32 and cuDNN's search for algorithms off for the whole process:
        both would change masks, the second from run to run.

        Args:
            model: the network, from `checkpoints.load`.
            call_shape: the fixed shapes of its calls.
            dtype: what encoder and decoder multiply in; coordinates and logits are float32 in any case.
            device: such as `cpu` or `cuda:0`.
            multimask: `single`, the answer for boxes, or `best`, of three alternatives the one with the
                highest predicted IoU.
            hq_token_only: take the HQ token's logits alone, not the sum with SAM's.
            mask_threshold: a pixel is inside if its logit is greater.
            stability_offset: distance of the two thresholds of the stability score, greater than 0.
            compiled: calls of `call_shape` run compiled and recorded (`compiled.py`), on a CUDA device alone;
                the first ones take minutes.

        Raises:
            ValueError: a setting outside its range.
        """
        if min(call_shape.images_per_call, call_shape.boxes_per_call) < 1:
            raise ValueError(f"{call_shape}: both numbers must be at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; wanted 'float32' or 'bfloat16'")
        if multimask not in ("single", "best"):
            raise ValueError(f"multimask is {multimask!r}; wanted 'single' or 'best': one mask a prompt")
        if not math.isfinite(mask_threshold):
            raise ValueError(f"mask_threshold is {mask_threshold}; it must be a finite number")
        if not 0 < stability_offset < math.inf:
            raise ValueError(f"stability_offset is {stability_offset}; it must be greater than 0, and finite")
        self.device = torch.device(device)
        if compiled and self.device.type != "cuda":
            raise ValueError(f"compiled calls are for CUDA devices; the device is {str(self.device)!r}")
        if self.device.type == "cuda":
            _forbid_reduced_precision()
        self.model = model.to(self.device).cast(getattr(torch, dtype)).eval()
        self.call_shape = call_shape
        self.dtype = dtype
        self.multimask: Literal["single", "best"] = multimask
        self.hq_token_only = hq_token_only
        self.mask_threshold = mask_threshold
        self.stability_offset = stability_offset
        if compiled:
            compile_calls(self.model, call_shape, tokens_needed(multimask, hq_token_only))
        self._host_work = HostWork(aside=self.device.type == "cuda")

    @property
    def input_side(self) -> int:
        """The side S that images are resized to."""
        return self.model.config.image_size

    def segment(
        self, images: Sequence[UInt8Array], boxes_xyxy: Sequence[npt.ArrayLike]
    ) -> list[Instances | SegmentFailure]:
        """The masks of upright RGB uint8 images (H, W, 3) of any sizes, one result an image, in order.

        `boxes_xyxy`: for each image (n_i, 4) in its own pixels, n_i from 0. The plain entry: resizes each
        image as the pipeline does and calls `segment_prepared`.

        Raises:
            ValueError: as `segment_prepared`; or an image that is not uint8 (H, W, 3) or is too elongated.
        """
        prepared = []
        for image, boxes in zip(images, boxes_xyxy, strict=True):
            check_picture(image)
            prepared.append(
                PreparedImage(
                    pixels_hwc=resize_longest_side(image, self.input_side),
                    size_hw=(image.shape[0], image.shape[1]),
                    prompts=Prompts(boxes_xyxy=box_rows(boxes)),
                )
            )
        return self.segment_prepared(prepared)

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        """The masks of images already resized, one result an image, in order: the production entry.

        An image without prompts gives no instances and never reaches the encoder. An image that memory
        does not suffice for is done again alone, then alone at `reduced_shape` with the flag
        `reduced_call_shape`; the other images of its call keep the bytes they would have had.

        Raises:
            ValueError: pixels that do not fit `size_hw`, or malformed prompts; nothing has been computed
                then. What goes wrong with one image's numbers or memory is a `SegmentFailure` in its place.
        """
        results: list[Instances | SegmentFailure] = [_join([], image.size_hw, ()) for image in images]
        busy = [i for i, image in enumerate(images) if self._check(image, i)]
        for start in range(0, len(busy), self.call_shape.images_per_call):
            places = busy[start : start + self.call_shape.images_per_call]
            call = [images[i] for i in places]
            answers = self._attempt(call, self.call_shape, ())
            if answers is None:
                answers = [self._segment_alone(image) for image in call]
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
        return results

    def _check(self, image: PreparedImage, index: int) -> int:
        """The number of prompts of an image that can be worked on."""
        check_picture(image.pixels_hwc)
        wanted = target_size_hw(image.size_hw, self.input_side)
        if image.pixels_hwc.shape[:2] != wanted:
            raise ValueError(
                f"image {index} of upright size {image.size_hw} was prepared as "
                f"{image.pixels_hwc.shape[:2]}; wanted {wanted}"
            )
        return check_prompts(image.prompts, self.model.config.mask_size, image=index)

    def _segment_alone(self, image: PreparedImage) -> Instances | SegmentFailure:
        """One image of a call for which memory ran out."""
        # First at the usual shape: its neighbours in the call need no other bytes, and may not the fault.
        smaller = reduced_shape(self.call_shape)
        for shape, flags in ((self.call_shape, ()), (smaller, (REDUCED_CALL_SHAPE,))):
            answers = self._attempt([image], shape, flags)
            if answers is not None:
                return answers[0]
        return SegmentFailure(
            code="out_of_memory",
            message=f"memory on {self.device} did not suffice for an image of {image.size_hw[0]}x"
            f"{image.size_hw[1]} pixels, alone and with {smaller.boxes_per_call} boxes a call; give the "
            "model more memory, or lower images_per_call and boxes_per_call",
        )

    def _attempt(
        self, images: Sequence[PreparedImage], shape: CallShape, flags: tuple[str, ...]
    ) -> list[Instances | SegmentFailure] | None:
        """One result an image, or None if memory ran out."""
        try:
            return self._run(images, shape, flags)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, past the handler, does nothing refer to the tensors of the frames that failed.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def _run(
        self, images: Sequence[PreparedImage], shape: CallShape, flags: tuple[str, ...]
    ) -> list[Instances | SegmentFailure]:
        """The results of at most `shape.images_per_call` images, with one encoder call."""
        fill = shape.images_per_call - len(images)
        embedding = self.model.encode_prepared(
            [image.pixels_hwc for image in [*images, *[images[-1]] * fill]],
            [image.size_hw for image in [*images, *[images[-1]] * fill]],
        )
        no_prompts = Prompts(boxes_xyxy=np.zeros((0, 4)))
        prompts = [*[image.prompts for image in images], *[no_prompts] * fill]
        pieces: list[list[Callable[[], Instances]]] = [[] for _ in images]
        for index, logits_NLL, iou_N in self._decode(embedding, prompts, shape.boxes_per_call):
            pieces[index].append(
                self._finish(logits_NLL, iou_N, embedding.resized_hw[index], images[index].size_hw)
            )
        return [
            _join([piece() for piece in part], image.size_hw, flags)
            for part, image in zip(pieces, images, strict=True)
        ]

    def _decode(
        self, embedding: ImageEmbedding, prompts: Sequence[Prompts], boxes_per_call: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Image, logits (n, 4G, 4G) and predicted IoU (n,), call by call, each image's prompts in order."""
        for call in self.model.decode_calls(
            embedding,
            prompts,
            multimask=self.multimask,
            hq_token_only=self.hq_token_only,
            prompts_per_call=boxes_per_call,
        ):
            indices, counts = torch.unique_consecutive(call.image_N, return_counts=True)
            start = 0
            for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
                part = slice(start, start + count)
                yield index, call.low_res_NMHW[part, 0], call.predicted_iou_NM[part, 0]
                start += count

    def _finish(
        self,
        logits_NLL: torch.Tensor,
        iou_N: torch.Tensor,
        resized_hw: tuple[int, int],
        size_hw: tuple[int, int],
    ) -> Callable[[], Instances]:
        """What gives some masks of one image; one whose numbers are not finite is empty, and its score NaN.

        `logits_NLL`: (n, 4G, 4G), `iou_N`: (n,), on the device.
        """
        # A sum is not finite if one term is not, and costs a tenth of asking each term.
        sound_N = torch.isfinite(logits_NLL.sum((1, 2)) + iou_N)
        if not bool(sound_N.all()):
            sound_N = torch.isfinite(logits_NLL).all(2).all(1) & torch.isfinite(iou_N)
            # What stands beside a mask changes none of its bytes, so the sound ones are as they would be.
            outside = self.mask_threshold - 2 * self.stability_offset
            logits_NLL = torch.where(sound_N[:, None, None], logits_NLL, outside)
            iou_N = torch.where(sound_N, iou_N, torch.nan)
        traced = trace_masks(
            logits_NLL,
            resized_hw=resized_hw,
            size_hw=size_hw,
            mask_threshold=self.mask_threshold,
            stability_offset=self.stability_offset,
        )
        predicted_iou = iou_N.float().cpu().numpy()
        return self._host_work.begin(partial(_instances, traced, predicted_iou))


def _instances(traced: TracedMasks, predicted_iou: npt.NDArray[np.float32]) -> Instances:
    """The host's part of some masks."""
    runs = traced.runs
    return Instances(
        size_hw=traced.size_hw,
        counts=rle.compress(runs),
        area=rle.run_areas(runs),
        bbox_xywh=rle.run_bboxes_xywh(runs),
        predicted_iou=predicted_iou,
        stability_score=traced.stability_score,
    )


def reduced_shape(shape: CallShape) -> CallShape:
    """The shape for an image that ran out of memory: alone, with a quarter of the boxes a call."""
    return CallShape(images_per_call=1, boxes_per_call=max(1, shape.boxes_per_call // 4))


def default_call_shape(config: SamHQConfig, memory_budget_bytes: int) -> CallShape:
    """The largest of `CALL_SHAPES` whose peak memory fits the budget by estimate; the same on every machine.

    `memory_budget_bytes`: what the model may take on its device, weights included.

    Raises:
        ValueError: not even one image with one box a call fits.
    """
    fitting = [shape for shape in CALL_SHAPES if estimated_bytes(config, shape) <= memory_budget_bytes]
    if not fitting:
        raise ValueError(
            f"a memory budget of {memory_budget_bytes} bytes is too small for {config.vision.name}: one "
            f"image with one box a call needs about {estimated_bytes(config, CALL_SHAPES[0])} bytes"
        )
    return fitting[-1]


def estimated_bytes(config: SamHQConfig, shape: CallShape) -> int:
    """Peak memory of the model at a call shape in float32, weights included: an estimate on the high side.

    Encoder and decoder take turns; the images' embeddings stay through both. A ViT's peak is the tokens of a
    block, its queries, keys and values twice over, and a strip of logits: no road of inference holds all of
    them. TinyViT's is its first maps; the decoder's a map of a quarter of its width at the size of the
    low-resolution masks, a few times over for each box (a CPU makes the maps one by one, in half of it).
    Measured on a CPU, over the weights: ViT-B at 1024 with one box 224 MiB an image, estimated 284.
    """
    vision, grid = config.vision, config.vision.grid
    low_res_pixels = config.mask_size**2
    if isinstance(vision, TinyVisionConfig):
        weights = 4 * 11_000_000
        encoder = 4 * 5 * low_res_pixels * 4 * vision.embed_dims[0]
    else:
        weights = 4 * (12 * vision.hidden_size**2 * vision.num_hidden_layers + 10_000_000)
        encoder = 4 * (20 * vision.hidden_size * grid**2 + 2 * STRIP_LOGITS)
    width = config.mask_decoder.hidden_size
    embedding = 4 * (5 * width * grid**2 + width // 8 * low_res_pixels)
    box = 4 * 5 * (width // 4) * low_res_pixels
    peak = max(shape.images_per_call * encoder, shape.boxes_per_call * box)
    return weights + shape.images_per_call * embedding + peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    # The CPU allocator raises a bare RuntimeError.
    return isinstance(error, RuntimeError) and ("out of memory" in text or "defaultcpuallocator" in text)


def probe_dtype(device: str | torch.device) -> Dtype:
    """`bfloat16` if the device multiplies it natively, else `float32`.

    CUDA: compute capability 8.0 (Ampere) or newer. CPU: AMX, AVX-512 BF16 or Arm's BF16 instructions, as
    Linux reports them; without them bfloat16 is emulated, several times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    if device.type == "cpu" and _cpu_features() & {"amx_bf16", "avx512_bf16", "bf16"}:
        return "bfloat16"
    return "float32"


def set_cpu_threads(threads: int) -> None:
    """None; PyTorch computes with so many threads in this process from here on.

    On a CPU they belong to what makes equal bytes: kernels share their work out by them, and the last bits of
    some sums follow (float32 products of few rows, softmax along an inner axis, 1x1 convolutions).
    """
    torch.set_num_threads(threads)


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What every core of this machine can do, by the names Linux has for it; empty elsewhere."""
    if not cpuinfo.exists():
        return set()
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
    cores = [set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")]
    return set.intersection(*cores) if cores else set()


def _forbid_reduced_precision() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _join(
    pieces: Sequence[Instances], size_hw: tuple[int, int], flags: tuple[str, ...]
) -> Instances | SegmentFailure:
    """The pieces of one image as one result; without pieces, no instances."""
    predicted_iou = np.concatenate([np.zeros(0, np.float32), *[piece.predicted_iou for piece in pieces]])
    if len(predicted_iou) and np.isnan(predicted_iou).all():
        return SegmentFailure(
            code="non_finite",
            message=f"the model's logits or scores are not finite for any box of an image of {size_hw[0]}x"
            f"{size_hw[1]} pixels; check the weights, and whether float32 gives the same",
        )
    return Instances(
        size_hw=size_hw,
        counts=tuple(text for piece in pieces for text in piece.counts),
        area=np.concatenate([np.zeros(0, np.int64), *[piece.area for piece in pieces]]),
        bbox_xywh=np.concatenate([np.zeros((0, 4), np.float32), *[piece.bbox_xywh for piece in pieces]]),
        predicted_iou=predicted_iou,
        stability_score=np.concatenate(
            [np.zeros(0, np.float32), *[piece.stability_score for piece in pieces]]
        ),
        flags=flags,
    )
