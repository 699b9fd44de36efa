"""`hqlabel report`: one static HTML page about a job, made from its published tables; no server, no network.

tables -> DuckDB (numbers) -> the chosen rows' masks and pictures (tiles) -> the template
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pycocotools import mask as coco_mask

from hqlabel.jobs.job_setup.printed_flags import retry_command, storage_flags
from hqlabel.jobs.job_setup.saved_job import PICTURES, SavedJob, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.report.charts import bars, histogram
from hqlabel.jobs.report.numbers import Key, ReportData, gather
from hqlabel.jobs.report.queries import SAMPLE_ROWS, SCORES, STEPS, published, queries
from hqlabel.jobs.report.sections import ReportSection, sections
from hqlabel.jobs.report.tile_facts import CSV_COLUMNS, boxes_json, class_choices, class_name, state_choices
from hqlabel.jobs.report.tiles import PictureKey, Pictures, draw_tiles
from hqlabel.jobs.results.read_tables import ImageRows, Row, failed_examples, find_images, require_published
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.input_report import describe_detector
from hqlabel.pipeline.errors import count, stage_of
from hqlabel.pipeline.storage.bounded_json import read_json
from hqlabel.pipeline.storage.output_store import NotFound
from hqlabel.pipeline.storage.uri_rules import masked
from hqlabel.pipeline.tables.manifest import Manifest

REPORT_KEY = "report/index.html"
EVALUATION_KEY = "report/evaluation.json"
_MOST_BYTES = 14_000_000  # of base64; the page stays under 20 MB
_MOST_CLASSES = 200
_IMAGE_COLUMNS = ("image_id", "image_uri", "height", "width", "source_etag")  # times would import pandas
_NO_SECRET = re.compile(r'((?:src="data:image/jpeg;base64,[A-Za-z0-9+/=]+|data-boxes="[^"]*)")')
"""Nearly all of a page: pictures, and what was written without credentials (`boxes_json`)."""
_TEMPLATES = Path(__file__).parent / "templates"
_PAIR_IOU = 0.8
_MOST_PAIRS = 6
_LEAST_SECONDS = 10  # a run's first unit has no beginning in the tables: short runs have no honest rate


@dataclass(frozen=True, kw_only=True)
class ShownTile:
    """One instance as the page shows it."""

    row: Row
    image: Row
    pictures: Pictures

    @property
    def name(self) -> str:
        """Its class, as text."""
        return class_name(self.row)

    @property
    def alt(self) -> str:
        """What the picture shows, for screen readers."""
        score = self.row["predicted_iou"]
        what = "no mask" if score is None else f"mask with predicted IoU {score:.2f}"
        return f"{self.name}, {what}, in {self.image['image_id']}"

    @property
    def boxes(self) -> str:
        """What the page's script knows of it."""
        return boxes_json([self.row])


@dataclass(frozen=True, kw_only=True)
class ShownPicture:
    """One image with all of its instances as the page shows it."""

    rows: ImageRows
    pictures: Pictures

    @property
    def contents(self) -> str:
        """How many boxes of each class it has, the commonest first."""
        found = Counter(class_name(row) for row in self.rows.instances)
        return ", ".join(f"{number:,} {name}" for name, number in found.most_common())

    @property
    def boxes(self) -> str:
        """What the page's script knows of its boxes."""
        return boxes_json(self.rows.instances)


@dataclass(frozen=True, kw_only=True)
class ShownSection:
    """A section with its tiles and the query behind it."""

    section: ReportSection
    tiles: Sequence[ShownTile]
    sql: str


def run(given: ConfigSources, *, to: str | None, as_json: bool) -> int:
    """Write the page into the output (report/index.html) or to a local file, and return 0."""
    saved = open_saved(given, "report", (*PICTURES, "cost"))
    manifest = require_published(saved.store)
    body = _masked(page(saved, manifest)).encode()
    if to is None:
        saved.store.put(REPORT_KEY, body)
    else:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_bytes(body)
    place = to or f"{saved.store.place.uri.rstrip('/')}/{REPORT_KEY}"
    console.say(f"report: {place} ({console.size(len(body))})")
    if as_json:
        console.data_json({"report": place, "bytes": len(body)})
    return 0


def _masked(text: str) -> str:
    """Return the page without credentials; they are not looked for where none can be."""
    parts = _NO_SECRET.split(text)
    parts[::2] = map(masked, parts[::2])
    return "".join(parts)


def page(saved: SavedJob, manifest: Manifest) -> str:
    """Return the whole page as HTML."""
    chosen = sections(manifest.filters, manifest.counts.rejected, masks=manifest.counts.masks)
    data = gather(saved.store, manifest, chosen)
    keys = [key for section in chosen for key in data.chosen[section.key]]
    pair_keys = [key for pair in data.overlapping for key in pair]
    shown_ids = {*data.whole, *(image_id for image_id, _ in [*keys, *pair_keys])}
    rows = find_images(saved.store, manifest, shown_ids, _IMAGE_COLUMNS)
    pairs = _disagreements(data.overlapping, rows)
    keys += [key for pair in pairs for key in pair]
    wanted: list[PictureKey] = [*((image_id, None) for image_id in data.whole), *keys]
    pictures = draw_tiles(saved.pictures, rows, wanted, most_bytes=_MOST_BYTES)
    instances = published(saved.store.place.uri.rstrip("/"), "instances")
    shown = [
        ShownSection(
            section=section,
            tiles=[_tile(key, rows, pictures) for key in data.chosen[section.key]],
            sql=section.sql(instances),
        )
        for section in chosen
    ]
    return _render(
        saved,
        manifest,
        data,
        shown=shown,
        pairs=[tuple(_tile(key, rows, pictures) for key in pair) for pair in pairs],
        whole=[ShownPicture(rows=rows[one], pictures=pictures[one, None]) for one in data.whole],
    )


def _tile(key: Key, rows: Mapping[str, ImageRows], pictures: Mapping[PictureKey, Pictures]) -> ShownTile:
    image_id, index = key
    return ShownTile(row=rows[image_id].instance(index), image=rows[image_id].image, pictures=pictures[key])


def _disagreements(pairs: Sequence[tuple[Key, Key]], rows: Mapping[str, ImageRows]) -> list[tuple[Key, Key]]:
    """Return, of pairs whose boxes overlap, those whose masks do."""
    found = []
    for pair in pairs:
        one, other = (rows[image_id].instance(index)["segmentation"] for image_id, index in pair)
        if float(coco_mask.iou([one], [other], [0])[0, 0]) > _PAIR_IOU:
            found.append(pair)
    return found[:_MOST_PAIRS]


def _render(
    saved: SavedJob,
    manifest: Manifest,
    data: ReportData,
    *,
    shown: Sequence[ShownSection],
    pairs: Sequence[tuple[ShownTile, ...]],
    whole: Sequence[ShownPicture],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, size=console.size, duration=console.duration)
    groups: dict[str, list[ShownSection]] = {}
    for one in shown:
        if one.tiles:
            groups.setdefault(one.section.group, []).append(one)
    boxes = _shown_boxes(shown, pairs, whole)
    script = (_TEMPLATES / "report.js").read_text("utf-8")
    output = saved.store.place.uri.rstrip("/")
    return environment.get_template("report.html.j2").render(
        output=output,
        manifest=manifest,
        counts=manifest.counts,
        job=saved.job,
        data=data,
        groups=groups,
        pairs=pairs,
        whole=whole,
        classes=class_choices(boxes),
        states=state_choices(boxes),
        csv_columns=CSV_COLUMNS,
        script=Markup(script),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=_facts(saved, manifest),
        totals=_totals(saved, manifest, data),
        failures=_failures(saved, manifest),
        retry=retry_command(output, saved.config, saved.job),
        export_command=shlex.join(
            ["hqlabel", "export", "coco", output, "picked-coco", *storage_flags(saved.config)]
        ),
        charts=[
            {"name": h.name, "svg": histogram(h, _line(manifest, h.name)), "most": max(h.counts)}
            for h in data.histograms
            if any(h.counts)
        ],
        lines=_lines(data),
        steps=STEPS,
        pace=None if data.pace is None else bars(data.pace),
        times=[(name.removesuffix("_ms"), found) for name, found in data.times.items() if found],
        evaluation=_evaluation(saved),
        score_names=SCORES,
        most_classes=_MOST_CLASSES,
        sample_rows=SAMPLE_ROWS,
        queries=queries(published(output, "instances"), published(output, "images")),
        made_at=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        number=_number,
    )


def _shown_boxes(
    shown: Sequence[ShownSection], pairs: Sequence[tuple[ShownTile, ...]], whole: Sequence[ShownPicture]
) -> list[Row]:
    """Return every box of the page once, however often it is shown."""
    tiles = [tile for section in shown for tile in section.tiles] + [tile for pair in pairs for tile in pair]
    rows = [tile.row for tile in tiles] + [row for picture in whole for row in picture.rows.instances]
    return list({(row["image_id"], row["instance_index"]): row for row in rows}.values())


def _number(value: Any, digits: int = 2) -> str:
    """Return a score or size as the page writes it."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def _facts(saved: SavedJob, manifest: Manifest) -> list[tuple[str, str]]:
    context, lineage = saved.job.context, manifest.lineage
    weights = context.weights
    again = f"{saved.store.place.uri.rstrip('/')}/config.yaml"
    command = shlex.join(["hqlabel", "label", "--config", again, "--output", "NEW"])
    set_filters = {k: v for k, v in manifest.filters.model_dump().items() if v is not None}
    if manifest.filters.nms_mode == "none":
        set_filters = {k: v for k, v in set_filters.items() if not k.startswith("nms_")}
    filters = ", ".join(f"{name} {value}" for name, value in set_filters.items())
    devices = ", ".join(f"{kind}: {count(n, 'unit')}" for kind, n in manifest.counts.devices.items())
    facts = [
        ("run", f"{manifest.run_id}, begun {saved.job.created_at}, {manifest.state}"),
        ("model", f"{weights.architecture}, {context.model.dtype}, weights sha256 {weights.sha256[:16]}…"),
        ("licence of the weights", weights.license or "unknown"),
        ("boxes", f"{context.box_rules.box_format}, {context.box_rules.box_frame} frame"),
        *describe_detector(context),
        ("filters", filters or "none"),
        ("code", lineage.get("code_version", context.lineage.get("code_version", "unknown"))),
        ("devices", devices or "unknown"),
        ("plan", f"sha256 {manifest.plan_sha256[:16]}…"),
        ("made again by", command),
    ]
    return facts + ([("note", weights.note)] if weights.note else [])


def _totals(saved: SavedJob, manifest: Manifest, data: ReportData) -> list[tuple[str, str, str]]:
    """Return the large numbers: value, name, and the line under it."""
    counts = manifest.counts
    failed, no_boxes = counts.status.get("failed", 0), counts.status.get("no_boxes", 0)
    size = sum(part.images.bytes + part.instances.bytes for part in manifest.parts)
    empty = f", {counts.empty:,} empty besides" if counts.empty else ""
    share = console.share(counts.accepted, counts.boxes)
    found = [
        (
            f"{counts.images:,}",
            "image" if counts.images == 1 else "images",
            f"{failed:,} failed, {no_boxes:,} without boxes",
        ),
        (
            f"{counts.masks:,}",
            "mask" if counts.masks == 1 else "masks",
            f"of {count(counts.boxes, 'box', 'boxes')}{empty}",
        ),
        (share, "accepted", f"{counts.accepted:,} of {counts.boxes:,}"),
        (console.size(size), "tables", f"{size / max(counts.boxes, 1):.0f} bytes a box"),
    ]
    if data.model_s:
        price = saved.config.cost.usd_per_gpu_hour
        money = "" if price is None else f", {data.model_s / 3600 * price:,.2f} USD"
        per_image = 1000 * data.model_s / max(counts.status.get("labelled", 0), 1)
        found.append((console.duration(data.model_s), "model time", f"{per_image:.0f} ms an image{money}"))
    seconds = 0 if data.pace is None else data.pace.span_s * len(data.pace.counts)
    if seconds >= _LEAST_SECONDS:
        found.append(
            (console.rate(counts.images / seconds), "images a second", f"over {console.duration(seconds)}")
        )
    return found


def _failures(saved: SavedJob, manifest: Manifest) -> list[dict[str, Any]]:
    failed = manifest.counts.failed
    examples = failed_examples(saved.store, manifest, per_code=3) if failed else {}
    return [
        {"code": code, "stage": stage_of(code), "number": number, "examples": examples.get(code, [])}
        for code, number in sorted(failed.items(), key=lambda item: -item[1])
    ]


def _line(manifest: Manifest, name: str) -> float | None:
    """Return the filter's bound on this column."""
    bound = manifest.filters.model_dump().get("min_area_px" if name == "area" else f"min_{name}")
    return None if bound is None else float(bound)


def _lines(data: ReportData) -> list[tuple[str, list[str]]]:
    """Return, for each score, the share of masks that each of STEPS would keep, from the histogram."""
    rows = []
    for one in data.histograms:
        total = sum(one.counts)
        if one.name in SCORES and total:
            first = [round((step - one.low) / (one.high - one.low) * len(one.counts)) for step in STEPS]
            rows.append((one.name, [console.share(sum(one.counts[at:]), total) for at in first]))
    return rows


def _evaluation(saved: SavedJob) -> Any:
    try:
        return read_json(saved.store, EVALUATION_KEY)
    except (NotFound, ValueError):
        return None
