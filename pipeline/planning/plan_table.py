"""Joined images and boxes -> rows of schema.PLAN, sorted by the bytes of their ids, slice by slice.

Boxes are gathered straight from the input's columns into their final place: one copy, of one slice of
images at a time. Uris are checked here so that a refused one is a row of the plan, never a surprise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import Int64Array, list_lengths, null_mask, single, to_lists
from hqlabel.pipeline.errors import ImageError, JobRefused, clean_text, count
from hqlabel.pipeline.inputs.image_box_lists import BOX_COLUMNS, TEXT, BoxList, examples
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.join_boxes_to_images import Joined
from hqlabel.pipeline.schema import PLAN, PLAN_BOX
from hqlabel.pipeline.storage.archive_uris import PLACE, container_of
from hqlabel.pipeline.storage.list_folders import allow_root
from hqlabel.pipeline.storage.read_objects import planned_versions
from hqlabel.pipeline.storage.uri_rules import (
    check_uri,
    is_inside,
    options_for,
    split_scheme,
    without_credentials,
)
from hqlabel.pipeline.worker.image_guard import describe_raised

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
    """Return the rows of the plan: `schema.PLAN`, one image each, cut into units of `images_per_unit`.

    `order`: the places in `joined` of the plan's images, in its order. `doubted`: uris that do not share what
    is known of their folder.
    """
    slices, trusted, versions = [], dict[str, bool](), dict[str, str | None]()
    links = pa.array(doubted, TEXT)
    for start in range(0, len(order), SLICE_ROWS):
        places = order[start : start + SLICE_ROWS]
        mention = joined.mention[places.to_numpy()]
        uris = joined.image_uri.take(places)
        units = (np.arange(len(places)) + start) // images_per_unit
        refused = refused_uris(uris, access, trusted, links)
        if joined.errors:
            numbered = enumerate(places.to_pylist())
            refused |= {row: joined.errors[place] for row, place in numbered if place in joined.errors}
        columns = [
            pa.array(units.astype(np.int32)),
            pc.cast(joined.image_id.take(places), pa.string()),
            pc.cast(uris, pa.string()),
            _boxes(mention, boxes),
            *_errors(mention, boxes, refused),
            _source_versions(uris, refused, access, versions),
        ]
        slices.append(pa.table(columns, schema=PLAN))
    return pa.concat_tables([PLAN.empty_table(), *slices])


def _boxes(mention: Int64Array, boxes: BoxList | None) -> pa.Array:
    """Return the box lists of some images: empty where no box file names the image, null where it is null."""
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
    """Return some boxes as PLAN_BOX; a column that the input did not have is null."""
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
    """Return error_code and error_message: a refused uri first, else lists of unlike length."""
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

# A name for which the check has the same result as for its neighbours in the folder.
_PLAIN_NAME = r"\A[^\x00-\x20.?#%:\\][^\x00-\x1f\x7f?#%:\\]*\z"


def refused_uris(
    uris: pa.Array,
    access: AccessRules,
    trusted: dict[str, bool] | None = None,
    doubted: pa.Array | None = None,
) -> dict[int, str]:
    """Return place -> reason, for the uris that may not be opened.

    The rules check scheme, bucket and folder, so one plain name is checked for all plain names of its
    folder; odd names, `doubted` uris, and all of a folder whose first was refused, are checked one by one.
    Workers check every uri again before they open it, and there follow the links of each file too.

    `trusted`: what is known of folders already; what is found out is added to it.
    """
    trusted = {} if trusted is None else trusted
    alone = None if doubted is None or not len(doubted) else pc.is_in(uris, doubted)
    # Of a picture inside another file, that file is checked.
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


def _source_versions(
    uris: pa.Array, refused: Mapping[int, str], access: AccessRules, known: dict[str, str | None]
) -> pa.Array:
    """Return the version tags of the files that hold the pictures; null for a picture that is a file.

    `known`: the tags found already; those found here are added. Refused places are not looked up.
    """
    inside = pc.match_substring_regex(uris, PLACE).to_numpy(zero_copy_only=False).copy()
    inside[list(refused)] = False
    rows = np.flatnonzero(inside)
    if not len(rows):
        return pa.nulls(len(uris), pa.string())
    files = pc.replace_substring_regex(uris.take(pa.array(rows)), PLACE, r"\1\2").dictionary_encode()
    new = [uri for uri in files.dictionary.to_pylist() if uri not in known]
    known.update(zip(new, planned_versions(new, lambda uri: options_for(uri, access)), strict=True))
    tags = pa.array([known[uri] for uri in files.dictionary.to_pylist()], pa.string()).take(files.indices)
    place = np.full(len(uris), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    return tags.take(pa.array(place, mask=place < 0))


@dataclass(frozen=True, kw_only=True)
class RefusedUris:
    """The refused uris of some rows of a plan: how many a flag each would allow.

    `outside`: local files outside the roots, and `folders`, which have them; `outside_first`: uri and real
    path of one. `unknown`: uris of `schemes` that are not allowed; `unknown_first`: one.
    """

    rows: int = 0
    refused: int = 0
    outside: int = 0
    outside_first: tuple[str, str] | None = None
    folders: frozenset[str] = frozenset()
    unknown: int = 0
    unknown_first: str | None = None
    schemes: frozenset[str] = frozenset()

    @classmethod
    def among(cls, plan: pa.Table, access: AccessRules, *, is_part: bool = False) -> RefusedUris:
        """Return those of a plan (schema.PLAN), looked up only where they are most; of a part, always."""
        is_refused = pc.equal(plan.column("error_code"), "uri_refused")
        refused = plan.filter(is_refused).column("image_uri").to_pylist()
        if not is_part and 2 * len(refused) <= plan.num_rows:
            return cls(rows=plan.num_rows, refused=len(refused))
        places = {uri: _outside(uri, access) for uri in dict.fromkeys(refused)}
        outside = [(uri, real) for uri in refused if (real := places[uri]) is not None]
        schemes = [(uri, split_scheme(uri)[0]) for uri in refused]
        unknown = [(uri, name) for uri, name in schemes if name not in ("file", *access.schemes)]
        return cls(
            rows=plan.num_rows,
            refused=len(refused),
            outside=len(outside),
            outside_first=outside[0] if outside else None,
            folders=frozenset(os.path.dirname(real) for _, real in outside),
            unknown=len(unknown),
            unknown_first=unknown[0][0] if unknown else None,
            schemes=frozenset(name for _, name in unknown),
        )

    @classmethod
    def merged(cls, parts: Sequence[RefusedUris]) -> RefusedUris:
        """Return those of all rows."""
        return cls(
            **{name: sum(getattr(part, name) for part in parts) for name in ("rows", "refused")},
            **{name: sum(getattr(part, name) for part in parts) for name in ("outside", "unknown")},
            outside_first=next((part.outside_first for part in parts if part.outside_first), None),
            folders=frozenset().union(*(part.folders for part in parts)),
            unknown_first=next((part.unknown_first for part in parts if part.unknown_first), None),
            schemes=frozenset().union(*(part.schemes for part in parts)),
        )


def refuse_if_a_flag_is_missing(found: RefusedUris) -> None:
    """Refuse a plan of which most images may not be read, though one flag would allow it.

    A few are rows that fail; most of them are a mistake that would cost the whole job.

    Raises:
        JobRefused: `--allow-root` or `--allow-scheme` is missing; the message names folder or scheme.
    """
    if 2 * found.outside > found.rows and found.outside_first is not None:
        uri, real = found.outside_first
        link = "" if uri.endswith(real) else f", which is {clean_text(real)}"
        raise JobRefused(
            f"{found.outside} of {found.rows} images lie outside what may be read, such as "
            f"{clean_text(uri)}{link}: allow them with {allow_root(sorted(found.folders))}"
        )
    if 2 * found.unknown > found.rows and found.unknown_first is not None:
        flags = " ".join(f"--allow-scheme {clean_text(name)}" for name in sorted(found.schemes))
        raise JobRefused(
            f"{found.unknown} of {found.rows} images have a scheme that is not allowed, such as "
            f"{clean_text(without_credentials(found.unknown_first))}: allow them with {flags}"
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
        return error.message if error.code == "uri_refused" else None  # the reader reports the others
    except Exception as error:  # of whatever reads a uri: it costs this row
        return f"the uri cannot be used: {describe_raised(error)}"
    return None


# ---------------------------------------------------------------------------------------------
# Categories
# ---------------------------------------------------------------------------------------------


def number_categories(boxes: BoxList, used: Int64Array | None) -> tuple[BoxList, Categories]:
    """Return the boxes with ids and names of their categories both filled in, and the list of categories.

    Names without ids are numbered from 1 in the order of their UTF-8 bytes. Where some boxes have ids, a box
    that lacks its id or its name gets the one that the others, or the input's own list, give it; a name that
    has no number stays without an id, and is noted. `used`: the rows of boxes that belong to an image, None
    for all; only their names count.

    Raises:
        JobRefused: one id with two names, or a name alone that has two ids; names a box of each.
    """
    table = boxes.boxes
    for column in ("category_id", "category_name"):  # all null: never given
        if column in table.column_names and table.column(column).null_count == table.num_rows:
            table = table.drop_columns([column])
    has_ids, has_names = (name in table.column_names for name in ("category_id", "category_name"))
    if has_names and not has_ids:
        table, categories = _numbered_by_name(table, used)
        return replace(boxes, boxes=table), categories
    if not has_ids:
        return replace(boxes, boxes=table), ()
    if not has_names:
        table = table.append_column("category_name", pa.nulls(table.num_rows, TEXT))
    names = single(table.column("category_name"))
    names = pc.if_else(pc.equal(names, ""), pa.scalar(None, names.type), names)  # next to ids a blank is none
    table = table.set_column(table.column_names.index("category_name"), "category_name", names)
    return _completed(boxes, table, used)


def _numbered_by_name(table: pa.Table, used: Int64Array | None) -> tuple[pa.Table, Categories]:
    names = pc.unique(_used(table, "category_name", used).drop_null())
    names = names.take(pc.sort_indices(names))
    ids = pa.array(np.arange(1, len(names) + 1), pa.int32())
    found = ids.take(pc.index_in(single(table.column("category_name")), names, skip_nulls=True))
    categories = [{"id": at, "name": name} for at, name in enumerate(names.to_pylist(), start=1)]
    return table.append_column("category_id", found), tuple(categories)


def _completed(boxes: BoxList, table: pa.Table, used: Int64Array | None) -> tuple[BoxList, Categories]:
    """Return the boxes of `table`, each id and name filled in from the other, and the categories."""
    pairs = pa.table({name: _used(table, name, used) for name in ("category_id", "category_name")})
    pairs = pairs.group_by(["category_id", "category_name"]).aggregate([])
    ids, names = (set(column.drop_null().to_pylist()) for column in pairs.columns)
    own, doubtful = _names_by_id(pairs)
    listed, conflict = _agreeing(boxes, {key: name for key, name in own.items() if key not in doubtful})
    names_by_id = listed | own
    sure = {number: name for number, name in names_by_id.items() if number not in doubtful}
    table = _filled(table, "category_name", "category_id", sure)
    numbers, of_several = _ids_by_name(pairs, sure)
    table = _filled(table, "category_id", "category_name", numbers)
    told = {name for several in doubtful.values() for name in several}
    lone = sorted(names - set(names_by_id.values()) - told, key=str.encode)
    unnamed = sorted(ids - set(names_by_id)) if names_by_id and not conflict else []
    notes = [
        *conflict,
        *([_several_names(doubtful, names_by_id)] if doubtful else []),
        *([_several_ids(of_several)] if of_several else []),
        *([_no_ids(lone)] if lone else []),
        *([_no_names(unnamed)] if unnamed else []),
    ]
    known: dict[int, str | None] = dict.fromkeys(ids) | names_by_id
    categories = tuple({"id": key, "name": known[key]} for key in sorted(known))
    return replace(boxes, boxes=table, notes=(*boxes.notes, *notes)), categories


def _names_by_id(pairs: pa.Table) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return the name of each id that boxes name, and all names of those that have several.

    Of several it is the first by its bytes, whatever the order of the rows; exports take the same.
    """
    names: dict[int, list[str]] = {}
    for row in pairs.to_pylist():
        if row["category_id"] is not None and row["category_name"] is not None:
            names.setdefault(row["category_id"], []).append(row["category_name"])
    ordered = {number: sorted(own, key=str.encode) for number, own in sorted(names.items())}
    several = {number: own for number, own in ordered.items() if len(own) > 1}
    return {number: own[0] for number, own in ordered.items()}, several


def _agreeing(boxes: BoxList, own: Mapping[int, str]) -> tuple[dict[int, str], list[str]]:
    """Return the names of the input's list; none, and a note, where boxes call an id otherwise."""
    listed = dict(boxes.categories)
    unlike = next((number for number, name in own.items() if listed.get(number, name) != name), None)
    if unlike is None:
        return listed, []
    names = examples([listed[unlike]]), examples([own[unlike]])
    return {}, [
        f"category {unlike} is {names[0]} in the list of categories and {names[1]} in the boxes: the boxes' "
        "names hold, and the list is not used"
    ]


def _ids_by_name(pairs: pa.Table, names: Mapping[int, str]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Return the ids of names that some boxes have alone, and the ids of those names that have several."""
    ids: dict[str, list[int]] = {}
    for number, name in sorted(names.items()):
        ids.setdefault(name, []).append(number)
    lone = [row["category_name"] for row in pairs.to_pylist() if row["category_id"] is None]
    numbers = {name: ids[name] for name in lone if name in ids}
    return (
        {name: own[0] for name, own in numbers.items() if len(own) == 1},
        {name: own for name, own in numbers.items() if len(own) > 1},
    )


def _filled(table: pa.Table, column: str, by: str, values: Mapping[Any, Any]) -> pa.Table:
    """Return the table, nulls of a column filled from another column where `values` has its value."""
    mine, keys = single(table.column(column)), single(table.column(by))
    if not mine.null_count or not values:
        return table
    known = pa.array(list(values.values()), mine.type)
    found = known.take(pc.index_in(keys, pa.array(list(values), keys.type), skip_nulls=True))
    return table.set_column(table.column_names.index(column), column, pc.coalesce(mine, found))


def _several_names(doubtful: Mapping[int, Sequence[str]], chosen: Mapping[int, str]) -> str:
    number = min(doubtful)
    return (
        f"{count(len(doubtful), 'category id')} with several names, such as {number}: "
        f"{examples(doubtful[number])}. Boxes keep what they say; the list of categories and exports call it "
        f"{examples([chosen[number]])}"
    )


def _several_ids(of_several: Mapping[str, Sequence[int]]) -> str:
    name = min(of_several)
    return (
        f"{count(len(of_several), 'category name')} with several ids stands in boxes without an id, such as "
        f"{examples([name])}: {', '.join(map(str, of_several[name][:3]))}. Those boxes keep the name alone"
    )


def _no_ids(names: list[str]) -> str:
    return (
        f"{len(names)} category names have no id, such as {examples(names)}, while others have one: "
        "the tables keep them so, and exports number them after the others"
    )


def _no_names(ids: list[int]) -> str:
    return (
        f"{count(len(ids), 'category id')} of the boxes without a name, such as "
        f"{', '.join(map(str, ids[:3]))}, while others have one: is the list of categories that of these "
        "boxes? The tables keep the ids"
    )


def _used(table: pa.Table, name: str, rows: Int64Array | None) -> pa.Array:
    column = single(table.column(name))
    return column if rows is None else column.take(pa.array(rows))
