"""`hqlabel bench`: each part gives the figures it names, and its two sides do the same work."""

from __future__ import annotations

import json
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.command import bench, bench_chain, bench_model, bench_stub
from benchmarks.command.bench_inputs import boxes_of, write_boxes, write_pictures
from jobs.config import load_config
from jobs.terminal.signals import Interrupts
from model.config import PUBLISHED
from model.records import CallShape, PreparedImage, Prompts
from pipeline.errors import UsageError
from pipeline.images.decode import decode_image
from tests.e2e import commands

SIZE_HW = (60, 80)


def test_the_model_part_names_every_shape_it_measured(checkpoint: Path) -> None:
    done = commands.run("bench", "model", "--quick", "--json", "--checkpoint", str(checkpoint))

    said = json.loads(done.stdout)
    figures = said["parts"]["model"]["figures"]
    assert {(row["boxes"], row["boxes_per_call"]) for row in figures} == {(1, 4), (1, 16), (10, 4), (10, 16)}
    assert all(row["ms_per_image"] > 0 and 0 < row["of_peak"] < 1 for row in figures)
    assert "torch" in said["machine"]


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

    of_picture = bench_model.flops(config, 0)

    assert encoder < of_picture < 1.04 * encoder, "the rest: position terms, HQ features, what prompts share"
    assert bench_model.flops(config, 10) == of_picture + 10 * (bench_model.flops(config, 1) - of_picture)
    assert 5.0e9 < bench_model.flops(config, 1) - of_picture < 5.4e9, "8.5e9 before it was shortened"


@pytest.mark.faults
def test_the_planning_part_starts_what_is_left_of_a_job() -> None:
    done = commands.run("bench", "planning", "--rows", "2000", "--json")

    part = json.loads(done.stdout)["parts"]["planning"]
    steps = {row["step"]: row for row in part["figures"]}
    assert part["title"] == "2,000 images, 32 units, 4 of them left"
    assert steps["resume: the first unit is committed"]["seconds"] > 0
    assert all(row["peak_mb"] > 50 for row in part["figures"])


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (bench.How(parts=("speed",)), "no part 'speed'; wanted some of model, pipeline, job, planning"),
        (bench.How(variants=("vit_x",)), "no variant 'vit_x'; wanted some of .*vit_b"),
    ],
)
def test_what_there_is_not_is_a_usage_error(how: bench.How, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        bench.run(load_config(None), how, Interrupts())


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

    assert bench_chain.loop_of_pillow(str(path), side=256) == decoded.pixels_hwc.nbytes == 256 * 192 * 3


def test_the_stub_answers_with_the_boxes() -> None:
    boxes = np.array([[2, 3, 10, 9], [0, 0, 80, 60]], np.float32)
    image = PreparedImage(
        pixels_hwc=np.zeros((60, 80, 3), np.uint8), size_hw=SIZE_HW, prompts=Prompts(boxes_xyxy=boxes)
    )

    (found,) = bench_stub.BoxModel(call_shape=CallShape()).segment_prepared([image])

    masks = coco_mask.decode([{"size": list(SIZE_HW), "counts": text} for text in found.counts])
    assert masks.sum((0, 1)).tolist() == found.area.tolist() == [48, 4800]
    assert masks[3:9, 2:10, 0].all()


def test_a_rate_is_of_the_loop_alone(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 6, SIZE_HW)

    rate = bench_chain.loop_rate(partial(bench_chain.loop_of_pillow, side=64), paths, processes=1)

    assert rate > 0
    assert not multiprocessing.active_children()
