"""`hqlabel export`: published tables in the formats of trainers and annotation tools, and what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from jobs import console, settings
from jobs.config import Given
from jobs.export_coco import write_coco
from jobs.export_hf import write_hf
from jobs.export_label_studio import write_label_studio
from jobs.export_yolo import Loss, write_yolo
from jobs.exporting import Source, open_source
from jobs.saved import open_saved
from jobs.selection import Selection
from jobs.tables import require_published
from pipeline.errors import UsageError
from pipeline.records import Place
from pipeline.storage import Store, open_store

Format = Literal["coco", "yolo-seg", "label-studio", "hf"]
FORMATS: tuple[str, ...] = get_args(Format)
_PER_FILE = {"coco": 250_000, "label-studio": 1000, "hf": 500_000}
_EXPECTED = ("images", "masks", "images turned by EXIF", "masks that the filters did not accept")


@dataclass(frozen=True, kw_only=True)
class How:
    """What was asked. `per_file`: masks (tasks for Label Studio) a file; None: the format's own number."""

    format: str
    to: str
    selection: Selection
    per_file: int | None = None
    tolerance_px: float = 0.5
    image_prefix: str | None = None
    json: bool = False


def run(given: Given, how: How) -> int:
    """Write the files into an empty folder or prefix, say what was left out and lost, and return 0."""
    if how.format not in FORMATS:
        raise UsageError(f"export {how.format!r}: wanted one of {', '.join(FORMATS)}")
    saved = open_saved(given)
    uri = settings.absolute(how.to)
    place = open_store(Place(uri=uri, options=settings.storage_options(saved.config, uri)))
    if place.list(limit=1):
        raise UsageError(
            f"--to {how.to}: there are files already; choose a new folder, so that none is mixed"
        )
    source = open_source(saved.store, saved.job, require_published(saved.store), how.selection)
    loss = Loss()
    keys = list(_write(source, place, loss, how))
    _say(how, source, loss, keys)
    return 0


def _write(source: Source, place: Store, loss: Loss, how: How) -> Iterator[str]:
    per_file = how.per_file or _PER_FILE.get(how.format, 0)
    if how.format == "coco":
        return write_coco(source, place, per_file=per_file)
    if how.format == "yolo-seg":
        return write_yolo(source, place, loss, tolerance_px=how.tolerance_px)
    if how.format == "hf":
        return write_hf(source, place, per_file=per_file)
    return write_label_studio(source, place, per_file=per_file, image_prefix=how.image_prefix)


def _say(how: How, source: Source, loss: Loss, keys: list[str]) -> None:
    tally, files = source.tally, len(keys)
    left_out = {what: number for what, number in tally.items() if number and what not in _EXPECTED}
    if how.json:
        lost = None if how.format != "yolo-seg" else {"mean_iou": loss.mean, "least_iou": loss.least}
        console.data_json(
            {
                "to": how.to,
                "format": how.format,
                "files": files,
                "images": tally["images"],
                "masks": tally["masks"],
                "left_out": left_out,
                "not_accepted": tally["masks that the filters did not accept"],
                "turned_by_exif": tally["images turned by EXIF"],
                "classes": {str(number): name for number, name in source.classes.names.items()},
                "loss": lost,
            }
        )
    masks, images = console.count(tally["masks"], "mask"), console.count(tally["images"], "image")
    console.say(f"{how.format}: {masks} of {images} in {console.count(files, 'file')} below {how.to}")
    lines = [("left out", f"{number:,} {what}") for what, number in left_out.items()]
    lines += _notes(how, source, loss)
    if lines:
        console.say(console.pairs(lines))


def _notes(how: How, source: Source, loss: Loss) -> Iterator[tuple[str, str]]:
    tally = source.tally
    if tally["masks that the filters did not accept"]:
        number = tally["masks that the filters did not accept"]
        yield (
            "note",
            f"{number:,} masks are not accepted by the job's filters; --accepted-only leaves them out",
        )
    if tally["images turned by EXIF"]:
        turned = console.count(tally["images turned by EXIF"], "image is", "images are")
        yield "note", f"{turned} stored turned: readers must apply EXIF, boxes and masks are upright"
    if source.classes.of_unnamed is not None:
        yield "note", f"boxes without a class have class {source.classes.of_unnamed}, named object"
    if not how.selection.is_all:
        yield "note", "images may show objects that were not selected: they are no full annotation"
    if how.format == "yolo-seg":
        yield "loss", loss.sentence()
