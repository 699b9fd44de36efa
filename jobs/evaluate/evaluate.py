"""`hqlabel evaluate`: published masks against COCO ground truth; AP, boundary AP and mean IoU.

    read the truth -> find its images among ours -> find its classes -> score -> judge -> print and keep

Every choice that a user could have made otherwise (how images, classes and boxes were matched, which
score ranked the masks) is printed with the figures.
"""

from __future__ import annotations

import json as json_text
import math
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from hqlabel.jobs.evaluate.average_precision import (
    ANY_CLASS,
    SIZES,
    EvaluatedImage,
    FoundMask,
    Match,
    Pair,
    Precision,
    average_precision,
    choose_match,
    pair_up,
    require_library,
)
from hqlabel.jobs.evaluate.ground_truth import Truth, TruthImage, TruthObject, read_truth
from hqlabel.jobs.job_setup.saved_job import STORE, SavedJob, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results.read_tables import ImageRows, Row, require_published
from hqlabel.jobs.results.select_rows import Selection, selected_images
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import UsageError, clean_text
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.join_boxes_to_images import why

EVALUATION_KEY = "report/evaluation.json"
SCORE_COLUMNS = {
    "product": ("detector_score", "predicted_iou"),
    "detector": ("detector_score",),
    "predicted-iou": ("predicted_iou",),
    "stability": ("stability_score",),
}
"""What each `--score` ranks masks by: the product of these columns."""
_COLUMNS = [
    *("box_id", "category_id", "category_name", "prompt_bbox", "segmentation"),
    *("detector_score", "predicted_iou", "stability_score", "reject_reason"),
]
_MOST_CATEGORIES = 30
Naming = Callable[[Row], str]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Where the truth is, which rows, which of SCORE_COLUMNS, and whether classes count."""

    truth: str
    selection: Selection
    score: str = "product"
    class_agnostic: bool = False
    max_per_image: int = 100
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The images that both sides have, and how things were matched, as text.

    `left_out`: what was not judged and why, counted. `rules`: what of the truth was read by a rule, counted.
    """

    images: tuple[EvaluatedImage, ...]
    categories: Mapping[int, str]
    match: Match
    words: Mapping[str, str]
    left_out: Mapping[str, int]
    rules: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class ClassMatch:
    """The classes that count: id to name, how ours were matched to them, and the id of a row or None.

    `one`: all objects and masks are of one class.
    """

    names: Mapping[int, str]
    words: str
    number_of: Callable[[Row], int | None]
    one: bool = False


def run(given: ConfigSources, options: EvaluateOptions) -> int:
    """Judge the tables, keep the figures in the output (report/evaluation.json), print them, return 0."""
    require_library()
    if options.score not in SCORE_COLUMNS:
        raise UsageError(f"--score {options.score!r}: wanted one of {', '.join(SCORE_COLUMNS)}")
    saved = open_saved(given, "evaluate", STORE)
    access = AccessRules(options=saved.config.storage)
    truth = read_truth(options.truth, access, classes=not options.class_agnostic)
    matched = match_truth(saved, truth, options)
    # All that a file can be refused for has been checked: the rest takes minutes.
    pairs = [pair for image in matched.images for pair in pair_up(image, matched.match)]
    classes = list(matched.categories)
    by_name = {
        name: average_precision(
            matched.images, classes, boundary=boundary, max_per_image=options.max_per_image
        )
        for name, boundary in (("mask_ap", False), ("boundary_ap", True))
    }
    figures = _figures(options, matched, by_name, pairs)
    body = console.json_line(figures)
    console.data(body if options.json else _text(matched, by_name, figures))
    saved.store.put(EVALUATION_KEY, (json_text.dumps(json_text.loads(body), indent=1) + "\n").encode())
    if not options.json:
        console.say(f"kept in {saved.store.place.uri.rstrip('/')}/{EVALUATION_KEY}; the report shows it")
    return 0


# ---- Matching ----


def match_truth(saved: SavedJob, truth: Truth, options: EvaluateOptions) -> Matched:
    """Return the truth's images that the job has published, with its masks of them.

    An image that failed counts, as one without masks; one that the job never had does not.

    Raises:
        UsageError: no image or no class is known to both, or the chosen scores are missing.
    """
    manifest = require_published(saved.store)
    published = selected_images(saved.store, manifest, options.selection, _COLUMNS)
    image_words, images, unknown = _match_images(published, truth)
    crowds = sum(_is_crowd(row) for one, _ in images for row in one.instances)
    rows = [row for one, _ in images for row in one.instances if not _is_crowd(row)]
    classes = _match_classes(rows, truth, options)
    score_words, score = _score_rule(rows, options.score)
    same_size = [(one, image) for one, image in images if _size_agrees(one.image, image)]
    if not same_size:
        raise UsageError(
            f"{options.truth}: all {len(images)} images that the job has too are of another size there, so "
            "its masks are in another frame (EXIF rotation?)"
        )
    judged = [
        EvaluatedImage(
            size_hw=_size_hw(one.image, image),
            objects=_objects(truth, image, one_class=classes.one),
            masks=tuple(
                _found_mask(row, classes.number_of(row), score(row))
                for row in one.instances
                if not _is_crowd(row)
            ),
        )
        for one, image in same_size
    ]
    left_out = {
        "images of the truth that the job does not have": len(truth.images) - len(images),
        "images of the job that the truth does not have": unknown,
        "images of another size in the truth": len(images) - len(same_size),
        "boxes of crowds, which are regions to pass over and got no mask": crowds,
        "objects that the truth marks as crowds (iscrowd 1), which are regions to pass over": sum(
            one.is_crowd for image in judged for one in image.objects
        ),
        "masks of classes that the truth does not have": sum(
            mask.category_id is None and mask.counts is not None for image in judged for mask in image.masks
        ),
    }
    match = choose_match(judged)
    pair_words = {
        "box_id": "by box_id, which is the annotation's id",
        "box_iou": "by their boxes (IoU of 0.5 or more, the best first)",
    }
    return Matched(
        images=tuple(judged),
        categories=classes.names,
        match=match,
        words={
            "images": image_words,
            "classes": classes.words,
            "objects": pair_words[match],
            "score": score_words,
        },
        left_out={k: v for k, v in left_out.items() if v},
        rules=truth.rules,
    )


def _is_crowd(row: Row) -> bool:
    """Return whether its file calls a box a crowd: a region without a mask, neither right nor missed."""
    return bool(row["reject_reason"] == "crowd")


def _size_agrees(image: Row, of_truth: TruthImage) -> bool:
    """Return False for two unlike sizes; an image that was never decoded has none, and has no masks."""
    size_hw = (image["height"], image["width"])
    return None in size_hw or of_truth.size_hw in (None, size_hw)


def _size_hw(image: Row, of_truth: TruthImage) -> tuple[int, int]:
    """Return the size that one side knows; one pixel when none does, because there are no masks then."""
    ours = (image["height"], image["width"])
    return (1, 1) if None in ours and of_truth.size_hw is None else of_truth.size_hw or ours


def _found_mask(row: Row, category_id: int | None, score: float) -> FoundMask:
    return FoundMask(
        box_id=row["box_id"],
        category_id=category_id,
        box_xywh=None if row["prompt_bbox"] is None else tuple(row["prompt_bbox"]),
        score=score,
        counts=None if row["segmentation"] is None else row["segmentation"]["counts"],
    )


def _match_images(
    published: Iterable[ImageRows], truth: Truth
) -> tuple[str, list[tuple[ImageRows, TruthImage]], int]:
    """Return the rule that matches the most images, as text, the pairs, and how many of ours have none."""
    named = [image for image in truth.images.values() if image.file_name]
    by_file = {image.file_name: image for image in named}
    if len(by_file) < len(named):
        by_file = {}  # names that repeat identify no image
    by_last = {name.rsplit("/", 1)[-1]: image for name, image in by_file.items()}
    if len(by_last) < len(by_file):
        by_last = {}
    rules: dict[str, tuple[Mapping[str, TruthImage], Naming]] = {
        "image_id is the truth's id": (truth.images, lambda image: str(image["image_id"])),
        "image_id is the truth's file_name": (by_file, lambda image: str(image["image_id"])),
        "the image's file is named as in the truth": (
            by_last,
            lambda image: str(image["image_uri"]).rsplit("/", 1)[-1],
        ),
    }
    found: dict[str, list[tuple[ImageRows, TruthImage]]] = {name: [] for name in rules}
    ours: list[str] = []
    for one in published:
        ours.append(str(one.image["image_id"]))
        for name, (known, of) in rules.items():
            if (key := of(one.image)) in known:
                found[name].append((one, known[key]))
    name = max(found, key=lambda name: len(found[name]))
    matched = {image.image_id for _, image in found[name]}
    lost = [image.file_name for image in truth.images.values() if image.image_id not in matched]
    known_ids = {one.image["image_id"] for one, _ in found[name]}
    hint = _hint([one for one in ours if one not in known_ids], lost)
    if not found[name]:
        doubled = "Two images of the truth have one file_name, so names tell nothing"
        raise _no_image(ours, truth, hint if by_file or not named else doubled)
    if len(matched) < len(found[name]):
        raise UsageError("several published images have the file name of one image of the truth")
    return f"{name}. {hint}".rstrip(". "), found[name], len(ours) - len(found[name])


def _hint(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Return why names of the truth are none of ours, in planning's words; "" when unknown."""
    names = [name.encode("utf-8", "replace").decode() for name in theirs if name]
    return why(pa.array(ours, pa.large_string()), pa.array(names, pa.large_string()))


def _no_image(ours: Sequence[str], truth: Truth, hint: str) -> UsageError:
    one = next(iter(truth.images.values()), None)
    id_and_name = (console.shown(one.image_id), console.shown(one.file_name)) if one else ()
    theirs = "id '{}', file_name '{}'".format(*id_and_name) if one else "none"
    example = f"'{console.shown(ours[0])}'" if ours else "none"
    absent = f"no image of the truth is in the tables: theirs {theirs}; ours image_id {example}. {hint}"
    wanted = "" if hint else "Wanted: the image_id as id or file_name there, or the same name of the file"
    return UsageError(clean_text(f"{absent.rstrip()} {wanted}".rstrip()))


def _match_classes(rows: Sequence[Row], truth: Truth, options: EvaluateOptions) -> ClassMatch:
    """Return the truth's classes, and how ours are found among them: by name where a name fits, else by id.

    Raises:
        UsageError: no class is known to both, or a name that two categories have could be either.
    """
    if options.class_agnostic:
        return _one_class("do not count (--class-agnostic)")
    if all(row["category_id"] is None and row["category_name"] is None for row in rows):
        return _one_class("do not count: the boxes have none")
    by_name = _by_name(truth)
    named = {row["category_name"] for row in rows if row["category_name"] is not None}
    shared = [name for name in named if len(by_name.get(name, ())) > 1]
    if shared:
        return _by_id_because_of(shared[0], by_name[shared[0]], rows, truth)
    if named & by_name.keys():
        return ClassMatch(
            names=truth.categories,
            words="by category_name" + _nearly(named, by_name),
            number_of=lambda row: by_name.get(row["category_name"], (None,))[0],
        )
    ids = {row["category_id"] for row in rows}
    if (named and by_name) or not ids & truth.categories.keys():
        ours, theirs = sorted(map(str, named or ids))[:3], list(truth.categories.values())[:3]
        raise UsageError(
            f"no class of the boxes is one of the truth: ours are {clean_text(str(ours))}, "
            f"theirs {clean_text(str(theirs))}{_nearly(named, by_name)}. "
            "To let classes not count: --class-agnostic"
        )
    return ClassMatch(
        names=truth.categories,
        words="by category_id" + _shifted(ids, truth.categories),
        number_of=_id_among(truth.categories),
    )


def _shifted(ours: Collection[int | None], theirs: Collection[int]) -> str:
    """Return a warning of ids that count from 0 here, as YOLO's do, and from 1 there; else ""."""
    if 0 not in ours or 0 in theirs or 1 not in theirs:
        return ""
    return "; the boxes count classes from 0, the truth from 1: the same number may be another class"


def _one_class(reason: str) -> ClassMatch:
    return ClassMatch(names={ANY_CLASS: "any"}, words=reason, number_of=lambda _: ANY_CLASS, one=True)


def _id_among(known: Mapping[int, str]) -> Callable[[Row], int | None]:
    return lambda row: row["category_id"] if row["category_id"] in known else None


def _by_name(truth: Truth) -> dict[str, tuple[int, ...]]:
    """Return each name's categories: those with objects, or one, as a class without objects decides nothing.

    Roboflow writes a category 0 without objects, called as the project, next to the real one of that name.
    """
    used = {one.category_id for objects in truth.objects.values() for one in objects}
    found: dict[str, tuple[int, ...]] = {}
    for number, name in truth.categories.items():
        if name:
            found[name] = (*found.get(name, ()), number)
    return {name: tuple(n for n in numbers if n in used) or numbers[:1] for name, numbers in found.items()}


def _by_id_because_of(name: str, numbers: Sequence[int], rows: Sequence[Row], truth: Truth) -> ClassMatch:
    """Return classes by id, which must mean the same on both sides: several categories are called `name`."""
    called = console.shown(name)
    shared = f"{len(numbers)} categories of the truth are called {called!r} ({numbers[0]}, {numbers[1]})"
    known = set(truth.categories.values())
    for row in rows:
        number, ours = row["category_id"], row["category_name"]
        theirs = truth.categories.get(number)
        if ours is not None and ours != theirs and (theirs is not None or ours in known):
            raise UsageError(
                f"{shared}, and ids do not tell them apart: category {number} is {console.shown(ours)!r} "
                f"here, there {console.shown(theirs or 'none')!r}. Name each category once, or "
                "--class-agnostic"
            )
    return ClassMatch(
        names=truth.categories, words=f"by category_id: {shared}", number_of=_id_among(truth.categories)
    )


def _nearly(named: Iterable[str], theirs: Collection[str]) -> str:
    """Return a warning of names that the truth has in another spelling; "" when there are none."""
    spellings = {_spelled(name): name for name in theirs}
    pairs = [(name, spellings.get(_spelled(name))) for name in sorted(named) if name not in theirs]
    nearly = [(ours, there) for ours, there in pairs if there is not None]
    return "".join(
        f"; {console.shown(ours)!r} is not in the truth, which has {console.shown(there)!r}"
        for ours, there in nearly[:3]
    )


def _spelled(name: str) -> str:
    """Drop from a name what changes when it is written again: case, spaces, hyphens, underscores."""
    return "".join(
        c for c in unicodedata.normalize("NFC", name).casefold() if c not in "-_" and not c.isspace()
    )


def _score_rule(rows: Sequence[Row], wanted: str) -> tuple[str, Callable[[Row], float]]:
    """Return what ranks the masks, as text, and the score of a row; a row without mask scores 0.

    Raises:
        UsageError: a mask has no such score.
    """
    masked = [row for row in rows if row["segmentation"] is not None]
    columns = SCORE_COLUMNS[wanted]
    unscored = {name: sum(_is_no_number(row[name]) for row in masked) for name in columns}
    if wanted == "product" and masked and unscored["detector_score"] == len(masked):
        words, by_iou = _score_rule(rows, "predicted-iou")
        return f"{words} (the boxes have no detector_score)", by_iou
    for name, number in unscored.items():
        if number:
            way_out = "; choose --score predicted-iou" if name == "detector_score" else ""
            raise UsageError(
                f"{number} of {len(masked)} masks have no {name}, which --score {wanted} needs{way_out}"
            )

    def score(row: Row) -> float:
        return 0.0 if row["segmentation"] is None else math.prod(float(row[name]) for name in columns)

    return " x ".join(columns), score


def _is_no_number(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _objects(truth: Truth, image: TruthImage, *, one_class: bool) -> tuple[TruthObject, ...]:
    objects = truth.objects.get(image.image_id, ())
    return tuple(replace(one, category_id=ANY_CLASS) for one in objects) if one_class else objects


# ---- Figures ----


def mean_iou(pairs: Sequence[Pair]) -> dict[str, float | int | None]:
    """Return number of pairs, and their mean IoU and mean boundary IoU; None for none."""
    number = len(pairs)
    return {
        "objects": number,
        "mean_iou": sum(pair.iou for pair in pairs) / number if number else None,
        "mean_boundary_iou": sum(pair.boundary_iou for pair in pairs) / number if number else None,
    }


def _figures(
    options: EvaluateOptions, matched: Matched, by_name: Mapping[str, Precision], pairs: Sequence[Pair]
) -> dict[str, Any]:
    objects = [one for image in matched.images for one in image.objects]
    masks = [mask for image in matched.images for mask in image.masks]
    return {
        "truth": options.truth,
        "matched": dict(matched.words),
        "selection": asdict(options.selection),
        "max_per_image": options.max_per_image,
        "images": len(matched.images),
        "objects": sum(not one.is_crowd for one in objects),
        "prompts": len(masks),
        "masks": sum(mask.counts is not None for mask in masks),
        "left_out": dict(matched.left_out),
        "truth_rules": dict(matched.rules),
        "pairs": {
            **mean_iou(pairs),
            "without_mask": sum(not pair.has_mask for pair in pairs),
            "by_size": {
                name: mean_iou([pair for pair in pairs if low <= pair.area < high])
                for name, (low, high) in SIZES.items()
                if name != "all"
            },
        },
        **{
            name: {k: v for k, v in asdict(precision).items() if k != "by_category"}
            for name, precision in by_name.items()
        },
        "categories": list(_categories(matched, by_name, pairs)),
    }


def _categories(
    matched: Matched, by_name: Mapping[str, Precision], pairs: Sequence[Pair]
) -> Iterator[dict[str, Any]]:
    of_class: dict[int | None, list[Pair]] = {number: [] for number in matched.categories}
    for pair in pairs:
        of_class[pair.category_id].append(pair)
    for number, name in matched.categories.items():
        ap = by_name["mask_ap"].by_category[number]
        if ap is not None or of_class[number]:
            yield {
                "id": number,
                "name": name or str(number),
                "mask_ap": ap,
                "boundary_ap": by_name["boundary_ap"].by_category[number],
                **mean_iou(of_class[number]),
            }


def _text(matched: Matched, by_name: Mapping[str, Precision], figures: Mapping[str, Any]) -> str:
    lines = [
        ("images", f"{figures['images']:,}; {matched.words['images']}"),
        ("objects", f"{figures['objects']:,}; {matched.words['objects']}"),
        ("classes", matched.words["classes"]),
        ("score", matched.words["score"]),
        *[("left out", f"{number:,} {what}") for what, number in matched.left_out.items()],
        *[("truth", f"{number:,} {what}") for what, number in matched.rules.items()],
    ]
    if figures["pairs"]["without_mask"]:
        lines.append(("no mask", f"{figures['pairs']['without_mask']:,} objects, counted with IoU 0"))
    tables = [console.pairs(lines), "", _by_size(by_name, figures)]
    categories = figures["categories"]
    if len(categories) > 1:
        most = sorted(categories, key=lambda one: -one["objects"])[:_MOST_CATEGORIES]
        head = ["class", "objects", "mask AP", "boundary AP", "mean IoU", "mean boundary IoU"]
        tables += ["", console.table(head, [_category_cells(one) for one in most])]
        if len(categories) > len(most):
            tables.append(f"  and {len(categories) - len(most)} classes more, in --json")
    return "\n".join(tables)


def _by_size(by_name: Mapping[str, Precision], figures: Mapping[str, Any]) -> str:
    mask, boundary = by_name["mask_ap"], by_name["boundary_ap"]
    pairs = {"all": figures["pairs"], **figures["pairs"]["by_size"]}
    rows = []
    for size in SIZES:
        of_size = pairs[size]
        columns = (
            mask.by_size[size],
            boundary.by_size[size],
            of_size["mean_iou"],
            of_size["mean_boundary_iou"],
        )
        rows.append([size, f"{of_size['objects']:,}", *map(_number, columns)])
    head = ["size", "matched", "mask AP", "boundary AP", "mean IoU", "mean boundary IoU"]
    also = f"  mask AP50 {_number(mask.ap50)}, AP75 {_number(mask.ap75)}, AR {_number(mask.ar)}"
    return console.table(head, rows) + "\n" + also


def _category_cells(one: Mapping[str, Any]) -> list[str]:
    names = ("mask_ap", "boundary_ap", "mean_iou", "mean_boundary_iou")
    return [console.shown(one["name"], 24), f"{one['objects']:,}", *(_number(one[name]) for name in names)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
