"""What a user names -> the lists of images and of boxes; its name decides which reader takes it.

Names are distinguished by their ending and by what a folder holds (`find_files`); two kinds of JSON and of
Parquet by their first bytes. The content is checked by the reader. No image is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import single
from hqlabel.pipeline.errors import ImageError, JobRefused, UsageError, clean_text
from hqlabel.pipeline.inputs.box_tables import (
    NO_URI,
    completed_ids,
    named_rows,
    read_box_tables,
    unused_columns,
)
from hqlabel.pipeline.inputs.coco_boxes import is_results, read_coco_images, read_instances, read_results
from hqlabel.pipeline.inputs.columns import RowFaults
from hqlabel.pipeline.inputs.find_files import (
    InputFiles,
    absolute,
    is_json,
    is_pattern,
    nothing_in,
    parent_of,
    picture_format,
    pointed_at,
    states_ending,
)
from hqlabel.pipeline.inputs.hf_parquet import HF_COLUMNS, holds_pictures, read_hf_boxes, read_hf_images
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, ImageList, has_picture_name, is_picture
from hqlabel.pipeline.inputs.megadetector_boxes import is_megadetector, read_megadetector
from hqlabel.pipeline.inputs.previous_output import (
    PublishedParts,
    find_parts,
    read_previous_boxes,
    read_previous_images,
)
from hqlabel.pipeline.inputs.propose_columns import (
    BOX_ROWS,
    IMAGE_ROWS,
    known_image_names,
    missing_column,
    unclear_columns,
)
from hqlabel.pipeline.inputs.read_table import TableFile, inspect_tables, read_batches
from hqlabel.pipeline.inputs.webdataset import read_tar_boxes, read_tar_images
from hqlabel.pipeline.inputs.yolo_boxes import read_yolo
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage.uri_rules import check_uri, split_scheme

_COLUMN_NAMES = frozenset(IMAGE_ROWS) | frozenset(BOX_ROWS) | frozenset(HF_COLUMNS)


def allowed_access(settings: InputSettings, access: AccessRules | None = None) -> AccessRules:
    """Return `access` with the local folders that the inputs imply: image root and tables' folders.

    Planning and workers must use the same rules, so a job keeps these in its context. Absolute, links
    resolved.
    """
    access = access or AccessRules()
    place = settings.images if settings.images is not None else settings.boxes
    roots = [os.path.realpath(split_scheme(root)[1]) for root in access.roots]
    roots += pointed_at(absolute(settings.image_root)) if settings.image_root is not None else []
    roots += pointed_at(absolute(place)) if place is not None else []
    return replace(access, roots=tuple(dict.fromkeys(roots)))


def read_images(settings: InputSettings, access: AccessRules) -> ImageList:
    """Return the images that `settings.images` lists, with uris that can be opened.

    `access`: as `allowed_access` gives it.

    Raises:
        JobRefused: nothing there, no pictures, an unreadable table, an image without a uri.
    """
    assert settings.images is not None, "the caller asks only for what is given"
    uri = absolute(settings.images)
    if is_json(uri) and not is_pattern(uri):
        if is_results(uri, access):
            raise JobRefused(
                f"{uri}: COCO results name no image files; "
                "give the instances file as --images and this one as --boxes"
            )
        if is_megadetector(uri, access):
            raise JobRefused(
                f"{uri}: a MegaDetector file; give it as --boxes, and the pictures' folder as --images"
            )
        return _resolved(read_coco_images(uri, access, folder=parent_of(uri)), settings)
    place = InputFiles.at(uri, access)
    parts = find_parts(uri, place.entries)  # before pictures: an output holds overlays
    if parts is not None:
        return read_previous_images(parts, access)
    if tars := place.tars():
        return read_tar_images(tars, access, root=place.root, ids=settings.tar_ids)
    if place.is_listing():
        return _from_listing(place, access)
    tables = place.tables()
    if holds_pictures(tables[0], settings.columns, access):
        return read_hf_images(tables, settings.columns, access, root=place.root)
    return _resolved(_read_image_tables(tables, settings, access, place.root), settings)


def read_boxes(settings: InputSettings, access: AccessRules) -> BoxList:
    """Return the boxes of `settings.boxes`; their uris are as written (see `resolve_uris`).

    `access`: as `allowed_access` gives it.

    Raises:
        JobRefused: nothing there, no table of boxes, or one that is not sound.
    """
    assert settings.boxes is not None, "the caller asks only for what is given"
    uri = absolute(settings.boxes)
    from_masks = settings.boxes_from == "masks"
    if is_json(uri) and not is_pattern(uri):
        reader = _json_reader(uri, access, from_masks=from_masks)
        return reader(uri, access, folder=_root(settings, parent_of(uri)))
    place = InputFiles.at(uri, access)
    if from_masks and not place.label_files():
        raise _no_masks(uri)
    parts = find_parts(uri, place.entries)
    if parts is not None:
        return _previous_boxes(parts, settings, access)
    if tars := place.tars():
        return read_tar_boxes(tars, settings.columns, access, root=place.root, ids=settings.tar_ids)
    boxes = _boxes_of(place, settings, access)
    return replace(boxes, notes=(*boxes.notes, *place.listed.notes))


def _boxes_of(place: InputFiles, settings: InputSettings, access: AccessRules) -> BoxList:
    """Return the boxes of label files or tables."""
    if labels := place.label_files():
        if settings.images is None:
            raise JobRefused(
                f"{place.root}: YOLO label files, such as {labels[0]}, name no pictures; state with --images "
                "where they are"
            )
        return read_yolo(place.root, place.entries, access, from_masks=settings.boxes_from == "masks")
    tables = place.tables()
    if holds_pictures(tables[0], settings.columns, access):
        return read_hf_boxes(tables, settings.columns, access, root=place.root)
    return read_box_tables(
        tables,
        settings.columns,
        access,
        folder=_root(settings, place.root),
        box_format=settings.box_format,
        needs_uri=settings.images is None,
    )


def _json_reader(uri: str, access: AccessRules, *, from_masks: bool) -> Callable[..., BoxList]:
    if is_results(uri, access):
        return partial(read_results, from_masks=from_masks)
    if not is_megadetector(uri, access):
        return partial(read_instances, from_masks=from_masks)
    if from_masks:
        raise _no_masks(uri)
    return read_megadetector


def _no_masks(uri: str) -> UsageError:
    return UsageError(
        f"input.boxes_from=masks is for COCO files (`segmentation`) and folders of YOLO polygons; {uri} is "
        "neither: leave it out"
    )


def resolve_uris(uris: pa.Array, folder: str) -> pa.Array:
    """Return uris, relative ones put below `folder`; absolute and blank ones and those with a scheme stay.

    Names are bytes: nothing is decoded or normalised but "./" at the beginning, which `find` writes.
    """
    names = pc.replace_substring_regex(uris, r"\A(\./+)+", "")
    complete = pc.match_substring_regex(uris, r"\A(/|\s*\z|data:|[A-Za-z][A-Za-z0-9+._\-]*:[/:])")
    parent, slash = pa.scalar(folder.rstrip("/"), TEXT), pa.scalar("/", TEXT)
    return pc.if_else(complete, uris, pc.binary_join_element_wise(parent, names, slash))


def check_columns(settings: InputSettings, found: Sequence[str]) -> None:
    """Check that every mapped name is one of ours and a column of a table; `found`: the tables' columns.

    Raises:
        UsageError: our name is unknown. JobRefused: no table has the other name.
    """
    for ours, theirs in settings.columns.items():
        if ours not in _COLUMN_NAMES:
            raise UsageError(
                f"input.columns: {ours!r} is no column of ours; known: {', '.join(sorted(_COLUMN_NAMES))}"
            )
        if theirs and theirs not in found:
            shown = ", ".join(found) or "none (columns are mapped in Parquet, CSV and JSONL tables)"
            raise JobRefused(f"input.columns: no table has a column {theirs!r}; found {shown}")


def _from_listing(place: InputFiles, access: AccessRules) -> ImageList:
    """Return the pictures among listed files; every file where one or a pattern's ending is named."""
    every = place.kind == "picture" or states_ending(place.uri)
    keys = [entry.key for entry in place.entries if every or is_picture(entry.key)]
    if not keys:
        raise nothing_in(place, "pictures")
    unnameable = tuple(name for name in place.listed.unnameable if is_picture(name))
    keys += [name for name in unnameable if name not in set(keys)]
    there = set(keys)
    others = [entry.key for entry in place.entries if entry.key not in there]
    targets = set(place.listed.links.values())  # named by their links already
    unnamed = [key for key in others if os.path.realpath(key) not in targets] if targets else others
    by_content = (
        (f"{place.uri}: its name has no picture's ending; it is taken for one by its first bytes",)
        if place.kind == "picture" and not has_picture_name(place.uri)
        else ()
    )
    return ImageList(
        image_uri=pa.array(keys, TEXT),
        image_id=None,
        root=place.root,
        listed=True,
        doubted=tuple(key for key in (*place.listed.links, *place.listed.odd) if key in there),
        skipped_files=len(others),
        unnameable=unnameable,
        left_out=tuple(place.listed.notes),
        notes=(*by_content, *_without_ending(unnamed, access)),
    )


_MOST_CHECKED = 8
_NO_PICTURES = (".txt", ".json", ".xml", ".csv", ".md", ".yaml", ".yml", ".db", ".ini", ".html", ".parquet")


def _without_ending(others: Sequence[str], access: AccessRules) -> tuple[str, ...]:
    """Return a sentence where files that are no pictures by their names are some by their first bytes.

    A few are checked, those without an ending first. TIFF does not count: raw camera files begin like it.
    """
    unknown = [key for key in others if not key.lower().endswith(_NO_PICTURES)]
    some = sorted(unknown, key=lambda key: "." in key.rpartition("/")[2])[:_MOST_CHECKED]
    found = [(key, kind) for key in some if (kind := _format_of(key, access)) not in (None, "TIFF")]
    if not found:
        return ()
    key, kind = found[0]
    return (
        f"{len(found)} of {len(some)} other files checked are pictures by their first bytes, though not by "
        f"their names, such as {clean_text(key)} ({kind}); they are left out: rename them, or list them in a "
        "table",
    )


def _format_of(uri: str, access: AccessRules) -> str | None:
    try:
        check_uri(uri, access)
        return picture_format(uri, access)
    except (ImageError, JobRefused):
        return None


def _read_image_tables(
    uris: Sequence[str], settings: InputSettings, access: AccessRules, folder: str
) -> ImageList:
    """Return the images that tables name; `image_uri` as written."""
    files = inspect_image_tables(uris, settings, access)
    faults = RowFaults(files[0].uri)
    nothing = pa.table({name: pa.array([], TEXT) for name in files[0].names})
    table = pa.concat_tables([nothing, *image_rows(files, access, faults)])
    faults.refuse_bad_columns()
    found, has_ids = single(table.column("image_uri")), "image_id" in files[0].names
    return ImageList(
        image_uri=pc.fill_null(found, NO_URI),
        image_id=completed_ids(single(table.column("image_id")), found) if has_ids else None,
        root=folder,
        files=tuple(uris),
        columns=files[0].all_names,
        used=files[0].names,
        unused=unused_columns(files[0]),
        notes=faults.notes(COST_OF_IMAGES),
    )


COST_OF_IMAGES = "images without a uri fail, rows without an image are left out"


def inspect_image_tables(
    uris: Sequence[str], settings: InputSettings, access: AccessRules
) -> tuple[TableFile, ...]:
    """Return the files of a table of images, their columns found and checked.

    Raises:
        JobRefused: unreadable, a missing column or a wrong type, two columns that could be meant.
    """
    wanted = {name: BOX_ROWS[name] for name in ("image_uri", "image_id")}
    first = inspect_tables(uris[:1], {}, settings.columns, access)[0]
    known = known_image_names(first.all_names, settings.columns, uri=first.uri)
    if known.unclear:
        raise unclear_columns(first.uri, settings.columns, known.unclear)
    files = inspect_tables(uris, wanted, known.mapping, access)
    for file in files:
        if "image_uri" not in file.names:
            raise missing_column(file.uri, "image_uri", file.all_names, settings.columns)
    return files


def image_rows(files: Sequence[TableFile], access: AccessRules, faults: RowFaults) -> Iterator[pa.Table]:
    """Yield the rows that name an image, as written: `image_uri` and, where given, `image_id`."""
    for file in files:
        for batch in read_batches(file, access, faults):
            yield pa.table(named_rows(batch, faults)[0]).select(list(files[0].names))


def _resolved(images: ImageList, settings: InputSettings) -> ImageList:
    root = _root(settings, images.root)
    return replace(images, image_uri=resolve_uris(images.image_uri, root), root=root)


def _root(settings: InputSettings, otherwise: str) -> str:
    return otherwise if settings.image_root is None else absolute(settings.image_root)


def _previous_boxes(parts: PublishedParts, settings: InputSettings, access: AccessRules) -> BoxList:
    """Return an earlier job's prompts, which state how they are to be read."""
    boxes = read_previous_boxes(parts, access)
    if settings.box_format not in (None, boxes.box_format):
        raise UsageError(
            f"--box-format {settings.box_format}: the boxes of {parts.folder} are {boxes.box_format}; "
            "leave it out"
        )
    if settings.box_frame == "stored" != boxes.box_frame:
        raise UsageError(
            f"--box-frame stored: the boxes of {parts.folder} are {boxes.box_frame}; leave it out"
        )
    return boxes
