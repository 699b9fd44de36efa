"""Whatever any call of a stage raises on one image costs that image alone; its neighbours do not notice.

Every call that a stage makes for one image raises every kind of error: in one unit each third image is the
victim of another kind, and the others must be as in a run in which nothing is raised.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import pkgutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import botocore.exceptions
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, UnidentifiedImageError

from hqlabel.model.records import PreparedImage
from hqlabel.pipeline.errors import HqlabelError, SystemicFault, UsageError
from hqlabel.pipeline.failpoints import FailPointReached
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.decode_upright import DecodedImage
from hqlabel.pipeline.job_context import JobDetector
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.stages import commit as commit_stage
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.crash_log import Restart
from hqlabel.pipeline.stages.detect import ModelRecord
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage import read_objects
from hqlabel.pipeline.storage.backend import FetchedObject
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.request_retries import classify
from hqlabel.pipeline.tables.unit_files import read_generation
from tests.pipeline.made_jobs import MadeJob, make_job, noise, png


class Panic(BaseException):
    """As pyo3 raises for a panic of Rust code: no `Exception`."""


class Mute(Exception):
    """An error that cannot even say what it is."""

    def __str__(self) -> str:
        raise ValueError("no text")


def client_error(code: str, status: int) -> botocore.exceptions.ClientError:
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "GetObject")


ERRNOS = (
    *("EACCES", "EBADF", "EFAULT", "EINVAL", "EIO", "ELOOP", "EMFILE", "ENAMETOOLONG", "ENODEV", "ENOENT"),
    *("ENOMEM", "ENOSPC", "ENOTCONN", "ENOTDIR", "ENXIO", "EOVERFLOW", "EPERM", "EPIPE", "ESTALE"),
)
ERRORS: list[BaseException] = [
    *(OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "x.png") for name in ERRNOS),
    *(ConnectionResetError("reset"), TimeoutError("late"), BlockingIOError(11, "again"), EOFError("end")),
    *(client_error("NoSuchKey", 404), client_error("AccessDenied", 403), client_error("Odd", 418)),
    botocore.exceptions.ParamValidationError(report="Invalid bucket name"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
    botocore.exceptions.NoCredentialsError(),
    *(ValueError("odd"), TypeError("odd"), KeyError("odd"), IndexError(3), AttributeError("odd")),
    *(AssertionError(), NotImplementedError("odd"), RuntimeError("odd\x1b[31m\nlines"), ImportError("gcsfs")),
    *(OverflowError("int"), ZeroDivisionError("zero"), FloatingPointError("nan"), StopIteration()),
    *(RecursionError("deep"), UnicodeError("idna"), BufferError("b"), LookupError(), UserWarning("w")),
    *(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), struct.error("unpack"), Mute()),
    *(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "start"), zlib.error("-3"), MemoryError()),
    *(pa.ArrowInvalid("bad"), pa.ArrowTypeError("bad"), pa.ArrowCapacityError("big"), pa.ArrowKeyError("k")),
    *(Image.DecompressionBombError("big"), UnidentifiedImageError("what"), SyntaxError("broken PNG")),
    *(ExceptionGroup("several", [ValueError("one"), OSError("two")]), HqlabelError("ours")),
    *(Panic("rust"), SystemExit(3), GeneratorExit(), BaseExceptionGroup("base", [Panic("rust")])),
    UsageError("ours too"),
]


def of_errors(error: BaseException) -> str:
    return f"{type(error).__name__}-{getattr(error, 'errno', None)}"


# ---------------------------------------------------------------------------------------------
# The calls
# ---------------------------------------------------------------------------------------------

_STAGES = "hqlabel.pipeline.stages"
IN_FETCH = (
    "hqlabel.pipeline.images.fetch.fetch_object",
    "hqlabel.pipeline.images.fetch.check_uri",
    "hqlabel.pipeline.images.fetch.options_for",
    "hqlabel.pipeline.images.fetch.parse_archive_uri",
    "hqlabel.pipeline.images.fetch.read_object",
)
IN_STORE = ("hqlabel.pipeline.storage.local_disk.LocalBackend.get",)
IN_DECODE = (
    "hqlabel.pipeline.images.decode_process.DecodeChild.decode",
    "hqlabel.pipeline.images.decode_process.DecodeChild._ask",
    f"{_STAGES}.prepare.with_boxes",
    f"{_STAGES}.rows_between_stages.PixelArena.keep",
    f"{_STAGES}.rows_between_stages.PixelArena.keep_all",
)
IN_SEGMENT = (f"{_STAGES}.segment.with_boxes",)
IN_MODEL = (
    "tests.fakes.BoxSegmenter.segment_prepared",
    f"{_STAGES}.segment.group_by_kind",
    f"{_STAGES}.segment.PreparedImage",
    f"{_STAGES}.segment._with_masks",
)
IN_DETECTOR = (
    "tests.pipeline.stages.test_detect.Corners.detect",
    f"{_STAGES}.detect.planned_boxes",
    f"{_STAGES}.detect._checked",
)
IN_COMMIT = (
    f"{_STAGES}.commit.with_boxes",
    f"{_STAGES}.commit.build_unit_table",
    f"{_STAGES}.commit.check_against_plan",
    "hqlabel.pipeline.tables.unit_table._outcome_of_masks",
    "hqlabel.pipeline.tables.unit_table._measured",
    "hqlabel.pipeline.tables.unit_table._instance_columns",
    "hqlabel.pipeline.tables.unit_checks.find_faults",
)


# ---------------------------------------------------------------------------------------------
# A unit of victims and neighbours
# ---------------------------------------------------------------------------------------------

SIDE = 64
SIZES = [(64, width) for width in range(20, 64)] + [(height, 64) for height in range(20, 64)]
"""Of the victims, each its own: pixels are known by it. Neighbours are of another."""
VICTIM = {f"{3 * at:04}.png": size for at, size in enumerate(SIZES[: len(ERRORS)])}
NEIGHBOURS = [f"{3 * at + more:04}.png" for at in range(len(ERRORS)) for more in (1, 2)]
BY_SIZE = {size: name for name, size in VICTIM.items()}
DATA = {name: png(noise(at, *size)) for at, (name, size) in enumerate(VICTIM.items())}
BY_DATA = {data: name for name, data in DATA.items()}
ERROR_OF = dict(zip(VICTIM, ERRORS, strict=True))


def victim_in(value: Any, depth: int = 5) -> str | None:
    """The first victim that an argument is about, or holds something of, and that has not failed yet."""
    if isinstance(value, ImageResult):
        return victim_in(value.planned) if value.error_code is None else None
    if isinstance(value, str):
        return next((name for name in [value[-8:]] if name in VICTIM), None)
    if isinstance(value, bytes):
        return BY_DATA.get(value)
    if isinstance(value, PreparedImage | DecodedImage):
        return BY_SIZE.get(tuple(value.size_hw))
    if isinstance(value, np.ndarray):
        return BY_SIZE.get(value.shape[:2]) if value.ndim == 3 else None
    if isinstance(value, pa.Table):
        rows = value.select([n for n in ("image_id", "status") if n in value.column_names]).to_pylist()
        alive = (row["image_id"] for row in rows if row.get("status", "failed") != "failed")
        return next((name for name in alive if name in VICTIM), None)
    if isinstance(value, Mapping):
        return victim_in(value.get("image_id"))
    if isinstance(value, tuple) and BY_SIZE.get(value):
        return BY_SIZE[value]
    if isinstance(value, Sequence) and depth:
        return next((name for one in value if (name := victim_in(one, depth - 1))), None)
    return None


class Strike:
    """Makes a call raise its victim's error whenever it is given one; `landed`: the victims so far.

    `error`: raised on each instead of their own.
    """

    def __init__(self, patch: pytest.MonkeyPatch, target: str, error: BaseException | None = None) -> None:
        self.landed: set[str] = set()
        owner, _, name = target.rpartition(".")
        real = pkgutil.resolve_name(target)

        def call(*args: Any, **kwargs: Any) -> Any:
            victim = victim_in([*args, *kwargs.values()])
            if victim is None:
                return real(*args, **kwargs)
            self.landed.add(victim)
            raise (error or ERROR_OF[victim]).with_traceback(None)

        patch.setattr(pkgutil.resolve_name(owner), name, call)


# ---------------------------------------------------------------------------------------------
# A small job
# ---------------------------------------------------------------------------------------------

_generations = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A job of one unit, and the decoder that its stages use."""

    job: MadeJob
    child: DecodeChild

    def run(self, generation: int | None = None, **restarts: Restart | None) -> dict[str, dict[str, Any]]:
        """The rows of the unit as a new generation, through all stages as Ray would carry them."""
        generation = next(_generations) if generation is None else generation
        context, store = self.job.context, Store(self.job.context.output)
        unit = UnitRow(unit_id=0, generation=generation)
        ready, arena = prepare_unit(unit, context, store, self.child, restarts.get("prepare"))
        done = SegmentWorker(context, epoch=1, use_gpu=False).run(unpack(pack(ready, arena)))
        read_outcome(commit_unit(unpack(pack(done)), context, store, restarts.get("commit")))
        rows = read_generation(store, 0, generation).to_pylist()
        assert [row["image_id"] for row in rows] == self.job.plan.table["image_id"].to_pylist()
        return {row["image_id"]: row for row in rows}

    @functools.cached_property
    def clean(self) -> dict[str, dict[str, Any]]:
        return self.run()


def make_unit(folder: Path, images: int | None = None, **context: Any) -> Unit:
    every = DATA | {name: png(noise(at % 7, 48, 48)) for at, name in enumerate(NEIGHBOURS)}
    pictures = dict(sorted(every.items())[:images])
    limits = Limits(decode_timeout_s=60)
    job = make_job(folder, pictures, images_per_unit=len(pictures), limits=limits, **context)
    side = SIDE if "detector" in context else None
    return Unit(job=job, child=DecodeChild(limits, SIDE, detector_side=side))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    made = make_unit(tmp_path_factory.mktemp("given"))
    yield made
    made.child.close()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    made = make_unit(tmp_path_factory.mktemp("few"), images=6)
    yield made
    made.child.close()


@pytest.fixture(scope="module")
def detected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    name = "tests.pipeline.stages.test_detect:Corners"
    detector = JobDetector(name=name, fingerprint="corners 1", longest_side=SIDE)
    made = make_unit(tmp_path_factory.mktemp("detected"), detector=detector)
    yield made
    made.child.close()


@pytest.fixture(autouse=True)
def one_try_and_a_fresh_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_stage, "_record", ModelRecord(code="internal"))
    monkeypatch.setattr(read_objects, "READ_TRIES", 1)


def lasting(row: Mapping[str, Any]) -> dict[str, Any]:
    passing = ("fetch_ms", "decode_ms", "detect_ms", "segment_ms", "processed_at", "attempts")
    return {name: value for name, value in row.items() if name not in passing}


def check(unit: Unit, target: str, code: Callable[[BaseException], str], patch: pytest.MonkeyPatch) -> None:
    """Strike every victim at one call; nobody else may notice."""
    clean = unit.clean
    strike = Strike(patch, target)
    found = unit.run()
    assert strike.landed == set(VICTIM), f"{target} was not given {set(VICTIM) - strike.landed}"
    for name in NEIGHBOURS:
        assert lasting(found[name]) == lasting(clean[name]), name
        assert found[name]["status"] == "labelled"
    for name, error in ERROR_OF.items():
        row = found[name]
        assert row["status"] == "failed", (name, error)
        assert row["error_message"].isprintable()
        assert all(one["segmentation"] is None for one in row["instances"])
        assert row["error_code"] == code(error), (error, row["error_message"])


# ---------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------


def internal(error: BaseException) -> str:
    return "out_of_memory" if isinstance(error, MemoryError) else "internal"


def model_failed(error: BaseException) -> str:
    return "out_of_memory" if isinstance(error, MemoryError) else "model_failed"


def detector_failed(error: BaseException) -> str:
    return "out_of_memory" if isinstance(error, MemoryError) else "detector_failed"


def of_fetch(error: BaseException) -> str:
    """What a client's word on a uri, and a driver that is missing, mean before the store is asked."""
    if isinstance(error, UsageError):
        return "unreachable"
    if isinstance(error, UnicodeError | NotImplementedError | botocore.exceptions.ParamValidationError):
        return "uri_refused"
    return internal(error)


def of_store(error: BaseException) -> str:
    """What an error of a store means for one image."""
    verdict = classify(error)
    if isinstance(error, HqlabelError) or verdict.kind == "bug":
        return of_fetch(error)
    if verdict.kind == "retry":
        return "unreachable"
    return verdict.code if verdict.kind == "image" else verdict.alone


@pytest.mark.parametrize("target", IN_FETCH)
def test_errors_before_the_store_is_asked(target: str, given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(given, target, of_fetch, monkeypatch)


@pytest.mark.parametrize("target", IN_STORE)
def test_errors_of_the_store(target: str, given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(given, target, of_store, monkeypatch)


@pytest.mark.parametrize("target", IN_DECODE)
def test_errors_in_decoding(target: str, given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(given, target, internal, monkeypatch)


@pytest.mark.parametrize("target", [*IN_DECODE[:1], *IN_DECODE[-2:]])
def test_errors_in_decoding_for_a_detector(
    target: str, detected: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(detected, target, internal, monkeypatch)


@pytest.mark.parametrize("target", IN_SEGMENT)
def test_errors_in_resolving_boxes(target: str, given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(given, target, internal, monkeypatch)


@pytest.mark.parametrize("target", IN_MODEL)
def test_errors_in_the_model(target: str, given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(given, target, model_failed, monkeypatch)


@pytest.mark.parametrize("target", IN_DETECTOR)
def test_errors_in_the_detector(target: str, detected: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(detected, target, detector_failed, monkeypatch)


@pytest.mark.parametrize("target", IN_COMMIT)
def test_errors_in_the_commit(target: str, given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(given, target, internal, monkeypatch)


def test_errors_in_the_commit_of_detected_boxes(detected: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    check(detected, IN_COMMIT[-2], internal, monkeypatch)


def ended_by_ray() -> SystemExit:
    end = SystemExit(0)
    end.ray_terminate_msg = "the node is drained"  # type: ignore[attr-defined]
    return end


NO_IMAGES = [KeyboardInterrupt(), FailPointReached("x"), BaseExceptionGroup("g", [KeyboardInterrupt()])]


@pytest.mark.parametrize("error", [*NO_IMAGES, ended_by_ray()], ids=of_errors)
@pytest.mark.parametrize("target", [IN_DECODE[0], IN_MODEL[0], IN_COMMIT[1]])
def test_what_is_no_images_is_let_through(
    target: str, error: BaseException, given: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    Strike(monkeypatch, target, error)
    with pytest.raises(type(error)):
        given.run()


def test_a_tag_that_no_table_can_hold_is_escaped(given: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any, **kwargs: Any) -> FetchedObject:
        return replace(read_objects.read_object(*args, **kwargs), etag="\udcff\x00")

    monkeypatch.setattr("hqlabel.pipeline.images.fetch.read_object", read)
    assert {row["source_etag"] for row in given.run().values()} == {"\\udcff\\x00"}


# ---------------------------------------------------------------------------------------------
# Deaths
# ---------------------------------------------------------------------------------------------

LONE = "0003.png"
AT_AN_IMAGE = {"prepare": IN_DECODE[0], "commit": "hqlabel.pipeline.tables.unit_table._measured"}


def starts_of(unit: Unit, stage: Literal["prepare", "commit"], most: int) -> tuple[int, dict[str, Any]]:
    """How often a process died over the unit, and its rows; each start has the marks of those before it."""
    store, generation = Store(unit.job.context.output), next(_generations)
    for deaths in range(most):
        restart = Restart(store, epoch=1, stage=stage) if deaths else None
        try:
            return deaths, unit.run(generation, **{stage: restart})
        except FailPointReached:
            continue
    raise AssertionError(f"still dying after {most} starts")


@pytest.mark.parametrize("stage", ["prepare", "commit"])
def test_an_image_over_which_a_task_dies_is_given_up_after_three_deaths(
    stage: Literal["prepare", "commit"], few: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = few.clean
    monkeypatch.setitem(ERROR_OF, LONE, FailPointReached("death"))
    monkeypatch.setattr(sys.modules[__name__], "VICTIM", {LONE: VICTIM[LONE]})
    monkeypatch.setattr(sys.modules[__name__], "BY_DATA", {DATA[LONE]: LONE})
    Strike(monkeypatch, AT_AN_IMAGE[stage])

    deaths, found = starts_of(few, stage, 6)

    assert deaths == 3
    assert found[LONE]["error_code"] == "crashed"
    assert f"in {stage} died each time" in found[LONE]["error_message"]
    assert LONE in found[LONE]["error_message"]
    assert all(lasting(found[name]) == lasting(clean[name]) for name in found if name != LONE)


@pytest.mark.parametrize(
    ("stage", "call"),
    [
        ("prepare", "read_unit"),
        ("prepare", "stop_if_most_images_fail"),
        ("commit", "read_unit"),
        ("commit", "put_unit"),
    ],
)
def test_a_task_that_dies_with_no_image_in_work_stops_the_job_and_charges_none(
    stage: Literal["prepare", "commit"], call: str, few: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise FailPointReached("death")

    monkeypatch.setattr(f"hqlabel.pipeline.stages.{stage}.{call}", die)
    with pytest.raises(SystemicFault, match=f"5 processes died .* in {stage} of unit 0") as caught:
        starts_of(few, stage, 9)
    assert caught.value.code == "resources"
