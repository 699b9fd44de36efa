"""Images and prompts in, finished masks out: the model's calls at fixed shapes, in bounded memory.

Matrix kernels answer differently in the last bits for one box and for three. So every call has exactly the
shape of `CallShape`, the last one padded with copies, and an image's result does not depend on what else is
in the batch. Masks become runs before the next boxes are decoded: an image with 10,000 boxes holds the logits
of one call at a time.

Letters: N masks, L = 4G the side of their logits.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hqlabel.model.device import (
    EMULATED,
    Dtype,
    HostThread,
    compile_calls,
    device_kind,
    is_out_of_memory,
    multiplies_bfloat16,
    use_full_precision,
)
from hqlabel.model.masks import TracedMasks, trace_masks
from hqlabel.model.prompt_encoder import box_rows, check_prompts, mask_to_prompt
from hqlabel.model.records import (
    CallShape,
    Fit,
    ImageEmbedding,
    Instances,
    PreparedImage,
    Prompts,
    SegmentFailure,
    check_image,
    fit_image,
    target_size_hw,
)
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.sam_hq import SamHQ

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
T = TypeVar("T")

REDUCED_CALL_SHAPE = "reduced_call_shape"
"""Flag of an image that was segmented at `reduced_shape` because memory ran out at the configured one."""


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
        stability_offset: float = 1.0,
        compiled: bool = False,
    ) -> None:
        """Take `model` over: it is moved to `device`, cast to `dtype` and put in evaluation mode.

        On a CUDA device this also calls `use_full_precision`, for the whole process.

        Args:
            model: the network, from `checkpoints.load`.
            call_shape: the fixed shapes of its calls.
            dtype: what encoder and decoder multiply in; coordinates and logits are float32 in any case.
            device: such as `cpu` or `cuda:0`.
            multimask: `single`, the answer for boxes, or `best`, of three alternatives the one with the
                highest predicted IoU.
            hq_token_only: take the HQ token's logits alone, not the sum with SAM's.
            stability_offset: distance of the two thresholds of the stability score, greater than 0.
            compiled: compile and record calls of `call_shape` (`compile_calls`), on a CUDA device alone; the
                first ones take minutes.

        Raises:
            ValueError: a setting outside its range.
        """
        if multimask not in ("single", "best"):
            raise ValueError(f"multimask is {multimask!r}; wanted 'single' or 'best': one mask a prompt")
        if not 0 < stability_offset < math.inf:
            raise ValueError(f"stability_offset is {stability_offset}; it must be greater than 0, and finite")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if compiled and not on_gpu:
            raise ValueError(f"compiled calls are for CUDA devices; the device is {str(self.device)!r}")
        if on_gpu:
            use_full_precision()
        if dtype == "bfloat16" and not multiplies_bfloat16(self.device):
            warnings.warn(EMULATED, stacklevel=2)
        self.model = model.to(self.device).cast(getattr(torch, dtype)).eval()
        self.call_shape = call_shape
        self.multimask: Literal["single", "best"] = multimask
        self.hq_token_only = hq_token_only
        self.stability_offset = stability_offset
        if compiled:
            compile_calls(self.model, call_shape, self.model.tokens_needed(multimask, hq_token_only))
        self._host_thread = HostThread(own_thread=on_gpu)

    @property
    def device_kind(self) -> str:
        """The kind of device, as the footers of what it makes state it; see `model.device.device_kind`."""
        return device_kind(self.device)

    @property
    def input_side(self) -> int:
        """The side S that images are resized to."""
        return self.model.config.image_size

    @property
    def fit(self) -> Fit:
        """How images come to that side."""
        return self.model.fit

    def mask_prompt(self, counts: str, size_hw: tuple[int, int]) -> Float32Array:
        """Return a mask of the upright image, compressed COCO runs, as a row of `Prompts.mask_logits`."""
        return mask_to_prompt(rle_to_mask(counts, size_hw), side=self.input_side, fit=self.fit)

    def segment(
        self, images: Sequence[UInt8Array], boxes_xyxy: Sequence[npt.ArrayLike]
    ) -> list[Instances | SegmentFailure]:
        """Return the masks of upright RGB uint8 images (H, W, 3) of any sizes, one result an image, in order.

        Resizes each image as the pipeline does and calls `segment_prepared`. `boxes_xyxy`: for each image
        (n_i, 4) in its own pixels, n_i from 0.

        Raises:
            ValueError: as `segment_prepared`; or an image that is not uint8 (H, W, 3) or is too elongated.
        """
        prepared = []
        for image, boxes in zip(images, boxes_xyxy, strict=True):
            pixels = fit_image(image, self.input_side, self.fit)
            size_hw, prompts = (image.shape[0], image.shape[1]), Prompts(boxes_xyxy=box_rows(boxes))
            prepared.append(PreparedImage(pixels_hwc=pixels, size_hw=size_hw, prompts=prompts))
        return self.segment_prepared(prepared)

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        """Return the masks of images already resized, one result an image, in order: the production entry.

        An image without prompts gives no instances and never reaches the encoder. An image for which memory
        runs out is segmented again alone, then alone at `reduced_shape` with the flag `reduced_call_shape`;
        the other images of its call keep the bytes they would have had.

        Raises:
            ValueError: pixels that do not fit `size_hw`, or malformed prompts; nothing has been computed
                then. What goes wrong with one image's numbers or memory is a `SegmentFailure` in its place.
        """
        results: list[Instances | SegmentFailure] = [_join([], image.size_hw, ()) for image in images]
        with_prompts = [i for i, image in enumerate(images) if self._count_prompts(image, i)]
        for start in range(0, len(with_prompts), self.call_shape.images_per_call):
            indices = with_prompts[start : start + self.call_shape.images_per_call]
            call = [images[i] for i in indices]
            answers = self._segment_or_none(call, self.call_shape, ())
            if answers is None:
                answers = [self._segment_alone(image) for image in call]
            for index, answer in zip(indices, answers, strict=True):
                results[index] = answer
        return results

    def _count_prompts(self, image: PreparedImage, index: int) -> int:
        """Return the number of an image's prompts; check both. Raises ValueError as `segment_prepared`."""
        check_image(image.pixels_hwc)
        resized_hw = target_size_hw(image.size_hw, self.input_side, self.fit)
        if image.pixels_hwc.shape[:2] != resized_hw:
            raise ValueError(
                f"image {index} of upright size {image.size_hw} was prepared as "
                f"{image.pixels_hwc.shape[:2]}; wanted {resized_hw}"
            )
        return check_prompts(image.prompts, self.model.config.mask_size, image=index)

    def _segment_alone(self, image: PreparedImage) -> Instances | SegmentFailure:
        """Return the result of one image of a call for which memory ran out."""
        # First at the usual shape: its neighbours in the call may have been the reason.
        smaller = reduced_shape(self.call_shape)
        for shape, flags in ((self.call_shape, ()), (smaller, (REDUCED_CALL_SHAPE,))):
            answers = self._segment_or_none([image], shape, flags)
            if answers is not None:
                return answers[0]
        return SegmentFailure(
            code="out_of_memory",
            message=f"memory on {self.device} did not suffice for an image of {image.size_hw[0]}x"
            f"{image.size_hw[1]} pixels, alone and with {smaller.boxes_per_call} boxes a call; give the "
            "model more memory, or lower images_per_call and boxes_per_call",
        )

    def _segment_or_none(
        self, images: Sequence[PreparedImage], shape: CallShape, flags: tuple[str, ...]
    ) -> list[Instances | SegmentFailure] | None:
        """Return one result an image, or None if memory ran out."""
        return none_without_memory(lambda: self._segment_call(images, shape, flags), self.device)

    @torch.no_grad()
    def _segment_call(
        self, images: Sequence[PreparedImage], shape: CallShape, flags: tuple[str, ...]
    ) -> list[Instances | SegmentFailure]:
        """Return the results of at most `shape.images_per_call` images, with one encoder call."""
        num_padding = shape.images_per_call - len(images)
        padded = [*images, *[images[-1]] * num_padding]
        embedding = self.model.encode_prepared(
            [image.pixels_hwc for image in padded], [image.size_hw for image in padded]
        )
        no_prompts = Prompts(boxes_xyxy=np.zeros((0, 4)))
        prompts = [*[image.prompts for image in images], *[no_prompts] * num_padding]
        pending: list[list[Future[Instances]]] = [[] for _ in images]
        for index, logits_NLL, iou_N in self._logits_by_image(embedding, prompts, shape.boxes_per_call):
            resized_hw = None if self.fit == "stretch" else embedding.resized_hw[index]
            pending[index].append(self._trace(logits_NLL, iou_N, resized_hw, images[index].size_hw))
        return [
            _join([part.result() for part in parts], image.size_hw, flags)
            for parts, image in zip(pending, images, strict=True)
        ]

    def _logits_by_image(
        self, embedding: ImageEmbedding, prompts: Sequence[Prompts], boxes_per_call: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield image index, logits (n, 4G, 4G) and predicted IoU (n,), an image's prompts in order."""
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

    def _trace(
        self,
        logits_NLL: torch.Tensor,
        iou_N: torch.Tensor,
        resized_hw: tuple[int, int] | None,
        size_hw: tuple[int, int],
    ) -> Future[Instances]:
        """Return the masks of some prompts of one image; of numbers not finite, empty ones with the IoU NaN.

        `logits_NLL`: (n, 4G, 4G), `iou_N`: (n,), on the device.
        """
        # A sum is not finite if one term is not, and costs a tenth of checking each term.
        finite_N = torch.isfinite(logits_NLL.sum((1, 2)) + iou_N)
        if not bool(finite_N.all()):
            finite_N = torch.isfinite(logits_NLL).all(2).all(1) & torch.isfinite(iou_N)
            # Other masks of a call change none of a mask's bytes, so the finite ones are as they would be.
            outside = -2 * self.stability_offset
            logits_NLL = torch.where(finite_N[:, None, None], logits_NLL, outside)
            iou_N = torch.where(finite_N, iou_N, torch.nan)
        traced = trace_masks(
            logits_NLL, resized_hw=resized_hw, size_hw=size_hw, stability_offset=self.stability_offset
        )
        return self._host_thread.submit(_instances, traced, iou_N.float().cpu().numpy())


def _instances(traced: TracedMasks, predicted_iou: Float32Array) -> Instances:
    """Return traced masks as the caller gets them; the host's part, for `HostThread`."""
    runs = traced.runs()
    return Instances(
        size_hw=traced.size_hw,
        counts=runs.counts(),
        area=runs.areas(),
        bbox_xywh=runs.bboxes_xywh(),
        predicted_iou=predicted_iou,
        stability_score=traced.stability_score,
    )


def none_without_memory(work: Callable[[], T], device: torch.device) -> T | None:
    """Return what `work` returns, or None if memory ran out; what it held is freed then."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Only here, past the handler, does nothing refer to the tensors of the frames that failed.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def reduced_shape(shape: CallShape) -> CallShape:
    """Return the shape for an image that ran out of memory: alone, with a quarter of the boxes a call."""
    return CallShape(images_per_call=1, boxes_per_call=max(1, shape.boxes_per_call // 4))


def _join(
    parts: Sequence[Instances], size_hw: tuple[int, int], flags: tuple[str, ...]
) -> Instances | SegmentFailure:
    """Return the parts of one image as one result; without parts, no instances."""
    predicted_iou = np.concatenate([np.zeros(0, np.float32), *[part.predicted_iou for part in parts]])
    if len(predicted_iou) and np.isnan(predicted_iou).all():
        return SegmentFailure(
            code="non_finite",
            message=f"the model's logits or scores are not finite for any box of an image of {size_hw[0]}x"
            f"{size_hw[1]} pixels; check the weights, and whether float32 gives the same",
        )
    return Instances(
        size_hw=size_hw,
        counts=tuple(text for part in parts for text in part.counts),
        area=np.concatenate([np.zeros(0, np.int64), *[part.area for part in parts]]),
        bbox_xywh=np.concatenate([np.zeros((0, 4), np.float32), *[part.bbox_xywh for part in parts]]),
        predicted_iou=predicted_iou,
        stability_score=np.concatenate([np.zeros(0, np.float32), *[part.stability_score for part in parts]]),
        flags=flags,
    )
