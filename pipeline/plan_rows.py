"""Joined images and boxes -> rows of schema.PLAN, sorted by the bytes of their ids, slice by slice.

Boxes are gathered straight from the input's columns into their final place: one copy, of one slice of
images at a time. Uris are checked here so that a refused one is a row of the plan, never a surprise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.access import is_inside, split_scheme, without_credentials
from pipeline.arrays import Int64Array, list_lengths, null_mask, single, to_lists
from pipeline.errors import ImageError, JobRefused, clean_text
from pipeline.folders import allow_root
from pipeline.joins import Joined
from pipeline.listings import BOX_COLUMNS, TEXT, BoxList, examples
from pipeline.members import PLACE, container_of
from pipeline.records import AccessRules
from pipeline.schema import PLAN, PLAN_BOX
from pipeline.storage import check_uri

SLICE_ROWS = 65_536

Categories = tuple[Mapping[str, Any], ...]
"""{"id": int, "name": str or None}, by id."""


def plan_table(
    joined: Joined,
    order: pa.Array,
    boxes: BoxList | None,
    access: AccessRules,
    *,
    images_per_unit: int,
    doubted: Sequence[str] = (),
) -> pa.Table:
    """The rows of the plan: `schema.PLAN`, one image each, cut into units of `images_per_unit`.

    `order`: the places in `joined` of the plan's images, in its order. `doubted`: uris that do not share what
    is known of their folder.
    """
    slices, trusted = [], dict[str, bool]()
    links = pa.array(doubted, TEXT)
    for start in range(0, len(order), SLICE_ROWS):
        places = order[start : start + SLICE_ROWS]
        mention = joined.mention[places.to_numpy()]
        uris = joined.image_uri.take(places)
        units = (np.arange(len(places)) + start) // images_per_unit
        columns = [
            pa.array(units.astype(np.int32)),
            pc.cast(joined.image_id.take(places), pa.string()),
            pc.cast(uris, pa.string()),
            _boxes(mention, boxes),
            *_errors(mention, boxes, refused_uris(uris, access, trusted, links)),
        ]
        slices.append(pa.table(columns, schema=PLAN))
    return pa.concat_tables([PLAN.empty_table(), *slices])


def _boxes(mention: Int64Array, boxes: BoxList | None) -> pa.Array:
    """The box lists of some images: empty where no box file names the image, null where it says null."""
    kind = PLAN.field("boxes").type
    lengths = np.zeros(len(mention), dtype=np.int64)
    if boxes is None:
        return to_lists(lengths, pa.array([], PLAN_BOX), kind=kind)
    named = mention >= 0
    lengths[named] = boxes.lengths[mention[named]]
    null = np.zeros(len(mention), dtype=np.bool_)
    null[named] = boxes.is_null[mention[named]]
    rows = pa.array(boxes.rows_of(mention[named]))
    return to_lists(lengths, _structs(boxes.boxes, rows), kind=kind, null=null)


def _structs(boxes: pa.Table, rows: pa.Array) -> pa.Array:
    """Some boxes as PLAN_BOX; a column that the input did not have is null."""
    children = []
    for field in PLAN_BOX:
        if field.name in boxes.column_names:
            children.append(_as(single(boxes.column(field.name)).take(rows), field.type))
        else:
            children.append(_as(pa.nulls(len(rows), BOX_COLUMNS[field.name]), field.type))
    return pa.StructArray.from_arrays(children, fields=list(PLAN_BOX))


def _as(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_struct(kind):
        return pc.cast(values, kind)
    # Parquet wants values under a null struct whose fields are not nullable; null ones are refused later.
    size, counts = values.flatten()
    sizes = to_lists(list_lengths(size), pc.fill_null(size.flatten(), -1), kind=kind.field("size").type)
    text = pc.cast(pc.fill_null(counts, ""), pa.string())
    return pa.StructArray.from_arrays([sizes, text], fields=list(kind), mask=pa.array(null_mask(values)))


def _errors(mention: Int64Array, boxes: BoxList | None, refused: Mapping[int, str]) -> list[pa.Array]:
    """error_code and error_message: a refused uri first, else lists of unlike length."""
    message = pa.nulls(len(mention), pa.string())
    if boxes is not None:
        message = pc.cast(boxes.error.take(pa.array(mention, mask=mention < 0)), pa.string())
    code = pc.if_else(message.is_valid(), "labels_mismatch", pa.scalar(None, pa.string()))
    if not refused:
        return [code, message]
    rows = np.fromiter(refused, dtype=np.int64)
    where = np.zeros(len(mention), dtype=np.bool_)
    where[rows] = True
    texts: list[str | None] = [None] * len(mention)
    for row, text in refused.items():
        texts[row] = text
    code = pc.if_else(pa.array(where), "uri_refused", code)
    return [code, pc.coalesce(pa.array(texts, pa.string()), message)]


# ---------------------------------------------------------------------------------------------
# Uris
# ---------------------------------------------------------------------------------------------

# A name of which the check says the same as of its neighbours in the folder.
_PLAIN_NAME = r"\A[^\x00-\x20.?#%:\\][^\x00-\x1f\x7f?#%:\\]*\z"


def refused_uris(
    uris: pa.Array,
    access: AccessRules,
    trusted: dict[str, bool] | None = None,
    doubted: pa.Array | None = None,
) -> dict[int, str]:
    """Place -> reason, for the uris that may not be opened.

    The rules look at scheme, bucket and folder, so one plain name stands for all plain names of its
    folder; odd names, `doubted` uris, and all of a folder whose first was refused, are checked one by one.
    Workers check every uri again before they open it, and there follow the links of each file too.

    `trusted`: what is known of folders already; what is found out is added to it.
    """
    trusted = {} if trusted is None else trusted
    alone = None if doubted is None or not len(doubted) else pc.is_in(uris, doubted)
    # Of a picture inside another file, that file is looked at.
    inside = pc.match_substring_regex(uris, PLACE)
    if pc.any(inside).as_py():
        uris = pc.replace_substring_regex(uris, PLACE, r"\1\2")
    folders = pc.replace_substring_regex(uris, r"[^/]*\z", "").dictionary_encode()
    codes, texts = folders.indices.to_numpy(), folders.dictionary.to_pylist()
    names = pc.replace_substring_regex(uris, r"\A.*/", "")
    plain = pc.match_substring_regex(names, _PLAIN_NAME).to_numpy(zero_copy_only=False)
    if alone is not None:
        plain = plain & ~alone.to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(plain)
    known, first = np.unique(codes[rows], return_index=True)
    for code, row in zip(known.tolist(), rows[first].tolist(), strict=True):
        if texts[code] not in trusted:
            trusted[texts[code]] = _refusal(uris[row].as_py(), access) is None
    is_trusted = np.array([trusted.get(text, False) for text in texts], dtype=np.bool_)
    doubtful = np.flatnonzero(~(plain & is_trusted[codes])).tolist()
    reasons = {row: _refusal(uris[row].as_py(), access) for row in doubtful}
    return {row: reason for row, reason in reasons.items() if reason is not None}


def refuse_if_a_flag_is_missing(plan: pa.Table, access: AccessRules) -> None:
    """Refuse a plan of which most images may not be read, though one flag would allow it.

    A few are rows that fail; most of them are a mistake that would cost the whole job.

    Raises:
        JobRefused: `--allow-root` or `--allow-scheme` is missing; it says which folder or scheme.
    """
    refused = plan.filter(pc.equal(plan.column("error_code"), "uri_refused")).column("image_uri").to_pylist()
    if 2 * len(refused) <= plan.num_rows:
        return
    leading = {uri: real for uri in refused if (real := _outside(uri, access)) is not None}
    if 2 * len(leading) > plan.num_rows:
        uri, real = next(iter(leading.items()))
        link = "" if uri.endswith(real) else f", which is {clean_text(real)}"
        raise JobRefused(
            f"{len(leading)} of {plan.num_rows} images lie outside what may be read, such as "
            f"{clean_text(uri)}{link}: allow them with {allow_root(map(os.path.dirname, leading.values()))}"
        )
    schemes = {uri: split_scheme(uri)[0] for uri in refused}
    unknown = {uri: name for uri, name in schemes.items() if name not in ("file", *access.schemes)}
    if 2 * len(unknown) > plan.num_rows:
        flags = " ".join(f"--allow-scheme {clean_text(name)}" for name in sorted(set(unknown.values())))
        raise JobRefused(
            f"{len(unknown)} of {plan.num_rows} images have a scheme that is not allowed, such as "
            f"{clean_text(without_credentials(next(iter(unknown))))}: allow them with {flags}"
        )


def _outside(uri: str, access: AccessRules) -> str | None:
    """Return where a local file really lies when that is outside the roots; else None."""
    scheme, path = split_scheme(container_of(uri))
    if scheme != "file" or not path.startswith("/") or "\x00" in path:
        return None
    real = os.path.realpath(path)
    return None if any(is_inside(real, root) for root in access.roots) else real


def _refusal(uri: str, access: AccessRules) -> str | None:
    try:
        check_uri(uri, access)
    except ImageError as error:
        return error.message
    return None


# ---------------------------------------------------------------------------------------------
# Categories
# ---------------------------------------------------------------------------------------------


def number_categories(boxes: BoxList, used: Int64Array | None) -> tuple[BoxList, Categories]:
    """The boxes with ids and names of their categories both filled in, and the list of categories.

    Names without ids are numbered from 1 in the order of their UTF-8 bytes. `used`: the rows of boxes
    that belong to an image, None for all; only their names are numbered.

    Raises:
        JobRefused: one id with two names.
    """
    table = boxes.boxes
    if "category_name" in table.column_names and "category_id" not in table.column_names:
        names = pc.unique(_used(table, "category_name", used).drop_null())
        names = names.take(pc.sort_indices(names))
        ids = pa.array(np.arange(1, len(names) + 1), pa.int32())
        found = ids.take(pc.index_in(single(table.column("category_name")), names, skip_nulls=True))
        table = table.append_column("category_id", found)
        return replace(boxes, boxes=table), _category_list(ids, names)
    if "category_id" not in table.column_names:
        return boxes, ()
    if "category_name" not in table.column_names:
        table = _with_known_names(table, boxes.categories)
    pairs = pa.table({name: _used(table, name, used) for name in ("category_id", "category_name")})
    pairs = pairs.group_by(["category_id", "category_name"]).aggregate([])
    pairs = pairs.filter(pc.is_valid(pairs.column("category_id")))
    named = pairs.filter(pc.is_valid(pairs.column("category_name")))
    names_by_id = {row["category_id"]: row["category_name"] for row in named.to_pylist()}
    if len(names_by_id) < named.num_rows:
        raise _two_names(named)
    every = dict.fromkeys(pairs.column("category_id").to_pylist()) | dict(boxes.categories) | names_by_id
    return replace(boxes, boxes=table), tuple({"id": key, "name": every[key]} for key in sorted(every))


def _used(table: pa.Table, name: str, rows: Int64Array | None) -> pa.Array:
    column = single(table.column(name))
    return column if rows is None else column.take(pa.array(rows))


def _category_list(ids: pa.Array, names: pa.Array) -> Categories:
    return tuple(
        {"id": key, "name": name} for key, name in zip(ids.to_pylist(), names.to_pylist(), strict=True)
    )


def _with_known_names(table: pa.Table, known: Mapping[int, str]) -> pa.Table:
    ids = pc.cast(single(table.column("category_id")), pa.int64())
    keys, names = pa.array(list(known), pa.int64()), pa.array(list(known.values()), TEXT)
    found = names.take(pc.index_in(ids, keys, skip_nulls=True))
    return table.append_column("category_name", found)


def _two_names(pairs: pa.Table) -> JobRefused:
    counts = pc.value_counts(pairs.column("category_id"))
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
    names = pairs.filter(pc.equal(pairs.column("category_id"), twice)).column("category_name").to_pylist()
    return JobRefused(f"category_id {twice} has several names: {examples([str(name) for name in names])}")
