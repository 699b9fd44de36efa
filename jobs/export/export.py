"""`hqlabel export`: published tables in the formats of trainers and annotation tools, and what that loses.

A format's module that needs Pillow is imported when it is asked for.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast, get_args

from hqlabel.jobs.export.coco import category_numbers, write_coco
from hqlabel.jobs.export.cvat_xml import write_cvat
from hqlabel.jobs.export.export_names import can_be_a_file, refuse_shared_files
from hqlabel.jobs.export.export_source import INSIDE_OTHERS, ExportSource, Loss, open_source
from hqlabel.jobs.export.hf_dataset import write_hf
from hqlabel.jobs.export.label_studio import write_label_studio
from hqlabel.jobs.export.webdataset_shards import write_webdataset
from hqlabel.jobs.export.yolo import ENDINGS, IN_VALIDATION, PASSED_OVER, write_yolo
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.saved_job import PICTURES, STORE, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results.read_tables import require_published
from hqlabel.jobs.results.select_rows import Selection
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import UsageError, count
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.uri_rules import split_scheme

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

Format = Literal["coco", "yolo-seg", "cvat", "label-studio", "labelme", "png", "webdataset", "hf"]
FORMATS: tuple[str, ...] = get_args(Format)
_PER_FILE = {"coco": 250_000, "cvat": 20_000, "label-studio": 1000, "hf": 500_000, "webdataset": 50_000}
_COUNTED_NOTES = {
    "masks that the filters did not accept": (
        *("mask is", "masks are"),
        "not accepted by the job's filters; --accepted-only leaves them out",
    ),
    "crowds": (
        *("crowd region has", "crowd regions have"),
        "iscrowd 1, the box filled: COCOeval and trainers ignore what lies in it",
    ),
    "images turned by EXIF": (
        *("image is", "images are"),
        "stored turned: readers must apply EXIF, boxes and masks are upright",
    ),
    INSIDE_OTHERS: (
        *("image lies", "images lie"),
        "inside tars or Parquet files, which readers of pictures do not open: unpack them",
    ),
}
"""What is counted and not skipped: subject and verb for one and for many, and the rest of the sentence."""
_NOT_SKIPPED = ("images", "masks", "masks without a class", PASSED_OVER, IN_VALIDATION, *_COUNTED_NOTES)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The call's choices. `per_file`: masks (tasks for Label Studio) a file; None: the format's own number.

    `tolerance_px`: of polygons, None: half a pixel. `categories_from_1`: COCO's categories are numbered anew.
    `polygons`: instead of masks. `subset`: of COCO, as Datumaro and CVAT import it. `images`: how pictures
    get into it, None: not at all. `val`: the share of images held back for validation.
    """

    format: str
    to: str
    selection: Selection
    per_file: int | None = None
    tolerance_px: float | None = None
    image_prefix: str | None = None
    categories_from_1: bool = False
    polygons: bool = False
    subset: str | None = None
    images: str | None = None
    val: float = 0.0
    json: bool = False


def run(given: ConfigSources, options: ExportOptions) -> int:
    """Write the files into an empty folder or prefix, report what was skipped and lost, and return 0."""
    if options.format not in FORMATS:
        raise UsageError(f"export {options.format!r}: wanted one of {', '.join(FORMATS)}")
    _refuse_what_others_have(options)
    saved = open_saved(given, "export", PICTURES if options.images else STORE)
    uri = resolve_settings.absolute(options.to)
    if os.path.lexists(uri) and not os.path.isdir(uri):
        raise UsageError(f"--to {options.to}: this is a file; wanted a new folder or prefix")
    place = Store(Place(uri=uri, options=resolve_settings.storage_options(saved.config, uri)))
    if place.list(limit=1):
        raise UsageError(
            f"--to {options.to}: there are files already; choose a new folder, so that none is mixed"
        )
    selection = replace(options.selection, with_crowds=options.format == "coco")
    source = open_source(saved.store, saved.job, require_published(saved.store), selection)
    loss = Loss(what="indexed masks show") if options.format == "png" else Loss()
    pictures = None
    if options.images is not None:
        from hqlabel.jobs.export.image_files import (
            ImageFiles,
            Way,
        )  # Pillow and the decoder: for pictures alone

        pictures = ImageFiles(way=cast(Way, options.images), place=place, context=saved.pictures)
        if options.format != "webdataset":
            refuse_shared_files(source, lambda name: name if can_be_a_file(name) else None)
    keys = list(_write(source, place, loss, options, pictures))
    if pictures is not None:
        pictures.say()
    _report(options, source, loss, keys, _idle_rights(given, options))
    return 0


def _idle_rights(given: ConfigSources, options: ExportOptions) -> list[str]:
    """Return a sentence about rights to read pictures that this call gives for nothing."""
    named = {"input.allow_roots": "--allow-root", "input.allow_schemes": "--allow-scheme"}
    flags = [flag for setting, flag in named.items() if given.flags.get(setting)]
    if options.images is not None or not flags:
        return []
    only = "no picture is opened without --images"
    why = only if options.format in _ONLY_FOR["--images"] else f"export {options.format} opens no picture"
    return [f"{', '.join(flags)}: without effect, because {why}"]


def _refuse_what_others_have(options: ExportOptions) -> None:
    """Raise UsageError for an option that is wrong, or that this format would pass over in silence."""
    if options.images not in (None, "link", "copy"):
        raise UsageError(f"--images {options.images}: wanted link or copy")
    if not 0 <= options.val < 1:
        raise UsageError(
            f"--val {options.val:g}: wanted a share of the images from 0 to below 1, such as 0.1"
        )
    if options.subset is not None and not re.fullmatch("[A-Za-z0-9-]{1,64}", options.subset):
        raise UsageError(f"--subset {options.subset}: wanted letters, digits and -, such as default or train")
    given = {
        "--images": options.images is not None,
        "--val": options.val > 0,
        "--polygons": options.polygons,
        "--subset": options.subset is not None,
        "--per-file": options.per_file is not None,
        "--tolerance": options.tolerance_px is not None,
        "--image-prefix": options.image_prefix is not None,
        "--categories-from-1": options.categories_from_1,
    }
    for flag, formats in _ONLY_FOR.items():
        if given[flag] and options.format not in formats:
            raise UsageError(f"{flag}: export {options.format} has no use for it; {', '.join(formats)} would")
    if options.tolerance_px is not None and options.format in ("cvat", "labelme") and not options.polygons:
        raise UsageError(f"--tolerance: export {options.format} writes whole masks; add --polygons")
    if options.format == "coco" and options.images and not options.subset:
        raise UsageError("--images: export coco puts pictures beside a subset; add --subset default")
    if options.format == "webdataset" and options.images == "link":
        raise UsageError("--images link: a tar holds no links to pictures; wanted --images copy")


_ONLY_FOR = {
    "--images": ("yolo-seg", "coco", "cvat", "labelme", "png", "webdataset"),
    "--val": ("yolo-seg",),
    "--polygons": ("cvat", "labelme"),
    "--subset": ("coco",),
    "--per-file": tuple(_PER_FILE),
    "--tolerance": ("yolo-seg", "cvat", "labelme"),
    "--image-prefix": ("label-studio",),
    "--categories-from-1": ("coco",),
}
_TOLERANCE_PX = 0.5


def _write(
    source: ExportSource, place: Store, loss: Loss, options: ExportOptions, pictures: ImageFiles | None
) -> Iterator[str]:
    per_file = options.per_file or _PER_FILE.get(options.format, 0)
    tolerance_px = _TOLERANCE_PX if options.tolerance_px is None else options.tolerance_px
    if options.format == "coco":
        return write_coco(
            source,
            place,
            per_file=per_file,
            categories_from_1=options.categories_from_1,
            subset=options.subset,
            pictures=pictures,
        )
    if options.format == "yolo-seg":
        return write_yolo(source, place, loss, tolerance_px=tolerance_px, val=options.val, pictures=pictures)
    if options.format == "hf":
        return write_hf(source, place, per_file=per_file)
    if options.format == "label-studio":
        return write_label_studio(source, place, per_file=per_file, image_prefix=options.image_prefix)
    if options.format == "webdataset":
        return write_webdataset(source, place, per_file=per_file, pictures=pictures)
    if options.format == "png":
        from hqlabel.jobs.export.voc_masks import write_png

        return write_png(source, place, loss, pictures=pictures)
    of_polygons = tolerance_px if options.polygons else None
    if options.format == "cvat":
        return write_cvat(source, place, loss, per_file=per_file, tolerance_px=of_polygons, pictures=pictures)
    from hqlabel.jobs.export.labelme import write_labelme

    return write_labelme(source, place, loss, tolerance_px=of_polygons, pictures=pictures)


def _numbers(options: ExportOptions, source: ExportSource) -> dict[int, int] | None:
    """Return the number of each class in the files, by its id; None where classes are names alone."""
    if options.format == "coco":
        return category_numbers(source.classes, from_1=options.categories_from_1)
    if options.format in ("label-studio", "labelme", "cvat"):
        return None
    first = 1 if options.format == "png" else 0
    return {number: place + first for number, place in source.classes.places().items()}


def _report(
    options: ExportOptions, source: ExportSource, loss: Loss, keys: list[str], idle: Sequence[str]
) -> None:
    tally, files = source.tally, len(keys)
    left_out = {what: number for what, number in tally.items() if number and what not in _NOT_SKIPPED}
    notes = [*(("note", sentence) for sentence in idle), *_notes(options, source, loss)]
    if options.json:
        lost = (
            {"mean_iou": loss.mean, "least_iou": loss.least, "masks_lost": loss.gone}
            if _is_lossy(options)
            else None
        )
        console.data_json(
            {
                "to": options.to,
                "format": options.format,
                "files": files,
                "images": tally["images"],
                "masks": tally["masks"],
                "crowds": tally["crowds"],
                "left_out": left_out,
                "not_accepted": tally["masks that the filters did not accept"],
                "without_class": tally["masks without a class"],
                "turned_by_exif": tally["images turned by EXIF"],
                "classes": {str(number): name for number, name in source.classes.names.items()},
                "numbers": _numbers(options, source),
                "loss": lost,
                "notes": [f"{name}: {text}" for name, text in notes],
            }
        )
    masks, images = count(tally["masks"], "mask"), count(tally["images"], "image")
    console.say(f"{options.format}: {masks} of {images} in {count(files, 'file')} below {options.to}")
    lines = [("left out", f"{number:,} {what}") for what, number in left_out.items()]
    lines += notes
    if lines:
        console.say(console.pairs(lines))


def _is_lossy(options: ExportOptions) -> bool:
    return options.format in ("yolo-seg", "png") or options.polygons


def _notes(options: ExportOptions, source: ExportSource, loss: Loss) -> Iterator[tuple[str, str]]:
    tally = source.tally
    for name, (one, many, rest) in _COUNTED_NOTES.items():
        unpacked = name == INSIDE_OTHERS and options.images is not None
        if tally[name] and not unpacked:
            yield "note", f"{count(tally[name], one, many)} {rest}"
    for sentence in _class_notes(options, source):
        yield "note", sentence
    if not options.selection.is_all:
        yield "note", "images may show objects that were not selected: they are no full annotation"
    if options.format == "label-studio":
        yield from (("note", sentence) for sentence in _prefix_notes(options.image_prefix, source.folder))
    if _is_lossy(options):
        scores = "; scores are lost" if options.format in ("yolo-seg", "png") else ""
        order = "; the smaller of two masks lies on top" if options.format == "png" else ""
        yield "loss", loss.sentence() + order + scores
    if options.format == "labelme" and options.images is None and tally["images"]:
        yield "next", "labelme looks for each picture beside its file; --images link or copy puts it there"
    if options.format == "yolo-seg":
        yield from _yolo_steps(options, source)


def _prefix_notes(prefix: str | None, folder: str) -> Iterator[str]:
    """Yield what keeps Label Studio from opening the images. `folder`: what all their uris begin with."""
    if prefix and not prefix.endswith(("/", "=")):
        yield (
            f"names stand right behind --image-prefix, as in {console.shown(prefix)}NAME; "
            "if a folder is meant, end it with /"
        )
    scheme = split_scheme(folder)[0]
    if prefix is None and folder.startswith("/"):
        yield _LOCAL_PATHS
    elif prefix is None and folder and scheme not in ("s3", "gs", "azure-blob", "http", "https"):
        yield (
            f"the images are {scheme}:// uris, which Label Studio does not open: --image-prefix with the "
            "place as it knows it, such as 'azure-blob://CONTAINER/FOLDER/'"
        )


_LOCAL_PATHS = (
    "the images are local paths, which Label Studio does not open: "
    "--image-prefix '/data/local-files/?d=FOLDER/', FOLDER below its LOCAL_FILES_DOCUMENT_ROOT"
)


def _class_notes(options: ExportOptions, source: ExportSource) -> Iterator[str]:
    classes, numbers = source.classes, _numbers(options, source)

    def named(number: int) -> str:
        name = f"`{console.shown(classes.names[number], 40)}`"
        return name if numbers is None else f"category {numbers[number]}, {name}"

    if source.tally["masks without a class"] and classes.of_unnamed is not None:
        masks = count(
            source.tally["masks without a class"], "mask without a class is", "masks without a class are"
        )
        yield f"{masks} {named(classes.of_unnamed)}"
    new = [number for number in classes.lone.values() if classes.given_id(number) is None]
    if new:
        yield f"names without a category_id are numbered behind the others: {'; '.join(map(named, new[:3]))}"
    if several := sorted(classes.several_names):
        ids = count(len(several), "category_id has", "category_ids have")
        yield f"{ids} several names, the first by its bytes is taken: {'; '.join(map(named, several[:3]))}"
    if doubled := classes.doubled():
        shown = ", ".join(f"`{console.shown(name, 40)}`" for name in doubled[:3])
        names = count(len(doubled), "name stands", "names stand")
        yield f"{names} for several ids: {shown}{_DOUBLED[options.format]}"
    if options.format == "coco" and numbers is not None and 0 in numbers.values():
        zero = next(number for number, new_number in numbers.items() if new_number == 0)
        yield f"{named(zero)}: CVAT takes category 0 for no label; --categories-from-1 numbers them anew"


_DOUBLED = {
    "coco": "; tools that know categories by their names mix them up",
    "yolo-seg": "; the numbers tell them apart",
    "label-studio": "; each is one label there",
    "labelme": "; each is one label there",
    "cvat": "; each is one label there",
    "png": "; their ids are put behind in labelmap.txt",
    "webdataset": "; the numbers tell them apart",
    "hf": "; their ids are put behind",
}


def _yolo_steps(options: ExportOptions, source: ExportSource) -> Iterator[tuple[str, str]]:
    """Yield where the pictures must be, and how they get there."""
    if over := source.tally[PASSED_OVER]:
        images = count(over, "image", "images")
        yield (
            "note",
            f"Ultralytics passes over {images}: another ending than {', '.join(ENDINGS)}, or under 10 pixels",
        )
    if not source.tally["images"]:
        return
    to = resolve_settings.absolute(options.to).rstrip("/")
    if options.val:
        yield from _split_notes(options, source)
    if options.images is not None:
        yield "next", f"yolo segment train data={shlex.quote(f'{to}/data.yaml')} model=yolo11n-seg.pt"
        return
    yield "next", f"the pictures alone go into {to}/images/, under their names in images.txt"
    root = next(iter(source.roots)) if len(source.roots) == 1 else None
    if root is not None and root.startswith("/") and to.startswith("/"):
        to, here = shlex.quote(to), shlex.quote(root)
        yield (
            "",
            f"mkdir -p {to}/images && cd {here} && sed 's|^./images/||' {to}/images.txt | "
            f"xargs -r -d '\\n' cp --parents -t {to}/images --",
        )


def _split_notes(options: ExportOptions, source: ExportSource) -> Iterator[tuple[str, str]]:
    """Yield how many images were held back."""
    held, images = source.tally[IN_VALIDATION], count(source.tally["images"], "image")
    if held:
        yield "val", f"{held:,} of {images}, by their ids: the same ones in every export"
    else:
        yield "note", f"--val {options.val:g} leaves train or val empty ({images}): both lists are images.txt"
