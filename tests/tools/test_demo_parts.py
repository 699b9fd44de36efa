"""Scenes whose objects have several surfaces, and what the material's pictures are used for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo_model.cache import UNKNOWN, SceneCache, fill
from tools.demo_model.cutouts import cutout_scene, innermost
from tools.demo_model.parts import SPLITS, parts_paint, split
from tools.demo_model.photographs import Material
from tools.demo_model.scenes import make_rich_scene, make_scene
from tools.demo_model.shapes import SHAPES

SEEDS = range(12)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Two photographs of noise, and three red discs whose transparent surroundings are blue."""
    folder, rng = tmp_path_factory.mktemp("material"), np.random.default_rng(0)
    for part in ("photographs", "cutouts"):
        (folder / part).mkdir()
    for index in range(2):
        pixels = rng.integers(0, 256, (90 + 30 * index, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{index}.jpg")
    rows, columns = np.ogrid[:80, :100]
    disc = ((rows - 40) / 40) ** 2 + ((columns - 50) / 40) ** 2 <= 1
    rgba = np.where(disc[..., None], [200, 0, 0, 255], [0, 0, 255, 0]).astype(np.uint8)
    for index in range(3):
        Image.fromarray(rgba).save(folder / "cutouts" / f"disc-{index}.png")
    return folder


def silhouette(seed: int) -> np.ndarray:
    return SHAPES["blob"][0](np.random.default_rng(seed), 60, 50)


@pytest.mark.parametrize("kind", [kind for kind, _ in SPLITS])
def test_every_split_leaves_parts_that_can_be_seen(kind) -> None:
    sizes = []
    for seed in range(20):
        coverage = silhouette(seed)
        parts = kind(np.random.default_rng(seed), coverage, 2)
        assert parts.shape == coverage.shape
        shares = np.bincount(parts[coverage > 127], minlength=2) / (coverage > 127).sum()
        assert len(shares) == 2
        sizes.append(shares.min())
    assert np.median(sizes) > 0.04


def test_an_object_has_two_to_four_parts() -> None:
    counts = [len(np.unique(split(np.random.default_rng(seed), silhouette(seed)))) for seed in range(80)]
    assert max(counts) == 4
    assert np.mean([count >= 2 for count in counts]) > 0.9


def test_edges_inside_are_often_stronger_than_the_one_around() -> None:
    """In the mean colours of the parts: one is near the background's, and another is far from that one."""
    ground = np.full((50, 60, 3), 120, dtype=np.float32)
    found = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        coverage = silhouette(seed)
        painted = parts_paint(rng, coverage, ground)
        parts = split(np.random.default_rng(seed), coverage)  # the same draws come first in parts_paint
        means = np.stack(
            [painted[(parts == part) & (coverage > 127)].mean(0) for part in np.unique(parts[coverage > 127])]
        )
        outer = np.abs(means - 120).mean(1).min()
        inner = max((np.abs(one - other).mean() for one in means for other in means), default=0.0)
        found.append(outer < 20 and inner > 2 * outer)
    assert np.mean(found) > 0.35


def test_a_rich_scene_is_a_function_of_its_seed_and_of_the_pictures(material) -> None:
    for seed in SEEDS:
        one, other = (make_rich_scene(seed, 128, Material(material)) for _ in range(2))
        assert np.array_equal(one.pixels_hwc, other.pixels_hwc)
        assert np.array_equal(one.label_map_hw, other.label_map_hw)
        assert one.masks().sum(0).max() == 1


def test_scenes_stand_on_photographs_and_hold_cut_outs_only_where_there_are_some(material) -> None:
    painted = [make_rich_scene(seed, 96) for seed in SEEDS]
    assert all(scene.known_ground for scene in painted)
    assert not any("cutout" in scene.kinds for scene in painted)
    mixed = [make_rich_scene(seed, 96, Material(material)) for seed in SEEDS]
    assert {scene.known_ground for scene in mixed} == {True, False}
    assert any("cutout" in scene.kinds for scene in mixed)


def test_a_cut_out_brings_no_colour_of_its_surroundings(material) -> None:
    coverage, paint = Material(material).cutout(np.random.default_rng(0), 40, 30)
    assert paint[coverage > 0].max(0)[2] <= 8


def test_a_rich_cache_marks_photographs_and_keeps_plain_scenes(tmp_path, material) -> None:
    fill(tmp_path, side=64, count=12, first_seed=0, rich=True, material=Material(material))
    cache = SceneCache(tmp_path)
    plain = make_scene(4, 64)
    assert np.array_equal(cache[4][0], plain.pixels_hwc)
    marked = 0
    for index in range(12):
        rich = index % 4 and not make_rich_scene(index, 64, Material(material)).known_ground
        labels = cache[index][1]
        assert (labels == UNKNOWN).any() == bool(rich)
        assert not (rich and (labels == 0).any())
        marked += bool(rich)
    assert marked


def test_a_held_out_picture_has_its_cut_out_whole_and_each_once(material) -> None:
    pictures = set()
    for index in range(3):
        scene, boxes = cutout_scene(material, index, 96)
        again, _ = cutout_scene(material, index, 96)
        assert np.array_equal(scene.pixels_hwc, again.pixels_hwc)
        mask = scene.masks()[0]
        (x1, y1, x2, y2) = scene.boxes_xyxy[0].astype(int)
        assert mask.sum() == mask[y1:y2, x1:x2].sum() > 0.6 * (y2 - y1) * (x2 - x1)
        assert (scene.pixels_hwc[mask][:, 2] < 30).mean() > 0.9
        assert np.abs(boxes - scene.boxes_xyxy).max() <= 0.08 * max(x2 - x1, y2 - y1)
        pictures.add(scene.pixels_hwc.tobytes())
    assert len(pictures) == 3
    with pytest.raises(ValueError, match="has 3 cut-outs; there is no number 3"):
        cutout_scene(material, 3, 96)


def test_the_innermost_pixel_lies_on_a_ring_too() -> None:
    rows, columns = np.ogrid[:60, :60]
    radius = np.hypot(rows - 30, columns - 30)
    ring = (radius > 12) & (radius < 28)
    x, y = innermost(ring)
    assert ring[y, x]
    assert np.abs(np.array(innermost(radius < 28)) - 30).max() <= 2


def test_an_empty_folder_of_photographs_is_refused(tmp_path) -> None:
    (tmp_path / "photographs").mkdir()
    with pytest.raises(ValueError, match="wanted at least one JPEG or PNG"):
        Material(tmp_path)
