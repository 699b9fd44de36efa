"""What the inputs list, before they are joined: which images there are, and which boxes belong to which.

Boxes are kept as flat columns, one row a box in the order of the file, with one list of row numbers that
groups them by image. A column that no input names is not kept at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import BoolArray, Int64Array, positions, ranges, starts_of
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.settings import BoxFormat, BoxFrame

TEXT = pa.large_string()
NUMBERS = pa.list_(pa.float64())

_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .jif .jfi .pjpeg .pjp .png .apng .webp .bmp .dib .tif .tiff .gif "
    ".ppm .pgm .pbm .pnm .jp2 .j2k .avif .heic .heif"
)
PICTURE_SUFFIXES = tuple(_SUFFIXES.split())
"""Which files of a folder are taken for pictures, in any case. Decoding goes by content, not by name."""

# The columns that describe one box; a table of boxes has those that its input names.
BOX_COLUMNS: dict[str, pa.DataType] = {
    "given": NUMBERS,
    "box_id": TEXT,
    "category_id": pa.int32(),
    "category_name": TEXT,
    "score": pa.float64(),
    "points_xy": NUMBERS,
    "point_labels": pa.list_(pa.int32()),
    "prompt_mask": pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.large_string())]),
    "iscrowd": pa.bool_(),
}


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images there are, in the order of the input.

    `image_uri`: where each is opened, large_string. `image_id`: large_string, or None when no input
    gives ids; `id_rule`: where they come from, as text. `root`: the folder or prefix that relative names
    start from, without a "/" at its end.
    `listed`: found by listing a folder, not named by a file. `doubted`: uris of links and of what is no file,
    each to be checked by itself. `unnameable`: uris of pictures whose real name is not UTF-8, escaped, which
    fail. `left_out`: sentences on files of the folder that are not taken.
    `size_hw`: int64 (n, 2) as the input states it (0 where it does not), unchecked. `categories`: id to name.
    `files`: uris of the tables that were read, `columns`: all of their columns' names, `used`: our name to
    the table's for those that are read, `unused`: the others. `notes`: sentences for the summary.
    """

    image_uri: pa.Array
    image_id: pa.Array | None
    root: str
    id_rule: str = "ids as given"
    listed: bool = False
    unnameable: tuple[str, ...] = ()
    doubted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    size_hw: Int64Array | None = None
    categories: Mapping[int, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    used: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    skipped_files: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BoxList:
    """The boxes there are, by image; n images are mentioned, in the order of their first mention.

    `image_id`, `image_uri`: large_string (n,), as written; at least one is not None. A null uri: the
    input names no file for this id. `lengths`: boxes of each image, int64 (n,). `is_null`: its list was
    null, bool (n,). `error`: why its lists cannot be used (`labels_mismatch`), or null, large_string.
    `id_rule`: where ids come from, as text.
    `boxes`: columns of BOX_COLUMNS, one row a box. `rows`: rows of `boxes`, image by image; None when
    they are in that order already. `folder`: what relative uris start from. `one_row_per_image`: an
    image named twice is a mistake of the input, not two of its boxes. `categories`: id to name. `by_stem`:
    `image_id` holds the names of images below their folder, without ending.
    """

    image_id: pa.Array | None
    image_uri: pa.Array | None
    lengths: Int64Array
    is_null: BoolArray
    error: pa.Array
    boxes: pa.Table
    rows: Int64Array | None
    folder: str
    box_format: BoxFormat
    box_frame: BoxFrame | None = None
    id_rule: str = "ids as given"
    one_row_per_image: bool = False
    by_stem: bool = False
    categories: Mapping[int, str] = field(default_factory=dict)
    size_hw: Int64Array | None = None
    files: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    used: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def rows_of(self, images: Int64Array) -> Int64Array:
        """Return row numbers in `boxes` of the boxes of some images, image after image."""
        flat = ranges(starts_of(self.lengths)[images], self.lengths[images])
        return flat if self.rows is None else self.rows[flat]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Rows that name images, grouped: fields as in `BoxList`; `error`: None where none has one."""

    image_id: pa.Array | None
    image_uri: pa.Array | None
    lengths: Int64Array
    rows: Int64Array | None
    error: pa.Array | None = None


def group_rows(
    image_id: pa.ChunkedArray | None, image_uri: pa.ChunkedArray | None, *, is_part: bool = False
) -> Groups:
    """Return rows that name their image, grouped by id where there is one, else by uri; their order is kept.

    Both arguments are dictionary-encoded chunks, one entry a row. A uri may be null next to an id; that of a
    group is null where all are. A group of rows that name different uris has the first of them by its text,
    and an error. `is_part`: some of the rows, of which most groups may be such.

    Raises:
        JobRefused: most groups are such.
    """
    key = image_id if image_id is not None else image_uri
    assert key is not None, "the caller has found at least one of the two"
    names, codes = _codes(key)
    lengths = np.bincount(codes, minlength=len(names)).astype(np.int64)
    rows = None if (codes[1:] >= codes[:-1]).all() else np.argsort(codes, kind="stable").astype(np.int64)
    if image_id is None or image_uri is None:
        ids, uris = (names, None) if image_uri is None else (None, names)
        return Groups(image_id=ids, image_uri=uris, lengths=lengths, rows=rows)
    uri_names, uri_codes = _codes(image_uri)
    ordered = uri_codes if rows is None else uri_codes[rows]
    first = ordered[starts_of(lengths)] if len(ordered) else ordered
    if (first < 0).any():
        first = np.where(first < 0, np.maximum.reduceat(ordered, starts_of(lengths)), first)
    torn = np.flatnonzero((ordered >= 0) & (ordered != np.repeat(first, lengths)))
    ends = np.cumsum(lengths)
    errors: dict[int, str] = {}
    for at in np.unique(np.searchsorted(ends, torn, side="right")).tolist():
        own = np.unique(ordered[ends[at] - lengths[at] : ends[at]])
        texts = sorted((uri_names[code].as_py(), code) for code in own[own >= 0].tolist())
        first[at] = texts[0][1]
        both = f"{texts[0][0]!r} and {texts[1][0]!r}"
        errors[at] = f"image_id {names[at].as_py()!r} names two images: {both}; one id names one image"
    if 2 * len(errors) > len(names) and not is_part:
        raise JobRefused(clean_text(next(iter(errors.values()))))
    return Groups(
        image_id=names,
        image_uri=uri_names.take(pa.array(first, mask=first < 0)),
        lengths=lengths,
        rows=rows,
        error=pa.array([errors.get(at) for at in range(len(names))], TEXT) if errors else None,
    )


def grouped_boxes(
    groups: Groups,
    boxes: pa.Table,
    *,
    folder: str,
    box_format: BoxFormat,
    files: Sequence[str],
    box_frame: BoxFrame | None = None,
    categories: Mapping[int, str] | None = None,
) -> BoxList:
    """Return the boxes of rows that were grouped: no list is null."""
    count = len(groups.lengths)
    return BoxList(
        image_id=groups.image_id,
        image_uri=groups.image_uri,
        lengths=groups.lengths,
        is_null=np.zeros(count, dtype=np.bool_),
        error=pa.nulls(count, TEXT) if groups.error is None else groups.error,
        boxes=boxes,
        rows=groups.rows,
        folder=folder,
        box_format=box_format,
        box_frame=box_frame,
        categories=categories or {},
        files=tuple(files),
    )


def with_all_images(
    boxes: BoxList, image_id: pa.Array, image_uri: pa.Array, *, is_null: BoolArray | None = None
) -> BoxList:
    """Return `boxes`, grouped by id, over a list of images of distinct ids: those without boxes have none.

    Boxes of an id that is not listed come last, with a null uri.
    """
    assert boxes.image_id is not None, "these boxes are grouped by id"
    group_of = positions(image_id, boxes.image_id)
    has = group_of >= 0
    orphans = np.flatnonzero(positions(boxes.image_id, image_id) < 0)
    listed = np.zeros(len(group_of), dtype=np.int64)
    listed[has] = boxes.lengths[group_of[has]]
    null = np.zeros(len(group_of) + len(orphans), dtype=np.bool_)
    if is_null is not None:
        null[: len(group_of)] = is_null & ~has
    return replace(
        boxes,
        image_id=pa.concat_arrays([image_id, boxes.image_id.take(pa.array(orphans))]),
        image_uri=pa.concat_arrays([image_uri, pa.nulls(len(orphans), TEXT)]),
        lengths=np.concatenate([listed, boxes.lengths[orphans]]),
        is_null=null,
        error=pa.nulls(len(null), TEXT),
        rows=boxes.rows_of(np.concatenate([group_of[has], orphans])),
    )


def refuse_repeated(ids: pa.Array, uri: str) -> None:
    """Raise JobRefused with examples unless the ids are distinct."""
    if len(twice := repeated(ids)):
        raise JobRefused(f"{uri}: {len(twice)} image ids are given more than once, such as {examples(twice)}")


def repeated(values: pa.Array) -> pa.Array:
    """Return the values that are there more than once."""
    if pc.count_distinct(values, mode="all").as_py() == len(values):
        return values.slice(0, 0)
    counts = pc.value_counts(values)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def _codes(column: pa.ChunkedArray) -> tuple[pa.Array, Int64Array]:
    """Return the distinct values of a dictionary-encoded column, and each row's number, -1 for null."""
    if not column.num_chunks:
        return pa.array([], type=TEXT), np.zeros(0, dtype=np.int64)
    whole = column.unify_dictionaries().combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    return whole.dictionary, pc.fill_null(whole.indices, -1).to_numpy().astype(np.int64)


def examples(values: pa.Array | Sequence[str], count: int = 3) -> str:
    """Return the first few values, quoted and escaped, for a message."""
    shown = values.slice(0, count).to_pylist() if isinstance(values, pa.Array) else list(values)[:count]
    return ", ".join(repr(clean_text(str(value))) for value in shown)


def is_picture(key: str) -> bool:
    """Return whether a file is called like a picture, and is not hidden."""
    return has_picture_name(key) and not key.rpartition("/")[2].startswith(".")


def has_picture_name(key: str) -> bool:
    """Return whether a file's name ends as a picture's does."""
    return key.lower().endswith(PICTURE_SUFFIXES)
