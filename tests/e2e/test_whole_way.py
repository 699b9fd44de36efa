"""Pictures and boxes through `hqlabel label` to the published tables, beside a plain loop."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from hqlabel.model import checkpoints
from hqlabel.model.device import set_cpu_threads
from hqlabel.model.records import CallShape, Instances, PreparedImage, Prompts
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.images.decode_upright import decode_image
from tests.conftest import MotoS3
from tests.e2e import commands
from tests.e2e.scenes import DataSet, write_coco

SHAPE = CallShape(images_per_call=1, boxes_per_call=16)
MASKS = ("--set", "model.dtype=float32", "--set", f"model.boxes_per_call={SHAPE.boxes_per_call}")


def label(data: DataSet, checkpoint: Path, output: str, *extra: str, code: int = 0) -> str:
    """Runs the job over `data`; stderr, for people."""
    inputs = ["--images", str(data.images), "--boxes", str(data.boxes), "--checkpoint", str(checkpoint)]
    return commands.run("label", *inputs, "--output", output, *MASKS, *extra, code=code).stderr


@pytest.fixture(scope="session")
def finished(data_set: DataSet, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one undisturbed job: 60 pictures, one actor, units of 16."""
    output = tmp_path_factory.mktemp("out") / "one"
    label(
        data_set, checkpoint, str(output), "--set", "output.images_per_unit=16", "--set", "cluster.actors=1"
    )
    return output


@pytest.mark.slow
def test_every_image_and_every_box_has_one_row(finished: Path, data_set: DataSet) -> None:
    images, instances = commands.tables(finished)

    assert images["image_id"].to_pylist() == sorted(data_set.boxes_by_id, key=str.encode)
    keys = list(zip(instances["image_id"].to_pylist(), instances["instance_index"].to_pylist(), strict=True))
    assert keys == [(name, i) for name in sorted(data_set.boxes_by_id, key=str.encode)
                    for i in range(len(data_set.boxes_by_id[name]))]  # fmt: skip
    by_status = {row["values"]: row["counts"] for row in images["status"].value_counts().to_pylist()}
    empty = sum(len(boxes) == 0 for boxes in data_set.boxes_by_id.values())
    assert by_status == {"labelled": len(data_set.boxes_by_id) - empty, "no_boxes": empty}


@pytest.mark.slow
def test_masks_equal_a_plain_loop_over_the_segmenter(
    finished: Path, data_set: DataSet, checkpoint: Path
) -> None:
    _, instances = commands.tables(finished)
    rows = {(r["image_id"], r["instance_index"]): r for r in instances.to_pylist()}
    set_cpu_threads(1)  # as the job's process does: the last bits of some sums follow their number
    model = checkpoints.load(checkpoint).model
    segmenter = Segmenter(model, call_shape=SHAPE, dtype="float32")
    compared = 0
    for name in sorted(data_set.boxes_by_id)[::3]:
        boxes = data_set.boxes_by_id[name]
        if len(boxes) == 0:
            continue
        decoded = decode_image((data_set.images / name).read_bytes(), max_pixels=10**8, side=128)
        height, width = decoded.size_hw
        clipped = boxes.clip(0, [width, height, width, height]).astype(np.float32)
        [found] = segmenter.segment_prepared(
            [PreparedImage(pixels_hwc=decoded.pixels_hwc, size_hw=decoded.size_hw,
                           prompts=Prompts(boxes_xyxy=clipped))]
        )  # fmt: skip
        assert isinstance(found, Instances)
        for index, counts in enumerate(found.counts):
            row = rows[name, index]
            assert row["segmentation"] == {"size": [height, width], "counts": counts}
            assert row["predicted_iou"] == found.predicted_iou[index]
            assert row["stability_score"] == found.stability_score[index]
            compared += 1
    assert compared > 250


@pytest.mark.faults
@pytest.mark.parametrize(("actors", "images_per_unit"), [(2, 16), (2, 7)])
def test_masks_do_not_depend_on_workers_or_units(
    actors: int, images_per_unit: int, finished: Path, data_set: DataSet, checkpoint: Path, tmp_path: Path
) -> None:
    label(data_set, checkpoint, str(tmp_path / "out"), "--set", f"output.images_per_unit={images_per_unit}",
          "--set", f"cluster.actors={actors}")  # fmt: skip

    for ours, theirs in zip(commands.tables(tmp_path / "out"), commands.tables(finished), strict=True):
        assert _without_unit(ours).equals(_without_unit(theirs))


@pytest.mark.slow
def test_two_workers_and_other_units_on_s3_give_the_same_tables_as_one_in_a_folder(
    moto_s3: MotoS3, finished: Path, data_set: DataSet, checkpoint: Path, tmp_path: Path
) -> None:
    source, target = moto_s3.place(), moto_s3.place()
    s3 = fsspec.filesystem("s3", **moto_s3.options, skip_instance_cache=True)
    s3.put(str(data_set.images), source.uri + "/images", recursive=True)
    s3.put(str(data_set.boxes), source.uri + "/boxes.parquet")
    remote = ["--images", source.uri + "/images", "--boxes", source.uri + "/boxes.parquet"]
    commands.run(
        "label", *remote, "--checkpoint", str(checkpoint), "--output", target.uri, *MASKS,
        "--set", "output.images_per_unit=7", "--set", f"storage.s3.endpoint_url={moto_s3.endpoint}",
        "--set", "cluster.actors=2",
    )  # fmt: skip
    s3.get(target.uri, str(tmp_path / "out"), recursive=True)

    skipped = ["image_uri", "source_etag"]
    for ours, theirs in zip(commands.tables(tmp_path / "out"), commands.tables(finished), strict=True):
        there = [name for name in skipped if name in ours.column_names]
        assert _without_unit(ours).drop_columns(there).equals(_without_unit(theirs).drop_columns(there))


@pytest.mark.slow
def test_a_finished_job_run_again_changes_no_byte(
    finished: Path, data_set: DataSet, checkpoint: Path
) -> None:
    before = commands.contents(finished)
    inputs = [
        "--images",
        str(data_set.images),
        "--boxes",
        str(data_set.boxes),
        "--checkpoint",
        str(checkpoint),
    ]
    text = commands.run_here(
        "label", *inputs, "--output", str(finished), *MASKS, "--set", "output.images_per_unit=16"
    ).stderr
    after = commands.contents(finished)

    owner = {name for name in {*before, *after} if name.startswith("owner/")}
    assert {k: v for k, v in before.items() if k not in owner} == {
        k: v for k, v in after.items() if k not in owner
    }
    assert "60 images" in text
    assert "nothing was left to do" in text


@pytest.mark.slow
def test_validate_finds_nothing_and_status_counts_all(finished: Path) -> None:
    commands.run_here("validate", "--output", str(finished))
    status = json.loads(commands.run_here("status", "--output", str(finished), "--json").stdout)

    assert status["images"]["planned"] == 60
    assert status["images"]["done"] == 60


@pytest.mark.slow
def test_validate_names_a_unit_with_one_flipped_bit(finished: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    unit = sorted((copy / "units").glob("*.parquet"))[2]
    data = bytearray(unit.read_bytes())
    data[len(data) // 3] ^= 0x10
    unit.write_bytes(data)
    result = commands.run_here("validate", "--output", str(copy), code=6)

    assert unit.name in result.stdout + result.stderr


@pytest.mark.slow
def test_duckdb_and_polars_read_a_plain_glob_and_pycocotools_the_masks(
    finished: Path, data_set: DataSet
) -> None:
    pattern = str(finished / "instances" / "*.parquet")
    [(count, distinct)] = duckdb.sql(
        f"SELECT count(*), count(DISTINCT (image_id, instance_index)) FROM '{pattern}'"
    ).fetchall()
    assert (count, distinct) == (data_set.num_boxes, data_set.num_boxes)
    rows = pl.read_parquet(pattern)["segmentation", "area", "bbox"].to_dicts()
    assert len(rows) == data_set.num_boxes
    for row in rows[::25]:
        assert coco_mask.decode(row["segmentation"]).sum() == row["area"]
        assert coco_mask.toBbox(row["segmentation"]).tolist() == (row["bbox"] or [0, 0, 0, 0])


@pytest.mark.slow
def test_a_plain_glob_never_shows_a_row_twice_while_a_job_runs_or_publishes_again(
    few_images: DataSet, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    inputs = ["--images", str(few_images.images), "--boxes", str(few_images.boxes)]
    job = ("label", *inputs, "--checkpoint", str(checkpoint), "--output", str(output), *MASKS)
    processes = multiprocessing.get_context("spawn")
    first = processes.Process(target=commands.label_here, args=job)
    first.start()
    seen = list(rows_while(lambda: first.exitcode is None, output, polars=True))
    assert first.exitcode == 0
    again = processes.Process(target=publish_often, args=(str(output),))
    again.start()
    # No Polars here: it opens a file twice, and is at a loss when a newer one has taken its place.
    seen += rows_while(lambda: again.exitcode is None, output, polars=False)
    assert again.exitcode == 0

    assert set(seen) <= {0, few_images.num_boxes}, "a glob saw a part of the rows, or rows twice"
    assert seen.count(few_images.num_boxes) > 3, "nothing was read while something was written"


def publish_often(output: str) -> None:
    for least in ("0.2", "0.9", "0.5"):
        commands.run_here("publish", "--output", output, "--min-predicted-iou", least)


def rows_while(running: Callable[[], bool], output: Path, *, polars: bool) -> Iterator[int]:
    """How many rows globs of `instances` have while something runs; fails on a row that is there twice."""
    pattern = str(output / "instances" / "*.parquet")
    while running():
        time.sleep(0.02)
        if not list(output.glob("instances/*.parquet")):
            yield 0
            continue
        count, distinct = duckdb.sql(
            f"SELECT count(*), count(DISTINCT (image_id, instance_index)) FROM '{pattern}'"
        ).fetchall()[0]
        assert count == distinct
        yield count
        if polars:
            rows = pl.read_parquet(pattern)
            assert rows.select("image_id", "instance_index").n_unique() == rows.height
            yield rows.height


@pytest.mark.slow
def test_coco_boxes_with_a_limit_work_as_in_the_readme(
    few_images: DataSet, checkpoint: Path, tmp_path: Path
) -> None:
    coco = write_coco(tmp_path / "coco.json", few_images)
    text = commands.label_here(
        "label", "--images", str(few_images.images), "--boxes", str(coco), "--checkpoint", str(checkpoint),
        "--limit", "10", "--output", str(tmp_path / "out"),
    ).stderr  # fmt: skip
    images, instances = commands.tables(tmp_path / "out")

    assert images.num_rows == 10
    assert instances["category_name"].unique().to_pylist() == ["thing"]
    assert "xywh" in text
    assert (tmp_path / "out" / "report" / "contact_sheet.png").stat().st_size > 1000


def _without_unit(table: pa.Table) -> pa.Table:
    kept = commands.lasting(table)
    return kept.drop_columns(["unit_id"]) if "unit_id" in kept.column_names else kept
