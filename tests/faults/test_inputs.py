"""Rows 31 to 42: what a store of images may do, and what the rows of the table say of it."""

from __future__ import annotations

import random
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed
from tests.conftest import MotoS3
from tests.faults import chain
from tests.faults.chain import SmallJob, as_job, look, lost_and_doubled, read_table, run_job
from tests.faults.conftest import Record
from tests.pipeline.made_jobs import BOXES, noise, png
from tests.s3_proxy import Fault, FaultProxy

pytestmark = pytest.mark.timeout(600)
IMAGES = 8


@dataclass(kw_only=True)
class Bucket:
    """Eight pictures in a bucket behind the proxy, and the job over them, 4 images a unit."""

    made: SmallJob
    proxy: FaultProxy
    images: Place
    wanted: chain.Seen
    faults: list[Fault] = field(default_factory=list)

    def strike(self, do: str, *, key: str = r"\d\d\.png", **how: object) -> Fault:
        path = self.images.uri.removeprefix("s3://")
        fault = self.proxy.add(Fault(match=f"GET /{path}/{key}", do=do, **how))  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def mend(self) -> None:
        for fault in self.faults:
            self.proxy.faults.remove(fault)
        self.faults.clear()

    def failures(self) -> dict[str, str]:
        rows = read_table(self.made.store, "images").to_pylist()
        return {row["image_id"]: row["error_code"] for row in rows if row["error_code"]}

    def label(self) -> float:
        began = time.monotonic()
        run_job(self.made, until="label")
        return time.monotonic() - began

    def settled(self) -> dict[str, int]:
        """After the fault is gone and failed images were done again: the undisturbed tables."""
        self.mend()
        codes = ("unreachable", "fetch_timeout", "denied", "not_found", "corrupt")
        run_job(self.made, until="retry", codes=codes)
        assert look(self.made.store) == self.wanted
        lost, doubled = lost_and_doubled(self.made.store, self.made)
        return {"lost": lost, "doubled": doubled}


@pytest.fixture(scope="module")
def plain(moto_s3: MotoS3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, chain.Seen, Path]:
    """The pictures in the bucket, the undisturbed tables, and the box file."""
    folder = tmp_path_factory.mktemp("bucket")
    images = moto_s3.place(f"images-{uuid.uuid4().hex}")
    for number in range(IMAGES):
        Store(images).put(f"{number:02}.png", png(noise(number)))
    ids = [f"{number:02}.png" for number in range(IMAGES)]
    pq.write_table(pa.table({"image_id": ids, "boxes": [BOXES] * IMAGES}), folder / "boxes.parquet")
    made = make_job(images, folder / "boxes.parquet", moto_s3.endpoint, folder / "out")
    run_job(made, until="label")
    return images, look(made.store), folder / "boxes.parquet"


def make_job(images: Place, boxes: Path, endpoint: str, out: Path) -> SmallJob:
    access = AccessRules(options={"s3": {"endpoint_url": endpoint}})
    plan = make_plan(InputSettings(images=images.uri, boxes=str(boxes)), access, images_per_unit=4)
    base = chain.make_small_job(out.parent / f"base-{uuid.uuid4().hex}")
    context = replace(
        base.context, output=Place(uri=str(out)), plan_sha256=plan.sha256, images_per_unit=4,
        access=plan.access, limits=Limits(fetch_timeout_s=20, segment_timeout_s=20),
    )  # fmt: skip
    return replace(base, job=as_job(context, plan), plan=plan)


@pytest.fixture
def bucket(plain: tuple[Place, chain.Seen, Path], s3_faults: FaultProxy, tmp_path: Path) -> Bucket:
    images, wanted, boxes = plain
    made = make_job(images, boxes, s3_faults.endpoint, tmp_path / "out")
    return Bucket(made=made, proxy=s3_faults, images=images, wanted=wanted)


def within(bucket: Bucket, seconds: float) -> None:
    """Another fetch deadline, which is no part of the job's identity."""
    context = replace(bucket.made.context, limits=Limits(fetch_timeout_s=seconds, segment_timeout_s=20))
    bucket.made = replace(bucket.made, job=replace(bucket.made.job, context=context))


# ---------------------------------------------------------------------------------------------
# What passes by itself
# ---------------------------------------------------------------------------------------------

PASSES: dict[str, tuple[int, dict[str, object]]] = {
    "503 SlowDown, twice": (31, {"do": "status", "status": 503, "code": "SlowDown", "times": 2}),
    "body cut short, once": (37, {"do": "truncate", "times": 1}),
    "one bit flipped on the way, once": (38, {"do": "corrupt", "times": 1}),
    "reset before the reply, twice": (39, {"do": "reset", "times": 2}),
}


@pytest.mark.parametrize("name", PASSES)
def test_rows_31_37_38_39_what_passes_is_tried_again(name: str, bucket: Bucket, record: Record) -> None:
    row, how = PASSES[name]
    fault = bucket.strike(**how)  # type: ignore[arg-type]
    seconds = bucket.label()
    assert bucket.failures() == {}
    assert look(bucket.made.store) == bucket.wanted
    lost, doubled = lost_and_doubled(bucket.made.store, bucket.made)
    record(row, fault=name, landed=fault.landed, lost=lost, doubled=doubled, recover_s=seconds, code="0")


@pytest.mark.faults
def test_row_33_some_errors_in_a_hundred_requests_change_nothing(bucket: Bucket, record: Record) -> None:
    rng = random.Random(33)
    kinds = [(500, "InternalError"), (429, "TooManyRequests"), (408, "RequestTimeout")]
    faults = [
        bucket.strike("status", status=status, code=code, times=1, skip=rng.randrange(8))
        for status, code in kinds * 2
    ]
    bucket.label()
    landed = sum(fault.landed for fault in faults)
    assert bucket.failures() == {}
    assert look(bucket.made.store) == bucket.wanted
    record(33, fault="500, 429 and 408 here and there", landed=landed, code="0")


# ---------------------------------------------------------------------------------------------
# What one image suffers for ever
# ---------------------------------------------------------------------------------------------

ONE_IMAGE: dict[str, tuple[int, str, dict[str, object]]] = {
    "404": (34, "not_found", {"do": "status", "status": 404, "code": "NoSuchKey"}),
    "403": (35, "denied", {"do": "status", "status": 403, "code": "AccessDenied"}),
    "503 for ever": (32, "unreachable", {"do": "status", "status": 503, "code": "SlowDown"}),
    "body cut short for ever": (37, "unreachable", {"do": "truncate"}),
    "bit flipped for ever": (38, "unreachable", {"do": "corrupt"}),
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("404", "403") else pytest.param(name, marks=pytest.mark.faults) for name in ONE_IMAGE],
)
def test_rows_32_34_35_37_38_one_bad_object_costs_one_row_until_it_is_mended(
    name: str, bucket: Bucket, record: Record
) -> None:
    row, code, how = ONE_IMAGE[name]
    fault = bucket.strike(key=r"03\.png", **how)  # type: ignore[arg-type]
    seconds = bucket.label()
    assert bucket.failures() == {"03.png": code}
    if code in ("not_found", "denied"):
        assert fault.landed == 1, "asked again for what will not change"
    seen = bucket.settled()
    record(row, fault=f"{name}, one image", landed=fault.landed, recover_s=seconds, code="0", **seen)


@pytest.mark.parametrize(
    ("row", "do", "how"),
    [
        (41, "drip", {"rate": 100.0}),
        pytest.param(40, "delay", {"seconds": 4.0}, marks=pytest.mark.faults),
    ],
)
def test_rows_40_and_41_a_stalled_or_dripping_reply_meets_the_deadline(
    row: int, do: str, how: dict[str, object], bucket: Bucket, record: Record
) -> None:
    within(bucket, 2.0)
    fault = bucket.strike(do, key=r"03\.png", **how)
    seconds = bucket.label()
    assert bucket.failures() == {"03.png": "fetch_timeout"}
    assert seconds < 30
    within(bucket, 20.0)
    seen = bucket.settled()
    what = "reply stalls 4 s" if do == "delay" else "100 bytes a second"
    record(row, fault=f"{what}, deadline 2 s", landed=fault.landed, recover_s=seconds, code="0", **seen)


@pytest.mark.faults
def test_row_41_a_slow_but_steady_reply_is_waited_for(bucket: Bucket, record: Record) -> None:
    fault = bucket.strike("drip", rate=40_000.0)
    seconds = bucket.label()
    assert bucket.failures() == {}
    record(41, fault="40 kB a second", landed=fault.landed, recover_s=seconds, code="0")


def test_row_42_objects_that_change_or_go_after_planning(
    bucket: Bucket, moto_s3: MotoS3, record: Record
) -> None:
    """No tag is planned with an image. A changed one is labelled as it is now, and its row says which."""
    images, store = bucket.images, Store(bucket.images)
    gone, other = store.read("02.png"), store.read("05.png")
    try:
        store.delete(["02.png"])
        store.put("05.png", png(noise(99)))
        tag = store.head("05.png").etag  # type: ignore[union-attr]
        bucket.label()
        rows = {row["image_id"]: row for row in read_table(bucket.made.store, "images").to_pylist()}
    finally:
        store.put("02.png", gone)
        store.put("05.png", other)
    assert bucket.failures() == {"02.png": "not_found"}
    assert rows["05.png"]["source_etag"] == tag
    assert images.uri in rows["05.png"]["image_uri"]
    lost, doubled = lost_and_doubled(bucket.made.store, bucket.made)
    record(
        42,
        fault="one object gone, one changed after planning",
        landed=2,
        lost=lost,
        doubled=doubled,
        code="0",
    )


# ---------------------------------------------------------------------------------------------
# What every image suffers
# ---------------------------------------------------------------------------------------------

EVERYWHERE: dict[str, tuple[int, str, dict[str, object]]] = {
    "503 for ever": (32, "store", {"do": "status", "status": 503, "code": "SlowDown"}),
    "403": (35, "denied", {"do": "status", "status": 403, "code": "AccessDenied"}),
    "clock skew": (36, "clock", {"do": "status", "status": 403, "code": "RequestTimeTooSkewed"}),
    "expired credentials": (36, "credentials", {"do": "status", "status": 400, "code": "ExpiredToken"}),
    "bucket gone": (35, "store", {"do": "status", "status": 404, "code": "NoSuchBucket"}),
    "connections reset": (39, "store", {"do": "reset"}),
    "nothing arrives": (40, "store", {"do": "delay", "seconds": 5.0}),
}


@pytest.mark.parametrize(
    "name",
    [
        n
        if n in ("403", "clock skew", "expired credentials", "bucket gone", "nothing arrives")
        else pytest.param(n, marks=pytest.mark.faults)
        for n in EVERYWHERE
    ],
)
@pytest.mark.parametrize("side", ["images"])
def test_rows_32_35_36_39_40_a_store_that_fails_everybody_stops_the_job_and_marks_nobody(
    name: str, side: str, bucket: Bucket, record: Record
) -> None:
    row, code, how = EVERYWHERE[name]
    within(bucket, 3.0 if name == "nothing arrives" else 20.0)
    fault = bucket.strike(**how)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(SystemicFault) as caught:
        run_job(bucket.made, until="label")
    seconds = time.monotonic() - began
    assert (caught.value.code, caught.value.exit_code) == (code, 5)
    assert "\n" not in str(caught.value)
    assert list_committed(bucket.made.store) == {}
    within(bucket, 20.0)
    seen = bucket.settled()
    record(row, fault=f"{name}, all images", landed=fault.landed, recover_s=seconds, code="5, then 0", **seen)


@pytest.mark.parametrize(
    "name", ["403", pytest.param("expired credentials", marks=pytest.mark.faults),
             pytest.param("clock skew", marks=pytest.mark.faults),
             pytest.param("bucket gone", marks=pytest.mark.faults)],
)  # fmt: skip
def test_rows_35_36_46_an_output_that_cannot_be_written_any_more_stops_the_job(
    name: str, small_job: SmallJob, wanted: chain.Seen, moto_s3: MotoS3, s3_faults: FaultProxy, record: Record
) -> None:
    row, code, how = EVERYWHERE[name]
    place = moto_s3.place()
    made = small_job.at(Place(uri=place.uri, options={"endpoint_url": s3_faults.endpoint}))
    path = place.uri.removeprefix("s3://")
    fault = s3_faults.add(Fault(match=f"PUT /{path}/(units|images|instances)", skip=2, **how))  # type: ignore[arg-type]
    with pytest.raises(SystemicFault) as caught:
        run_job(made)
    assert caught.value.code == code
    assert len(list_committed(made.store)) == 2
    s3_faults.faults.remove(fault)
    run_job(made)
    assert look(made.store) == wanted
    record(row, 46, fault=f"{name}, output, after two commits", landed=fault.landed, code="5, then 0")


@pytest.mark.parametrize("do", ["truncate", "corrupt"])
def test_rows_37_38_objects_that_are_broken_in_the_store_never_stop_the_job(
    do: str, bucket: Bucket, record: Record
) -> None:
    """All of a unit, for ever; a retry of nothing but such objects ends, too."""
    within(bucket, 4.0)
    fault = bucket.strike(do, key=r"0[0-3]\.png")
    bucket.label()
    broken = {f"0{number}.png": "unreachable" for number in range(4)}
    assert bucket.failures() == broken
    run_job(bucket.made, until="retry", codes=("unreachable",))
    assert bucket.failures() == broken
    within(bucket, 20.0)
    seen = bucket.settled()
    row = 37 if do == "truncate" else 38
    record(row, fault=f"{do} of a whole unit's objects for ever", landed=fault.landed, code="0", **seen)
