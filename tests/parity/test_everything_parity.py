"""Everything in a picture: the masks of the original's `SamAutomaticMaskGenerator`, with the same weights."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hqlabel.model.checkpoints import DEMO_FOLDER, load
from hqlabel.model.everything.everything import EverythingSegmenter
from hqlabel.model.everything.point_grid import PointGrid, cut_crops
from hqlabel.model.records import CallShape
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.segmenter import Segmenter
from tests.parity.lively import SMALL_VITS, lively
from tests.parity.oracle import original_of
from tests.parity.stand_ins import connected_components_with_stats, import_original

FOLDER = Path(__file__).parents[2] / "examples" / "photos"
PHOTOS = ("cat.jpg", "coffee.jpg", "astronaut.jpg")
LIVELY = {"pred_iou": 0.65, "stability": 0.88, "stability_offset": 0.1}
SCORES = 1e-5
NEAR_ZERO_PIXELS = 3  # whose logit is within 1e-4 of 0


@pytest.fixture(scope="module")
def lively_model():
    """Its masks are noise over the whole picture."""
    return lively(SMALL_VITS["grid16-window5"], seed=3)


@pytest.fixture(scope="module")
def demo():
    """Its masks are of things, so boxes differ, and crops cut some."""
    return load(DEMO_FOLDER).model


@pytest.fixture
def opencv(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "cv2", SimpleNamespace(connectedComponentsWithStats=connected_components_with_stats)
    )


def picture(name, longest=None):
    image = Image.open(FOLDER / name).convert("RGB")
    if longest:
        image.thumbnail((longest, longest))
    return np.array(image)


def originals(model, image, grid):
    generator = import_original().SamAutomaticMaskGenerator(
        original_of(model),
        points_per_side=grid.points_per_side,
        pred_iou_thresh=0.88 if grid.pred_iou is None else grid.pred_iou,
        stability_score_thresh=grid.stability,
        stability_score_offset=grid.stability_offset,
        box_nms_thresh=grid.box_nms,
        crop_n_layers=grid.crop_layers,
        crop_nms_thresh=grid.crop_nms,
        crop_overlap_ratio=grid.crop_overlap,
        crop_n_points_downscale_factor=grid.points_downscale,
        min_mask_region_area=grid.min_region_area,
    )
    return generator.generate(image)


def ours(model, images, grid, **shape):
    segmenter = EverythingSegmenter(Segmenter(model, call_shape=CallShape(**shape)), grid)
    return segmenter.segment(
        [cut_crops(image, grid, side=model.config.image_size, fit=model.fit) for image in images]
    )


def compare(answer, reference):
    """The same masks: each of one side has its own on the other, with its point, crop, box and scores."""
    one = answer.instances
    places = {}
    for i in range(len(one.counts)):
        places[(*answer.points_xy[i].round(3).tolist(), *answer.crops_xyxy[i].tolist())] = i
    assert len(places) == len(one.counts)
    assert len(reference) == len(one.counts)
    for mask in reference:
        x, y, width, height = mask["crop_box"]
        i = places.pop((*np.round(mask["point_coords"][0], 3).tolist(), x, y, x + width, y + height))
        assert abs(one.predicted_iou[i] - mask["predicted_iou"]) <= SCORES
        assert abs(one.stability_score[i] - mask["stability_score"]) <= SCORES
        pixels = rle_to_mask(one.counts[i], one.size_hw)
        assert int((pixels != mask["segmentation"]).sum()) <= NEAR_ZERO_PIXELS
        assert one.area[i] == pixels.sum()
        left, top, boxw, boxh = one.bbox_xywh[i].tolist()
        assert np.abs(np.array([left, top, boxw - 1, boxh - 1]) - mask["bbox"]).max() <= 1


def test_random_weights_give_the_originals_masks(lively_model):
    """No box is dropped for another, so every mask that passes the thresholds is compared."""
    grid, image = PointGrid(points_per_side=8, box_nms=1.0, **LIVELY), picture("cat.jpg", 160)
    (answer,) = ours(lively_model, [image], grid, boxes_per_call=5)

    assert 20 < len(answer.instances.counts) < 60  # each threshold drops some
    compare(answer, originals(lively_model, image, grid))


@pytest.mark.parametrize("min_region_area", [0, 15])
def test_duplicates_go_as_with_the_original(lively_model, opencv, min_region_area):
    grid = PointGrid(points_per_side=8, box_nms=0.98, min_region_area=min_region_area, **LIVELY)
    image = picture("coffee.jpg", 130)
    (answer,) = ours(lively_model, [image], grid, boxes_per_call=5)

    assert answer.instances.counts
    compare(answer, originals(lively_model, image, grid))


def test_crops_give_the_originals_masks(demo, opencv):
    grid = PointGrid(
        points_per_side=4, crop_layers=1, pred_iou=0.3, stability=0.3, stability_offset=0.1, min_region_area=9
    )
    image = picture("coins.png", 160)
    (answer,) = ours(demo, [image], grid, boxes_per_call=3)

    assert len(np.unique(answer.crops_xyxy, axis=0)) > 1
    compare(answer, originals(demo, image, grid))


def test_pictures_that_share_calls_give_the_masks_they_give_alone(lively_model):
    grid = PointGrid(points_per_side=3, crop_layers=1, pred_iou=0.0, stability=0.0, box_nms=1.0)
    images = [picture(name, 90) for name in PHOTOS]
    alone = [ours(lively_model, [image], grid, images_per_call=2, boxes_per_call=4)[0] for image in images]
    for one, together in zip(
        alone, ours(lively_model, images, grid, images_per_call=2, boxes_per_call=4), strict=True
    ):
        assert one.instances.counts
        assert one.instances.counts == together.instances.counts
        np.testing.assert_array_equal(one.instances.predicted_iou, together.instances.predicted_iou)
