"""`hqlabel inspect`: one image as it was labelled: its row, its instances, and a picture of both.

Not named `inspect.py`: with this folder on the path, that name would shadow the standard library's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqlabel.jobs.job_setup.saved_job import PICTURES, SavedJob, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results.read_tables import ImageRows, Row, find_images
from hqlabel.jobs.results.render_images import drawn_rows, overlay_png
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import HqlabelError, UsageError
from hqlabel.pipeline.job_state.plan_files import iter_plan
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage.uri_rules import masked
from hqlabel.pipeline.tables.images_and_instances import flatten_unit
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed

_LONGEST_SIDE = 1600
_MOST_ROWS = 500
_SCORES = {
    "detector_score": "det.\nscore",
    "predicted_iou": "pred.\nIoU",
    "stability_score": "stab.\nscore",
    "box_iou": "box\nIoU",
    "mask_in_box": "mask\nin box",
}
"""The columns of scores, with their headings."""


def run(given: ConfigSources, image_id: str, *, picture: str | None, json: bool) -> int:
    """Print the rows of one image, write its overlay as PNG, and return 0.

    Raises:
        UsageError: the job has no such image. JobRefused: it is not labelled yet.
    """
    saved = open_saved(given, "inspect", PICTURES)
    rows = _find(saved, image_id)
    place = _draw(saved, rows, picture or _picture_name(image_id))
    if json:
        image = {**rows.image, "processed_at": rows.image["processed_at"].isoformat()}
        console.data_json({"image": image, "instances": rows.instances, "picture": place})
        return 0
    console.data(console.pairs(_image_lines(rows)))
    if rows.instances:
        head = ["#", "class", "box\n(x, y, w, h)", "area", *_SCORES.values(), "accepted"]
        console.data(console.table(head, _table(rows.instances[:_MOST_ROWS])))
        if (more := len(rows.instances) - _MOST_ROWS) > 0:
            console.say(f"{more:,} more rows: --json prints all")
    return 0


def _find(saved: SavedJob, image_id: str) -> ImageRows:
    """Return the published rows of the image; of one that is not published yet, its unit's."""
    manifest = read_manifest(saved.store)
    published = find_images(saved.store, manifest, [image_id]) if manifest else {}
    if image_id in published:
        return published[image_id]
    for unit_id, planned in enumerate(iter_plan(saved.store, saved.job.context.plan_sha256)):
        if image_id in planned["image_id"].to_pylist():
            return _from_unit(saved, unit_id, image_id)
    raise UsageError(
        f"{saved.store.place.uri}: no image has the image_id {image_id!a}; it is the id in images/"
    )


def _from_unit(saved: SavedJob, unit_id: int, image_id: str) -> ImageRows:
    committed = list_committed(saved.store, saved.job.context.first_generation)
    if unit_id not in committed:
        raise UsageError(f"{image_id!a} is planned (unit {unit_id}) and not labelled yet; see hqlabel status")
    flat = flatten_unit(read_committed(saved.store, committed[unit_id]), FilterSettings())
    images = [row for row in flat.images.to_pylist() if row["image_id"] == image_id]
    instances = [row for row in flat.instances.to_pylist() if row["image_id"] == image_id]
    return ImageRows(image=images[0], instances=tuple(instances))


def _draw(saved: SavedJob, rows: ImageRows, name: str) -> str | None:
    """Write the overlay and return its file; None, with a note on stderr, when there is no picture."""
    try:
        body = overlay_png(saved.pictures, rows, longest_side=_LONGEST_SIDE)
    except HqlabelError as error:
        console.say(f"no picture: {error}")
        return None
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(body)
    except (OSError, ValueError) as error:
        raise UsageError(f"the picture cannot be written to {name!a}: {error}; see --picture") from error
    boxes, drawn = len(rows.instances), len(drawn_rows(rows))
    console.say(f"picture: {name}" + (f" ({drawn:,} of {boxes:,} boxes drawn)" if drawn < boxes else ""))
    return name


def _picture_name(image_id: str) -> str:
    """Return a plain file name in the working folder, whatever the id holds; no other image has it."""
    plain = re.sub(r"[^\w.-]+", "_", image_id)[-40:].lstrip(".-") or "image"
    if plain != image_id:
        plain += f".{hashlib.sha256(image_id.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return f"{plain}.overlay.png"


def _image_lines(rows: ImageRows) -> list[tuple[str, str]]:
    image = rows.image
    size = (
        f"{image['width']} x {image['height']} pixels, upright" if image["width"] else "unknown: not decoded"
    )
    boxes = f"{image['num_boxes']} given, {console.with_a_mask(*rows.masks())}"
    boxes += f", {image['num_accepted']} accepted"
    turned = image["exif_orientation"] not in (None, 1)
    lines = [
        ("image_id", console.shown(image["image_id"], 200)),
        ("image_uri", masked(console.shown(image["image_uri"], 200))),
        ("status", image["status"]),
        ("size", size + (f" (EXIF orientation {image['exif_orientation']})" if turned else "")),
        ("boxes", boxes),
    ]
    if image["error_code"]:
        lines.append(("error", f"{image['error_code']} ({image['error_stage']}): {image['error_message']}"))
    return lines


def _table(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            str(row["instance_index"]),
            console.shown(row["category_name"] or _text(row["category_id"]), 24),
            "-" if row["prompt_bbox"] is None else ", ".join(f"{value:g}" for value in row["prompt_bbox"]),
            _text(row["area"]),
            *(_text(row[name]) for name in _SCORES),
            "yes" if row["accepted"] else f"no: {row['reject_reason']}",
        ]
        for row in rows
    ]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
