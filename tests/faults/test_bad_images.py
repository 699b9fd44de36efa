"""Rows 5 to 7, 48 to 50, 57 and 58: what one image, the device or many boxes do to a job, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from hqlabel.jobs.job_setup.check_models import read_checkpoint
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.model.records import SegmentFailure
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.stages.segment import SegmentWorker, deadline_s
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests.e2e.scenes import picture, small_checkpoint
from tests.fakes import harmful_picture, trouble
from tests.faults.chain import do_unit, in_child
from tests.faults.conftest import Record
from tests.model.test_segmenter import (
    CONFIG,
    SHAPE,
    as_bytes,
    hooked,
    is_marked,
    marked,
    run_out,
    some_images,
)
from tests.parity.lively import lively
from tests.pipeline.made_jobs import MadeJob, make_job, noise, png
from tests.table_digest import mask_columns_digest

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]


def rows_of(job: MadeJob) -> dict[str, dict]:
    """Every committed row by image id, and a proof that there is one for each planned image."""
    store = Store(job.context.output)
    found = [
        row for unit in list_committed(store).values() for row in read_committed(store, unit).to_pylist()
    ]
    assert [row["image_id"] for row in found] == job.plan.table["image_id"].to_pylist()
    return {row["image_id"]: row for row in found}


def codes_of(job: MadeJob) -> dict[str, str]:
    return {image_id: row["error_code"] for image_id, row in rows_of(job).items() if row["error_code"]}


# ---------------------------------------------------------------------------------------------
# Rows 5 to 7
# ---------------------------------------------------------------------------------------------

DECODERS = {
    "crash": (5, "crashed"),
    "kill": (5, "crashed"),
    "sleep": (6, "timeout"),
    "spin": (6, "timeout"),
    "bomb": (7, "out_of_memory"),
}


def test_rows_5_6_7_a_picture_that_harms_its_decoder_costs_its_own_row(
    tmp_path: Path, record: Record
) -> None:
    pictures = {f"{n}.png": png(noise(n)) for n in range(8)}
    names = dict(zip(DECODERS, sorted(pictures)[1:6], strict=True))
    pictures |= {names[kind]: trouble(kind) for kind in DECODERS}
    job = make_job(tmp_path, pictures, limits=Limits(decode_timeout_s=2, decode_memory_bytes=2**29))
    child = DecodeChild(job.context.limits, 64, decoder="tests.fakes:troubled_decoder")
    began = time.monotonic()
    for unit_id in job.unit_ids:
        store = Store(job.context.output)
        unit, _ = prepare_unit(UnitRow(unit_id=unit_id), job.context, store, child)
        done = SegmentWorker(job.context, epoch=1, use_gpu=False).run(unit)
        read_outcome(commit_unit(done, job.context, store))
    child.close()
    seconds = time.monotonic() - began
    assert codes_of(job) == {names[kind]: code for kind, (_, code) in DECODERS.items()}
    record(5, 6, 7, fault="decoder crashes, is killed, sleeps, spins, is bombed", landed=len(DECODERS),
           recover_s=seconds, code="0")  # fmt: skip


def work(context: JobContext, unit_ids: list[int]) -> None:
    """What one worker of driver 1 does."""
    done = list_committed(Store(context.output))
    for unit_id in unit_ids:
        if unit_id not in done:
            do_unit(UnitRow(unit_id=unit_id), context)


@pytest.mark.parametrize(
    ("row", "kind", "code"),
    [
        (5, "exit", "crashed"),
        (6, "sleep", "timeout"),
        pytest.param(5, "crash", "crashed", marks=pytest.mark.faults),
        pytest.param(6, "spin", "crashed", marks=pytest.mark.faults),
    ],
)
def test_rows_5_6_a_picture_that_kills_its_model_process_is_given_up_after_three_deaths(
    row: int, kind: str, code: str, tmp_path: Path, record: Record
) -> None:
    """A loop that never lets go of the interpreter cannot leave a word of its own: it counts as a crash."""
    pictures = {f"{n}.png": png(noise(n)) for n in range(4)} | {"2.png": png(harmful_picture(kind))}
    job = make_job(tmp_path, pictures, limits=Limits(segment_timeout_s=1.0))
    began, deaths = time.monotonic(), 0
    while in_child(work, job.context, job.unit_ids) != 0:
        deaths += 1
        assert deaths <= 3
    assert codes_of(job) == {"2.png": code}
    assert sum(row["status"] == "labelled" for row in rows_of(job).values()) == 3
    record(row, fault=f"picture makes the model process {kind}", landed=deaths,
           recover_s=time.monotonic() - began, code="0")  # fmt: skip


def test_deadlines_scale_with_the_boxes() -> None:
    limits = Limits(segment_timeout_s=300)
    assert deadline_s(limits, 0) == 300
    assert deadline_s(limits, 10_000) == 300 * 101


# ---------------------------------------------------------------------------------------------
# Rows 48 to 50
# ---------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_row_48_memory_of_the_device_runs_out_in_a_call_and_for_an_image(record: Record) -> None:
    model = lively(CONFIG)
    segmenter = Segmenter(model, call_shape=SHAPE)
    images = some_images()
    images[3] = marked(images[3])
    expected = [as_bytes(one) for one in segmenter.segment_prepared(images)]
    landed = [0]

    def out() -> BaseException:
        landed[0] += 1
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    calls = iter(range(1000))
    with hooked(model.image_encoder, run_out(out, lambda _: next(calls) == 1)):
        once = segmenter.segment_prepared(images)
    assert [as_bytes(one) for one in once] == expected

    with hooked(model.image_encoder, run_out(out, lambda x: bool(is_marked(x).any()))):
        results = segmenter.segment_prepared(images)
    failed = results.pop(3)
    assert isinstance(failed, SegmentFailure)
    assert failed.code == "out_of_memory"
    assert [as_bytes(one) for one in results] == expected[:3] + expected[4:]
    record(48, fault="CUDA out of memory, once and for one image", landed=landed[0], code="0")


def test_row_49_a_lost_device_ends_its_process_and_no_image_is_marked(
    tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process proves its device on a blank image first; where that fails too, the job stops."""
    pictures = {f"{n}.png": png(noise(n)) for n in range(4)} | {"1.png": png(harmful_picture("device"))}
    job = make_job(tmp_path, pictures)
    assert in_child(work, job.context, job.unit_ids) == 1
    assert list_committed(Store(job.context.output)) == {}

    from tests import fakes

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fakes.BoxSegmenter, "segment_prepared", lost)
    worker = SegmentWorker(job.context, epoch=1, use_gpu=True, restarted="a")
    done = worker.run(UnitRow(unit_id=0))
    assert isinstance(done.fault, SystemicFault)
    assert (done.fault.code, done.fault.exit_code) == ("device", 5)
    assert list_committed(Store(job.context.output)) == {}
    record(49, fault="device lost in a call, then for good", landed=2, code="5")


def test_row_50_numbers_that_are_not_finite_cost_their_image(tmp_path: Path, record: Record) -> None:
    pictures = {f"{n}.png": png(noise(n)) for n in range(6)} | {"2.png": png(harmful_picture("nan"))}
    job = make_job(tmp_path, pictures)
    work(job.context, job.unit_ids)
    assert codes_of(job) == {"2.png": "non_finite"}
    for row in rows_of(job).values():
        for one in row["instances"]:
            scores = [one["predicted_iou"], one["stability_score"], one["box_iou"]]
            assert all(score is None or np.isfinite(score) for score in scores)
    record(50, fault="NaN logits of one image", landed=1, code="0")


# ---------------------------------------------------------------------------------------------
# Rows 57 and 58: the real network, small
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("weights") / "small")


def network_job(folder: Path, weights: Path, images: int, **options: object) -> MadeJob:
    pictures = {f"{n:03}.png": png(picture(n)) for n in range(images)}
    record_of_weights = read_checkpoint(ConfigSources(flags={"model.checkpoint": str(weights)}).load())
    return make_job(
        folder, pictures, segmenter="hqlabel.pipeline.stages.load_model:load_segmenter",
        weights=record_of_weights, limits=Limits(segment_timeout_s=300), **options,
    )  # fmt: skip


def digest(job: MadeJob) -> str:
    """Of every row, but for its unit and what names the picture's file: those differ between two jobs."""
    store = Store(job.context.output)
    tables = [read_committed(store, unit) for unit in list_committed(store).values()]
    return mask_columns_digest(pa.concat_tables(tables).drop_columns(["unit_id", "image_uri", "source_etag"]))


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("images", [12, 200])
def test_row_57_masks_are_the_same_bytes_whatever_happens(
    images: int, weights: Path, tmp_path: Path, record: Record
) -> None:
    made = network_job(tmp_path / "a", weights, images, images_per_unit=4)
    work(made.context, made.unit_ids)
    wanted, landed = digest(made), 0

    shuffled = at_another_place(made, tmp_path / "b")
    order = list(np.random.default_rng(0).permutation(made.unit_ids))
    code = in_child(
        _with_threads, shuffled.context, order, 1, failpoint="commit.created=kill@2", timeout_s=250
    )
    assert code == -signal.SIGKILL
    assert in_child(_with_threads, shuffled.context, order, 2, timeout_s=500) == 0
    assert digest(shuffled) == wanted
    landed += 1

    other_units = network_job(tmp_path / "c", weights, images, images_per_unit=7)
    work(other_units.context, other_units.unit_ids)
    assert digest(other_units) == wanted
    landed += 1
    fault = f"{images} images: units shuffled, begun with threads 1 and 2, killed, units of 7"
    record(57, fault=fault, landed=landed, code="same bytes")


def at_another_place(made: MadeJob, folder: Path) -> MadeJob:
    from hqlabel.pipeline.job_context import Place
    from hqlabel.pipeline.planning.make_plan import write_plan

    context = replace(made.context, output=Place(uri=str(folder)))
    write_plan(Store(context.output), made.plan)
    return replace(made, context=context)


def _with_threads(context: JobContext, order: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    work(context, [int(unit_id) for unit_id in order])
    assert torch.get_num_threads() == context.model.cpu_threads  # whatever the process began with


@pytest.mark.faults
def test_row_58_memory_is_flat_from_one_box_to_ten_thousand(
    weights: Path, tmp_path: Path, record: Record
) -> None:
    """The peak of the whole way of one image, segment and commit, above what the loaded model holds."""
    peaks = {}
    for boxes in (1, 10, 100, 1_000, 10_000):
        peaks[boxes] = _peak_mib(tmp_path / str(boxes), weights, boxes)
    slope = (peaks[10_000] - peaks[1_000]) / 9
    assert slope < 25, peaks  # all masks of 10,000 boxes at once would be 700 MB for this picture
    told = ", ".join(f"{boxes}: {peak:.0f}" for boxes, peak in peaks.items())
    record(58, fault=f"boxes on one image; peak MiB above the model: {told}; {slope:.1f} MiB per 1,000 boxes",
           landed=len(peaks), code="0")  # fmt: skip


def _peak_mib(folder: Path, weights: Path, boxes: int) -> float:
    rng = np.random.default_rng(boxes)
    start = rng.uniform(0, (240, 180), (boxes, 2))
    given = np.concatenate([start, start + rng.uniform(6, (70, 50), (boxes, 2))], axis=1)
    job = network_job(folder, weights, 5, boxes={"004.png": given.round(2).tolist()}, images_per_unit=5)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    child = context.Process(target=_measure, args=(job.context, told))
    child.start()
    peak = told.get(timeout=500)
    child.join(30)
    answered = rows_of(job)["004.png"]
    assert answered["status"] == "labelled"
    assert len(answered["instances"]) == boxes
    return float(peak)


def _measure(context: JobContext, told: multiprocessing.Queue) -> None:
    store = Store(context.output)
    child = DecodeChild(context.limits, context.weights.input_side)
    unit, _ = prepare_unit(UnitRow(unit_id=0), context, store, child)
    worker = SegmentWorker(context, epoch=1, use_gpu=False)
    before = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    read_outcome(commit_unit(worker.run(unit), context, store))
    told.put((_status_kib("VmHWM") - before) / 1024)
    told.close()
    told.join_thread()
    os._exit(0)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
