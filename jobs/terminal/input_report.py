"""What a job understood of its inputs, reported before any work: the moment at which a mistake is cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.job_file import Job


def describe_inputs(config: Config, plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values about images, boxes and their join; `plan`: the fields of a PlanSummary."""
    limited = plan["listed_images"] > plan["images"]
    images = count(plan["images"], "image") + (
        f", the first of {plan['listed_images']:,} (--limit)" if limited else ""
    )
    rows = [("images", f"{images}; {_place(config.input.images)}")] if config.input.images else []
    if config.input.boxes:
        boxes = count(plan["boxes"], "box", "boxes")
        around = " around masks" if config.input.boxes_from == "masks" else ""
        of_images = "" if config.input.images else f" of {images}"
        rows.append(("boxes", f"{boxes}{around}{of_images}; {_place(config.input.boxes)}"))
        lists = {"boxes", "bbox"} & set(plan.get("used_columns") or ())
        own = "" if config.input.box_format or not lists else " (COCO's is --box-format xywh)"
        rows.append(("box format", f"{plan['box_format']}{own}, in the {_frame(plan['box_frame'])}"))
    rows.append(("ids", plan["id_rule"]))
    rows += _columns(plan)
    if config.input.boxes and "class_count" in plan:  # a job of an earlier version does not say
        scores = _scores(plan)
        rows += (
            [("classes", _classes(plan)), ("scores", scores)]
            if scores
            else [("classes", f"{_classes(plan)}; no scores given")]
        )
    rows += [("", line) for line in _odd_images(plan, detected=config.detector.name is not None)]
    return rows


def describe_model(context: JobContext, *, asked_dtype: str) -> list[tuple[str, str]]:
    """Return names and values about the weights and the number format.

    The note of the demo checkpoint is not among them: it stands at the end, where it is still seen.
    """
    weights = context.weights
    licence = f"licence {weights.license}" if weights.license else "licence unknown"
    dtype = context.model.dtype + (" (auto)" if asked_dtype == "auto" else "")
    model = f"{weights.architecture}, input side {weights.input_side}, {dtype}"
    rows = [("model", f"{model}; sha256 {weights.sha256[:12]}; {licence}")]
    return rows if weights.warning is None else [*rows, ("", weights.warning)]


def describe_detector(context: JobContext) -> list[tuple[str, str]]:
    """Return name and value of the detector, where there is one."""
    detector = context.detector
    if detector is None:
        return []
    licence = f"licence {detector.license}" if detector.license else "licence unknown"
    shown = f"shown {detector.longest_side} pixels, score over {detector.score_threshold:g}"
    fingerprint = console.fingerprint(detector.fingerprint)
    return [("detector", f"{detector.title}, {shown}; fingerprint {fingerprint}; {licence}")]


def describe_work(
    job: Job, *, done_units: int, pending_units: int, part: str | None, kept_images: int = 0
) -> tuple[str, str]:
    """Return how the work is cut, how much of it is done, and how much of it is this driver's.

    `kept_images`: of a job whose inputs changed, those that keep their rows in the units of the new plan.
    """
    per_unit = count(job.context.images_per_unit, "image")
    cut = f"{count(job.units, 'unit')} of up to {per_unit}"
    if kept_images:
        left = job.plan["images"] - kept_images
        done = f"{count(left, 'image')} to do, {count(kept_images, 'row')} kept"
    elif not done_units:
        done = "nothing done yet"
    elif done_units == job.units:
        done = "all done"
    else:
        done = f"{done_units:,} done ({console.share(done_units, job.units)})"
    mine = f"; slice {part}: {pending_units:,} to do" if part else ""
    return "work", f"{cut}; {done}{mine}"


def warnings(config: Config, plan: Mapping[str, Any]) -> list[str]:
    """Return the sentences on likely mistakes, each its own line; `plan`: the fields of a PlanSummary."""
    sentences = list(plan["warnings"])
    if not plan["boxes"] and plan["without_boxes"] == plan["images"] and config.detector.name is None:
        sentences.insert(0, f"no image has a box, so there will be no mask; {_NO_BOXES}")
    if plan["boxes"] and plan.get("crowd_boxes") == plan["boxes"]:
        sentences.insert(0, _ALL_CROWDS)
    return [f"warning: {sentence}" for sentence in (*sentences, *_without_effect(config))]


_OF_BOX_FILES = ("box_format", "box_frame", "boxes_from", "allow_unmatched")


def _without_effect(config: Config) -> list[str]:
    """Return a sentence for each group of settings that are set and change nothing in this job."""
    given = {"detector": _changed(config.detector), "input": _changed(config.input)}
    groups = [
        (config.detector.name is None, "detector", given["detector"], "there is no --detector"),
        (
            config.input.boxes is None,
            "input",
            [name for name in given["input"] if name in _OF_BOX_FILES],
            "there are no --boxes",
        ),
        (
            config.input.boxes is None and config.detector.name is None,
            "boxes",
            [name for name in _changed(config.boxes) if name != "nms_iou"],
            "there are neither --boxes nor a --detector",
        ),
        *(
            (
                one.nms_mode == "none",
                section,
                [n for n in _changed(one) if n == "nms_iou"],
                "nms_mode is none",
            )
            for section, one in (("boxes", config.boxes), ("filter", config.filter))
        ),
    ]
    return [
        f"{', '.join(f'{section}.{name}' for name in names)}: without effect, because {why}"
        for is_idle, section, names, why in groups
        if is_idle and names
    ]


def _changed(section: BaseModel) -> list[str]:
    """Return the settings of a section that have another value than by default."""
    plain = type(section)()
    return [name for name in type(section).model_fields if getattr(section, name) != getattr(plain, name)]


_NO_BOXES = (
    "say with --boxes where they are (tars, data sets and COCO files that hold pictures and boxes are named "
    "there too), or find them with --detector"
)

_ALL_CROWDS = (
    "every box is a crowd (iscrowd 1), so there will be no mask; annotation tools mark masks drawn with a "
    "brush so: if they are objects, write iscrowd 0"
)


def as_json(config: Config, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same facts for a program."""
    return {"images_at": config.input.images, "boxes_at": config.input.boxes, **plan}


def _odd_images(plan: Mapping[str, Any], *, detected: bool) -> list[str]:
    """Return what will not be labelled, by the plan alone."""
    lines = []
    if plan["without_boxes"] and not detected:
        unnamed = plan["listed_without_boxes"]
        why = f" ({unnamed:,} named by no box file)" if unnamed else ""
        lines.append(f"{count(plan['without_boxes'], 'image')} without boxes{why}: will not be opened")
    for name, reason in (
        ("null_boxes", "a null box list: will fail (boxes_missing)"),
        ("mismatched_labels", "labels, scores or ids of another length: will fail (labels_mismatch)"),
        ("refused_uris", "a uri that may not be opened: will fail (uri_refused)"),
    ):
        if plan[name]:
            lines.append(f"{count(plan[name], 'image')} with {reason}")
    if plan["invalid_prompts"]:
        boxes = count(plan["invalid_prompts"], "box", "boxes")
        lines.append(f"{boxes} with points or a mask that cannot be used: no mask (prompt_invalid)")
    if crowds := plan.get("crowd_boxes"):  # a job of an earlier version does not say
        lines.append(crowd_sentence(crowds))
    lost = plan["unmatched_boxes"]
    if lost["boxes"]:
        boxes = count(lost["boxes"], "box", "boxes")
        lines.append(f"{boxes} of {count(lost['images'], 'unlisted image')}: left out (--allow-unmatched)")
    if plan["skipped_files"]:
        files = count(plan["skipped_files"], "file")
        what = "is no picture" if plan["skipped_files"] == 1 else "are no pictures"
        lines.append(f"{files} in the folder {what}: left out")
    lines += plan.get("left_out", ())  # jobs of before have none
    return lines


def _columns(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return which columns of the tables are read, and which are not."""
    rows = []
    if used := plan.get("used_columns"):
        read = [theirs if ours == theirs else f"{theirs} as {ours}" for ours, theirs in used.items()]
        rows.append(("columns used", f"{_listed(read, most=len(read))}"))
    if unused := plan.get("unused_columns"):
        rows.append(("", f"columns not used: {_listed(unused)}"))
    return rows


def _classes(plan: Mapping[str, Any]) -> str:
    """Return the classes with most boxes, each with its number of them."""
    shown = [
        f"{console.shown(str(one['id'] if one['name'] is None else one['name']), 40)} {one['boxes']:,}"
        for one in plan["classes"]
    ]
    more = plan["class_count"] - len(shown)
    without = plan["boxes_without_class"]
    parts = [
        *(
            [", ".join(shown) + (f" and {count(more, 'more class', 'more classes')}" if more else "")]
            if shown
            else []
        ),
        *([f"{count(without, 'box', 'boxes')} without a class"] if without and shown else []),
    ]
    return "; ".join(parts) or "none given"


def _scores(plan: Mapping[str, Any]) -> str:
    """Return the range of the scores, and how many boxes have none; "" where no box has one."""
    if plan["lowest_score"] is None:
        return ""
    without = plan["boxes_without_score"]
    lacking = f"; {count(without, 'box', 'boxes')} without a score" if without else ""
    return f"{plan['lowest_score']:.4g} to {plan['highest_score']:.4g}{lacking}"


def _listed(names: Sequence[str], most: int = 12) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(console.shown(name, 40) for name in names[:most]) + more


def crowd_sentence(number: int) -> str:
    """Return the sentence on boxes with iscrowd 1, before the work and after it."""
    are = (
        "is a region, no object: it keeps its row"
        if number == 1
        else "are regions, not objects: they keep their rows"
    )
    return f"{count(number, 'crowd box', 'crowd boxes')} (iscrowd 1) {are} without a mask"


def _frame(frame: str) -> str:
    return "upright picture (EXIF applied)" if frame == "upright" else "picture as stored (EXIF not applied)"


def _place(uri: str | None) -> str:
    return f"from {console.shown(uri, 90)}" if uri else ""
