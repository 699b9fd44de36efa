"""WebDataset tars: pictures and what belongs to them next to each other, `0001.jpg` and `0001.json`.

Only the headers are read while planning; a picture's uri states where in the tar its bytes are
(`archive_uris`). The `.json` of the same name up to the first dot is an object with the columns of a table
with one row an image (`boxes`, `labels`, `scores` ...). Names are kept as the tar has them.

Compressed tars have no places, and are refused. Links and devices of a tar are left out: nothing is ever
unpacked. A member that cannot be used costs itself: one whose header is damaged is passed over to the next
header that is sound, and a `.json` that cannot be read fails its picture.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa

from hqlabel.pipeline.arrow_lists import single
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import boxes_of_rows
from hqlabel.pipeline.inputs.columns import Kind, RowFaults, locate, plain, readable, sampled_leaf, settle
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, ImageList, has_picture_name
from hqlabel.pipeline.inputs.json_records import (
    SAMPLE_ROWS,
    TextDamage,
    json_word,
    readable_lines,
    shapers_of,
    with_plain_values,
)
from hqlabel.pipeline.inputs.propose_columns import (
    IMAGE_ROWS,
    KEYS,
    missing_column,
    names_known,
    unclear_columns,
)
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import TarIds
from hqlabel.pipeline.storage.archive_uris import TarMember
from hqlabel.pipeline.storage.list_folders import is_hidden_path
from hqlabel.pipeline.storage.read_objects import in_this_context, is_no_utf8, open_input
from hqlabel.pipeline.storage.uri_rules import options_for, split_scheme

READERS = 16
JSON_BYTES = 64 * 2**20
"""The longest `.json` of a sample."""
MOST_MEMBERS = 10_000_000
_HEADER_BYTES = 2**20  # a header of names and attributes; a longer one is no tar of pictures
_REMOTE_BLOCK = 16 * 2**10  # headers lie a picture apart: larger blocks would fetch the pictures too
_LOCAL_BLOCK = 2**18


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One picture of a tar, and where its `.json` lies, if there is one."""

    picture: TarMember
    data: TarMember | None

    def called(self) -> str:
        """Return the tar and the member in which its values are."""
        member = self.data or self.picture
        return f"{member.container}: {member.name}"


@dataclass(frozen=True, kw_only=True)
class TarPictures:
    """The pictures of one tar in their order, and how many hidden ones are not taken (`list_folders`).

    `members`: how many there are; `bad`: why some of them are left out.
    """

    samples: list[TarSample]
    hidden: int
    members: int
    bad: list[str]


def read_tar_images(uris: Sequence[str], access: AccessRules, *, root: str, ids: TarIds) -> ImageList:
    """Return the pictures of some tars, in the order of the tars and of their members.

    `ids`: what an image is called: `member` its name in the tar, `key` that name up to its first dot, `shard`
    the tar's own name below `root` and the member's.

    Raises:
        JobRefused: not a plain tar, or no pictures.
    """
    tars = list(_read_all(uris, access))
    samples = [sample for tar in tars for sample in tar.samples]
    if not samples:
        raise JobRefused(f"{uris[0]}: no pictures in {len(uris)} tars")
    return ImageList(
        image_uri=pa.array([str(sample.picture) for sample in samples], TEXT),
        image_id=pa.array([_id(sample.picture, root, ids) for sample in samples], TEXT),
        root=root,
        id_rule=_ID_RULES[ids],
        listed=True,
        left_out=_on_hidden(tars),
        notes=_on_bad(tars, root),
    )


def _on_bad(tars: Sequence[TarPictures], root: str) -> tuple[str, ...]:
    """Return a sentence on the members that cannot be used.

    Raises:
        JobRefused: they are most of them.
    """
    faults = RowFaults(root, "member")
    for tar in tars:
        faults.tell("member", tar.bad, tar.members)
    faults.refuse_bad_columns()
    return faults.notes("left out")


def _on_hidden(tars: Sequence[TarPictures]) -> tuple[str, ...]:
    """Return a sentence on the pictures that are skipped."""
    hidden = sum(tar.hidden for tar in tars)
    return (f"hidden pictures in the tars: {hidden:,}, left out",) if hidden else ()


_ID_RULES: dict[TarIds, str] = {
    "member": "ids are the names in the tars",
    "key": "ids are the names in the tars up to the first dot",
    "shard": "ids are the tars' names and the names in them",
}


def read_tar_boxes(
    uris: Sequence[str], mapping: Mapping[str, str], access: AccessRules, *, root: str, ids: TarIds
) -> BoxList:
    """Return the boxes of the `.json` files in some tars; a picture without one has no boxes.

    Raises:
        JobRefused: not a plain tar, a `.json` that is none, or none of them has boxes.
    """
    tars = list(_read_all(uris, access))
    samples = {uri: tar.samples for uri, tar in zip(uris, tars, strict=True)}
    columns, names = _columns(samples, mapping, access)

    faults = RowFaults(root, "sample")
    kinds = dict(columns.values())
    tables = (
        (uri, table)
        for uri, found in samples.items()
        for table in _tables(found, list(_rows(uri, found, root, ids, access)), kinds, faults)
    )
    renamed = ((uri, table.rename_columns(_ours(table, columns))) for uri, table in tables)
    boxes = boxes_of_rows(renamed, columns, faults, folder=root, box_format="xyxy")
    used = {ours: theirs for ours, (theirs, _) in columns.items() if ours not in KEYS}
    unused = tuple(name for name in names if name not in {*used.values(), *KEYS})
    notes = (*boxes.notes, *_on_bad(tars, root), *_on_hidden(tars))
    return replace(boxes, id_rule=_ID_RULES[ids], columns=names, used=used, unused=unused, notes=notes)


def _ours(table: pa.Table, columns: Mapping[str, tuple[str, Kind]]) -> list[str]:
    names = {theirs: ours for ours, (theirs, _) in columns.items()}
    return [names.get(name, name) for name in table.column_names]


def _tables(
    samples: Sequence[TarSample], rows: Sequence[_Row], kinds: Mapping[str, Kind], faults: RowFaults
) -> Iterator[pa.Table]:
    """Yield one tar's samples as typed columns; `faults` gets what cannot be read, with its member's name."""
    schema = pa.schema([(name, kind.arrow_type()) for name, kind in kinds.items()])
    shapers = shapers_of(kinds)
    lines = [json.dumps(row.values).encode() for row in rows]
    lines = [with_plain_values(line, shapers) for line in lines] if shapers else lines
    first = 0
    for read, found in readable_lines(b"\n".join(lines), schema):
        columns = {
            name: readable(single(read.column(name)), partial(plain, kind=kind), found.setdefault(name, {}))
            for name, kind in kinds.items()
        }
        some = range(first, first + read.num_rows)
        found["json"] = {at - first: text for at in some if (text := rows[at].reason) is not None}
        named = {
            name: {row: f"{samples[first + row].called()}: {text}" for row, text in texts.items()}
            for name, texts in found.items()
        }
        yield faults.add(pa.table(columns), named, first_row=first)
        first += read.num_rows


def _id(picture: TarMember, root: str, ids: TarIds) -> str:
    if ids == "key":
        return _key(picture.name)
    if ids == "member":
        return picture.name
    return f"{picture.container.removeprefix(root).lstrip('/')}/{picture.name}"


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


@dataclass(frozen=True)
class _Row:
    """A sample's own object, named by its picture, as a row of a table; `reason`: why there is none."""

    values: Mapping[str, Any]
    reason: str | None = None


def _rows(
    uri: str, samples: Sequence[TarSample], root: str, ids: TarIds, access: AccessRules
) -> Iterator[_Row]:
    """Yield one row of a table for each picture."""
    with open_input(uri, options_for(uri, access), block=_REMOTE_BLOCK) as stream:
        for sample in samples:
            names = {"image_uri": str(sample.picture), "image_id": _id(sample.picture, root, ids)}
            try:
                own = {"boxes": []} if sample.data is None else _object(stream, sample.data)
                yield _Row({**own, **names})
            except TextDamage as error:
                yield _Row(names, str(error))


def _object(stream: BinaryIO, member: TarMember) -> dict[str, Any]:
    if member.size > JSON_BYTES:
        raise TextDamage(f"it has {member.size} bytes; wanted at most {JSON_BYTES}")
    stream.seek(member.start)
    try:
        found = json.loads(stream.read(member.size))
    except (ValueError, RecursionError) as error:
        raise TextDamage(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise TextDamage(f"it holds {json_word(found)}; wanted a JSON object with `boxes`")
    return found


def _columns(
    samples: Mapping[str, Sequence[TarSample]], mapping: Mapping[str, str], access: AccessRules
) -> tuple[dict[str, tuple[str, Kind]], tuple[str, ...]]:
    """Return our column -> its name in the objects and its kind, by the first ones; and all their names."""
    values: dict[str, list[Any]] = {"image_uri": [""], "image_id": [""]}
    uri = next((uri for uri, found in samples.items() if any(one.data for one in found)), next(iter(samples)))
    some = [one for one in samples[uri] if one.data is not None][:SAMPLE_ROWS]
    rows = list(_rows(uri, some, "", "member", access)) if some else []
    for name, value in ((name, value) for row in rows for name, value in row.values.items()):
        values.setdefault(name, []).append(value)
    if rows and all(row.reason for row in rows):
        raise JobRefused(clean_text(f"{some[0].called()}: {rows[0].reason}"))
    given = {**mapping, **{name: name for name in KEYS}}
    known = names_known(list(values), given, uri=uri, box_format=None)
    if known.unclear:
        raise unclear_columns(uri, mapping, known.unclear)
    found = locate(list(values), IMAGE_ROWS, known.mapping, uri=uri)
    if "boxes" not in found:
        raise missing_column(f"{uri}: in the .json next to the pictures", "boxes", list(values))
    columns = {}
    for ours, theirs in found.items():
        wanted = IMAGE_ROWS[ours]
        leaf = sampled_leaf(values[theirs], wanted.leaf)
        columns[ours] = (theirs, settle(ours, {uri: Kind(wanted.depth, leaf)}, wanted))
    return columns, tuple(values)


# ---------------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------------


def _read_all(uris: Sequence[str], access: AccessRules) -> Iterator[TarPictures]:
    """Yield the pictures of each tar, several tars at a time."""
    with ThreadPoolExecutor(min(READERS, len(uris)) or 1) as pool:
        yield from pool.map(in_this_context(lambda uri: read_pictures(uri, access)), uris)


def read_pictures(uri: str, access: AccessRules) -> TarPictures:
    """Return the pictures of one tar.

    Raises:
        JobRefused: not a plain tar, or one that ends early.
    """
    block = _LOCAL_BLOCK if split_scheme(uri)[0] == "file" else _REMOTE_BLOCK
    with open_input(uri, options_for(uri, access), block=block) as stream:
        members, bad = _members(stream, uri)
    named = {one.name: one for one in members}  # of two of one name the last counts, as tar unpacks them
    twice = [one.name for one in members if named[one.name] is not one]
    bad += [f"{uri}: {name!r} is there again, and the last one counts" for name in twice]
    data = {_key(one.name): one for one in named.values() if one.name.lower().endswith(".json")}
    pictures = [one for one in named.values() if has_picture_name(one.name)]
    shown = [one for one in pictures if not is_hidden_path(one.name)]
    samples = [TarSample(picture=one, data=data.get(_key(one.name))) for one in shown]
    hidden = len(pictures) - len(shown)
    return TarPictures(samples=samples, hidden=hidden, members=len(members) + len(bad) - len(twice), bad=bad)


def _members(stream: BinaryIO, uri: str) -> tuple[list[TarMember], list[str]]:
    """Return the regular files of a tar, and why others that could hold a picture or boxes are left out."""
    found: list[TarMember] = []
    bad: list[str] = []
    bounded: Any = _Bounded(stream)
    try:
        with tarfile.open(fileobj=bounded, mode="r:", tarinfo=_Header) as opened:
            for one in _headers(opened, stream, bad):
                if len(found) > MOST_MEMBERS:
                    raise tarfile.ReadError(f"more than {MOST_MEMBERS:,} members; wanted several tars")
                if (reason := _unusable(one)) is not None:
                    bad.append(reason)
                elif one.isreg() and not one.issparse():
                    found.append(
                        TarMember(container=uri, start=one.offset_data, size=one.size, name=one.name)
                    )
    except tarfile.TarError as error:
        raise JobRefused(
            f"{uri}: not a sound tar: {clean_text(str(error))}; wanted a plain, uncompressed one"
        ) from error
    return found, [f"{uri}: {reason}" for reason in bad]


def _unusable(one: tarfile.TarInfo) -> str | None:
    """Return why a member cannot be used that could be meant for a picture or its boxes; None for others."""
    if one.isdir() or not (
        one.name == "" or has_picture_name(one.name) or one.name.lower().endswith(".json")
    ):
        return None
    if not one.name or "\x00" in one.name or is_no_utf8(one.name):
        return f"the member name {one.name!a} is not UTF-8 text"
    if one.issym() or one.islnk():
        return f"{one.name!r} is a link to {one.linkname!a}; wanted the file itself"
    return None if one.isreg() and not one.issparse() else f"{one.name!r} is no regular file"


_DAMAGED: tuple[type[Exception], ...] = tuple(
    getattr(tarfile, name)
    for name in ("InvalidHeaderError", "TruncatedHeaderError")  # which have no types
)


class _Header(tarfile.TarInfo):
    """A header; of a damaged one it says so, where `tarfile` takes it for the tar's end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: str) -> Self:
        """Return the header that a block is.

        Raises:
            tarfile.ReadError: it is none. tarfile.HeaderError: it is empty, as the tar's end is.
        """
        try:
            one = super().frombuf(buf, encoding, errors)
        except _DAMAGED as error:
            raise tarfile.ReadError(str(error)) from error
        if one.size < 0:
            raise tarfile.ReadError(f"a size of {one.size} bytes")
        return one


def _headers(tar: Any, stream: BinaryIO, bad: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's members whose headers are sound; `bad` gets where one is damaged.

    Behind damage the next header is looked for from where the data of the member before begin: its size may
    be what is wrong, and then it is left out. No byte is looked at twice.

    Raises:
        tarfile.TarError: the tar ends early.
    """
    size, start = stream.seek(0, io.SEEK_END), 0
    last: tarfile.TarInfo | None = None
    while True:
        tar.members.clear()  # or every header is kept
        one, reason = _next(tar, stream)
        if not reason:
            yield from [last] if last is not None else []
            if one is None:
                return
            last = one
            continue
        at = tar.offset
        start = start if last is None else max(start, last.offset_data)
        found = _sound_header(stream, start, but=at)
        is_wrong = at >= size or (found is not None and found < at)
        if found is None and not _is_ended(stream, size):
            raise tarfile.ReadError(f"unexpected end of data ({reason}, byte {at} of {size})")
        if last is not None and is_wrong:
            bad.append(f"{last.name!a} is stated to have {last.size} bytes, which is wrong")
        else:
            bad.append(f"the header at byte {at} is damaged ({reason})")
            yield from [last] if last is not None else []
        if found is None:
            return
        last, tar.offset, start = None, found, found + tarfile.BLOCKSIZE


def _next(tar: Any, stream: BinaryIO) -> tuple[tarfile.TarInfo | None, str]:
    """Return the next member, or why there is none that is sound; neither at the tar's end."""
    try:
        one = tar.next()
    except tarfile.TarError as error:
        return None, str(error)
    if one is None:
        stream.seek(tar.offset)
        blocks = stream.read(2 * tarfile.BLOCKSIZE)
        if any(blocks):  # two empty blocks are the end; one alone is a header that was wiped
            return None, "empty header"
    return one, ""


_MAGIC = np.frombuffer(b"ustar", np.uint8)
_MAGIC_AT = 257


def _sound_header(stream: BinaryIO, start: int, *, but: int) -> int | None:
    """Return where the first sound header from byte `start` on is, that at `but` aside; None for none."""
    stream.seek(start)
    while len(block := stream.read(_HEADER_BYTES)) >= tarfile.BLOCKSIZE:
        rows = len(block) // tarfile.BLOCKSIZE
        blocks = np.frombuffer(block, np.uint8, rows * tarfile.BLOCKSIZE).reshape(rows, -1)
        named = (blocks[:, _MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC).all(axis=1)
        for row in np.flatnonzero(named).tolist():
            at = start + row * tarfile.BLOCKSIZE
            if at != but and _is_header(blocks[row].tobytes()):
                return at
        start += rows * tarfile.BLOCKSIZE
        stream.seek(start)
    return None


def _is_header(block: bytes) -> bool:
    try:
        _Header.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _is_ended(stream: BinaryIO, size: int) -> bool:
    """Return whether a tar ends as it should: with two empty blocks."""
    stream.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
    return not any(stream.read(2 * tarfile.BLOCKSIZE))


class _Bounded:
    """A stream that gives no more at once than a header may take, so that no header fills the memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; wanted at most {_HEADER_BYTES}")
        return self._stream.read(size)
