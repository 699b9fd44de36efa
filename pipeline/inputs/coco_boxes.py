"""COCO files of any size: instances (images, annotations, categories) and results (a list of boxes).

Streamed: records go from the file into Arrow columns in blocks. Keys that are not named here (keypoints,
licences) are skipped unread; so is `segmentation`, unless the person asks for the boxes around the masks
(`boxes_around_masks`). A box is xywh in pixels. Image ids may be
integers or strings; integers become decimal strings. `iscrowd` may be 0, 1, true, false, any of these as
text, or null.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.model.rle import tight_boxes_xywh
from hqlabel.pipeline.arrow_lists import Int64Array, first_null, null_mask, positions, single
from hqlabel.pipeline.box_geometry import box_around
from hqlabel.pipeline.errors import JobRefused, clean_text, count
from hqlabel.pipeline.inputs.box_tables import NO_URI, as_names, crowds, usable_boxes
from hqlabel.pipeline.inputs.columns import (
    UNUSABLE,
    Found,
    Kind,
    RowFaults,
    plain,
    plain_masks,
    readable,
    sampled_leaf,
)
from hqlabel.pipeline.inputs.image_box_lists import (
    NUMBERS,
    TEXT,
    BoxList,
    ImageList,
    examples,
    group_rows,
    grouped_boxes,
    repeated,
    with_all_images,
)
from hqlabel.pipeline.inputs.json_records import (
    Lines,
    TextDamage,
    first_byte,
    json_record,
    read_lines,
    readable_lines,
    refuse_other_bytes,
    split_arrays,
)
from hqlabel.pipeline.inputs.read_table import naming_values, open_named
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.read_objects import open_input
from hqlabel.pipeline.storage.uri_rules import options_for

_BOX = {
    "image_id": Kind(0, "key"),
    "category_id": Kind(0, "integer"),
    "bbox": Kind(1, "number"),
    "score": Kind(0, "number"),
    "id": Kind(0, "key"),
    "iscrowd": Kind(0, "flag"),
}
_RECORDS: dict[str, dict[str, Kind]] = {
    "": _BOX,
    "annotations": _BOX,
    "images": {
        "id": Kind(0, "key"),
        "file_name": Kind(0, "text"),
        "width": Kind(0, "number"),
        "height": Kind(0, "number"),
    },
    "categories": {"id": Kind(0, "integer"), "name": Kind(0, "text")},
}
_SAMPLE_RECORDS = 100
_HEAD_BYTES = 2**20
_SHAPE = "wanted COCO: an object with lists `images` and `annotations`, or a list of results"


def is_results(uri: str, access: AccessRules) -> bool:
    """Return whether a file is a list (results) and not an object (instances).

    Raises:
        JobRefused: neither.
    """
    with open_named(uri, "JSON", access) as stream:
        refuse_other_bytes(stream)
        first = first_byte(stream)
    if first not in ("[", "{"):
        found = f"it begins with {first!r}" if first else "it is empty"
        raise JobRefused(f"{uri}: not a sound JSON file: {found}; {_SHAPE}")
    return first == "["


def read_results(uri: str, access: AccessRules, *, folder: str, from_masks: bool = False) -> BoxList:
    """Return the boxes of a results file, by image id; it names no files.

    `from_masks`: those around its masks.
    """
    records = _read(uri, {""}, access, from_masks=from_masks)[""]
    return _grouped(records.table(), records.faults, uri, folder)


def read_coco_images(uri: str, access: AccessRules, *, folder: str) -> ImageList:
    """Return the images of an instances file; `image_uri` holds the file names as written."""
    return _images(uri, _read(uri, {"images", "categories"}, access), access, folder)


def read_instances(uri: str, access: AccessRules, *, folder: str, from_masks: bool = False) -> BoxList:
    """Return the boxes of an instances file, and every image it names: those without boxes have none.

    Annotations of an image that the file does not name come last, with a null uri. `from_masks`: the boxes
    around its masks.
    """
    found = _read(uri, {"images", "annotations", "categories"}, access, from_masks=from_masks)
    if "annotations" not in found:
        raise JobRefused(f"{uri}: {_without(uri, 'annotations', access)}; {_SHAPE}")
    images, error = _one_file_each(_images(uri, found, access, folder), uri)
    annotations, notes = found["annotations"].table(), tuple[str, ...]()
    if from_masks:
        annotations, notes = _of_their_picture(uri, annotations, images)
    boxes = _grouped(annotations, found["annotations"].faults, uri, folder)
    listed = with_all_images(boxes, images.image_id, images.image_uri)
    assert images.size_hw is not None, "zeros where the file states no size"
    size_hw = np.zeros((len(listed.lengths), 2), dtype=np.int64)
    size_hw[: len(images.size_hw)] = images.size_hw
    notes = (*images.notes, *listed.notes, *notes)
    error = pa.concat_arrays([error, pa.nulls(len(listed.lengths) - len(error), TEXT)])
    return replace(listed, categories=images.categories, size_hw=size_hw, error=error, notes=notes)


class _Records:
    """The records of one array of the file: blocks of plain columns, and what of them cannot be used."""

    def __init__(self, uri: str, first: Lines, *, from_masks: bool) -> None:
        name = first.name
        self.faults = RowFaults(f"{uri}: {name}" if name else uri)
        self._kinds = _kinds(first)
        self._schema = pa.schema([(name, kind.arrow_type()) for name, kind in self._kinds.items()])
        self._read = _block_of_masks if from_masks and "bbox" in self._kinds else _block
        self._blocks: list[pa.Table] = []
        self._rows = 0

    def add(self, lines: Lines) -> None:
        """Read some records more.

        Raises:
            TextDamage: there are other than `lines.count`. JobRefused: most values of a key are unusable.
        """
        before = self._rows
        for table, found in self._read(lines, self._schema):
            plainer = _compact(_whole(table, self._kinds, found), found)
            self._blocks.append(self.faults.add(plainer, found, first_row=self._rows))
            self._rows += table.num_rows
        if self._rows - before != lines.count:
            raise TextDamage(f"{lines.count} records were counted, {self._rows - before} can be read")

    def table(self) -> pa.Table:
        """Return all records; the column UNUSABLE is there where a record cannot be used."""
        self.faults.refuse_bad_columns()
        return pa.concat_tables(self._blocks, promote_options="default")


def _read(
    uri: str, names: Collection[str], access: AccessRules, *, from_masks: bool = False
) -> dict[str, _Records]:
    """Return the wanted arrays of the file; one that is absent is no key."""
    found: dict[str, _Records] = {}
    with open_named(uri, "JSON", access) as stream:
        for lines in split_arrays(stream, names):
            if lines.name not in found:
                found[lines.name] = _Records(uri, lines, from_masks=from_masks)
            found[lines.name].add(lines)
    return found


def _block(lines: Lines, schema: pa.Schema) -> Iterator[tuple[pa.Table, Found]]:
    """Yield the records of a block; flags in several spellings, which stop Arrow, are read one by one."""
    at = schema.get_field_index("iscrowd")
    if at >= 0:
        try:
            read_lines(lines.text, lines.count, pa.schema([schema.field(at)]))
        except (pa.ArrowInvalid, TextDamage):
            yield from _with_flags(lines, schema.remove(at), at)
            return
    if not lines.count:
        yield schema.empty_table(), {}
    elif lines.text.strip():
        yield from readable_lines(lines.text, schema)


def _with_flags(lines: Lines, schema: pa.Schema, at: int) -> Iterator[tuple[pa.Table, Found]]:
    records = (json_record(line) for line in lines.text.split(b"\n") if line.strip())
    flags = (record.get("iscrowd") for record in records)
    texts = [None if flag is None else str(flag) for flag in flags]
    first = 0
    for table, found in readable_lines(lines.text, schema):
        some = pa.array(texts[first : first + table.num_rows], TEXT)
        yield table.add_column(at, "iscrowd", some), found
        first += table.num_rows


def _block_of_masks(lines: Lines, schema: pa.Schema) -> Iterator[tuple[pa.Table, Found]]:
    """Yield the records of a block with the box around each mask as `bbox`, and the mask's own size."""
    at = schema.get_field_index("bbox")
    records = [json_record(line) for line in lines.text.split(b"\n") if line.strip()]
    boxes, sizes_hw = boxes_around_masks([record.get("segmentation") for record in records])
    first = 0
    for table, found in _block(lines, schema.remove(at)):
        own = slice(first, first + table.num_rows)
        with_boxes = table.add_column(at, "bbox", pa.array(boxes[own], NUMBERS))
        yield with_boxes.append_column("mask_hw", pa.array(sizes_hw[own], pa.list_(pa.int64()))), found
        first += table.num_rows


def boxes_around_masks(
    masks: Sequence[Any],
) -> tuple[list[tuple[float, ...] | None], list[tuple[int, int] | None]]:
    """Return x, y, width, height of the box around each mask as COCO writes it, and the size of those of RLE.

    Of RLE, compressed or not, the box ends on the edges of the outermost pixels, as pycocotools' `toBbox` has
    it. Of polygons it is their own extent, which differs from that of their pixels by less than one. None for
    an empty mask, and for what is none.
    """
    boxes: list[tuple[float, ...] | None] = [None] * len(masks)
    sizes_hw: list[tuple[int, int] | None] = [None] * len(masks)
    by_size: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for place, mask in enumerate(masks):
        if isinstance(mask, dict):
            plain_mask = plain_masks(mask)
            if len(plain_mask["size"]) == 2 and min(plain_mask["size"]) > 0:
                sizes_hw[place] = size_hw = tuple(plain_mask["size"])
                by_size.setdefault(size_hw, []).append((place, plain_mask["counts"]))
        elif isinstance(mask, list):
            boxes[place] = _around_polygons(mask)
    for size_hw, group in by_size.items():
        found = tight_boxes_xywh([text for _, text in group], size_hw)
        for (place, _), box in zip(group, found, strict=True):
            boxes[place] = box
    return boxes, sizes_hw


def _around_polygons(polygons: list[Any]) -> tuple[float, ...] | None:
    """Return the box around all polygons of one mask; None where one of them is none."""
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]  # one polygon without its list, as some tools write it
    found = [box_around(one) if isinstance(one, list) else None for one in polygons]
    corners = [box for box in found if box is not None]
    if not corners or len(corners) < len(found):
        return None
    x1, y1 = (min(sides) for sides in list(zip(*corners, strict=True))[:2])
    x2, y2 = (max(sides) for sides in list(zip(*corners, strict=True))[2:])
    return x1, y1, x2 - x1, y2 - y1


def _kinds(lines: Lines) -> dict[str, Kind]:
    """Return the columns of an array; what its ids are written as is seen from its first records."""
    records = [json_record(line) for line in lines.text.split(b"\n", _SAMPLE_RECORDS)[:_SAMPLE_RECORDS]]
    kinds = {}
    for name, kind in _RECORDS[lines.name].items():
        leaf = sampled_leaf(record.get(name) for record in records)
        if kind.leaf == "key":
            kind = replace(kind, leaf="text" if leaf == "null" else leaf)
        if kind.leaf == "integer" and leaf == "whole":
            kind = replace(kind, leaf=leaf)
        if kind.leaf == "flag":
            flag = sampled_leaf((record.get(name) for record in records), "flag")
            kind = replace(kind, leaf="integer" if flag == "null" else flag)
        if leaf == "text" and name in ("width", "height"):
            continue  # only used to guess mistakes; not worth a refusal
        kinds[name] = kind
    return kinds


def _without(uri: str, name: str, access: AccessRules) -> str:
    """Return what a file without this list has there or at its beginning instead, as text."""
    null = re.compile(rf'"{name}"\s*:\s*null\b'.encode())
    with open_input(uri, options_for(uri, access)) as stream:
        head = before = stream.read(_HEAD_BYTES)
        while before and null.search(before) is None:
            block = stream.read(_HEAD_BYTES)
            before = before[-64:] + block if block else b""
    if before:
        return f"`{name}` is null; wanted a list, which is [] where there are none"
    key = re.match(rb'\s*\{\s*"((?:[^"\\]|\\.){0,200})"', head.removeprefix(b"\xef\xbb\xbf"))
    first = f"; its first key is {clean_text(key[1].decode(errors='replace'))!r}" if key else ""
    return (
        f"there is no list `{name}`{first} (boxes by file name are read one object a line, from a file named "
        '.jsonl: {"image_uri": "a.jpg", "boxes": [[1, 2, 3, 4]]})'
    )


def _whole(table: pa.Table, kinds: Mapping[str, Kind], found: Found) -> pa.Table:
    """Return the same, with whole numbers that are written as floats (`1.0`) as integers.

    One that is so large that a float has lost digits of it is null, and in `found`.
    """
    for at, (name, kind) in enumerate(kinds.items()):
        if kind.leaf == "whole":
            rows = found.setdefault(name, {})
            values = readable(single(table.column(at)), functools.partial(plain, kind=kind), rows)
            table = table.set_column(at, name, values)
    return table


def _compact(table: pa.Table, found: Found) -> pa.Table:
    """Return it with crowds marked and image ids dictionary-encoded: five million boxes name few images."""
    if "image_id" not in table.column_names:
        return table
    at = table.column_names.index("iscrowd")
    flags = readable(single(table.column("iscrowd")), crowds, found.setdefault("iscrowd", {}))
    table = table.set_column(at, "iscrowd", flags)
    at = table.column_names.index("image_id")
    ids = pc.cast(single(table.column("image_id")), TEXT).dictionary_encode()
    return table.set_column(at, "image_id", ids)


def _of_their_picture(uri: str, table: pa.Table, images: ImageList) -> tuple[pa.Table, tuple[str, ...]]:
    """Return the annotations, with null boxes around masks of another size than their picture, and why."""
    assert images.size_hw is not None, "zeros where the file states no size"
    assert images.image_id is not None, "an instances file has ids"
    place = positions(pc.cast(table.column("image_id"), TEXT).combine_chunks(), images.image_id)
    stated_hw = np.where(place[:, None] >= 0, images.size_hw[place], 0)
    sizes = [one or (0, 0) for one in table.column("mask_hw").to_pylist()]
    own_hw = np.array(sizes, np.int64).reshape(-1, 2)
    odd = (own_hw > 0).all(axis=1) & (stated_hw > 0).all(axis=1) & (own_hw != stated_hw).any(axis=1)
    if not odd.any():
        return table, ()
    bbox = single(table.column("bbox"))
    table = table.set_column(
        table.column_names.index("bbox"), "bbox", pc.if_else(pa.array(odd), pa.scalar(None, NUMBERS), bbox)
    )
    first = int(np.flatnonzero(odd)[0])
    return table, (
        f"{uri}: {odd.sum()} masks are of another size than their picture, such as "
        f"{own_hw[first].tolist()} in one of {stated_hw[first].tolist()} (height, width): "
        "their boxes get no mask (box_malformed)",
    )


def _grouped(table: pa.Table, faults: RowFaults, uri: str, folder: str) -> BoxList:
    ids = table.column("image_id")
    if 2 * ids.null_count > len(ids):
        raise JobRefused(
            f"{uri}: record {first_null(ids)} (from 0) has no image_id; {_SHAPE}; the rows of a table are "
            "read one object a line, from a file named .jsonl: jq -c '.[]' IN > OUT.jsonl"
        )
    if table.num_rows and table.column("bbox").null_count == table.num_rows:
        if "mask_hw" in table.column_names:
            raise JobRefused(f"{uri}: none of its {table.num_rows} records has a mask (`segmentation`)")
        raise JobRefused(
            f"{uri}: none of its {table.num_rows} records has a bbox; {_SHAPE}; for the boxes around masks: "
            "--set input.boxes_from=masks"
        )
    table = _named(table, "image_id", faults)
    ours = {"bbox": "given", "category_id": "category_id", "score": "score", "id": "box_id"}
    flat = {ours.get(name, name): single(table.column(name)) for name in (*ours, "iscrowd")}
    # A column of nulls alone was never given.
    flat = {
        name: column for name, column in flat.items() if not len(column) or column.null_count < len(column)
    }
    reasons = single(table.column(UNUSABLE)) if UNUSABLE in table.column_names else None
    with naming_values(uri):
        boxes = pa.table(usable_boxes(flat, reasons, faults))
    faults.refuse_bad_columns()
    groups = group_rows(table.column("image_id"), None)
    found = grouped_boxes(groups, boxes, folder=folder, box_format="xywh", files=[uri])
    notes = faults.notes("boxes get no mask (box_malformed), those without an image are left out")
    lost = table.column("bbox").null_count if "mask_hw" in table.column_names else 0
    said = f"{uri}: {lost:,} of {table.num_rows:,} records have no mask around which a box could be"
    return replace(found, notes=(*notes, said) if lost else notes)


def _named(table: pa.Table, name: str, faults: RowFaults) -> pa.Table:
    """Return the records that have this id; the others are counted."""
    column = table.column(name)
    if column.null_count:
        lacking = null_mask(single(column))
        if UNUSABLE in table.column_names:
            lacking &= null_mask(single(table.column(UNUSABLE)))
        faults.lacking({name: np.flatnonzero(lacking).tolist()}, rows_there=table.num_rows, blank=0)
    return table.filter(column.is_valid()) if column.null_count else table


def _images(uri: str, found: Mapping[str, _Records], access: AccessRules, folder: str) -> ImageList:
    if "images" not in found:
        raise JobRefused(f"{uri}: {_without(uri, 'images', access)}; {_SHAPE}")
    records = found["images"]
    table = records.table()
    for name in ("id", "file_name"):
        if 2 * table.column(name).null_count > table.num_rows:
            raise JobRefused(f"{uri}: image {first_null(table.column(name))} (from 0) has no {name}")
    files = as_names(table.column("file_name"))
    nameless = null_mask(files)
    if UNUSABLE in table.column_names:
        nameless &= null_mask(single(table.column(UNUSABLE)))
    records.faults.lacking(
        {"file_name": np.flatnonzero(nameless).tolist()}, rows_there=table.num_rows, blank=0
    )
    table = table.set_column(table.column_names.index("file_name"), "file_name", files)
    table = _named(table, "id", records.faults)
    ids = pc.cast(single(table.column("id")), TEXT)
    ids, table, repeats = _ids_once(ids, table, uri)
    names: dict[int, str] = {}
    notes: tuple[str, ...] = ()
    if "categories" in found:
        names, doubtful = _categories(found["categories"].table())
        notes = (
            *found["categories"].faults.notes("such a category has no name"),
            *(f"{uri}: {told}" for told in doubtful),
        )
    return ImageList(
        image_uri=pc.fill_null(single(table.column("file_name")), NO_URI),
        image_id=ids,
        root=folder,
        size_hw=_sizes(table),
        categories=names,
        files=(uri,),
        notes=(
            *records.faults.notes("images without a file fail, those without an id are left out"),
            *repeats,
            *notes,
        ),
    )


def _ids_once(ids: pa.Array, table: pa.Table, uri: str) -> tuple[pa.Array, pa.Table, tuple[str, ...]]:
    """Return the images without those that say what an earlier one of the same id says, and a sentence."""
    if not len(repeated(ids)):
        return ids, table, ()
    names = single(table.column("file_name"))
    codes_N2 = np.stack([_codes(ids), _codes(names)], axis=1)
    first = np.sort(np.unique(codes_N2, axis=0, return_index=True)[1])
    again = np.ones(len(ids), dtype=np.bool_)
    again[first] = False
    number = int(again.sum())
    note = f"{uri}: {count(number, 'image')} with the id and file of another, such as id "
    notes = (f"{note}{examples(ids.filter(pa.array(again)))}: counted once",) if number else ()
    return ids.take(pa.array(first)), table.take(pa.array(first)), notes


def _one_file_each(images: ImageList, uri: str) -> tuple[ImageList, pa.Array]:
    """Return the images with one row an id, and why those of several files cannot be labelled, else null.

    Raises:
        JobRefused: most ids are such.
    """
    assert images.image_id is not None, "an instances file has ids"
    assert images.size_hw is not None, "zeros where the file states no size"
    twice = repeated(images.image_id)
    if not len(twice):
        return images, pa.nulls(len(images.image_id), TEXT)
    codes = _codes(images.image_id)
    first = np.sort(np.unique(codes, return_index=True)[1])
    ids = images.image_id.take(pa.array(first))
    own = pc.is_in(images.image_id, twice)
    files: dict[str, list[str]] = {}
    for name, file in zip(
        *(one.filter(own).to_pylist() for one in (images.image_id, images.image_uri)), strict=True
    ):
        files.setdefault(name, []).append(file)
    reasons = {
        name: f"image id {name!r} stands for several files: {examples(sorted(some))}; give each its own id"
        for name, some in files.items()
    }
    example = clean_text(reasons[min(reasons)])
    if 2 * len(reasons) > len(ids):
        raise JobRefused(f"{uri}: {len(reasons):,} of {len(ids):,} ids are not of one file: {example}")
    note = (
        f"{uri}: {count(len(reasons), 'image id')} of several files, which fail (labels_mismatch): {example}"
    )
    least = [min(files[name]) if name in files else None for name in ids.to_pylist()]
    one_each = replace(
        images,
        image_id=ids,
        image_uri=pc.coalesce(pa.array(least, TEXT), images.image_uri.take(pa.array(first))),
        size_hw=images.size_hw[first],
        notes=(*images.notes, note),
    )
    return one_each, pa.array([reasons.get(name) for name in ids.to_pylist()], TEXT)


def _codes(texts: pa.Array) -> Int64Array:
    codes: Int64Array = pc.fill_null(texts.dictionary_encode().indices, -1).to_numpy().astype(np.int64)
    return codes


def _sizes(table: pa.Table) -> Int64Array:
    """Return height and width as the file states them; 0 for none, or what could be no size."""
    size_hw = np.zeros((table.num_rows, 2), dtype=np.int64)
    for axis, name in enumerate(("height", "width")):
        if name in table.column_names:
            values = np.nan_to_num(
                pc.fill_null(table.column(name), 0.0).to_numpy(), nan=0, posinf=0, neginf=0
            )
            size_hw[:, axis] = np.clip(values, 0, 2**31)
    return size_hw


def _categories(table: pa.Table) -> tuple[dict[int, str], list[str]]:
    """Return category id -> name, for those that have a name, and a sentence on ids that have several.

    Of several names it is the first by its bytes, whatever their order in the file.
    """
    names: dict[int, set[str]] = {}
    for row in table.to_pylist():
        if row["id"] is not None and row["name"] is not None:
            names.setdefault(row["id"], set()).add(row["name"])
    ordered = {number: sorted(own, key=str.encode) for number, own in names.items()}
    several = sorted(number for number, own in ordered.items() if len(own) > 1)
    told = [
        f"{count(len(several), 'category', 'categories')} with several names, such as {several[0]}: "
        f"{examples(ordered[several[0]])}; the first of these is taken"
    ] if several else []  # fmt: skip
    return {number: own[0] for number, own in ordered.items()}, told
