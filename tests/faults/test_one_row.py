"""One row that names something odd, in the real command on a real Ray: it costs itself, whatever it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import MotoS3
from tests.faults.conftest import Record
from tests.pipeline.made_jobs import BOXES, noise, png

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES = 200

ODD = {
    "s3://my bucket/a.jpg": "uri_refused",
    "s3://a-bucket-without-credentials/a.jpg": "denied",
    "s3://" + "b" * 300 + "/a.jpg": "uri_refused",
    "s3://my bucket/a.tar#512:4/a.jpg": "uri_refused",
    "gs://bucket/a.jpg": "unreachable",
    "gs://bucket/a.parquet#image:0:0/a.jpg": "unreachable",
    "hf://datasets/a": "uri_refused",
    "http://h:99999/x": "uri_refused",
    "http://[::1/x": "uri_refused",
    "http://" + "h" * 300 + "/x": "uri_refused",
    "http://127.0.0.1:9/x": "unreachable",
    "https://user@h/x": "uri_refused",
    "zip://a.jpg::s3://bucket/a.zip": "uri_refused",
    "data:image/png;base64,AAAA": "uri_refused",
    "file://host/a.png": "uri_refused",
    "/a/nul\x00byte.png": "uri_refused",
    "n" * 300 + ".png": "not_found",
    "folder.png": "uri_refused",
    "pipe.png": "uri_refused",
    "circle.png": "uri_refused",
    "shards.tar#512:4/a.png": "not_found",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    for number in range(PICTURES):
        (made / f"{number:03}.png").write_bytes(png(noise(number % 7)))
    (made / "folder.png").mkdir()
    os.mkfifo(made / "pipe.png")
    (made / "circle.png").symlink_to(made / "circle.png")
    return made


def label(table: Path, out: Path, *extra: str, command: str = "label", **environment: str) -> tuple[int, str]:
    """The exit code of the command over a table of images with boxes, and what it said."""
    named = ["--boxes", str(table), "--set", "output.images_per_unit=8"] if command == "label" else []
    argv = [
        *(sys.executable, "-m", "tests.faults.stub_cli", command, "--no-progress", "--output", str(out)),
        *(*named, "--set", "cluster.actors=1", "--set", "limits.fetch_timeout_s=4", *extra),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    nobody = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(table.parent), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        argv, cwd=REPOSITORY, text=True, capture_output=True, timeout=400, check=False,
        env={**kept, **nobody, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def table_of(uris: list[str], path: Path) -> Path:
    ids = [f"{number:04}" for number in range(len(uris))]
    pq.write_table(pa.table({"image_id": ids, "image_uri": uris, "boxes": [BOXES] * len(uris)}), path)
    return path


def rows_of(out: Path) -> dict[str, dict[str, object]]:
    parts = [pq.read_table(part) for part in sorted((out / "images").glob("*.parquet"))]
    return {str(row["image_uri"]): row for row in pa.concat_tables(parts).to_pylist()}


def test_odd_rows_among_two_hundred_cost_themselves_and_are_named(
    folder: Path, tmp_path: Path, record: Record
) -> None:
    pictures = [f"{number:03}.png" for number in range(PICTURES)]
    uris = list(pictures)
    for at, uri in enumerate(ODD):
        uris.insert(11 * at, uri)
    table = table_of(uris, folder / "odd.parquet")

    code, said = label(
        table, tmp_path / "out", "--allow-scheme", "http", "--allow-scheme", "https",
        "--set", "limits.max_failure_rate=0.2",
    )  # fmt: skip

    assert code == 0, said
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len(uris)
    failed = {uri: row for uri, row in rows.items() if row["status"] == "failed"}
    wanted = {uri if ":" in uri or uri[0] == "/" else str(folder / uri): code for uri, code in ODD.items()}
    wanted = {str(folder / uri) if uri.startswith("shards") else uri: code for uri, code in wanted.items()}
    assert {uri: row["error_code"] for uri, row in failed.items()} == wanted
    for uri, row in failed.items():
        name = uri.replace("user@", "").encode("unicode_escape").decode()
        assert name[:60] in str(row["error_message"]), row
    record(34, fault="odd uris in rows of a table", landed=len(ODD), code="0")


def bucket_table(moto_s3: MotoS3, folder: Path, missing: str, each: int = 8) -> Path:
    """Fifty buckets of pictures, and before them one that is not there."""
    client = boto3.client(
        "s3", endpoint_url=moto_s3.endpoint, region_name="us-east-1",
        aws_access_key_id="x", aws_secret_access_key="x",
    )  # fmt: skip
    uris = [f"s3://{missing}/{number}.png" for number in range(each)]
    for bucket in range(50):
        client.create_bucket(Bucket=f"pictures-{bucket:02}")
        for number in range(2):
            client.put_object(Bucket=f"pictures-{bucket:02}", Key=f"{number}.png", Body=png(noise(number)))
            uris.append(f"s3://pictures-{bucket:02}/{number}.png")
    return table_of(uris, folder / "buckets.parquet")


def test_one_bucket_of_51_that_is_not_there_costs_its_rows_until_it_is_and_alone_it_stops_the_job(
    moto_s3: MotoS3, tmp_path: Path, record: Record
) -> None:
    table = bucket_table(moto_s3, tmp_path, "not-there-yet")
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": moto_s3.endpoint}

    code, said = label(table, tmp_path / "out", "--set", "limits.max_failure_rate=0.2", **keys)

    assert code == 0, said
    failed = {uri: row for uri, row in rows_of(tmp_path / "out").items() if row["status"] == "failed"}
    assert {row["error_code"] for row in failed.values()} == {"not_found"}
    assert sorted(failed) == [f"s3://not-there-yet/{number}.png" for number in range(8)]
    assert all(uri in str(row["error_message"]) for uri, row in failed.items())

    alone = table_of(sorted(failed), tmp_path / "alone.parquet")
    code, said = label(alone, tmp_path / "alone", **keys)
    assert code == 5, said
    assert "8 of 8 images of a unit cannot be read, for example s3://not-there-yet/0.png" in said
    assert not list((tmp_path / "alone" / "units").glob("*"))

    client = boto3.client(
        "s3", endpoint_url=moto_s3.endpoint, region_name="us-east-1",
        aws_access_key_id="x", aws_secret_access_key="x",
    )  # fmt: skip
    client.create_bucket(Bucket="not-there-yet")
    for number in range(8):
        client.put_object(Bucket="not-there-yet", Key=f"{number}.png", Body=png(noise(number)))
    code, said = label(
        table, tmp_path / "out", "--code", "not_found", "--checkpoint", "stub", command="retry", **keys
    )
    assert code == 0, said
    assert {row["status"] for row in rows_of(tmp_path / "out").values()} == {"labelled"}
    record(35, fault="one bucket of 51 is not there", landed=8, code="0")


def test_processes_that_die_before_any_image_is_prepared_stop_the_job(
    folder: Path, tmp_path: Path, record: Record
) -> None:
    table = table_of([f"{number:03}.png" for number in range(8)], folder / "few.parquet")

    code, said = label(table, tmp_path / "out", HQLABEL_FAILPOINT="unit.read=kill")

    assert code == 5, said
    assert "5 processes died one after another in prepare of unit 0" in said
    record(5, fault="every process that prepares a unit SIGKILL", landed=6, code="5")
