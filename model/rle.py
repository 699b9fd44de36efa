"""Masks <-> COCO run-length encoding: the runs of many masks at once, and their compressed strings.

COCO's runs go down the columns: position p = x * H + y. Their lengths alternate outside, inside,
outside, ... and begin with outside, of length 0 when pixel (0, 0) is inside. Every string made here equals
that of `pycocotools.mask.encode` byte for byte; `counts` writes and reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask

from model.counts import counts_text, read_lengths

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The uncompressed runs of N masks of one size.

    `lengths`: int64 (R,), the run lengths of all masks one after the other; those of mask n are
    `lengths[offsets[n] : offsets[n + 1]]` and sum to H * W. `offsets`: int64 (N + 1,).
    `size_hw`: (H, W).
    """

    lengths: Int64Array
    offsets: Int64Array
    size_hw: tuple[int, int]

    def __len__(self) -> int:
        """The number of masks."""
        return len(self.offsets) - 1


def runs_from_edges(edges: npt.NDArray[np.int64], num_masks: int, size_hw: tuple[int, int]) -> Runs:
    """The runs of `num_masks` masks from the places where they change; nothing is compared pixel by pixel.

    Args:
        edges: int64 (E,), in any order: n * (H * W + 1) + p for every position p at which a vertical run
            of mask n starts or, one past its last pixel, ends. A run that touches the bottom of column x
            ends at p = (x + 1) * H. Where one run's end is the next one's start (a mask that touches both
            bottom and top), both are given, and cancel.
        num_masks: how many masks there are; a mask without edges is empty.
        size_hw: (H, W) of each.
    """
    stride = size_hw[0] * size_hw[1] + 1
    # Each mask's last run ends where the mask ends, whether inside or outside.
    terminators = np.arange(1, num_masks + 1, dtype=np.int64) * stride - 1
    # PyTorch's sort: on 200,000 edges a quarter of NumPy's time.
    edges = torch.from_numpy(np.concatenate([edges, terminators])).sort().values.numpy()
    single = np.ones(len(edges), dtype=np.bool_)
    equal = edges[1:] == edges[:-1]
    single[1:] &= ~equal
    single[:-1] &= ~equal
    # A mask that is inside up to its end has given that edge too: it stands twice, and one of them stays.
    single[np.searchsorted(edges, terminators)] = True
    edges = edges[single]
    offsets = np.concatenate([[0], np.searchsorted(edges, terminators) + 1]).astype(np.int64)
    lengths = np.diff(edges, prepend=0)
    lengths[offsets[1:-1]] -= 1  # the first run of mask n > 0 starts one past the terminator before it
    return Runs(lengths=lengths, offsets=offsets, size_hw=size_hw)


def runs_from_masks(masks_NHW: torch.Tensor) -> Runs:
    """The runs of dense masks, bool (N, H, W), found on the tensor's device; only edges leave it."""
    if masks_NHW.dtype != torch.bool or masks_NHW.ndim != 3:
        raise ValueError(f"masks are {masks_NHW.dtype} {tuple(masks_NHW.shape)}; wanted bool (N, H, W)")
    num_masks, height, width = masks_NHW.shape
    columns_NWH = masks_NHW.transpose(1, 2)
    border = columns_NWH.new_zeros((num_masks, width, 1))
    padded = torch.cat([border, columns_NWH, border], dim=2)
    n, x, y = torch.nonzero(padded[:, :, 1:] ^ padded[:, :, :-1], as_tuple=True)
    edges = n * (height * width + 1) + x * height + y
    return runs_from_edges(edges.cpu().numpy(), num_masks, (height, width))


def concatenate(parts: Sequence[Runs]) -> Runs:
    """The masks of all parts as one, in order. The parts, at least one, are of one size."""
    num_runs = np.cumsum([0] + [len(part.lengths) for part in parts])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, num_runs[:-1], strict=True)]
    return Runs(
        lengths=np.concatenate([part.lengths for part in parts]),
        offsets=np.concatenate([[0], *offsets]).astype(np.int64),
        size_hw=parts[0].size_hw,
    )


def run_areas(runs: Runs) -> Int64Array:
    """The number of pixels inside each mask, int64 (N,)."""
    totals = np.concatenate([[0], np.cumsum(np.where(_is_inside(runs), runs.lengths, 0))])
    return np.diff(totals[runs.offsets])


def run_bboxes_xywh(runs: Runs) -> npt.NDArray[np.float32]:
    """The tight box (x, y, width, height) of each mask in pixels, float32 (N, 4); zeros for an empty mask."""
    height, width = runs.size_hw
    boxes = np.zeros((len(runs), 4), dtype=np.float32)
    inside = np.flatnonzero(_is_inside(runs) & (runs.lengths > 0))
    if len(inside) == 0:
        return boxes
    end = np.cumsum(runs.lengths)[inside]
    mask_index = (end - 1) // (height * width)
    end -= mask_index * (height * width)
    start_x, start_y = np.divmod(end - runs.lengths[inside], height)
    last_x, last_y = np.divmod(end - 1, height)
    # A run that goes on into the next column touches both bottom and top.
    wraps = start_x != last_x
    start_y[wraps], last_y[wraps] = 0, height - 1
    first = np.flatnonzero(np.diff(mask_index, prepend=-1))
    x1, x2 = np.minimum.reduceat(start_x, first), np.maximum.reduceat(last_x, first)
    y1, y2 = np.minimum.reduceat(start_y, first), np.maximum.reduceat(last_y, first)
    boxes[mask_index[first]] = np.stack([x1, y1, x2 - x1 + 1, y2 - y1 + 1], axis=1)
    return boxes


def compress(runs: Runs) -> tuple[str, ...]:
    """The COCO compressed string of each mask: ASCII, equal to pycocotools' byte for byte."""
    return counts_text(runs.lengths, runs.offsets)


def encode_masks(masks_NHW: torch.Tensor) -> tuple[str, ...]:
    """The COCO compressed strings of dense masks, bool (N, H, W), found on the tensor's device."""
    return compress(runs_from_masks(masks_NHW))


def decompress(counts: Sequence[str], size_hw: tuple[int, int]) -> Runs:
    """The runs of N compressed strings of one size, each checked: the inverse of `compress`.

    Raises:
        ValueError: a string that is not the runs of a mask of `size_hw`; see `counts.read_lengths`.
    """
    found = read_lengths(counts, size_hw[0] * size_hw[1])
    for index, fault in found.faults.items():
        raise ValueError(
            f"RLE string {index} is no mask of height {size_hw[0]} and width {size_hw[1]}: {fault}; it is "
            f"{counts[index][:40]!a} of length {len(counts[index])}"
        )
    offsets = np.cumsum([0, *np.bincount(found.mask, minlength=len(counts))])
    return Runs(lengths=found.lengths, offsets=offsets, size_hw=size_hw)


def decode_rle(counts: str, size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The mask of a compressed string, uint8 (H, W), 1 inside. Errors as `decompress`."""
    return cast("npt.NDArray[np.uint8]", coco_mask.decode(_checked([counts], size_hw)[0]))


def rle_area(counts: Sequence[str], size_hw: tuple[int, int]) -> Int64Array:
    """The pixels inside each of N masks of one size, int64 (N,). Errors as `decompress`."""
    # One at a time: pycocotools 2.0.11 overflows on a list of 256 masks and more (with numpy 2).
    return np.array([int(coco_mask.area(mask)) for mask in _checked(counts, size_hw)], dtype=np.int64)


def rle_bbox_xywh(counts: Sequence[str], size_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The tight box (x, y, width, height) of each of N masks, float32 (N, 4); zeros for an empty mask.

    Errors as `decompress`.
    """
    return np.asarray(coco_mask.toBbox(_checked(counts, size_hw)), dtype=np.float32).reshape(-1, 4)


def rle_iou(
    counts_a: Sequence[str], counts_b: Sequence[str], size_hw: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Intersection over union of each of A masks with each of B masks of one size, float64 (A, B).

    Two empty masks give 0. Errors as `decompress`.
    """
    masks_a, masks_b = _checked(counts_a, size_hw), _checked(counts_b, size_hw)
    if not masks_a or not masks_b:
        return np.zeros((len(masks_a), len(masks_b)))
    return np.asarray(coco_mask.iou(masks_a, masks_b, [0] * len(masks_b)), dtype=np.float64)


def _checked(counts: Sequence[str], size_hw: tuple[int, int]) -> list[dict[str, Any]]:
    decompress(counts, size_hw)
    return [{"size": list(size_hw), "counts": text.encode("ascii")} for text in counts]


def _is_inside(runs: Runs) -> npt.NDArray[np.bool_]:
    """Whether each run lies inside its mask: every second one, beginning with the second; bool (R,)."""
    inside = np.zeros(len(runs.lengths), dtype=np.bool_)
    inside[1::2] = True
    inside ^= np.repeat(runs.offsets[:-1] % 2 == 1, np.diff(runs.offsets))
    return inside
