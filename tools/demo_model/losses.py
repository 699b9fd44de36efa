"""What the demo training minimises. Logits and targets are (N, H, W); targets are shares of a cell, 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tools.demo_model.cache import UNKNOWN

NEAR_BOX = 0.15  # of the box's side, on each side of it: what counts as near
OUTSIDE_WEIGHT = 0.3


def near_box(boxes_N4: torch.Tensor, *, cells: int, side: int) -> torch.Tensor:
    """1 where a cell of the `cells` x `cells` grid over `side` pixels lies in or near the box, else 0."""
    centres = (torch.arange(cells, device=boxes_N4.device) + 0.5) * (side / cells)
    margin = (boxes_N4[:, 2:] - boxes_N4[:, :2]) * NEAR_BOX + side / cells
    low, high = boxes_N4[:, :2] - margin, boxes_N4[:, 2:] + margin
    inside = (centres[None, None] >= low[..., None]) & (centres[None, None] <= high[..., None])
    return (inside[:, 1, :, None] & inside[:, 0, None, :]).float()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Per object (N,): mean over the cells near the box, and a share of the mean over the others.

    Small objects weigh as much as large ones, and the easy background does not drown the edge.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    inner = (loss * near).sum((-1, -2)) / near.sum((-1, -2))
    far = 1 - near
    return inner + OUTSIDE_WEIGHT * (loss * far).sum((-1, -2)) / far.sum((-1, -2)).clamp(min=1)


def dice(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per object (N,): 1 - the soft Dice coefficient."""
    inside = logits.sigmoid()
    both = (inside * targets).sum((-1, -2))
    return 1 - (2 * both + 1) / (inside.sum((-1, -2)) + targets.sum((-1, -2)) + 1)


def iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per object (N,): intersection over union of the two after thresholding; no gradient."""
    predicted, wanted = logits.detach() > 0, targets > 0.5
    both = (predicted & wanted).sum((-1, -2)).float()
    return both / (predicted | wanted).sum((-1, -2)).clamp(min=1)


def step_one(
    logits_NMHW: torch.Tensor, predicted_iou_NM: torch.Tensor, targets: torch.Tensor, near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the SAM part, and the true IoU of mask 0 per object.

    Mask 0 answers for the box. Of the alternatives 1 to 3 only the best is taught, lightly, as in SAM.
    """
    main = cross_entropy(logits_NMHW[:, 0], targets, near) + dice(logits_NMHW[:, 0], targets)
    spread = targets[:, None].expand(-1, 3, -1, -1), near[:, None].expand(-1, 3, -1, -1)
    others = cross_entropy(logits_NMHW[:, 1:], *spread) + dice(logits_NMHW[:, 1:], spread[0])
    true_iou = iou(logits_NMHW, targets[:, None].expand_as(logits_NMHW))
    score = (predicted_iou_NM - true_iou).square()
    total = main.mean() + 0.1 * others.min(1).values.mean() + score[:, 0].mean() + 0.1 * score[:, 1:].mean()
    return total, true_iou[:, 0]


def step_two(
    logits: torch.Tensor, targets: torch.Tensor, near: torch.Tensor, *, edge_weight: float = 4.0
) -> torch.Tensor:
    """The loss of the HQ part: cells within two of the edge weigh `edge_weight` times as much again."""
    widest = F.max_pool2d(targets[:, None], 5, 1, 2)[:, 0]
    narrowest = -F.max_pool2d(-targets[:, None], 5, 1, 2)[:, 0]
    weights = near * (1 + edge_weight * (widest - narrowest))
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    inner = (loss * weights).sum((-1, -2)) / weights.sum((-1, -2))
    outer = (loss * (1 - near)).sum((-1, -2)) / (1 - near).sum((-1, -2)).clamp(min=1)
    return (inner + OUTSIDE_WEIGHT * outer + dice(logits, targets)).mean()


def fine_affinity(vectors_BFHW: torch.Tensor, labels_BHW: torch.Tensor) -> torch.Tensor:
    """As `affinity`, between cells of 4 pixels 1, 2 and 4 cells apart, down and across.

    It keeps edges finer than a patch in the early feature, which the HQ branch reads.
    """
    unit = F.normalize(vectors_BFHW, dim=1)
    losses = []
    for step in (1, 2, 4):
        for axis in (-2, -1):
            length = unit.shape[axis] - step
            near, far = unit.narrow(axis, 0, length), unit.narrow(axis, step, length)
            pair = labels_BHW.narrow(axis, 0, length), labels_BHW.narrow(axis, step, length)
            losses.append(_pairs(8 * (near * far).sum(1) - 4, *pair))
    return torch.stack(losses).mean()


def _pairs(logits: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "the same thing" in which both answers weigh the same, picture by picture.

    Two places that both show a photograph are left out: nobody said what is on it.
    """
    same, known = (one == other).float(), ((one != UNKNOWN) | (other != UNKNOWN)).float()
    loss = F.binary_cross_entropy_with_logits(logits, same, reduction="none")
    count = known.sum((1, 2), keepdim=True).clamp(min=1)
    share = ((same * known).sum((1, 2), keepdim=True) / count).clamp(0.02, 0.98)
    weighed = loss * known * (same / share + (1 - same) / (1 - share))
    return (weighed.sum((1, 2), keepdim=True) / count).mean() / 2


def affinity(vectors_BLC: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """How badly the likeness of two cells' vectors tells whether they show the same thing.

    Both answers weigh the same. It teaches the encoder objects before the decoder can; it is dropped after
    training.
    """
    unit = F.normalize(vectors_BLC, dim=-1)
    likeness = 8 * (unit @ unit.transpose(1, 2)) - 4
    return _pairs(likeness, labels_BL[:, :, None], labels_BL[:, None])
