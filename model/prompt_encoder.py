"""Prompts of users to the tokens and maps that the mask decoder reads.

First on the host: boxes, points and masks are checked, moved to model pixels (the frame of the S x S input),
grouped by kind and cut into chunks of one size. A decoder call needs prompts of one kind: the same parts, and
the same number of points. Points are never padded to a common number here, since a padding point is a token
like any other and changes the mask. The model moves a chunk when it needs it.

Then `PromptEncoder`, that of Segment Anything (arXiv 2304.02643), which HQ-SAM leaves as it is. All of it is
fp32 whatever the rest of the model runs in: bf16 rounds a corner by up to 2 px, and the positional encoding
by 0.01 rms.

Letters: as in `records.py`; T prompt tokens, C width of the decoder (256).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model.kernels import LayerNorm2d
from hqlabel.model.records import Fit, Prompts, scale_boxes, scale_points, target_size_hw
from hqlabel.model.sam_config import PATCH_SIZE, PromptEncoderConfig

SizeHW = tuple[int, int]

BACKGROUND, FOREGROUND, PADDING = 0, 1, -1
"""Point labels. A padding point has no position: it means "no point here"."""

MASK_CERTAINTY = 0.999
"""Probability that `mask_to_prompt` gives to a pixel inside a user's mask: logits of +-6.9."""


class PositionEmbeddingRandom(nn.Module):
    """Fourier features of positions (arXiv 2006.10739); the Gaussian matrix is part of the weights."""

    positional_encoding_gaussian_matrix: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, xy: torch.Tensor) -> torch.Tensor:
        """Return the positional encoding (..., C) of fp32 positions (..., 2): (x, y), 1 is the input side.

        [sin, cos] of 2 pi (2 xy - 1) G with the Gaussian matrix G. Written as products and one sum, not as a
        matrix product: those may be rounded to TF32 or bf16 by a setting of the caller's.
        """
        matrix = self.positional_encoding_gaussian_matrix
        if xy.dtype != torch.float32 or matrix.dtype != torch.float32:
            raise TypeError(
                f"positions are {xy.dtype} and the positional matrix {matrix.dtype}; both must be "
                "torch.float32 (change the model's dtype with SamHQ.cast, which leaves them alone)"
            )
        c = 2 * xy - 1
        phase = 2 * math.pi * (c[..., :1] * matrix[0] + c[..., 1:] * matrix[1])
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Prompts in model pixels to sparse tokens and a dense map.

    `pad_boxes`: a padding token follows a box too, as the weights of HQ-SAM 2 know it.
    """

    def __init__(self, config: PromptEncoderConfig, *, pad_boxes: bool = False) -> None:
        super().__init__()
        self.pad_boxes = pad_boxes
        width = config.hidden_size
        self.side = config.image_size
        self.grid = config.grid
        self.pe_layer = PositionEmbeddingRandom(width)
        # background, foreground, top-left corner, bottom-right corner
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.no_mask_embed = nn.Embedding(1, width)
        hidden = config.mask_input_channels
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, hidden // 4, 2, 2),
            LayerNorm2d(hidden // 4),
            nn.GELU(),
            nn.Conv2d(hidden // 4, hidden, 2, 2),
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, width, 1),
        )

    @property
    def pe_matrix(self) -> torch.Tensor:
        """The Gaussian matrix (2, C / 2) of the positional encoding, fp32."""
        return self.pe_layer.positional_encoding_gaussian_matrix

    def no_mask(self) -> torch.Tensor:
        """Return the dense map of a prompt without a mask, (1, C, 1, 1): one vector for every cell."""
        return self.no_mask_embed.weight.view(1, -1, 1, 1)

    def image_pe(self) -> torch.Tensor:
        """Return the positional encoding of the cell centres, (1, C, G, G), fp32."""
        cells = torch.arange(self.grid, device=self.pe_matrix.device, dtype=torch.float32)
        centre = (cells + 0.5) / self.grid
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        encoded: torch.Tensor = self.pe_layer(torch.stack([x, y], dim=-1))
        return encoded.permute(2, 0, 1)[None]

    def _kind(self, index: int) -> torch.Tensor:
        return cast(nn.Embedding, self.point_embeddings[index]).weight

    def embed_boxes(self, boxes_N4: torch.Tensor) -> torch.Tensor:
        """Return two tokens a box, (N, 2, C), from fp32 (x1, y1, x2, y2). No padding point, no clipping."""
        corners_N22 = boxes_N4.reshape(-1, 2, 2)
        kind_2C = torch.cat([self._kind(2), self._kind(3)])
        tokens: torch.Tensor = self.pe_layer((corners_N22 + 0.5) / self.side) + kind_2C
        return tokens

    def embed_points(self, points_NP2: torch.Tensor, labels_NP: torch.Tensor, *, pad: bool) -> torch.Tensor:
        """Return one token a point, (N, P, C), and with `pad` one padding token after them, (N, P + 1, C).

        `points_NP2`: fp32 (x, y). `labels_NP`: int64; 1 foreground, 0 background, -1 padding (its
        position is ignored). `pad` is for points without a box: the published weights know no other way.
        """
        if pad:
            points_NP2 = F.pad(points_NP2, (0, 0, 0, 1))
            labels_NP = F.pad(labels_NP, (0, 1), value=PADDING)
        labels_NP1 = labels_NP[..., None]
        kind = torch.where(labels_NP1 == FOREGROUND, self._kind(FOREGROUND), self._kind(BACKGROUND))
        token = self.pe_layer((points_NP2 + 0.5) / self.side) + kind
        return torch.where(labels_NP1 == PADDING, self.not_a_point_embed.weight, token)

    def embed_masks(self, logits_NHW: torch.Tensor) -> torch.Tensor:
        """Return the dense map (N, C, G, G) of fp32 low-resolution logits (N, 4G, 4G)."""
        out: torch.Tensor = self.mask_downscaling(logits_NHW[:, None])
        return out

    def forward(
        self,
        *,
        boxes_N4: torch.Tensor | None = None,
        points_NP2: torch.Tensor | None = None,
        labels_NP: torch.Tensor | None = None,
        masks_NHW: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sparse tokens (N, T, C), points before boxes, and the dense map.

        The map is (N, C, G, G), or (1, C, 1, 1) without masks. A mask alone gives T = 0.

        Raises:
            ValueError: there is none of the three, or points without labels.
        """
        tokens: list[torch.Tensor] = []
        if (points_NP2 is None) != (labels_NP is None):
            raise ValueError("points_NP2 and labels_NP go together; one of them is missing")
        if points_NP2 is not None and labels_NP is not None:
            tokens.append(self.embed_points(points_NP2, labels_NP, pad=boxes_N4 is None))
        if boxes_N4 is not None:
            tokens.append(self.embed_boxes(boxes_N4))
            if self.pad_boxes:
                tokens.append(self.not_a_point_embed.weight.expand(len(boxes_N4), 1, -1))
        if masks_NHW is None:
            if not tokens:
                raise ValueError(
                    "a prompt needs a box, points with labels, or mask logits; it has none of them"
                )
            return torch.cat(tokens, dim=1), self.no_mask()
        if not tokens:
            tokens.append(masks_NHW.new_zeros(len(masks_NHW), 0, self.no_mask_embed.embedding_dim))
        return torch.cat(tokens, dim=1), self.embed_masks(masks_NHW)


# Prompts on the host


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
) -> list[PromptBatch]:
    """Return the prompts of all images, one batch for each kind.

    `mask_size`: side of low-resolution masks, 4G. The order of `place_N` is that of images, then of
    prompts. Images without prompts are in no batch.

    Raises:
        ValueError: as `SamHQ.decode_prompts`.
    """
    counts = [check_prompts(one, mask_size, image=i) for i, one in enumerate(prompts)]
    kinds: dict[tuple[bool, int, bool], list[PromptBatch]] = {}
    start = 0
    for image, count in enumerate(counts):
        if count:
            batch = to_model_frame(
                prompts[image], sizes_hw[image], resized_hw[image], image=image, start=start
            )
            kinds.setdefault(batch.kind(), []).append(batch)
        start += count
    return [concatenate(batches) for batches in kinds.values()]


def box_rows(boxes_xyxy: npt.ArrayLike) -> npt.NDArray[np.generic]:
    """Return boxes as an array; an empty list means (0, 4). Other shapes are kept, to be refused."""
    boxes = np.asarray(boxes_xyxy)
    return np.zeros((0, 4)) if boxes.shape == (0,) else boxes


def parts_of(prompts: Prompts) -> tuple[npt.NDArray[Any] | None, ...]:
    """Return boxes, points, labels and masks as arrays on the host, None where there are none."""
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
    shapes = {
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
    for name, (array, shape, fits) in shapes.items():
        if array is None:
            continue
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{where}: {name} has dtype {array.dtype}; wanted numbers")
        if not fits:
            raise ValueError(f"{where}: {name} has shape {array.shape}; wanted {shape}")
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
        others = sorted(set(np.unique(labels).tolist()) - {BACKGROUND, FOREGROUND, PADDING})
        raise ValueError(
            f"{where}: point labels {others}; wanted 1 (foreground), 0 (background) or -1 (padding)"
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
    mask_hw: npt.NDArray[np.generic], *, side: int, certainty: float = MASK_CERTAINTY, fit: Fit = "pad"
) -> npt.NDArray[np.float32]:
    """Return a user's mask as low-resolution logits (4G, 4G), a row of `Prompts.mask_logits`.

    `mask_hw`: (H, W) in upright pixels; bool, or float as the probability of being inside, in [0, 1].
    `side`, `fit`: the model's input side S = 16 G and the rule by which images come to it.

    The mask is treated as the image is: resized (bilinear, averaging over the footprint) to the size of the
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
    height, width = target_size_hw((mask_hw.shape[0], mask_hw.shape[1]), side, fit)
    resized = F.interpolate(inside[None, None], (height, width), mode="bilinear", antialias=True)
    padded = F.pad(resized, (0, side - width, 0, side - height))
    p = F.avg_pool2d(padded, 4)[0, 0].clamp(1 - certainty, certainty)
    logits: npt.NDArray[np.float32] = torch.log(p / (1 - p)).numpy()
    return logits
