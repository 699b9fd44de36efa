"""The points and the crops of "segment everything": settings, and what follows from them.

As `SamAutomaticMaskGenerator` of Segment Anything has them. NumPy alone: CPU workers import this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from hqlabel.model.records import Fit, fit_image

Float64Array = npt.NDArray[np.float64]
Box = tuple[int, int, int, int]

MAX_POINTS = 20_000
"""Of all crops of an image together: bounds the masks that it can have."""


@dataclass(frozen=True, kw_only=True)
class PointGrid:
    """Which points are asked, and which of their masks stay.

    `points_per_side`: in the whole image. `crop_layers`: layer n cuts the image into 2^n x 2^n crops, each
    with a grid of its own, `points_per_side / points_downscale ** n` a side. `crop_overlap`: of the crops of
    layer 1, as a share of the short side; half of it in each further layer. `pred_iou`, `stability`: lowest
    scores; None is the default of the model's family. `box_nms`, `crop_nms`: IoU of boxes over which the mask
    with the lower score goes, within a crop, and that of the larger crop, between crops. `min_region_area`:
    separate parts and holes of fewer pixels are removed; 0 leaves them.
    """

    points_per_side: int = 32
    crop_layers: int = 0
    crop_overlap: float = 512 / 1500
    points_downscale: int = 1
    pred_iou: float | None = None
    stability: float = 0.95
    stability_offset: float = 1.0
    box_nms: float = 0.7
    crop_nms: float = 0.7
    min_region_area: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of its range; names it."""
        lowest = {"points_per_side": 1, "crop_layers": 0, "points_downscale": 1, "min_region_area": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}; wanted a whole number from {low}")
        shares = {"crop_overlap": self.crop_overlap, "stability": self.stability}
        shares |= {"box_nms": self.box_nms, "crop_nms": self.crop_nms}
        if self.pred_iou is not None:
            shares["pred_iou"] = self.pred_iou
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share!r}; wanted a number from 0 to 1")
        if self.crop_overlap == 1:
            raise ValueError("crop_overlap is 1; wanted less, or crops would be the whole image")
        if not 0 < self.stability_offset < math.inf:
            raise ValueError(f"stability_offset is {self.stability_offset!r}; wanted a finite number over 0")
        if self.crop_layers > 5 or self.num_points > MAX_POINTS:
            raise ValueError(
                f"{self.points_per_side} points a side and {self.crop_layers} crop layers are "
                f"{self.num_points:,} points an image; wanted {MAX_POINTS:,} at most and 5 layers: take "
                "fewer points, or a points_downscale of 2"
            )

    def side_of_layer(self, layer: int) -> int:
        """Return the points a side of a crop of this layer; 0 where downscaling leaves none."""
        return int(self.points_per_side / self.points_downscale**layer)

    @property
    def num_points(self) -> int:
        """The points of one image, in all crops."""
        layers = range(min(self.crop_layers, 16) + 1)
        return sum(4**layer * self.side_of_layer(layer) ** 2 for layer in layers)

    def points_xy(self, layer: int, box: Box) -> Float64Array:
        """Return the points of a crop, row by row, (n, 2), in pixels of the crop."""
        side = self.side_of_layer(layer)
        steps = np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side) if side else np.zeros(0)
        x, y = np.meshgrid(steps, steps)
        return np.stack([x, y], axis=-1).reshape(-1, 2) * [box[2] - box[0], box[3] - box[1]]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A part of an image, resized once to the model's input side.

    `image_hw`: the upright size of the image. `box_xyxy`: in its pixels. `layer`: 0 is the whole image.
    """

    pixels_hwc: npt.NDArray[np.uint8]
    image_hw: tuple[int, int]
    box_xyxy: Box
    layer: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Its size in upright pixels."""
        x1, y1, x2, y2 = self.box_xyxy
        return y2 - y1, x2 - x1


def crop_boxes(size_hw: tuple[int, int], grid: PointGrid) -> list[tuple[int, Box]]:
    """Return layer and box of every crop: the whole image, then layer by layer, column by column."""
    height, width = size_hw
    crops: list[tuple[int, Box]] = [(0, (0, 0, width, height))]
    for layer in range(1, grid.crop_layers + 1):
        count = 2**layer
        overlap = int(grid.crop_overlap * min(size_hw) * (2 / count))
        crop_h, crop_w = (math.ceil((overlap * (count - 1) + side) / count) for side in size_hw)
        for i, j in product(range(count), repeat=2):
            x, y = i * (crop_w - overlap), j * (crop_h - overlap)
            box = (x, y, min(x + crop_w, width), min(y + crop_h, height))
            # An image of a few pixels: the last crops of a layer would be empty.
            if x < width and y < height:
                crops.append((layer, box))
    return crops


def cut_crops(image_hwc: npt.NDArray[np.uint8], grid: PointGrid, *, side: int, fit: Fit) -> tuple[Crop, ...]:
    """Return the crops of an upright uint8 RGB image, each resized from its own pixels.

    Raises:
        ValueError: as `fit_image`.
    """
    size_hw = (image_hwc.shape[0], image_hwc.shape[1])
    return tuple(
        Crop(
            pixels_hwc=fit_image(image_hwc[y1:y2, x1:x2], side, fit),
            image_hw=size_hw,
            box_xyxy=(x1, y1, x2, y2),
            layer=layer,
        )
        for layer, (x1, y1, x2, y2) in crop_boxes(size_hw, grid)
    )
