"""Check a few pictures before any work: can they be opened, and are the boxes inside them.

Planning reads lists and tables only, so it cannot see that boxes were measured before the EXIF orientation
was applied. The headers of some pictures, spread over the plan, show it. Nothing here stops a job, but a
driver that is missing for most pictures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.errors import ImageError, SystemicFault, UsageError, clean_text
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.decode_upright import DecodedImage
from hqlabel.pipeline.images.fetch import fetch_ahead
from hqlabel.pipeline.inputs.image_box_lists import examples
from hqlabel.pipeline.inputs.propose_columns import LARGEST_SHARE
from hqlabel.pipeline.job_context import AccessRules, BoxRules
from hqlabel.pipeline.planning.partitioned_plan import AnyPlan
from hqlabel.pipeline.planning.suspicious_boxes import suspicions_of_place
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.worker.image_guard import charge

PICTURES = 32
SUSPICIOUS_SHARE = 0.1
"""Of the pictures checked that cannot be opened: more of them is no accident."""
_BOXES_OF_ONE = 1000
_FETCH_TIMEOUT_S = 15.0  # a picture that takes longer is left to the job


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """One picture of the plan: its row, and its header or why there is none."""

    row: Mapping[str, Any]
    header: DecodedImage | None
    error: ImageError | None


def with_preview_warnings(plan: AnyPlan, limits: Limits, *, detected: bool = False) -> AnyPlan:
    """Return the plan with the warnings of `preview_pictures` whose flag no warning of the plan names.

    `detected`: a detector finds the boxes.
    """
    summary = plan.summary
    rules = BoxRules(box_format=summary.box_format, box_frame=summary.box_frame)
    flags = {_flag(sentence) for sentence in summary.warnings}
    warnings = preview_pictures(plan.table, rules, plan.access, limits, detected=detected)
    new = [sentence for sentence in warnings if _flag(sentence) not in flags]
    return replace(plan, summary=replace(summary, warnings=(*summary.warnings, *new)))


def _flag(sentence: str) -> str:
    """Return the flag that a sentence ends with; the whole sentence where there is none."""
    return sentence[sentence.rfind("--") :] if "--" in sentence else sentence


def preview_pictures(
    table: pa.Table, rules: BoxRules, access: AccessRules, limits: Limits, *, detected: bool = False
) -> tuple[str, ...]:
    """Return sentences on what is likely wrong, with the flag that fixes it where there is one.

    `table`: a plan (schema.PLAN). Fetches up to PICTURES pictures that have boxes, and opens their headers.
    `detected`: a detector finds the boxes, so that every picture counts.

    Raises:
        UsageError: there is no driver for the stores of most pictures.
    """
    rows = _sample(table, detected=detected)
    if not rows:
        return ()
    try:
        seen = _seen(rows, access, limits)
    except SystemicFault as fault:
        return (f"no picture could be checked from this machine: {clean_text(str(fault))}",)
    faults = [one.error.fault for one in seen if one.error is not None and one.error.fault is not None]
    missing = [fault for fault in faults if fault.code == "driver"]
    if missing and 2 * len(missing) >= len(seen):
        raise UsageError(missing[0].message)
    if len(faults) == len(seen):
        return (f"no picture could be checked from this machine: {clean_text(str(faults[0]))}",)
    found = (_unopened(seen), *_misplaced(seen, rules), _odd_masks(seen), _odd_points(seen, rules))
    return tuple(sentence for sentence in found if sentence)


def _sample(table: pa.Table, *, detected: bool) -> list[dict[str, Any]]:
    """Return rows that are to be opened, spread evenly: those with boxes, or all where a detector sees them.

    One of each of PICTURES stretches, but not always its first: every second file may be missing.
    """
    wanted = pc.is_null(table.column("error_code"))
    if not detected:
        has_boxes = pc.greater(pc.fill_null(pc.list_value_length(table.column("boxes")), 0), 0)
        wanted = pc.and_(has_boxes, wanted)
    places = pc.indices_nonzero(wanted).to_numpy()
    if not len(places):
        return []
    edges = np.linspace(0, len(places), PICTURES + 1).astype(np.int64)
    within = np.random.default_rng(0).random(PICTURES)
    chosen = places[np.unique(edges[:-1] + (within * np.diff(edges)).astype(np.int64))]
    # One by one: to take rows from a chunked column joins its chunks first, however large they are.
    rows: list[dict[str, Any]] = pa.concat_tables(table.slice(int(at), 1) for at in chosen).to_pylist()
    return rows


def _seen(rows: list[dict[str, Any]], access: AccessRules, limits: Limits) -> list[_Seen]:
    timeout_s = min(limits.fetch_timeout_s, _FETCH_TIMEOUT_S)
    soon = limits.model_copy(update={"fetch_timeout_s": timeout_s})
    child = DecodeChild(soon, side=1, decoder="hqlabel.pipeline.images.decode_upright:measure_image")
    found = []
    try:
        uris, versions = [row["image_uri"] for row in rows], [row.get("source_version") for row in rows]
        for row, outcome in zip(rows, fetch_ahead(uris, access, soon, versions=versions), strict=True):
            header, error = None, outcome.error
            try:
                header = child.decode(outcome.fetched.data) if outcome.fetched else None
            except BaseException as raised:
                error = charge(raised, uri=row["image_uri"], step="decode")
            found.append(_Seen(row=row, header=header, error=error))
    finally:
        child.close()
    return found


def _unopened(seen: list[_Seen]) -> str | None:
    """Return a sentence when so many of the pictures cannot be used that it is no accident."""
    failed = [(one.row["image_uri"], one.error) for one in seen if one.error is not None]
    if len(failed) <= SUSPICIOUS_SHARE * len(seen):
        return None
    code = Counter(error.code for _, error in failed).most_common(1)[0][0]
    alike = [(uri, error) for uri, error in failed if error.code == code]
    uri, first = alike[0]
    return (
        f"{len(failed)} of {len(seen)} pictures checked cannot be opened, most with {code}, such as "
        f"{examples([uri for uri, _ in alike])}: {first.message}{_odd_name(uri)}"
        f"{_NOT_FOUND if code == 'not_found' else ''}"
    )


def _odd_masks(seen: list[_Seen]) -> str | None:
    """Return a sentence when masks given as prompts are not of their picture's size."""
    masks = [
        (image_id, box["prompt_mask"]["size"], header.size_hw)
        for image_id, header, box in _boxes_of(seen)
        # others are no masks at all, which the plan reports
        if box["prompt_mask"] is not None and min(box["prompt_mask"]["size"] or [0]) > 0
    ]
    odd = [(image_id, size, size_hw) for image_id, size, size_hw in masks if tuple(size) != size_hw]
    if not odd:
        return None
    image_id, size, (height, width) = odd[0]
    return (
        f"{len(odd)} of {len(masks)} masks checked are of another size than their picture, and will not be "
        f"used (prompt_invalid), such as {size[:4]} for {clean_text(image_id)}, which is {height} high and "
        f"{width} wide; a mask's size is [height, width] of the upright picture"
    )


def _odd_points(seen: list[_Seen], rules: BoxRules) -> str | None:
    """Return a sentence when points lie as shares of their pictures would, or outside them.

    Shares are points too, at the picture's corner: they spoil the mask, and no code reports it.
    """
    points_N2, sizes_hw = [], list[tuple[int, int]]()
    for _, header, box in _boxes_of(seen):
        numbers, labels = np.array(box["points_xy"] or [], np.float64), box["point_labels"] or []
        if len(numbers) != 2 * len(labels):
            continue  # which the plan reports
        some = numbers.reshape(-1, 2)[[label != -1 for label in labels]]  # -1 fills up
        some = some[np.isfinite(some).all(axis=1)]
        points_N2.append(some)
        sizes_hw += [header.stored_size_hw if rules.box_frame == "stored" else header.size_hw] * len(some)
    points = np.concatenate(points_N2) if points_N2 else np.zeros((0, 2))
    if not len(points):
        return None
    if np.mean((np.abs(points) <= LARGEST_SHARE).all(axis=1)) > 0.9:
        return (
            f"nearly all of {len(points)} points checked lie within 0 to 1, in the corner of their "
            "pictures; points are pixels, whatever the box format: multiply shares by width and height"
        )
    outside = ((points < 0) | (points > np.array(sizes_hw)[:, ::-1])).any(axis=1)
    if outside.mean() <= SUSPICIOUS_SHARE:
        return None
    (x, y), (height, width) = points[outside][0], np.array(sizes_hw)[outside][0]
    return (
        f"{outside.sum()} of {len(points)} points checked lie outside their pictures: their boxes get no "
        f"mask (prompt_invalid), such as ({x:g}, {y:g}) in one {height} high and {width} wide; points are "
        f"[x, y] in pixels of the {rules.box_frame} picture"
    )


_NOT_FOUND = "; if they lie elsewhere: --set input.image_root=FOLDER"


def _odd_name(uri: str) -> str:
    """Return what in a name may be why there is no such file, as text; "" where nothing is odd."""
    odd = [
        words
        for words, pattern in (
            ("backslashes (Windows)", r"\\"),
            ("percent-encoding", r"%[0-9A-Fa-f]{2}"),
            ("white space or quotes at its end or beginning", r"""[\s"']\Z|/[\s"'][^/]*\Z"""),
        )
        if re.search(pattern, uri)
    ]
    return f"; the name has {' and '.join(odd)}" if odd else ""


def _misplaced(seen: list[_Seen], rules: BoxRules) -> tuple[str, ...]:
    boxes = [
        (box["given"], header)
        for _, header, box in _boxes_of(seen)
        if box["given"] is not None and len(box["given"]) == 4 and None not in box["given"]
    ]
    if not boxes:
        return ()
    return suspicions_of_place(
        np.array([given for given, _ in boxes], np.float64),
        rules,
        upright_size_hw=np.array([header.size_hw for _, header in boxes], np.int64),
        stored_size_hw=np.array([header.stored_size_hw for _, header in boxes], np.int64),
    )


def _boxes_of(seen: list[_Seen]) -> Iterator[tuple[str, DecodedImage, Mapping[str, Any]]]:
    """Yield image id, header and box of the first boxes of every picture with a header."""
    for one in seen:
        if one.header is not None:
            for box in one.row["boxes"][:_BOXES_OF_ONE]:
                yield one.row["image_id"], one.header, box
