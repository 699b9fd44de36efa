"""COCO files of any size: instances (images, annotations, categories) and results (a list of boxes).

Streamed: records go from the file into Arrow columns in blocks. Keys that are not named here (keypoints,
licences) are skipped unread; so is `segmentation`, unless the person asks for the boxes around the masks
(`boxes_around_masks`). A box is xywh in pixels. Image ids may be
integers or strings; integers become decimal strings. `iscrowd` may be 0, 1, true, false, any of these as
text, or null.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.model.rle import tight_boxes_xywh
from hqlabel.pipeline.arrow_lists import Int64Array, first_null, positions, single
from hqlabel.pipeline.box_geometry import box_around
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import box_columns, crowds
from hqlabel.pipeline.inputs.columns import Kind, plain, plain_masks, sampled_leaf
from hqlabel.pipeline.inputs.image_box_lists import (
    NUMBERS,
    TEXT,
    BoxList,
    ImageList,
    group_rows,
    grouped_boxes,
    refuse_repeated,
    with_all_images,
)
from hqlabel.pipeline.inputs.json_records import (
    Lines,
    TextDamage,
    first_byte,
    json_record,
    read_lines,
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
    return _grouped(uri, _read(uri, {""}, access, from_masks=from_masks)[""], folder)


def read_coco_images(uri: str, access: AccessRules, *, folder: str) -> ImageList:
    """Return the images of an instances file; `image_uri` holds the file names as written."""
    return _images(uri, _read(uri, {"images", "categories"}, access), access, folder)


def read_instances(uri: str, access: AccessRules, *, folder: str, from_masks: bool = False) -> BoxList:
    """Return the boxes of an instances file, and every image it names: those without boxes have none.

    Annotations of an image that the file does not name come last, with a null uri. `from_masks`: the boxes
    around its masks.
    """
    blocks = _read(uri, {"images", "annotations", "categories"}, access, from_masks=from_masks)
    if "annotations" not in blocks:
        raise JobRefused(f"{uri}: {_without(uri, 'annotations', access)}; {_SHAPE}")
    images = _images(uri, blocks, access, folder)
    annotations, notes = blocks["annotations"], tuple[str, ...]()
    if from_masks:
        annotations, notes = _of_their_picture(uri, pa.concat_tables(annotations), images)
    boxes = _grouped(uri, annotations, folder)
    boxes = replace(boxes, notes=(*boxes.notes, *notes))
    listed = with_all_images(boxes, images.image_id, images.image_uri)
    assert images.size_hw is not None, "zeros where the file states no size"
    size_hw = np.zeros((len(listed.lengths), 2), dtype=np.int64)
    size_hw[: len(images.size_hw)] = images.size_hw
    return replace(listed, categories=images.categories, size_hw=size_hw)


def _read(
    uri: str, names: Collection[str], access: AccessRules, *, from_masks: bool = False
) -> dict[str, list[pa.Table]]:
    """Return the wanted arrays of the file as blocks of plain columns; an array that is absent is no key."""
    found: dict[str, dict[str, Kind]] = {}
    blocks: dict[str, list[pa.Table]] = {}
    with open_named(uri, "JSON", access) as stream:
        for lines in split_arrays(stream, names):
            if lines.name not in found:
                found[lines.name] = _kinds(lines)
            kinds = found[lines.name]
            schema = pa.schema([(name, kind.arrow_type()) for name, kind in kinds.items()])
            if from_masks and "bbox" in kinds:
                table = _whole(_block_of_masks(lines, schema), kinds)
            else:
                table = _whole(_block(lines, schema), kinds)
            blocks.setdefault(lines.name, []).append(_compact(table))
    return blocks


def _block(lines: Lines, schema: pa.Schema) -> pa.Table:
    """Return the records of a block; flags in several spellings, which stop Arrow, are read one by one."""
    try:
        return read_lines(lines.text, lines.count, schema)
    except TextDamage:
        at = schema.get_field_index("iscrowd")
        if at < 0:
            raise
        table = read_lines(lines.text, lines.count, schema.remove(at))  # another key's fault is reported here
        flags = [json_record(line).get("iscrowd") for line in lines.text.split(b"\n")]
        texts = [None if flag is None else str(flag) for flag in flags]
        return table.add_column(at, "iscrowd", pa.array(texts, TEXT))


def _block_of_masks(lines: Lines, schema: pa.Schema) -> pa.Table:
    """Return the records of a block with the box around each mask as `bbox`, and the mask's own size."""
    at = schema.get_field_index("bbox")
    table = _block(lines, schema.remove(at))
    masks = [json_record(line).get("segmentation") for line in lines.text.split(b"\n")]
    boxes, sizes_hw = boxes_around_masks(masks)
    table = table.add_column(at, "bbox", pa.array(boxes, NUMBERS))
    return table.append_column("mask_hw", pa.array(sizes_hw, pa.list_(pa.int64())))


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


def _whole(table: pa.Table, kinds: Mapping[str, Kind]) -> pa.Table:
    """Return the same, with whole numbers that are written as floats (`1.0`) as integers.

    Raises:
        TextDamage: one that is so large that a float has lost digits of it.
    """
    for at, (name, kind) in enumerate(kinds.items()):
        if kind.leaf == "whole":
            try:
                values = plain(single(table.column(at)), kind)
            except pa.ArrowInvalid as error:
                raise TextDamage(f"{name!r} {error}") from error
            table = table.set_column(at, name, values)
    return table


def _compact(table: pa.Table) -> pa.Table:
    """Return it with crowds marked and image ids dictionary-encoded: five million boxes name few images."""
    if "image_id" not in table.column_names:
        return table
    at = table.column_names.index("iscrowd")
    table = table.set_column(at, "iscrowd", crowds(single(table.column("iscrowd"))))
    at = table.column_names.index("image_id")
    ids = pc.cast(single(table.column("image_id")), TEXT).dictionary_encode()
    return table.set_column(at, "image_id", ids)


def _of_their_picture(uri: str, table: pa.Table, images: ImageList) -> tuple[list[pa.Table], tuple[str, ...]]:
    """Return the annotations, with null boxes around masks of another size than their picture, and why."""
    assert images.size_hw is not None, "zeros where the file states no size"
    assert images.image_id is not None, "an instances file has ids"
    place = positions(pc.cast(table.column("image_id"), TEXT).combine_chunks(), images.image_id)
    stated_hw = np.where(place[:, None] >= 0, images.size_hw[place], 0)
    sizes = [one or (0, 0) for one in table.column("mask_hw").to_pylist()]
    own_hw = np.array(sizes, np.int64).reshape(-1, 2)
    odd = (own_hw > 0).all(axis=1) & (stated_hw > 0).all(axis=1) & (own_hw != stated_hw).any(axis=1)
    if not odd.any():
        return [table], ()
    bbox = single(table.column("bbox"))
    table = table.set_column(
        table.column_names.index("bbox"), "bbox", pc.if_else(pa.array(odd), pa.scalar(None, NUMBERS), bbox)
    )
    first = int(np.flatnonzero(odd)[0])
    return [table], (
        f"{uri}: {odd.sum()} masks are of another size than their picture, such as "
        f"{own_hw[first].tolist()} in one of {stated_hw[first].tolist()} (height, width): "
        "their boxes get no mask (box_malformed)",
    )


def _grouped(uri: str, blocks: list[pa.Table], folder: str) -> BoxList:
    table = pa.concat_tables(blocks)
    ids = table.column("image_id")
    if ids.null_count:
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
    ours = {"bbox": "given", "category_id": "category_id", "score": "score", "id": "box_id"}
    flat = {ours.get(name, name): single(table.column(name)) for name in (*ours, "iscrowd")}
    # A column of nulls alone was never given.
    flat = {
        name: column for name, column in flat.items() if not len(column) or column.null_count < len(column)
    }
    with naming_values(uri):
        boxes = pa.table(box_columns(flat))
    found = grouped_boxes(group_rows(ids, None), boxes, folder=folder, box_format="xywh", files=[uri])
    lost = table.column("bbox").null_count if "mask_hw" in table.column_names else 0
    said = f"{uri}: {lost:,} of {table.num_rows:,} records have no mask around which a box could be"
    return replace(found, notes=(said,)) if lost else found


def _images(uri: str, blocks: Mapping[str, list[pa.Table]], access: AccessRules, folder: str) -> ImageList:
    if "images" not in blocks:
        raise JobRefused(f"{uri}: {_without(uri, 'images', access)}; {_SHAPE}")
    table = pa.concat_tables(blocks["images"])
    for name in ("id", "file_name"):
        if table.column(name).null_count:
            raise JobRefused(f"{uri}: image {first_null(table.column(name))} (from 0) has no {name}")
    ids = pc.cast(single(table.column("id")), TEXT)
    refuse_repeated(ids, uri)
    return ImageList(
        image_uri=single(table.column("file_name")),
        image_id=ids,
        root=folder,
        size_hw=_sizes(table),
        categories=_categories(uri, blocks.get("categories")),
        files=(uri,),
    )


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


def _categories(uri: str, blocks: list[pa.Table] | None) -> dict[int, str]:
    """Return category id -> name, for those that have a name."""
    names: dict[int, str] = {}
    for row in pa.concat_tables(blocks).to_pylist() if blocks else []:
        if row["id"] is None or row["name"] is None:
            continue
        if names.setdefault(row["id"], row["name"]) != row["name"]:
            raise JobRefused(
                f"{uri}: category {row['id']} has two names: {names[row['id']]!r} and {row['name']!r}"
            )
    return names
