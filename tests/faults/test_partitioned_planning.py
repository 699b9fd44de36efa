"""Plans in partitions, on Ray, by the real commands: processes that die, files that are damaged, resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings
from tests.faults.commands import REPOSITORY
from tests.pipeline.made_jobs import BOXES, noise, png
from tests.table_digest import mask_columns_digest

pytestmark = pytest.mark.faults
IMAGES = 24
KINDS = {
    *("read_piece", "join_partition", "find_doubles", "rows_of_partition", "rows_of_range"),
    *("_apply_over", "write_range"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a table of them in 4 files and one of their boxes in 30."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "pictures").mkdir()
    names = [f"{at:02d}" for at in range(IMAGES)]
    for at, name in enumerate(names):
        (place / "pictures" / f"{name}.png").write_bytes(png(noise(at)))
    uris = [str(place / "pictures" / f"{name}.png") for name in names]
    write(place / "images", pa.table({"image_id": names, "image_uri": uris}), 4)
    boxes = {"image_id": names, "boxes": pa.array([BOXES] * IMAGES, pa.list_(pa.list_(pa.float64())))}
    write(place / "boxes", pa.table(boxes), 30)
    return place


def write(folder: Path, table: pa.Table, files: int) -> None:
    folder.mkdir()
    for at in range(files):
        start, stop = (number * table.num_rows // files for number in (at, at + 1))
        pq.write_table(table.slice(start, stop - start), folder / f"part-{at:03d}.parquet")


def run(command: str, folder: Path, out: Path, *extra: str, code: int = 0, **environment: str) -> str:
    inputs = ["--images", str(folder / "images"), "--boxes", str(folder / "boxes"), "--output", str(out)]
    more = ["--set", "output.images_per_unit=4", "--set", "model.dtype=float32", "--set", "cluster.actors=1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.partitioned_cli", command, *inputs, *more, "--json", *extra],
        cwd=REPOSITORY, text=True, capture_output=True, timeout=400, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0", **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def test_every_task_may_lose_its_process_and_the_plan_is_right(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "died").mkdir()
    out = tmp_path / "out"
    allowed = ("--allow-root", str(folder / "pictures"))

    run("label", folder, out, "--no-progress", *allowed, DIE_ONCE=str(tmp_path / "died"))

    assert {path.name for path in (tmp_path / "died").iterdir()} == KINDS
    job = json.loads((out / "job.json").read_text())
    settings = InputSettings(images=str(folder / "images"), boxes=str(folder / "boxes"))
    access = AccessRules(roots=(str(folder / "pictures"),))
    sha256 = make_plan(settings, access, images_per_unit=4).sha256
    assert job["identity"]["plan_sha256"] == sha256
    rows = pa.concat_tables(pq.read_table(path) for path in (out / "images").glob("*.parquet"))
    assert sorted(rows["image_id"].to_pylist()) == [f"{at:02d}" for at in range(IMAGES)]
    run("label", folder, out, "--no-progress", *allowed)
    assert mask_columns_digest(rows) == mask_columns_digest(
        pa.concat_tables(pq.read_table(path) for path in (out / "images").glob("*.parquet"))
    )
    refused = run("label", folder, out, "--no-progress", *allowed, "--limit", "3", code=4)
    assert "Choose another output folder" in refused


def test_plan_says_the_same_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    said = json.loads(run("plan", folder, out, "--allow-root", str(folder / "pictures")))

    assert said["images"] == IMAGES
    assert not out.exists()


def test_a_sample_of_a_plan_in_partitions_is_measured(folder: Path, tmp_path: Path) -> None:
    more = ("--allow-root", str(folder / "pictures"), "--checkpoint", "demo", "--sample", "6")

    said = json.loads(run("plan", folder, tmp_path / "out", *more))

    assert said["estimate"]["measured"]["images"] == 6


def test_a_damaged_file_among_many_is_named_before_there_is_an_output(folder: Path, tmp_path: Path) -> None:
    for table in ("images", "boxes"):
        (tmp_path / table).mkdir()
        for path in (folder / table).iterdir():
            os.link(path, tmp_path / table / path.name)
    bad = tmp_path / "boxes" / "part-017.parquet"
    body = bytearray(bad.read_bytes())
    body[10:40] = bytes(30)
    bad.unlink()
    bad.write_bytes(bytes(body))

    refused = run("label", tmp_path, tmp_path / "out", "--no-progress", code=4)

    assert "part-017.parquet" in refused
    assert not (tmp_path / "out" / "job.json").exists()
