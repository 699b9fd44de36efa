"""One process with the model: what it makes of a unit, and how an image that kills it is found out."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from hqlabel.model.checkpoints import DEMO_FOLDER, load
from hqlabel.model.records import SegmentFailure
from hqlabel.model.rle import compress_lengths
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.settings import Limits, ModelSettings
from hqlabel.pipeline.stages.commit import commit_unit
from hqlabel.pipeline.stages.crash_log import is_device_lost
from hqlabel.pipeline.stages.detect import MOST_RAISED
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
from hqlabel.pipeline.stages.segment import SegmentWorker, deadline_s
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests import fakes
from tests.fakes import box_masks, harmful_picture, trouble
from tests.pipeline.made_jobs import BOXES, make_job, noise, png


class Ended(Exception):
    """Stands for the end of the process in tests that live on."""


def end(status):
    raise Ended(status)


@pytest.fixture(scope="module")
def child():
    made = DecodeChild(Limits(decode_timeout_s=5), 64, decoder="tests.fakes:troubled_decoder")
    yield made
    made.close()


def prepared(job, child, unit_id=0):
    unit, _ = prepare_unit(UnitRow(unit_id=unit_id), job.context, Store(job.context.output), child)
    return unit


def worker(job, **options):
    return SegmentWorker(job.context, **({"epoch": 1, "use_gpu": False, "end_process": end} | options))


def codes(unit):
    return {image.planned["image_id"]: image.error_code for image in unit.images}


def drawn(box, height=48, width=64):
    x1, y1, x2, y2 = (round(v) for v in box)
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def test_each_call_of_the_model_is_told_as_it_ends(tmp_path, child):
    job = make_job(tmp_path, {f"{i}.png": png(noise(i)) for i in range(3)}, {"1.png": []})
    told = []

    worker(job, tell=lambda *what: told.append(what)).run(prepared(job, child))

    assert [what[:3] for what in told] == [(0, 1, 0), (0, 2, 0)]  # the one without boxes needs no call
    assert all(what[3] >= 0 for what in told)


def test_every_usable_box_has_its_mask_and_the_pixels_are_gone(tmp_path, child):
    given = [BOXES[0], [9, 9, 3, 3], BOXES[1], [float("nan")] * 4]
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))}, {"a.png": given})

    found = worker(job).run(prepared(job, child))

    first = found.images[0].instances
    masks = coco_mask.decode([{"size": [48, 64], "counts": text} for text in first.counts])
    assert np.array_equal(np.moveaxis(masks, 2, 0), np.stack([drawn(given[0]), drawn(given[2])]))
    assert len(found.images[1].instances.counts) == 2
    assert first.predicted_iou[0] == pytest.approx(
        np.asarray(noise(1).resize((64, 48))).mean() / 255, abs=1e-3
    )
    assert [image.pixels_hwc for image in found.images] == [None, None]
    assert all(image.attempts == 1 and image.segment_ms >= 0 for image in found.images)


def test_a_crowd_is_shown_to_no_model_and_its_image_is_labelled_all_the_same(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))})
    unit, arena = prepare_unit(UnitRow(unit_id=0), job.context, Store(job.context.output), child)
    for image, crowds in zip(unit.images, ([True, None], [True, True]), strict=True):
        for box, crowd in zip(image.planned["boxes"], crowds, strict=True):
            box["iscrowd"] = crowd

    mixed, alone = worker(job).run(unpack(pack(unit, arena))).images

    [runs] = mixed.instances.counts
    assert np.array_equal(coco_mask.decode({"size": [48, 64], "counts": runs}), drawn(BOXES[1]))
    assert (alone.instances, alone.error_code) == (None, None)


def test_a_unit_is_the_same_through_arrow_and_without(tmp_path, child):
    job = make_job(tmp_path, {f"{i}.png": png(noise(i)) for i in range(4)})
    unit, arena = prepare_unit(UnitRow(unit_id=0), job.context, Store(job.context.output), child)

    through = worker(job).run(unpack(pack(unit, arena)))
    straight = worker(job).run(unit)

    for one, other in zip(through.images, straight.images, strict=True):
        assert one.instances.counts == other.instances.counts
        assert np.array_equal(one.instances.predicted_iou, other.instances.predicted_iou)


def test_call_shapes_of_several_images_give_the_same_as_one(tmp_path, child):
    job = make_job(tmp_path, {f"{i}.png": png(noise(i)) for i in range(7)}, images_per_unit=7)
    several = replace(job.context, model=ModelSettings(dtype="float32", images_per_call=3, boxes_per_call=16))
    unit = prepared(job, child)

    one = worker(job).run(unit)
    three = SegmentWorker(several, epoch=1, use_gpu=False, end_process=end).run(unit)

    assert [i.instances.counts for i in one.images] == [i.instances.counts for i in three.images]


def test_images_that_failed_or_need_no_model_pass_through(tmp_path, child):
    pictures = {"a.png": png(noise(1)), "b.png": b"", "c.png": png(noise(3)), "d.png": trouble("exit")}
    job = make_job(tmp_path, pictures, {"c.png": []})

    found = worker(job).run(prepared(job, child))

    assert codes(found) == {"a.png": None, "b.png": "empty", "c.png": None, "d.png": "crashed"}
    assert [image.instances is None for image in found.images] == [False, True, True, True]


def test_numbers_that_are_not_finite_cost_their_image(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(harmful_picture("nan"))})

    assert codes(worker(job).run(prepared(job, child))) == {"a.png": None, "b.png": "non_finite"}


def test_an_image_that_kills_is_failed_after_three_deaths_and_its_neighbours_are_labelled(tmp_path, child):
    pictures = {"a.png": png(noise(1)), "b.png": png(harmful_picture("device")), "c.png": png(noise(3))}
    job = make_job(tmp_path, pictures)
    unit = prepared(job, child)

    for _ in range(3):
        with pytest.raises(Ended):
            worker(job).run(unit)
    found = worker(job).run(unit)

    assert codes(found) == {"a.png": None, "b.png": "crashed", "c.png": None}
    assert {image.attempts for image in found.images} == {4}


def test_an_image_that_hangs_is_failed_as_timeout(tmp_path, child):
    pictures = {"a.png": png(noise(1)), "b.png": png(harmful_picture("sleep"))}
    job = make_job(tmp_path, pictures, limits=Limits(segment_timeout_s=0.5))
    unit, began = prepared(job, child), time.monotonic()

    starts = 0
    while True:
        # Another process for each start: a sleeping thread cannot be raised from.
        starts += 1
        if run_in_process(job, unit, tmp_path) == 0:
            break
    found = pickle.loads((tmp_path / "found.pickle").read_bytes())

    assert codes(found) == {"a.png": None, "b.png": "timeout"}
    assert starts <= 4
    assert time.monotonic() - began < 60


def run_in_process(job, unit, folder, *, first="pass"):
    """The exit status of a process that runs the unit; its result is left in the folder."""
    (folder / "unit.pickle").write_bytes(pickle.dumps((job.context, unit)))
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import pickle, pathlib; from hqlabel.pipeline.stages import crash_log, segment\n"
        f"folder = pathlib.Path({str(folder)!r}); {first}\n"
        "context, unit = pickle.loads((folder / 'unit.pickle').read_bytes())\n"
        "found = segment.SegmentWorker(context, epoch=1, use_gpu=False).run(unit)\n"
        "(folder / 'found.pickle').write_bytes(pickle.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    return done.returncode


def test_a_hang_that_keeps_the_interpreter_ends_too(tmp_path, child):
    pictures = {"a.png": png(harmful_picture("spin"))}
    job = make_job(tmp_path, pictures, limits=Limits(segment_timeout_s=0.3))
    began = time.monotonic()

    assert run_in_process(job, prepared(job, child), tmp_path, first="crash_log._BACKSTOP_S = 1") == 1

    assert time.monotonic() - began < 30


def test_a_broken_device_stops_the_job_and_marks_no_image(tmp_path, child, monkeypatch):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    monkeypatch.setattr("tests.fakes.BoxSegmenter.segment_prepared", lost)

    found = worker(job, restarted="w1").run(prepared(job, child))

    assert found.fault.code == "device"
    assert found.images == ()
    assert [e.key for e in Store(job.context.output).list("attempts/")] == ["attempts/model.1.w1.json"]


def test_processes_that_die_over_their_weights_are_not_started_for_ever(tmp_path, child, monkeypatch):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    unit = prepared(job, child)
    assert worker(job, restarted="w1").run(unit).fault is None

    monkeypatch.setattr("tests.fakes.box_segmenter", lambda context, use_gpu: end(137))
    for _ in range(3):
        with pytest.raises(Ended):
            worker(job, restarted="w1")
    found = worker(job, restarted="w1").run(unit)

    assert found.fault.code == "resources"
    assert "3 processes died" in found.fault.message


def lost(self, images):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_weights_that_are_not_the_jobs_stop_the_job(tmp_path, child):
    checkpoint = tmp_path / "w.pth"
    checkpoint.write_bytes(b"not weights")
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    weights = replace(job.context.weights, source=str(checkpoint))
    context = replace(
        job.context, weights=weights, segmenter="hqlabel.pipeline.stages.load_model:load_segmenter"
    )

    found = SegmentWorker(context, epoch=1, use_gpu=False).run(prepared(job, child))

    assert found.fault.code == "weights"
    assert str(checkpoint) in found.fault.message


def test_a_job_of_compiled_calls_stops_where_there_is_no_gpu(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    model = job.context.model.model_copy(update={"compile": True})
    context = replace(job.context, model=model, segmenter="hqlabel.pipeline.stages.load_model:load_segmenter")

    found = SegmentWorker(context, epoch=1, use_gpu=False).run(prepared(job, child))

    assert found.fault.code == "device"
    assert "model.compile=true" in found.fault.message


@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_on_a_cpu_computes_with_the_threads_of_the_job(tmp_path, threads):
    """Sums are rounded otherwise by other numbers of threads, so the process must not choose."""
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    weights = load(DEMO_FOLDER).weights
    context = replace(
        job.context,
        weights=replace(job.context.weights, source="demo", sha256=weights.sha256, input_side=512),
        model=job.context.model.model_copy(update={"cpu_threads": threads}),
        segmenter="hqlabel.pipeline.stages.load_model:load_segmenter",
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        SegmentWorker(context, epoch=1, use_gpu=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_fault_from_before_is_passed_on(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    fault = SystemicFault("denied", "no")

    assert worker(job).run(UnitRow(unit_id=0, fault=fault)).fault is fault


ERRORS = [
    (ValueError("runs"), "model_failed"),
    (IndexError("3 of 2"), "model_failed"),
    (OverflowError("int too large"), "model_failed"),
    (RecursionError("deep"), "model_failed"),
    (AssertionError(), "model_failed"),
    (RuntimeError("size mismatch \x1b[31m"), "model_failed"),
    (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "model_failed"),
    (MemoryError(), "out_of_memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: out of memory"), "out_of_memory"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("images_per_call", [1, 3])
def test_whatever_is_raised_on_an_image_costs_that_image_alone(
    tmp_path, child, monkeypatch, error, code, images_per_call
):
    pictures = {f"{i}.png": png(noise(i)) for i in range(5)} | {"2.png": png(harmful_picture("bug"))}
    job = make_job(tmp_path, pictures, images_per_unit=5)
    model = ModelSettings(dtype="float32", images_per_call=images_per_call, boxes_per_call=16)
    monkeypatch.setitem(fakes._HARM, "bug", lambda: raise_(error))
    unit = prepared(job, child)

    found = SegmentWorker(replace(job.context, model=model), epoch=1, use_gpu=False).run(unit)

    assert codes(found) == {"0.png": None, "1.png": None, "2.png": code, "3.png": None, "4.png": None}
    assert found.images[2].error_message.startswith(type(error).__name__)
    assert found.images[2].error_message.isprintable()
    alone = worker(make_job(tmp_path / "alone", {"0.png": pictures["0.png"]})).run
    assert found.images[0].instances.counts == alone(unit).images[0].instances.counts


def raise_(error):
    raise error


def raise_key_error(self, images):
    raise KeyError("a bug in the model")


def test_a_model_that_raises_on_a_blank_picture_too_stops_the_job_and_marks_no_image(
    tmp_path, child, monkeypatch
):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))})
    unit, tried = prepared(job, child), worker(job)
    monkeypatch.setattr("tests.fakes.BoxSegmenter.segment_prepared", raise_key_error)

    for found in (tried.run(unit), worker(job, restarted="w1").run(unit)):
        assert (found.fault.code, found.images) == ("model", ())
        assert "KeyError: 'a bug in the model'" in found.fault.message


def test_a_model_that_never_works_on_an_image_stops_the_job(tmp_path, child):
    bad = {f"{i:02}.png": png(harmful_picture("bug")) for i in range(MOST_RAISED)}
    job = make_job(tmp_path, bad | {"99.png": png(noise(1))}, images_per_unit=MOST_RAISED + 1)
    good = make_job(
        tmp_path / "good", {"00.png": png(noise(1))} | dict(list(bad.items())[1:]), images_per_unit=99
    )
    none_yet, has_worked = worker(job), worker(good)

    fault = none_yet.run(prepared(job, child)).fault

    assert fault.code == "model"
    assert f"none of the first {MOST_RAISED} images" in fault.message
    for _ in range(2):
        assert Counter(codes(has_worked.run(prepared(good, child))).values()) == {
            None: 1,
            "model_failed": MOST_RAISED - 1,
        }


def test_a_mask_prompt_that_raises_costs_its_image_alone(tmp_path, child, monkeypatch):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))})
    unit = prepared(job, child)
    mask = {"size": [48, 64], "counts": compress_lengths([48 * 64])}
    unit.images[0].planned["boxes"][1]["prompt_mask"] = mask
    monkeypatch.setattr("tests.fakes.BoxSegmenter.mask_prompt", lambda *_: raise_(ValueError("odd")))

    assert codes(worker(job).run(unit)) == {"a.png": "model_failed", "b.png": None}


@pytest.mark.parametrize("lost", ["some", "all"])
def test_numbers_that_are_not_finite_for_one_kind_of_prompt_cost_its_boxes_alone(
    tmp_path, child, monkeypatch, lost
):
    job = make_job(tmp_path, {"a.png": png(noise(1))}, {"a.png": [BOXES[0], BOXES[1], BOXES[0]]})
    unit = prepared(job, child)
    unit.images[0].planned["boxes"][1] |= {"points_xy": [5.0, 6.0], "point_labels": [1]}

    def segment_prepared(self, images):
        bad = SegmentFailure(code="non_finite", message="not finite")
        with_points = [image.prompts.points_xy is not None for image in images]
        return [
            bad if lost == "all" or has else box_masks(one)
            for one, has in zip(images, with_points, strict=True)
        ]

    monkeypatch.setattr("tests.fakes.BoxSegmenter.segment_prepared", segment_prepared)
    found = unpack(pack(worker(job).run(unit)))
    commit_unit(found, job.context, Store(job.context.output))
    [row] = read_unit_rows(job)

    if lost == "all":
        assert (row["status"], row["error_code"]) == ("failed", "non_finite")
        return
    assert row["status"] == "labelled"
    assert [one["box_error"] for one in row["instances"]] == [None, "non_finite", None]
    assert [one["segmentation"] is None for one in row["instances"]] == [False, True, False]
    assert row["instances"][1]["predicted_iou"] is None
    assert row["instances"][0]["segmentation"] == row["instances"][2]["segmentation"]


def read_unit_rows(job):
    store = Store(job.context.output)
    return read_committed(store, list_committed(store)[0]).to_pylist()


@pytest.mark.parametrize("masks", [0, 1, 3])
def test_a_model_that_answers_with_another_number_of_masks_is_found_out(tmp_path, child, monkeypatch, masks):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))})

    def segment_prepared(self, images):
        return [box_masks(images[0])] * masks

    monkeypatch.setattr("tests.fakes.BoxSegmenter.segment_prepared", segment_prepared)
    expected = (
        {"a.png": None, "b.png": None} if masks == 1 else dict.fromkeys(("a.png", "b.png"), "model_failed")
    )

    assert codes(worker(job).run(prepared(job, child))) == expected


def test_a_unit_without_work_for_the_model_leaves_no_mark(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1))}, {"a.png": []})

    worker(job).run(prepared(job, child))

    assert Store(job.context.output).list("attempts/") == []


def test_deadlines_grow_with_the_boxes():
    limits = Limits(segment_timeout_s=10)

    assert [deadline_s(limits, boxes) for boxes in (0, 100, 1000)] == [10, 20, 110]


def test_lost_devices_are_told_from_lack_of_memory():
    assert is_device_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_device_lost(type("AcceleratorError", (RuntimeError,), {})("unspecified launch failure"))
    assert not is_device_lost(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_device_lost(RuntimeError("CUDA error: out of memory"))
    assert not is_device_lost(ValueError("boxes"))
