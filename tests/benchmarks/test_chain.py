"""The benchmarks of chain, model and resumed job: figures by name, and two sides that do the same work."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import arithmetic, call_shapes, chain
from benchmarks.made_inputs import boxes_of, write_boxes, write_pictures
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.model.sam_config import PUBLISHED
from hqlabel.pipeline.images.decode_upright import decode_image
from tests.e2e.scenes import small_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZE_HW = (60, 80)


def test_the_shapes_that_are_measured_have_their_figures(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "small")
    config = ConfigSources(flags={"model.checkpoint": str(checkpoint)}).load()

    title, figures = call_shapes.measure(config, quick=True, variants=[])

    assert title.startswith("the model alone on cpu")
    assert {(row["boxes"], row["boxes_per_call"]) for row in figures} == {(1, 4), (1, 16), (10, 4), (10, 16)}
    assert all(row["ms_per_image"] > 0 and 0 < row["of_peak"] < 1 for row in figures)


def test_operations_are_those_of_the_definition() -> None:
    """ViT-B by hand: patches; twelve blocks; attention over the grid (4) and in windows (8); neck."""
    config = PUBLISHED["vit_b"]
    tokens, width, padded = 64 * 64, 768, 25 * 14 * 14
    patches = tokens * width * 16 * 16 * 3
    products = 12 * tokens * width * width * 12 - 8 * 4 * tokens * width * width
    windows = 8 * padded * width * width * 4
    attention = 2 * width * (4 * tokens * tokens + 8 * padded * 14 * 14)
    neck = tokens * (width * 256 + 9 * 256 * 256)
    encoder = 2 * (patches + products + windows + attention + neck)

    of_picture = arithmetic.flops(config, 0)

    assert encoder < of_picture < 1.04 * encoder, "the rest: position terms, HQ features, what prompts share"
    assert arithmetic.flops(config, 10) == of_picture + 10 * (arithmetic.flops(config, 1) - of_picture)
    assert 5.0e9 < arithmetic.flops(config, 1) - of_picture < 5.4e9, "8.5e9 before it was shortened"


@pytest.mark.faults
def test_what_is_left_of_a_job_is_started() -> None:
    program = [sys.executable, "-m", "benchmarks.resume", "--rows", "2000"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("2,000 images, 32 units, 4 of them left\n")
    assert "resume: the first unit is committed" in done.stdout


def test_pictures_and_boxes_are_the_same_each_time_and_fit(tmp_path: Path) -> None:
    one, other = (write_pictures(tmp_path / name, 10, SIZE_HW) for name in ("a", "b"))

    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]
    assert len({p.read_bytes() for p in one}) == 8
    with Image.open(one[0]) as picture:
        assert picture.size == (80, 60)
    for number in range(10):
        boxes = boxes_of(number, SIZE_HW)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= (80, 60)).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 5).all()
    assert write_boxes(tmp_path / "a", one, SIZE_HW).exists()


def test_the_bare_loop_makes_the_pixels_that_the_chain_makes(tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1, (600, 800))
    decoded = decode_image(path.read_bytes(), max_pixels=10**6, side=256)

    assert chain.loop_of_pillow(str(path), side=256) == decoded.pixels_hwc.nbytes == 256 * 192 * 3


def test_a_rate_is_of_the_loop_alone(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 6, SIZE_HW)

    rate = chain.loop_rate(partial(chain.loop_of_pillow, side=64), paths, processes=1)

    assert rate > 0
    assert not multiprocessing.active_children()
