import numpy as np
import pytest

from tools.demo_model.cache import HELD_OUT_FIRST_SEED, SceneCache, fill
from tools.demo_model.scenes import MIN_AREA_FRACTION, jitter_boxes, make_scene
from tools.demo_model.shapes import SHAPES

SEEDS = range(12)


@pytest.mark.parametrize("side", [128, 256])
def test_the_same_seed_paints_the_same_scene(side: int) -> None:
    for seed in SEEDS:
        one, other = make_scene(seed, side), make_scene(seed, side)
        assert np.array_equal(one.pixels_hwc, other.pixels_hwc)
        assert np.array_equal(one.label_map_hw, other.label_map_hw)


def test_other_seeds_paint_other_scenes() -> None:
    pictures = {make_scene(seed, 128).pixels_hwc.tobytes() for seed in SEEDS}
    assert len(pictures) == len(SEEDS)


def test_the_long_side_is_as_asked_and_pictures_are_not_all_square() -> None:
    sizes = [make_scene(seed, 128).label_map_hw.shape for seed in SEEDS]
    assert {max(size) for size in sizes} == {128}
    assert any(height < width for height, width in sizes)
    assert any(height > width for height, width in sizes)


def test_masks_are_disjoint_and_large_enough_to_ask_for() -> None:
    for seed in SEEDS:
        masks = make_scene(seed, 256).masks()
        assert masks.sum(0).max() == 1
        assert (masks.sum((1, 2)) >= MIN_AREA_FRACTION * masks[0].size).all()


def test_a_box_without_jitter_is_the_tight_box_of_the_visible_mask() -> None:
    for seed in SEEDS:
        scene = make_scene(seed, 256)
        for mask, (x1, y1, x2, y2) in zip(scene.masks(), scene.boxes_xyxy.astype(int), strict=True):
            assert not np.delete(mask, np.s_[y1:y2], axis=0).any()
            assert not np.delete(mask, np.s_[x1:x2], axis=1).any()
            inside = mask[y1:y2, x1:x2]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_jitter_moves_no_edge_by_more_than_seven_percent_and_stays_in_the_picture() -> None:
    boxes = np.tile(np.array([[10.0, 20.0, 110.0, 70.0]], dtype=np.float32), (500, 1))
    jittered = jitter_boxes(np.random.default_rng(0), boxes, (200, 300))
    moved = np.abs(jittered - boxes) / [100, 50, 100, 50]
    assert 0.05 < moved.max() <= 0.07 + 1e-6
    clipped = jitter_boxes(np.random.default_rng(0), np.array([[0.0, 0.0, 300.0, 200.0]]), (200, 300))
    assert (clipped >= 0).all()
    assert (clipped <= [300, 200, 300, 200]).all()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_paints_something_and_leaves_something(name: str) -> None:
    draw = SHAPES[name][0]
    for seed in range(20):
        coverage = draw(np.random.default_rng(seed), 60, 40)
        assert coverage.shape == (40, 60)
        assert coverage.dtype == np.uint8
        assert 0.02 < (coverage > 127).mean() < 1


def test_a_cache_holds_the_scenes_it_was_asked_for_and_goes_on_where_it_stopped(tmp_path) -> None:
    fill(tmp_path, side=64, count=3, first_seed=5)
    (tmp_path / "ready.txt").write_text("2")
    assert len(SceneCache(tmp_path)) == 2
    fill(tmp_path, side=64, count=3, first_seed=5)
    cache = SceneCache(tmp_path)
    assert len(cache) == 3
    for index in range(3):
        scene = make_scene(5 + index, 64)
        pixels, labels = cache[index]
        assert np.array_equal(pixels, scene.pixels_hwc)
        assert np.array_equal(labels, scene.label_map_hw)


def test_a_cache_refuses_held_out_seeds(tmp_path) -> None:
    with pytest.raises(ValueError, match="held-out"):
        fill(tmp_path, side=64, count=2, first_seed=HELD_OUT_FIRST_SEED - 1)
