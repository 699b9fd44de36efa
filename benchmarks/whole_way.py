"""Generated pictures through `hqlabel label` and `hqlabel validate`, from a folder and from S3.

    python -m benchmarks.whole_way [--images 2000] [--most-boxes 60]

A small random model (128-pixel input), so what is measured is everything around a model: plan, fetch,
decode, units, commit, publish, checks. S3 is a local server over HTTP. Prints one line a store, and fails
unless both runs have every image and every box once, `validate` finds nothing, and the tables are equal in
every column that lasts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import fsspec
import pyarrow as pa
from moto.server import ThreadedMotoServer

from tests.e2e import commands
from tests.e2e.scenes import DataSet, make_data_set, small_checkpoint

LIMIT_S = 3600
BUCKET = "hqlabel-bench"
DIFFER_BY_STORE = ("image_uri", "source_etag")


def main() -> None:
    """Run both stores and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--most-boxes", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data_set(folder / "data", images=arguments.images, most_boxes=arguments.most_boxes)
        checkpoint = small_checkpoint(folder / "weights")
        local = run_local(data, checkpoint, folder / "local")
        remote = run_s3(data, checkpoint, folder / "s3")
    for mine, theirs in zip(local, remote, strict=True):
        assert lasting(mine).equals(lasting(theirs)), "the two stores gave different tables"
    print("both stores: the same tables in every column that lasts", flush=True)


def run_local(data: DataSet, checkpoint: Path, output: Path) -> tuple[pa.Table, pa.Table]:
    """The tables of a job from folder to folder."""
    inputs = ["--images", str(data.images), "--boxes", str(data.boxes)]
    measure("folder", data, [*inputs, "--checkpoint", str(checkpoint), "--output", str(output)], [])
    return checked(output, data)


def run_s3(data: DataSet, checkpoint: Path, copy: Path) -> tuple[pa.Table, pa.Table]:
    """The tables of a job from bucket to bucket, fetched into `copy`."""
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
        place = ["--checkpoint", str(checkpoint), "--output", f"s3://{BUCKET}/out"]
        measure("S3", data, [*inputs, *place], ["--set", f"storage.s3.endpoint_url={endpoint}"])
        s3.get(f"{BUCKET}/out", str(copy), recursive=True)
    finally:
        server.stop()
    return checked(copy, data)


def measure(store: str, data: DataSet, arguments: list[str], options: list[str]) -> None:
    """Run `label`, then `validate`, and print a line of figures."""
    began = time.monotonic()
    commands.run("label", *arguments, *options, "--no-progress", timeout_s=LIMIT_S)
    labelled = time.monotonic() - began
    commands.run("validate", *arguments[-2:], *options, timeout_s=LIMIT_S)
    validated = time.monotonic() - began - labelled
    images = len(data.boxes_by_id)
    print(
        f"{store:<7}{images:>7} images {data.num_boxes:>7} boxes  label {labelled:7.1f} s "
        f"{images / labelled:6.1f} images/s {data.num_boxes / labelled:7.1f} boxes/s  "
        f"validate {validated:6.1f} s",
        flush=True,
    )


def checked(output: Path, data: DataSet) -> tuple[pa.Table, pa.Table]:
    """The published tables, with every image and every box in them once."""
    images, instances = commands.tables(output)
    assert images["image_id"].to_pylist() == sorted(data.boxes_by_id, key=str.encode)
    assert instances.num_rows == data.num_boxes
    keys = set(zip(instances["image_id"].to_pylist(), instances["instance_index"].to_pylist(), strict=True))
    assert len(keys) == data.num_boxes
    return images, instances


def lasting(table: pa.Table) -> pa.Table:
    """The columns that neither time nor store may change."""
    kept = commands.lasting(table)
    return kept.drop_columns([name for name in DIFFER_BY_STORE if name in kept.column_names])


if __name__ == "__main__":
    main()
