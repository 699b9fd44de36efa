"""Tables of images and boxes, read in pieces and parted by the key that joins them.

`inspect_inputs` opens every file's footer, in the driver. `read_piece` reads some row groups as the planner
of one process would, and gives each partition its rows; an image's rows all go to the same one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import Int64Array, single
from hqlabel.pipeline.inputs.box_tables import (
    NO_URI,
    BoxTables,
    box_rows,
    boxes_of_rows,
    inspect_box_tables,
    unused_columns,
)
from hqlabel.pipeline.inputs.columns import RowFaults
from hqlabel.pipeline.inputs.find_files import InputFiles, absolute, is_json, is_pattern
from hqlabel.pipeline.inputs.hf_parquet import holds_pictures
from hqlabel.pipeline.inputs.image_box_lists import NUMBERS, TEXT, BoxList, ImageList
from hqlabel.pipeline.inputs.open_inputs import (
    check_columns,
    image_rows,
    inspect_image_tables,
    resolve_uris,
)
from hqlabel.pipeline.inputs.previous_output import find_parts
from hqlabel.pipeline.inputs.read_table import TableFile, read_batches
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.join_boxes_to_images import comparable, ids_of_uris
from hqlabel.pipeline.planning.key_hashes import hash64
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage.checksummed_parquet import open_closed, read_closed_stream
from hqlabel.pipeline.storage.read_objects import open_input
from hqlabel.pipeline.storage.uri_rules import options_for

Content = Literal["images", "box rows", "box lists"]
Key = Literal["id", "uri", "id of uri"]

Streams = tuple[pa.Buffer, ...]
"""Rows as Arrow streams: one, or, of images with lists, a second one with the boxes in these."""
Piece = list[Streams]
"""What one reader has for one partition, in the order of the table."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some files, or row groups, of one table. `key`: by what its rows are parted.

    `folder`: what relative uris start from; `ids_below`: the folder that ids made of uris leave out.
    """

    content: Content
    files: tuple[TableFile, ...]
    key: Key
    folder: str
    ids_below: str = ""


@dataclass(frozen=True, kw_only=True)
class TableInputs:
    """Inputs that can be read in pieces. `images`, `boxes`: all but the rows, which are none.

    `tables`: one source for each table, whole; that of images first. `rows`: of all tables, and the boxes in
    lists. `image_rows`: rows that may be an image each.
    """

    images: ImageList | None
    boxes: BoxList | None
    tables: tuple[Source, ...]
    rows: int
    image_rows: int
    access: AccessRules

    def below(self, folder: str) -> TableInputs:
        """Return the same with relative uris of boxes below another folder."""
        tables = tuple(one if one.content == "images" else replace(one, folder=folder) for one in self.tables)
        return replace(self, tables=tables)


def inspect_inputs(
    settings: InputSettings, access: AccessRules, *, least_bytes: int = 0
) -> TableInputs | None:
    """Return the inputs when all of them are tables, of so many bytes together; else None.

    Raises:
        JobRefused: unreadable, a missing column or a wrong type.
    """
    named = {"images": settings.images, "boxes": settings.boxes}
    found = {name: _tables_at(uri, settings, access) for name, uri in named.items() if uri is not None}
    places = [place for place in found.values() if place is not None]
    if len(places) < len(found) or not places:
        return None
    if sum(one.size for place in places for one in place.entries) < least_bytes:
        return None
    of_images, of_boxes = found.get("images"), found.get("boxes")
    images = _images(of_images, settings, access) if of_images else None
    boxes = _boxes(of_boxes, settings, access) if of_boxes else None
    check_columns(settings, [*(images[0].columns if images else ()), *(boxes[0].columns if boxes else ())])
    key_of_images, key_of_boxes = _keys(images[0] if images else None, boxes[0] if boxes else None)
    sources = []
    if images:
        root = images[0].root
        sources.append(
            Source(content="images", files=images[1], key=key_of_images, folder=root, ids_below=root)
        )
    if boxes:
        content: Content = "box lists" if boxes[0].one_row_per_image else "box rows"
        sources.append(
            Source(content=content, files=boxes[1].files, key=key_of_boxes, folder=boxes[0].folder)
        )
    counts = [_count_rows(one, access) for one in sources]
    return TableInputs(
        images=images[0] if images else None,
        boxes=boxes[0] if boxes else None,
        tables=tuple(sources),
        rows=sum(counts),
        image_rows=counts[0],
        access=access,
    )


def _tables_at(uri: str, settings: InputSettings, access: AccessRules) -> InputFiles | None:
    """Return what a user names when it is a table without pictures in it."""
    uri = absolute(uri)
    if settings.boxes_from == "masks" or (is_json(uri) and not is_pattern(uri)):
        return None
    place = InputFiles.at(uri, access)
    if find_parts(uri, place.entries) is not None or place.tars() or place.is_listing():
        return None
    if place.label_files():
        return None
    tables = place.tables()
    return None if holds_pictures(tables[0], settings.columns, access) else place


def _images(
    place: InputFiles, settings: InputSettings, access: AccessRules
) -> tuple[ImageList, tuple[TableFile, ...]]:
    uris = place.tables()
    files = inspect_image_tables(uris, settings, access)
    nothing = pa.array([], TEXT)
    root = place.root if settings.image_root is None else absolute(settings.image_root)
    images = ImageList(
        image_uri=nothing,
        image_id=nothing if "image_id" in files[0].names else None,
        root=root,
        files=tuple(uris),
        columns=files[0].all_names,
        used=files[0].names,
        unused=unused_columns(files[0]),
    )
    return images, files


def _boxes(place: InputFiles, settings: InputSettings, access: AccessRules) -> tuple[BoxList, BoxTables]:
    uris = place.tables()
    folder = place.root if settings.image_root is None else absolute(settings.image_root)
    tables = inspect_box_tables(
        uris,
        settings.columns,
        access,
        folder=folder,
        box_format=settings.box_format,
        needs_uri=settings.images is None,
    )
    names = tables.files[0].names
    nothing = pa.array([], TEXT)
    boxes = BoxList(
        image_id=nothing if "image_id" in names else None,
        image_uri=nothing if "image_uri" in names else None,
        lengths=np.zeros(0, np.int64),
        is_null=np.zeros(0, np.bool_),
        error=nothing,
        boxes=pa.table({"given": pa.array([], NUMBERS)}),
        rows=None,
        folder=folder,
        box_format=tables.box_format or "xyxy",
        one_row_per_image=tables.one_row_per_image,
        files=tuple(uris),
        columns=tables.files[0].all_names,
        used=names,
        unused=tables.unused,
        notes=(*tables.notes, *place.listed.notes),
    )
    return boxes, tables


def _keys(images: ImageList | None, boxes: BoxList | None) -> tuple[Key, Key]:
    """Return by what rows of images, and those of boxes, are parted: as `join` finds one for the other."""
    one = images if boxes is None else boxes if images is None else None
    if one is not None:
        key: Key = "id" if one.image_id is not None else "uri"
        return key, key
    assert images is not None, "there is one of them, or both"
    assert boxes is not None, "there is one of them, or both"
    if boxes.image_uri is not None and (images.image_id is None or boxes.image_id is None):
        return "uri", "uri"
    return "id" if images.image_id is not None else "id of uri", "id"


def _count_rows(source: Source, access: AccessRules) -> int:
    """Return the rows of a table and the numbers of boxes in its lists, by the footers."""
    return sum(rows for file in source.files for _, rows, _ in _groups(file, access))


def _groups(file: TableFile, access: AccessRules) -> Iterator[tuple[int, int, int]]:
    """Yield number, rows with the boxes in their lists, and rows alone of each row group.

    A file of text is one group, and what its rows are is guessed from its size.
    """
    with open_input(file.uri, options_for(file.uri, access)) as stream:
        if file.file_format != "parquet":
            unpacked = stream.seek(0, io.SEEK_END) * (_PACKED_TEXT if file.uri.lower().endswith(".gz") else 1)
            yield 0, unpacked // _BYTES_OF_A_BOX, 0
            return
        metadata = open_closed(stream).metadata
    lists = file.names.get("boxes")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        weight = group.num_rows
        for at in range(group.num_columns if lists else 0):
            if group.column(at).path_in_schema.split(".")[0] == lists:
                weight += group.column(at).num_values // 4
                break
        yield number, weight, group.num_rows


_PACKED_TEXT = 6  # times, by gzip
_BYTES_OF_A_BOX = 60  # in a file of text, with the names next to it


def split(source: Source, access: AccessRules, rows: int) -> list[Source]:
    """Return the source in pieces of about so many rows, in the order of its files."""
    pieces: list[list[TableFile]] = [[]]
    weight = 0
    for file in source.files:
        first = start = 0
        numbers: list[int] = []
        for number, more, own in _groups(file, access):
            if weight and weight + more > rows:
                pieces[-1] += _with_groups(file, numbers, start)
                pieces.append([])
                weight, numbers, start = 0, [], first
            numbers.append(number)
            weight += more
            first += own
        pieces[-1] += _with_groups(file, numbers, start)
    if not any(pieces):
        pieces = [[replace(file, groups=()) for file in source.files]]
    return [replace(source, files=tuple(files)) for files in pieces if files]


def _with_groups(file: TableFile, numbers: Sequence[int], first_row: int) -> list[TableFile]:
    if not numbers or file.file_format != "parquet":
        return [file] if numbers else []
    return [replace(file, groups=tuple(numbers), first_row=first_row)]


# ---------------------------------------------------------------------------------------------
# One piece
# ---------------------------------------------------------------------------------------------


def read_piece(source: Source, access: AccessRules, parts: int) -> list[Any]:
    """Return what is at fault in a piece (`RowFaults`), and then for each partition its rows (`Piece`).

    Raises:
        JobRefused: a file that cannot be read.
    """
    faults = RowFaults(source.files[0].uri, is_part=True)
    chunks = [list(chunk) for chunk in _PARTED[source.content](source, access, faults, parts)]
    return [faults, *([chunk[part] for chunk in chunks] for part in range(parts))]


def _parted_images(
    source: Source, access: AccessRules, faults: RowFaults, parts: int
) -> Iterator[Iterator[Streams]]:
    """Yield rows of images, with uris that can be opened, for each partition."""
    nothing = pa.table({name: pa.array([], TEXT) for name in source.files[0].names})
    for chunk in _chunks(image_rows(source.files, access, faults)):
        rows = pa.concat_tables([nothing, *chunk])
        uris = resolve_uris(pc.fill_null(single(rows.column("image_uri")), NO_URI), source.folder)
        rows = rows.set_column(rows.column_names.index("image_uri"), "image_uri", uris)
        yield _parted(rows, source, parts)


def _parted_rows(
    source: Source, access: AccessRules, faults: RowFaults, parts: int
) -> Iterator[Iterator[Streams]]:
    """Yield rows of boxes, with the names of their images, for each partition."""
    names = [name for name in ("image_id", "image_uri") if name in source.files[0].names]
    nothing = pa.table({name: pa.array([], TEXT) for name in names} | {"given": pa.array([], NUMBERS)})
    batches = (
        pa.table(keys | dict(zip(boxes.column_names, boxes.columns, strict=True)))
        for keys, boxes in box_rows(source.files, access, faults)
    )
    for chunk in _chunks(batches):
        tables = list(chunk) or [nothing]
        yield _parted(pa.concat_tables(tables), source, parts)


def _parted_lists(
    source: Source, access: AccessRules, faults: RowFaults, parts: int
) -> Iterator[Iterator[Streams]]:
    """Yield images with the lengths of their lists, and their boxes, for each partition."""
    batches = (batch for file in source.files for batch in read_batches(file, access, faults))
    for chunk in _chunks(batches):
        named = ((source.files[0].uri, batch) for batch in chunk)
        boxes = boxes_of_rows(
            named, tuple(source.files[0].names), faults, folder=source.folder, box_format="xyxy"
        )
        yield _parted_list(boxes, source, parts)


_PARTED = {"images": _parted_images, "box rows": _parted_rows, "box lists": _parted_lists}
_CHUNK_ROWS = 500_000
"""Rows that are parted together: a file of text is read by one task, however long it is."""


def _chunks(batches: Iterator[pa.Table]) -> Iterator[Iterator[pa.Table]]:
    """Yield tables that follow each other in runs of about _CHUNK_ROWS rows, at least one run.

    Each run is to be taken to its end before the next: what is counted of a batch belongs to the last read.
    """
    ended = False

    def run() -> Iterator[pa.Table]:
        nonlocal ended
        rows = 0
        while rows < _CHUNK_ROWS:
            batch = next(batches, None)
            if batch is None:
                ended = True
                return
            rows += batch.num_rows
            yield batch

    while not ended:
        yield run()


def _codes(rows: pa.Table, source: Source, parts: int) -> Int64Array:
    """Return the partition of each row, int64 (n,)."""
    if source.key == "id":
        key = single(rows.column("image_id"))
    else:
        uris = pc.fill_null(single(rows.column("image_uri")), NO_URI)
        uris = uris if source.content == "images" else resolve_uris(uris, source.folder)
        if source.key == "uri":
            key = comparable(uris)
        else:
            key = ids_of_uris(ImageList(image_uri=uris, image_id=None, root=source.ids_below))[0]
    return (hash64(pc.fill_null(key, "")) % np.uint64(parts)).astype(np.int64)


def _parted(rows: pa.Table, source: Source, parts: int) -> Iterator[Streams]:
    codes = _codes(rows, source, parts)
    taken = rows.take(pa.array(np.argsort(codes, kind="stable")))
    edges = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=parts))])
    for start, stop in pairwise(edges.tolist()):
        yield (to_stream(taken.slice(start, stop - start)),)


def _parted_list(boxes: BoxList, source: Source, parts: int) -> Iterator[Streams]:
    names = {"image_id": boxes.image_id, "image_uri": boxes.image_uri}
    columns = {name: column for name, column in names.items() if column is not None}
    columns |= {"length": pa.array(boxes.lengths), "is_null": pa.array(boxes.is_null), "error": boxes.error}
    images = pa.table(columns)
    codes = _codes(images, source, parts)
    order = np.argsort(codes, kind="stable")
    taken, flat = images.take(pa.array(order)), boxes.boxes.take(pa.array(boxes.rows_of(order)))
    edges = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=parts))])
    ends = np.concatenate([[0], np.cumsum(boxes.lengths[order])])
    for start, stop in pairwise(edges.tolist()):
        own = flat.slice(int(ends[start]), int(ends[stop] - ends[start]))
        yield to_stream(taken.slice(start, stop - start)), to_stream(own)


_PACKED = pa.ipc.IpcWriteOptions(compression="lz4")
"""40 % less to keep and to spill, for 0.1 µs a row."""


def to_stream(table: pa.Table) -> pa.Buffer:
    """Return a table as an Arrow stream, of its own rows alone even where it is a slice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=_PACKED) as writer:
        writer.write_table(table)
    return sink.getvalue()


def from_streams(streams: Sequence[pa.Buffer]) -> pa.Table:
    """Return the rows of several streams as one table; a column that one of them lacks is null there."""
    tables = [read_closed_stream(stream) for stream in streams]
    return pa.concat_tables(tables, promote_options="default")
