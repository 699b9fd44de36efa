"""People's prompts to tensors: checked, moved to model pixels, grouped by kind, cut into chunks of one size.

A decoder call needs prompts of one kind: the same parts, and the same number of points. Points are never
padded to a common number here, since a padding point is a token like any other and changes the mask.

Everything stays on the host; the model moves a chunk when it needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from model.config import PATCH_SIZE
from model.prompt_encoder import BACKGROUND, FOREGROUND, PADDING
from model.records import Prompts, scale_boxes, scale_points, target_size_hw

SizeHW = tuple[int, int]

MASK_CERTAINTY = 0.999
"""Probability that `mask_to_prompt` gives to a pixel inside a person's mask: logits of +-6.9."""


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """N prompts of one kind, on the host, in model pixels.

    `place_N`: int64, where each belongs in the call's order. `image_N`: int64, its image. Of the other
    four, fp32 except for the labels, those that the kind lacks are None.
    """

    place_N: torch.Tensor
    image_N: torch.Tensor
    boxes_N4: torch.Tensor | None = None
    points_NP2: torch.Tensor | None = None
    labels_NP: torch.Tensor | None = None
    masks_NHW: torch.Tensor | None = None

    def kind(self) -> tuple[bool, int, bool]:
        """Return what must be equal in one decoder call: box or not, points (-1: none), mask or not."""
        points = -1 if self.points_NP2 is None else self.points_NP2.shape[1]
        return self.boxes_N4 is not None, points, self.masks_NHW is not None

    def chunks(self, size: int) -> Iterator[tuple[PromptBatch, int]]:
        """Yield batches of exactly `size` prompts and how many of them are real.

        The last one is filled with copies of the last prompt.
        """
        N = len(self.place_N)
        for start in range(0, N, size):
            index = torch.arange(start, start + size).clamp(max=N - 1)
            parts = {f.name: getattr(self, f.name) for f in fields(self)}
            rows = {name: x[index] for name, x in parts.items() if x is not None}
            yield PromptBatch(**rows), min(size, N - start)


def group_prompts(
    prompts: Sequence[Prompts],
    sizes_hw: Sequence[SizeHW],
    resized_hw: Sequence[SizeHW],
    *,
    mask_size: int,
) -> tuple[list[PromptBatch], list[int]]:
    """Return the prompts of all images by kind, and the number of prompts of each image.

    `mask_size`: side of low-resolution masks, 4G. The order of `place_N` is that of images, then of
    prompts. Images without prompts are in no batch.

    Raises:
        ValueError: as `SamHQ.decode_prompts` says.
    """
    counts = [check_prompts(p, mask_size, image=i) for i, p in enumerate(prompts)]
    kinds: dict[tuple[bool, int, bool], list[PromptBatch]] = {}
    start = 0
    for image, count in enumerate(counts):
        if count:
            batch = to_model_frame(
                prompts[image], sizes_hw[image], resized_hw[image], image=image, start=start
            )
            kinds.setdefault(batch.kind(), []).append(batch)
        start += count
    return [concatenate(batches) for batches in kinds.values()], counts


def box_rows(boxes_xyxy: npt.ArrayLike) -> npt.NDArray[np.generic]:
    """Return boxes as an array; an empty list stands for (0, 4). Other shapes stay, to be refused."""
    boxes = np.asarray(boxes_xyxy)
    return np.zeros((0, 4)) if boxes.shape == (0,) else boxes


def parts_of(prompts: Prompts) -> tuple[npt.NDArray[Any] | None, ...]:
    """Return boxes, points, labels and masks as arrays on the host, None where not given."""
    parts = (prompts.boxes_xyxy, prompts.points_xy, prompts.point_labels, prompts.mask_logits)
    return tuple(None if part is None else np.asarray(part) for part in parts)


def check_prompts(prompts: Prompts, mask_size: int, *, image: int) -> int:
    """Return the number N of prompts. Checked: dtypes, shapes, lengths, labels, and that all is finite."""
    where = f"prompts of image {image}"
    boxes, points, labels, masks = parts_of(prompts)
    if boxes is None and points is None and masks is None:
        raise ValueError(f"{where}: none of boxes_xyxy, points_xy and mask_logits is given")
    if (points is None) != (labels is None):
        raise ValueError(f"{where}: points_xy and point_labels go together; one of them is missing")
    given = {
        "boxes_xyxy": (boxes, "(N, 4)", boxes is None or (boxes.ndim == 2 and boxes.shape[1] == 4)),
        "points_xy": (
            points,
            "(N, P, 2) with P from 1",
            points is None or (points.ndim == 3 and points.shape[1] > 0 and points.shape[2] == 2),
        ),
        "point_labels": (
            labels,
            "(N, P)",
            labels is None or points is None or labels.shape == points.shape[:2],
        ),
        "mask_logits": (
            masks,
            f"(N, {mask_size}, {mask_size})",
            masks is None or (masks.ndim == 3 and masks.shape[1:] == (mask_size, mask_size)),
        ),
    }
    lengths = set()
    for name, (array, wanted, right) in given.items():
        if array is None:
            continue
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{where}: {name} has dtype {array.dtype}; wanted numbers")
        if not right:
            raise ValueError(f"{where}: {name} has shape {array.shape}; wanted {wanted}")
        if not np.isfinite(array).all():
            raise ValueError(f"{where}: {name} holds a value that is not finite")
        lengths.add(len(array))
    if len(lengths) != 1:
        raise ValueError(
            f"{where}: boxes, points and masks must agree on their number; found {sorted(lengths)}"
        )
    if masks is not None and masks.dtype.kind != "f":
        raise ValueError(
            f"{where}: mask_logits has dtype {masks.dtype}; wanted float logits (mask_to_prompt makes them "
            "of a mask)"
        )
    if labels is not None and not np.isin(labels, (BACKGROUND, FOREGROUND, PADDING)).all():
        found = sorted(set(np.unique(labels).tolist()) - {BACKGROUND, FOREGROUND, PADDING})
        raise ValueError(
            f"{where}: point labels {found}; wanted 1 (foreground), 0 (background) or -1 (padding)"
        )
    return lengths.pop()


def to_model_frame(
    prompts: Prompts, size_hw: SizeHW, resized_hw: SizeHW, *, image: int, start: int
) -> PromptBatch:
    """Return one image's prompts in model pixels; `start` is the place of its first."""
    boxes, points, labels, masks = parts_of(prompts)
    N = next(len(x) for x in (boxes, points, masks) if x is not None)
    return PromptBatch(
        place_N=torch.arange(start, start + N),
        image_N=torch.full((N,), image),
        boxes_N4=None if boxes is None else torch.from_numpy(scale_boxes(boxes, size_hw, resized_hw)),
        points_NP2=None if points is None else torch.from_numpy(scale_points(points, size_hw, resized_hw)),
        labels_NP=None if labels is None else torch.from_numpy(np.array(labels, dtype=np.int64)),
        masks_NHW=None if masks is None else torch.from_numpy(np.array(masks, dtype=np.float32)),
    )


def concatenate(batches: Sequence[PromptBatch]) -> PromptBatch:
    """Return batches of one kind as one."""
    columns = {f.name: [getattr(b, f.name) for b in batches] for f in fields(PromptBatch)}
    return PromptBatch(**{name: torch.cat(x) for name, x in columns.items() if x[0] is not None})


def mask_to_prompt(
    mask_hw: npt.NDArray[np.generic], *, side: int, certainty: float = MASK_CERTAINTY
) -> npt.NDArray[np.float32]:
    """Return a person's mask as low-resolution logits (4G, 4G), a row of `Prompts.mask_logits`.

    `mask_hw`: (H, W) in upright pixels; bool, or float as the probability of being inside, in [0, 1].
    `side`: the model's input side S = 16 G.

    The mask goes the image's way: resized (bilinear, averaging over the footprint) to the size of the
    resized image, padded to S x S as outside, averaged over 4 x 4. The coverage p of a cell then becomes
    log(p / (1 - p)), with p held within `certainty` and 1 - `certainty`, so that a cell half covered is 0
    and one wholly inside is log(0.999 / 0.001) = 6.9: the meaning that the model's own logits have, and near
    their usual size. A tool's 0 and 255, or 0 and 1, taken as logits would mean something else.

    Raises:
        ValueError: another shape, dtype or side, a value outside [0, 1], a certainty outside (0.5, 1).
    """
    if side < PATCH_SIZE or side % PATCH_SIZE:
        raise ValueError(f"side is {side}; wanted the model's input side, a multiple of {PATCH_SIZE}")
    if mask_hw.ndim != 2 or not (mask_hw.dtype == np.bool_ or np.issubdtype(mask_hw.dtype, np.floating)):
        raise ValueError(
            f"mask has shape {mask_hw.shape} and dtype {mask_hw.dtype}; wanted (H, W), bool or float"
        )
    if not 0.5 < certainty < 1:
        raise ValueError(f"certainty is {certainty}; it must lie between 0.5 and 1")
    inside = torch.from_numpy(mask_hw.astype(np.float32))
    if not bool(((inside >= 0) & (inside <= 1)).all()):
        raise ValueError("mask holds a value outside [0, 1]; give bool, or the probability of being inside")
    height, width = target_size_hw((mask_hw.shape[0], mask_hw.shape[1]), side)
    resized = F.interpolate(inside[None, None], (height, width), mode="bilinear", antialias=True)
    padded = F.pad(resized, (0, side - width, 0, side - height))
    p = F.avg_pool2d(padded, 4)[0, 0].clamp(1 - certainty, certainty)
    logits: npt.NDArray[np.float32] = torch.log(p / (1 - p)).numpy()
    return logits
