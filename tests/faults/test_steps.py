"""Rows 3, 17, 19 to 23: a job that ends between any two steps, on any store, is finished by the next."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from hqlabel.pipeline import failpoints, schema
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.job_state.job_file import read_job
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.checksummed_parquet import ParquetSink
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.verify_output import verify
from hqlabel.pipeline.worker.process_env import REFUSED
from tests.conftest import MotoS3, make_place
from tests.faults import chain
from tests.faults.chain import SmallJob, in_child, look, lost_and_doubled, run_job
from tests.faults.conftest import Record
from tests.s3_proxy import Fault, FaultProxy

pytestmark = pytest.mark.timeout(900)

ON_DISK_ONLY = {name for name in failpoints.NAMES if name.startswith("disk.")}
QUICK_ON_S3 = ("commit.created", "publish.images")


def interrupted_publish_only(made: SmallJob) -> bool:
    """Whether the job is sound as it lies there, but for a publish that was cut short."""
    job = read_job(made.store)
    found = verify(made.store, job).findings if job is not None else []
    return all("interrupted" in str(one) for one in found)


def visit_once(made: SmallJob, name: str, visit: int, wanted: chain.Seen) -> int:
    """The exit code of a run with this fail point armed; what lies there is sound, and a rerun ends it."""
    if name == "attempt.image":  # only a unit's second start notes its images
        assert in_child(run_job, made, failpoint="attempt.started=kill") == -signal.SIGKILL
    code = in_child(run_job, made, failpoint=f"{name}=kill@{visit}")
    if code == -signal.SIGKILL:
        assert interrupted_publish_only(made)
        run_job(made)
    assert look(made.store) == wanted
    assert not [key for key in keys(made) if key.startswith(("units/", "attempts/"))], (
        "clean has left something"
    )
    return code


def keys(made: SmallJob) -> list[str]:
    return [entry.key for entry in made.store.list()]


@pytest.mark.slow
def test_row_17_killed_at_every_fail_point_on_a_disk(
    small_job: SmallJob, wanted: chain.Seen, tmp_path: Path, record: Record
) -> None:
    """The first visit of each place; row 3 (planning, before the first unit, finalising) is among them."""
    landed, began = 0, time.monotonic()
    for name in failpoints.NAMES:
        made = small_job.at(Place(uri=str(tmp_path / name)))
        code = visit_once(made, name, 1, wanted)
        assert code == -signal.SIGKILL, f"{name} is not visited by a job"
        landed += 1
    seconds = (time.monotonic() - began) / landed
    record(
        3, 17, fault="SIGKILL at each fail point, disk", landed=landed, recover_s=seconds, code="-9, then 0"
    )


def test_row_17_killed_at_some_fail_points_on_s3(
    small_job: SmallJob, wanted: chain.Seen, moto_s3: MotoS3, record: Record
) -> None:
    for name in QUICK_ON_S3:
        assert visit_once(small_job.at(moto_s3.place()), name, 1, wanted) == -signal.SIGKILL, name
    record(17, fault="SIGKILL at some fail points, S3", landed=len(QUICK_ON_S3), code="-9, then 0")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize("name", failpoints.NAMES)
def test_row_17_killed_at_every_visit(
    name: str,
    kind: str,
    small_job: SmallJob,
    wanted: chain.Seen,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record: Record,
) -> None:
    if kind == "s3" and name in ON_DISK_ONLY:
        pytest.skip("a step of the disk's driver")
    landed = 0
    most = 12 if name in ON_DISK_ONLY else 6
    for visit in range(1, most + 1):
        made = small_job.at(make_place(kind, tmp_path / f"{visit}", request))
        if visit_once(made, name, visit, wanted) == 0:
            break
        landed += 1
    record(17, fault=f"SIGKILL at {name}, each visit, {kind}", landed=landed, code="-9, then 0")


def test_row_17_raised_at_every_fail_point_in_memory(
    small_job: SmallJob, wanted: chain.Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """A store of this process cannot survive its death: there the work is cut off by an exception."""
    landed = 0
    for name in sorted(set(failpoints.NAMES) - ON_DISK_ONLY - {"attempt.image"}):
        made = small_job.at(make_place("memory", tmp_path, None))  # type: ignore[arg-type]
        failpoints.arm({failpoints.VARIABLE: f"{name}=raise"})
        try:
            with pytest.raises(failpoints.FailPointReached):
                run_job(made)
        finally:
            failpoints.arm({})
        assert interrupted_publish_only(made)
        run_job(made)
        assert look(made.store) == wanted, name
        landed += 1
    record(17, fault="exception at each fail point, memory", landed=landed, code="raised, then 0")


def test_a_fail_point_is_data_and_the_command_line_refuses_it() -> None:
    assert failpoints.VARIABLE in REFUSED
    for text in (
        "rm -rf=kill",
        "job.created=exec",
        "job.created=kill@0",
        "job.created",
        "=kill",
        "../x=raise",
    ):
        with pytest.raises(ValueError, match="wanted name=action@visit"):
            failpoints.parse(text)
    done = subprocess.run(
        [sys.executable, "-m", "hqlabel", "status", "--output", "nowhere"],
        env={**os.environ, failpoints.VARIABLE: "job.created=kill"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert failpoints.VARIABLE in done.stderr


# ---------------------------------------------------------------------------------------------
# S3: the N-th request that changes anything
# ---------------------------------------------------------------------------------------------


def sweep(
    made: SmallJob,
    proxy: FaultProxy,
    moto: MotoS3,
    wanted: chain.Seen,
    do: str,
    *,
    kill: bool,
    every: int,
    first: int = 0,
) -> int:
    """How many requests were struck, each in a job of its own; with `kill` the client dies with it."""
    struck = 0
    for number in range(first, 200, every):
        place = moto.place()
        job = made.at(Place(uri=place.uri, options={"endpoint_url": proxy.endpoint}))
        path = place.uri.removeprefix("s3://")
        child = None
        fault = proxy.add(
            Fault(match=f"^(PUT|POST|DELETE) /{path}.*|^POST /bucket", do=do, skip=number, times=1)  # type: ignore[arg-type]
        )
        if kill:
            fault.then = lambda: os.kill(child.pid, signal.SIGKILL)  # type: ignore[union-attr,arg-type]  # noqa: B023
        child = chain.start_child(run_job, job)
        child.join(120)
        proxy.faults.remove(fault)
        if not fault.landed:
            assert child.exitcode == 0
            break
        struck += 1
        assert child.exitcode == (-signal.SIGKILL if kill else 0), f"request {number}"
        if kill:
            assert interrupted_publish_only(job)
            run_job(job)
        assert look(job.store) == wanted, f"request {number}"
    return struck


@pytest.mark.parametrize("do", [pytest.param("reset", marks=pytest.mark.faults), "drop_after"])
def test_rows_19_and_20_replies_lost_at_some_requests(
    do: str, small_job: SmallJob, wanted: chain.Seen, moto_s3: MotoS3, s3_faults: FaultProxy, record: Record
) -> None:
    landed = sweep(small_job, s3_faults, moto_s3, wanted, do, kill=False, every=40)
    what = "request lost" if do == "reset" else "reply lost (row 20: the winner learns it)"
    record(19, 20, fault=f"{what}, every 40th changing request, S3", landed=landed, code="0")


@pytest.mark.faults
@pytest.mark.parametrize("first", range(4))  # four tests, so that none takes a quarter of an hour
@pytest.mark.parametrize("kill", [False, True], ids=["lives", "dies"])
@pytest.mark.parametrize("do", ["reset", "drop_after"])
def test_rows_19_and_20_every_request_that_changes_anything(
    do: str,
    kill: bool,
    first: int,
    small_job: SmallJob,
    wanted: chain.Seen,
    moto_s3: MotoS3,
    s3_faults: FaultProxy,
    record: Record,
) -> None:
    landed = sweep(small_job, s3_faults, moto_s3, wanted, do, kill=kill, every=4, first=first)
    what = "lost before" if do == "reset" else "reply lost after"
    died = ", the client killed" if kill else ""
    code = "-9, then 0" if kill else "0"
    record(
        19,
        20,
        fault=f"each changing request {what} it was done{died}, S3 ({first + 1}/4)",
        landed=landed,
        code=code,
    )


def test_row_21_an_exception_while_a_file_is_written_shows_nothing(
    small_job: SmallJob,
    wanted: chain.Seen,
    any_place: Place,
    monkeypatch: pytest.MonkeyPatch,
    record: Record,
) -> None:
    """Raised after a row group of the first part, and of the second."""
    landed = 0
    real = ParquetSink.write
    for place, strike in ((any_place, 1), (Place(uri=any_place.uri + "2", options=any_place.options), 3)):
        made, calls = small_job.at(place), 0

        def write(self: ParquetSink, table: pa.Table) -> None:
            nonlocal calls, landed
            real(self, table)
            if table.schema.names == schema.IMAGES.names:
                calls += 1
                if calls == strike:  # noqa: B023
                    landed += 1
                    raise RuntimeError("injected after a row group")

        monkeypatch.setattr(ParquetSink, "write", write)
        with pytest.raises(RuntimeError, match="injected"):
            run_job(made)
        monkeypatch.setattr(ParquetSink, "write", real)
        assert interrupted_publish_only(made)
        for name in ("images", "instances"):
            for entry in made.store.list(f"{name}/"):
                checksummed_parquet.check_seal(made.store.read(entry.key), entry.key)
        run_job(made)
        assert look(made.store) == wanted
    record(21, fault="exception after a row group of a part", landed=landed, code="1, then 0")


def test_row_22_an_upload_left_open_is_seen_by_nobody_and_dropped_by_clean(
    small_job: SmallJob, wanted: chain.Seen, moto_s3: MotoS3, record: Record
) -> None:
    """The job itself sends one request a file; what other tools have begun and left here is dropped too."""
    place = moto_s3.place()
    made = small_job.at(place)
    client = boto3.client("s3", endpoint_url=moto_s3.endpoint)
    prefix = place.uri.removeprefix("s3://bucket/")
    run_job(made, until="label")
    for key in (f"{prefix}/units/00000000.g0.parquet", "elsewhere/part-1"):
        upload = client.create_multipart_upload(Bucket="bucket", Key=key)["UploadId"]
        body = io.BytesIO(bytes(5 * 2**20))
        client.upload_part(Bucket="bucket", Key=key, UploadId=upload, PartNumber=1, Body=body)
    assert verify(made.store, read_job(made.store)).findings == []  # type: ignore[arg-type]

    run_job(made)

    left = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert [one["Key"] for one in left] == ["elsewhere/part-1"]
    for one in left:
        client.abort_multipart_upload(Bucket="bucket", Key=one["Key"], UploadId=one["UploadId"])
    assert look(made.store) == wanted
    record(22, fault="multipart upload begun and left, S3", landed=1, code="0")


def test_row_23_nothing_is_renamed_and_a_refused_delete_loses_nothing(
    small_job: SmallJob, wanted: chain.Seen, moto_s3: MotoS3, s3_faults: FaultProxy, record: Record
) -> None:
    place = moto_s3.place()
    made = small_job.at(Place(uri=place.uri, options={"endpoint_url": s3_faults.endpoint}))
    path = place.uri.removeprefix("s3://")
    fault = s3_faults.add(
        Fault(match=f"DELETE /{path}|POST /bucket/?[?]delete", do="status", status=403, code="AccessDenied")
    )

    with pytest.raises(SystemicFault, match="denied"):
        run_job(made)

    assert look(made.store) == wanted
    assert s3_faults.requests("x-amz-copy-source|uploads") == 0
    assert verify(made.store, read_job(made.store)).findings == []  # type: ignore[arg-type]
    s3_faults.faults.remove(fault)
    run_job(made)
    assert look(Store(place)) == wanted
    lost, doubled = lost_and_doubled(made.store, made)
    record(
        23, fault="every delete refused (403), S3", landed=fault.landed, lost=lost, doubled=doubled, code="5"
    )
