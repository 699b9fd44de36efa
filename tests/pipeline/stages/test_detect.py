"""A detector in the job: its boxes become the images' boxes; what it does wrong stays with its picture."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hqlabel.model.detectors import Category, Detections
from hqlabel.model.records import resize_longest_side
from hqlabel.pipeline.errors import JobRefused, SystemicFault
from hqlabel.pipeline.failpoints import FailPointReached
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.job_context import BoxRules, JobDetector
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.detect import load_detector, try_out
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from hqlabel.pipeline.tables.verify_output import verify
from tests.docs.markdown import blocks
from tests.pipeline.made_jobs import SIDE, make_job, noise, png

ROOT = Path(__file__).resolve().parents[3]

LONGEST = 40
KILLER = (1, 2, 3)


class Corners:
    """Finds three boxes by the size of the picture alone; harms its process where a colour says so."""

    name, license = "corners", "MIT"
    categories = (Category(id=1, name="left"), Category(id=5, name=None))

    def __init__(self, version: str = "1", wrong: str = "") -> None:
        self._version, self._wrong = version, wrong
        self.calls: list[list[tuple[int, ...]]] = []

    def fingerprint(self) -> str:
        return f"corners {self._version}"

    def detect(self, images):
        self.calls.append([image.shape for image in images])
        if self._wrong == "count":
            return []
        return [self._found(image) for image in images]

    def _found(self, image: np.ndarray) -> Detections:
        height, width = image.shape[:2]
        if image.max() == 0:
            raise KeyError("a black picture")
        if image.min() == 255:
            return Detections(boxes_xyxy=np.zeros((0, 4)), category_ids=np.zeros(0, int), scores=np.zeros(0))
        if tuple(image[0, 0]) == KILLER:
            raise FailPointReached("the process ends")
        boxes = [[0, 0, width / 2, height], [0, 0, width, height / 2], [1, 1, 2, 2], [0, 0, 3, 3]]
        ids = {"category": [1, 5, 1, 9], "float": [1.0, 5.0, 1.0, 1.0]}.get(self._wrong, [1, 5, 1, 1])
        return Detections(
            boxes_xyxy=np.array(boxes, np.float32)[:, : 3 if self._wrong == "shape" else 4],
            category_ids=np.array(ids),
            scores=np.array([0.6, 0.9, 0.3, 0.31])[: 3 if self._wrong == "scores" else 4],
            box_ids=["a", "b", "c", "d"],
        )


def settings(**fields) -> JobDetector:
    name = "tests.pipeline.stages.test_detect:Corners"
    return JobDetector(**({"name": name, "fingerprint": "corners 1", "longest_side": LONGEST} | fields))


@pytest.fixture(scope="module")
def child():
    made = DecodeChild(Limits(decode_timeout_s=5), SIDE, detector_side=LONGEST)
    yield made
    made.close()


def made(tmp_path, pictures, detector=None, **context):
    """A job over pictures without boxes, whose boxes a detector is to find."""
    job = make_job(tmp_path, pictures, {name: [] for name in pictures}, **context)
    changed = replace(
        job.context,
        detector=detector or settings(),
        decoder="hqlabel.pipeline.images.decode_upright:decode_image",
    )
    return replace(job, context=changed)


def worked(job, child, unit_id=0, **options):
    """The unit through all stages, as Ray's processes would run it; its committed rows by image id."""
    store = Store(job.context.output)
    ready = unpack(pack(*prepare_unit(UnitRow(unit_id=unit_id), job.context, store, child)))
    done = unpack(pack(SegmentWorker(job.context, epoch=1, use_gpu=False, **options).run(ready)))
    read_outcome(commit_unit(done, job.context, store))
    return {row["image_id"]: row for row in read_committed(store, list_committed(store)[unit_id]).to_pylist()}


def plain(value, size=(48, 64)):
    return png(Image.fromarray(np.full((*size, 3), value, np.uint8)))


def turned(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def test_the_boxes_found_are_upright_pixels_with_score_and_category(tmp_path, child):
    pictures = {"a.png": png(noise(1, 30, 100)), "b.png": turned(noise(2, 20, 80))}
    job = made(tmp_path, pictures | {"c.png": png(noise(3, 33, 100))})  # shown as 13 x 40: two scales

    rows = worked(job, child)

    first = rows["a.png"]["instances"]
    assert [one["prompt_bbox_given"] for one in first] == [
        [0, 0, 100, 15], [0, 0, 50, 30], [0, 0, 7.5, 7.5],
    ]  # fmt: skip
    assert [(one["category_id"], one["category_name"], one["box_id"]) for one in first] == [
        (5, None, "b"), (1, "left", "a"), (1, "left", "d"),
    ]  # fmt: skip
    assert [round(one["detector_score"], 3) for one in first] == [0.9, 0.6, 0.31]
    assert [one["prompt_bbox"] for one in first][:2] == [[0, 0, 100, 15], [0, 0, 50, 30]]
    assert all(one["segmentation"]["size"] == [30, 100] for one in first)
    assert [one["prompt_bbox_given"] for one in rows["b.png"]["instances"]][:2] == [
        [0, 0, 20, 40], [0, 0, 10, 80],
    ]  # fmt: skip
    np.testing.assert_allclose(
        [one["prompt_bbox_given"] for one in rows["c.png"]["instances"]],
        [[0, 0, 100, 16.5], [0, 0, 50, 33], [0, 0, 7.5, 3 * 33 / 13]],
        rtol=1e-6,
    )
    assert all(row["status"] == "labelled" and row["detect_ms"] > 0 for row in rows.values())


def test_the_detector_is_shown_the_upright_picture_never_enlarged_and_made_from_one_decoding(tmp_path):
    child = DecodeChild(Limits(), SIDE, detector_side=LONGEST)
    large, small, turned_one = noise(1, 60, 100), noise(2, 20, 30), noise(3, 30, 90)
    job = made(tmp_path, {"a.png": png(large), "b.png": png(small), "c.png": turned(turned_one)})

    unit, arena = prepare_unit(UnitRow(unit_id=0), job.context, Store(job.context.output), child)
    child.close()

    assert np.array_equal(unit.images[0].detector_pixels_hwc, resize_longest_side(np.asarray(large), LONGEST))
    assert np.array_equal(unit.images[1].detector_pixels_hwc, np.asarray(small))
    upright = np.asarray(turned_one.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(unit.images[2].detector_pixels_hwc, resize_longest_side(upright, LONGEST))
    assert [one.pixels_hwc.shape[:2] for one in unit.images] == [(38, 64), (43, 64), (64, 21)]
    travelled = unpack(pack(unit, arena))
    for one, other in zip(travelled.images, unit.images, strict=True):
        assert np.array_equal(one.detector_pixels_hwc, other.detector_pixels_hwc)
        assert np.array_equal(one.pixels_hwc, other.pixels_hwc)


def test_a_picture_of_the_models_own_size_is_not_kept_twice(tmp_path):
    child = DecodeChild(Limits(), SIDE, detector_side=SIDE)
    job = made(tmp_path, {"a.png": png(noise(1, 60, 100))}, settings(longest_side=SIDE))

    unit, _ = prepare_unit(UnitRow(unit_id=0), job.context, Store(job.context.output), child)
    rows = worked(job, child)
    child.close()

    assert unit.images[0].detector_pixels_hwc is None
    assert rows["a.png"]["instances"][0]["prompt_bbox_given"] == [0, 0, 100, 30]


def test_nothing_found_is_no_boxes_and_a_detector_that_raises_fails_its_picture_alone(tmp_path, child):
    pictures = {"a.png": plain(255), "b.png": plain(0), "c.png": png(noise(1)), "d.png": b"no picture"}
    job = made(tmp_path, pictures, settings(images_per_call=3))

    rows = worked(job, child)

    found = {name: (row["status"], row["error_code"]) for name, row in rows.items()}
    assert found == {
        "a.png": ("no_boxes", None),
        "b.png": ("failed", "detector_failed"),
        "c.png": ("labelled", None),
        "d.png": ("failed", "not_an_image"),
    }
    assert rows["b.png"]["error_message"] == "KeyError: 'a black picture'"
    assert rows["b.png"]["error_stage"] == "detect"
    assert rows["a.png"]["detect_ms"] > 0
    assert rows["d.png"]["detect_ms"] is None


ODD_ANSWERS = {
    "boxes of text": {"boxes_xyxy": [["a", "b", "c", "d"]]},
    "no boxes": {"boxes_xyxy": None},
    "ids in pairs": {"category_ids": np.array([[1, 5]])},
    "scores of text": {"scores": ["high"]},
    "ids that are no text": {"box_ids": ["\ud800"]},
    "an id of 64 bits": {"category_ids": np.array([2**40])},
    "no detections": None,
}


@pytest.mark.parametrize("odd", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_whatever_a_detector_answers_for_one_picture_costs_that_picture_alone(
    tmp_path, child, monkeypatch, odd
):
    sound = {"boxes_xyxy": np.array([[1, 1, 9, 9]]), "category_ids": np.array([1]), "scores": np.array([0.9])}
    answer = odd and Detections(**(sound | odd))
    found = Corners._found
    monkeypatch.setattr(Corners, "_found", lambda s, i: answer if i.max() == 0 else found(s, i))
    monkeypatch.setattr(Corners, "categories", (*Corners.categories, Category(id=2**40, name="far")))
    job = made(tmp_path, {"a.png": png(noise(1)), "b.png": plain(0)}, settings(images_per_call=2))

    rows = worked(job, child)

    assert {name: row["error_code"] for name, row in rows.items()} == {
        "a.png": None,
        "b.png": "detector_failed",
    }


@pytest.mark.parametrize("value", [1.7e308, -1e308, np.nan, np.inf])
def test_boxes_of_a_detector_that_lie_nowhere_cost_themselves(tmp_path, child, monkeypatch, value):
    found = Detections(
        boxes_xyxy=np.array([[1, 1, 9, 9], [1, 1, value, 9]]), category_ids=np.array([1, 1]), scores=None
    )
    monkeypatch.setattr(Corners, "_found", lambda *_: found)
    job = made(tmp_path, {"a.png": png(noise(1))}, settings())

    row = worked(job, child)["a.png"]

    assert row["status"] == "labelled"
    assert [one["box_error"] is None for one in row["instances"]] == [True, False]


def test_a_detector_that_raises_on_a_blank_picture_too_stops_the_job(tmp_path, child, monkeypatch):
    job = made(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))})
    unit = prepare_unit(UnitRow(unit_id=0), job.context, Store(job.context.output), child)[0]
    monkeypatch.setattr(Corners, "_found", lambda *_: {}["key"])

    found = SegmentWorker(job.context, epoch=1, use_gpu=False).run(unit)

    assert (found.fault.code, found.images) == ("model", ())
    assert "KeyError: 'key'" in found.fault.message


def test_validate_takes_a_detectors_boxes_for_sound(tmp_path, child):
    job = made(tmp_path, {"a.png": png(noise(1)), "b.png": plain(255)})
    worked(job, child)
    stored = Job(identity={}, context=job.context, plan={"images": 2, "boxes": 0, "units": 1})

    found = verify(Store(job.context.output), stored, sample=None)

    assert [f"{one.key}: {one.message}" for one in found.findings if one.key.startswith("units/")] == []
    plain_job = replace(stored, context=replace(job.context, detector=None))
    messages = [one.message for one in verify(Store(job.context.output), plain_job).findings]
    assert any("3 boxes, planned 0" in message for message in messages)


def test_the_threshold_and_the_most_count_and_the_others_leave_no_row(tmp_path, child):
    pictures = {"a.png": png(noise(1))}
    few = worked(made(tmp_path / "few", pictures, settings(max_detections=1)), child)
    all_of_them = worked(made(tmp_path / "all", pictures, settings(score_threshold=0.0)), child)

    assert [one["box_id"] for one in few["a.png"]["instances"]] == ["b"]
    assert [one["box_id"] for one in all_of_them["a.png"]["instances"]] == ["b", "a", "d", "c"]


def test_boxes_that_the_rules_leave_without_a_mask_keep_their_rows(tmp_path, child):
    rules = BoxRules(min_side_px=5, nms_mode="all", nms_iou=0.2)
    job = made(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))}, box_rules=rules)
    none = made(tmp_path / "none", {"a.png": png(noise(1))}, box_rules=BoxRules(min_score=0.95))

    rows, empty = worked(job, child), worked(none, child)

    assert [one["box_error"] for one in rows["a.png"]["instances"]] == [None, "nms:0", "box_small"]
    assert [one["segmentation"] is None for one in rows["a.png"]["instances"]] == [False, True, True]
    assert empty["a.png"]["status"] == "no_boxes"
    assert [one["box_error"] for one in empty["a.png"]["instances"]] == ["box_score"] * 3


def test_calls_are_filled_up_to_their_fixed_size(tmp_path, child):
    job = made(tmp_path, {f"{i}.png": png(noise(i)) for i in range(4)}, settings(images_per_call=3))
    store = Store(job.context.output)
    worker = SegmentWorker(job.context, epoch=1, use_gpu=False)

    worker.run(prepare_unit(UnitRow(unit_id=0), job.context, store, child)[0])

    assert [len(call) for call in worker._detect._detector.calls] == [3, 3]


def test_a_picture_that_ends_the_process_is_found_out_and_failed_alone(tmp_path, child):
    killer = np.full((48, 64, 3), KILLER, np.uint8)
    job = made(
        tmp_path, {"a.png": png(noise(1)), "b.png": png(Image.fromarray(killer)), "c.png": png(noise(2))}
    )
    deaths = 0
    while True:
        try:
            rows = worked(job, child)
            break
        except FailPointReached:
            deaths += 1

    assert deaths == 3
    assert {name: row["error_code"] for name, row in rows.items()} == {
        "a.png": None, "b.png": "crashed", "c.png": None,
    }  # fmt: skip


def test_a_changed_detector_stops_the_work_and_marks_nothing(tmp_path, child):
    job = made(tmp_path, {"a.png": png(noise(1))}, settings(options={"version": "2"}))

    with pytest.raises(
        SystemicFault, match="has fingerprint corners 2, this job began with corners 1"
    ) as caught:
        worked(job, child)

    assert caught.value.code == "weights"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("count", "gave 0 results for 1 pictures"),
        ("shape", r"boxes_xyxy has shape \(4, 3\); wanted \(N, 4\)"),
        ("scores", "scores has 3 values for 4 boxes"),
        ("category", "category_ids holds 9, which is not among its categories"),
        ("float", "category_ids has type float64; wanted integers"),
    ],
)
def test_a_detector_that_answers_wrongly_is_refused_on_a_blank_picture(wrong, why):
    asked = settings(options={"wrong": wrong})

    with pytest.raises(JobRefused, match=why):
        try_out(load_detector(asked), asked)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("yolo", "no such kind of detector; wanted hf:"),
        ("no.such.module:Class", "No module named 'no'; wanted .* PYTHONPATH=FOLDER"),
        ("tests.pipeline.stages.test_detect:Nothing", "AttributeError"),
        ("pyarrow:Table", "TypeError|it has no 'name'"),
        ("hf:no/such/place/at/all", "no such folder, nor a hub id"),
    ],
)
def test_a_detector_that_is_none_is_refused_by_name(name, why):
    with pytest.raises(JobRefused, match=why) as caught:
        load_detector(settings(name=name))

    assert name in str(caught.value)


def test_the_documented_example_of_ones_own_detector_works(tmp_path, child, monkeypatch):
    [example] = blocks((ROOT / "docs" / "detectors.md").read_text(), "python")
    (tmp_path / "own_bright.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    bright = np.full((48, 64, 3), 20, np.uint8)
    bright[10:30, 8:40] = 250
    asked = settings(name="own_bright:BrightSpot", fingerprint="bright spot, version 1", longest_side=64)
    detector = load_detector(asked)
    try_out(detector, asked)
    job = made(tmp_path / "job", {"a.png": png(Image.fromarray(bright)), "b.png": plain(7)}, asked)

    rows = worked(job, child_of(asked))

    assert detector.license == "MIT"
    [found] = rows["a.png"]["instances"]
    assert found["prompt_bbox_given"] == [8, 10, 40, 30]
    assert (found["category_name"], found["detector_score"]) == ("bright", None)
    assert rows["b.png"]["status"] == "no_boxes"


def child_of(asked: JobDetector) -> DecodeChild:
    return DecodeChild(Limits(decode_timeout_s=5), SIDE, detector_side=asked.longest_side)
