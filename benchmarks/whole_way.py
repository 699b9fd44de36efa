"""Generated pictures through `hqlabel label` and `hqlabel validate`, from a folder and from S3, and by hand.

    python -m benchmarks.whole_way [--images 2000] [--most-boxes 60] [--folder DIR --part PART ...]

A small random model (128-pixel input), so what is measured is everything around a model: plan, fetch,
decode, units, commit, publish, checks. S3 is a local server over HTTP. Prints one line a part, and fails
unless both runs have every image and every box once, `validate` finds nothing, the tables are equal in
every column that lasts, and every mask and score is the one of a plain loop over `Segmenter`.

The parts are `data`, `folder`, `s3`, `compare` and `loop`, all by default; with `--folder` each can be run
by itself, over what the ones before have left there.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from moto.server import ThreadedMotoServer

from hqlabel.model import checkpoints
from hqlabel.model.device import set_cpu_threads
from hqlabel.model.records import CallShape, Instances, PreparedImage, Prompts
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.images.decode_upright import decode_image
from tests.e2e import commands
from tests.e2e.scenes import DataSet, make_data_set, small_checkpoint

LIMIT_S = 3600
SIDE = 128
SHAPE = CallShape(images_per_call=1, boxes_per_call=16)
BUCKET = "hqlabel-bench"
DIFFER_BY_STORE = ("image_uri", "source_etag")
PARTS = ("data", "folder", "s3", "compare", "loop")
SETTINGS = (
    "--set", "model.dtype=float32", "--set", f"model.boxes_per_call={SHAPE.boxes_per_call}",
)  # fmt: skip


def main() -> None:
    """Run the parts asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--most-boxes", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where everything is kept; default: a temporary one")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if "data" in arguments.part:
            make_data_set(folder / "data", images=arguments.images, most_boxes=arguments.most_boxes)
            small_checkpoint(folder / "weights")
        data = read_data_set(folder / "data")
        if "folder" in arguments.part:
            run_folder(data, folder)
        if "s3" in arguments.part:
            run_s3(data, folder)
        if "compare" in arguments.part:
            compare(data, folder)
        if "loop" in arguments.part:
            compare_with_loop(data, folder)


def read_data_set(folder: Path) -> DataSet:
    """What `make_data_set` left in a folder."""
    rows = pq.read_table(folder / "boxes.parquet", columns=["image_id", "boxes"]).to_pylist()
    given = {row["image_id"]: np.array(row["boxes"], np.float32) for row in rows}
    names = [str(path.relative_to(folder / "images")) for path in (folder / "images").rglob("*.*")]
    boxes = {name: given.get(name, np.empty((0, 4), np.float32)) for name in names}
    return DataSet(images=folder / "images", boxes=folder / "boxes.parquet", boxes_by_id=boxes)


def run_folder(data: DataSet, folder: Path) -> None:
    """A job from folder to folder; leaves `folder`/out."""
    inputs = ["--images", str(data.images), "--boxes", str(data.boxes)]
    measure("folder", data, inputs, ["--checkpoint", str(folder / "weights")], str(folder / "out"), [])


def run_s3(data: DataSet, folder: Path) -> None:
    """A job from bucket to bucket; leaves a copy of its output in `folder`/s3."""
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        s3 = fsspec.filesystem("s3", endpoint_url=endpoint)
        s3.mkdir(BUCKET)
        s3.put(str(data.images), f"{BUCKET}/images", recursive=True)
        s3.put(str(data.boxes), f"{BUCKET}/boxes.parquet")
        inputs = ["--images", f"s3://{BUCKET}/images", "--boxes", f"s3://{BUCKET}/boxes.parquet"]
        options = ["--set", f"storage.s3.endpoint_url={endpoint}"]
        weights = ["--checkpoint", str(folder / "weights")]
        measure("S3", data, inputs, weights, f"s3://{BUCKET}/out", options)
        s3.get(f"{BUCKET}/out", str(folder / "s3"), recursive=True)
    finally:
        server.stop()


def measure(
    store: str, data: DataSet, inputs: list[str], weights: list[str], output: str, options: list[str]
) -> None:
    """Run `label`, then `validate`, and print a line of figures."""
    began = time.monotonic()
    place = ["--output", output, *options]
    commands.run("label", *inputs, *weights, *SETTINGS, *place, "--no-progress", timeout_s=LIMIT_S)
    labelled = time.monotonic() - began
    commands.run("validate", *place, timeout_s=LIMIT_S)
    validated = time.monotonic() - began - labelled
    images = len(data.boxes_by_id)
    print(
        f"{store:<7}{images:>7} images {data.num_boxes:>7} boxes  label {labelled:7.1f} s "
        f"{images / labelled:6.1f} images/s {data.num_boxes / labelled:7.1f} boxes/s  "
        f"validate {validated:6.1f} s",
        flush=True,
    )


def compare(data: DataSet, folder: Path) -> None:
    """Hold the tables of both stores against the data and against each other."""
    for mine, theirs in zip(checked(folder / "out", data), checked(folder / "s3", data), strict=True):
        assert lasting(mine).equals(lasting(theirs)), "the two stores gave different tables"
    print("both stores: every image and box once, the same in every column that lasts", flush=True)


def checked(output: Path, data: DataSet) -> tuple[pa.Table, pa.Table]:
    """The published tables, with every image and every box in them once."""
    images, instances = commands.tables(output)
    assert images["image_id"].to_pylist() == sorted(data.boxes_by_id, key=str.encode)
    assert instances.num_rows == data.num_boxes
    keys = set(zip(instances["image_id"].to_pylist(), instances["instance_index"].to_pylist(), strict=True))
    assert len(keys) == data.num_boxes
    return images, instances


def compare_with_loop(data: DataSet, folder: Path) -> None:
    """Hold every mask and score of the table against a plain loop over the segmenter."""
    began = time.monotonic()
    _, instances = commands.tables(folder / "out")
    columns = ["image_id", "instance_index", "segmentation", "predicted_iou", "stability_score"]
    rows = instances.select(columns).to_pylist()
    found = {(row.pop("image_id"), row.pop("instance_index")): row for row in rows}
    for key, wanted in loop(data, folder / "weights"):
        assert found.pop(key) == wanted, f"{key} differs from the loop"
    assert not found, f"{len(found)} rows are not in the loop"
    print(
        f"loop   {data.num_boxes} masks and their scores equal, {time.monotonic() - began:.1f} s", flush=True
    )


def loop(data: DataSet, weights: Path) -> Iterator[tuple[tuple[str, int], dict[str, object]]]:
    """(image id, box number) and what the segmenter says of the box, image by image."""
    set_cpu_threads(1)  # as in the job's processes
    segmenter = Segmenter(checkpoints.load(weights).model, call_shape=SHAPE, dtype="float32")
    for name, boxes in data.boxes_by_id.items():
        if not len(boxes):
            continue
        decoded = decode_image((data.images / name).read_bytes(), max_pixels=10**8, side=SIDE)
        height, width = decoded.size_hw
        prompts = Prompts(boxes_xyxy=boxes.clip(0, [width, height, width, height]).astype(np.float32))
        image = PreparedImage(pixels_hwc=decoded.pixels_hwc, size_hw=decoded.size_hw, prompts=prompts)
        [answer] = segmenter.segment_prepared([image])
        assert isinstance(answer, Instances), f"{name}: {answer}"
        for place, counts in enumerate(answer.counts):
            yield (
                (name, place),
                {
                    "segmentation": {"size": [height, width], "counts": counts},
                    "predicted_iou": float(answer.predicted_iou[place]),
                    "stability_score": float(answer.stability_score[place]),
                },
            )


def lasting(table: pa.Table) -> pa.Table:
    """The columns that neither time nor store may change."""
    kept = commands.lasting(table)
    return kept.drop_columns([name for name in DIFFER_BY_STORE if name in kept.column_names])


if __name__ == "__main__":
    main()
