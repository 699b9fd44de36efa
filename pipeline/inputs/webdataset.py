"""WebDataset tars: pictures and what belongs to them next to each other, `0001.jpg` and `0001.json`.

Only the headers are read while planning; a picture's uri states where in the tar its bytes are
(`archive_uris`). The `.json` of the same name up to the first dot is an object with the columns of a table
with one row an image (`boxes`, `labels`, `scores` ...). Names are kept as the tar has them.

Compressed tars have no places, and are refused. Links, devices and folders of a tar are skipped: nothing is
ever unpacked.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa

from hqlabel.pipeline.arrow_lists import single
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import boxes_of_rows
from hqlabel.pipeline.inputs.columns import Kind, RowFaults, locate, plain, sampled_leaf, settle
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, ImageList, examples, has_picture_name
from hqlabel.pipeline.inputs.json_records import (
    SAMPLE_ROWS,
    TextDamage,
    json_word,
    read_lines,
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
from hqlabel.pipeline.inputs.read_table import naming, naming_values
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


@dataclass(frozen=True, kw_only=True)
class TarPictures:
    """The pictures of one tar in their order, and how many hidden ones are not taken (`list_folders`)."""

    samples: list[TarSample]
    hidden: int


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
    )


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

    def batches() -> Iterator[tuple[str, pa.Table]]:
        for uri, found in samples.items():
            lines = [json.dumps(row).encode() for row in _rows(uri, found, root, ids, access)]
            for batch in _batches(uri, found, lines, dict(columns.values())):
                with naming_values(uri):
                    values = ((ours, single(batch.column(t)), k) for ours, (t, k) in columns.items())
                    yield uri, pa.table({ours: plain(column, k) for ours, column, k in values})

    boxes = boxes_of_rows(batches(), columns, RowFaults(uris[0]), folder=root, box_format="xyxy")
    used = {ours: theirs for ours, (theirs, _) in columns.items() if ours not in KEYS}
    unused = tuple(name for name in names if name not in {*used.values(), *KEYS})
    notes = (*boxes.notes, *_on_hidden(tars))
    return replace(boxes, id_rule=_ID_RULES[ids], columns=names, used=used, unused=unused, notes=notes)


def _batches(
    uri: str, samples: Sequence[TarSample], lines: Sequence[bytes], kinds: Mapping[str, Kind]
) -> list[pa.Table]:
    """Return the lines of one tar's samples as typed columns; an error names the member."""
    if not lines:
        return []
    schema = pa.schema([(name, kind.arrow_type()) for name, kind in kinds.items()])
    shapers = shapers_of(kinds)
    lines = [with_plain_values(line, shapers) for line in lines] if shapers else lines
    try:
        return [read_lines(b"\n".join(lines), len(lines), schema)]
    except (pa.ArrowException, TextDamage):
        for sample, line in zip(samples, lines, strict=True):
            what = uri if sample.data is None else f"{uri}: {clean_text(sample.data.name)}"
            with naming(what, "JSON"):
                read_lines(line, 1, schema)
        raise


def _id(picture: TarMember, root: str, ids: TarIds) -> str:
    if ids == "key":
        return _key(picture.name)
    if ids == "member":
        return picture.name
    return f"{picture.container.removeprefix(root).lstrip('/')}/{picture.name}"


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _rows(
    uri: str, samples: Sequence[TarSample], root: str, ids: TarIds, access: AccessRules
) -> Iterator[dict[str, Any]]:
    """Yield one line of a table for each picture: the sample's own object, named by the picture."""
    with open_input(uri, options_for(uri, access), block=_REMOTE_BLOCK) as stream:
        for sample in samples:
            row = {"boxes": []} if sample.data is None else _object(stream, sample.data)
            yield row | {"image_uri": str(sample.picture), "image_id": _id(sample.picture, root, ids)}


def _object(stream: BinaryIO, member: TarMember) -> dict[str, Any]:
    what = f"{member.container}: {clean_text(member.name)}"
    if member.size > JSON_BYTES:
        raise JobRefused(f"{what} has {member.size} bytes; wanted at most {JSON_BYTES}")
    stream.seek(member.start)
    try:
        found = json.loads(stream.read(member.size))
    except (ValueError, RecursionError) as error:
        raise JobRefused(f"{what} is no JSON: {clean_text(str(error))}") from error
    if not isinstance(found, dict):
        raise JobRefused(f"{what} holds {json_word(found)}; wanted an object with `boxes`")
    return found


def _columns(
    samples: Mapping[str, Sequence[TarSample]], mapping: Mapping[str, str], access: AccessRules
) -> tuple[dict[str, tuple[str, Kind]], tuple[str, ...]]:
    """Return our column -> its name in the objects and its kind, by the first ones; and all their names."""
    values: dict[str, list[Any]] = {"image_uri": [""], "image_id": [""]}
    uri = next((uri for uri, found in samples.items() if any(one.data for one in found)), next(iter(samples)))
    some = [one for one in samples[uri] if one.data is not None][:SAMPLE_ROWS]
    for row in _rows(uri, some, "", "member", access) if some else ():
        for name, value in row.items():
            values.setdefault(name, []).append(value)
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
        JobRefused: not a plain tar, or a member whose name is not UTF-8 or comes twice.
    """
    block = _LOCAL_BLOCK if split_scheme(uri)[0] == "file" else _REMOTE_BLOCK
    with open_input(uri, options_for(uri, access), block=block) as stream:
        members = _members(stream, uri)
    repeated = [name for name, count in Counter(one.name for one in members).items() if count > 1]
    if repeated:
        raise JobRefused(f"{uri}: {len(repeated)} names are there twice, such as {examples(repeated)}")
    data = {_key(one.name): one for one in members if one.name.lower().endswith(".json")}
    pictures = [one for one in members if has_picture_name(one.name)]
    shown = [one for one in pictures if not is_hidden_path(one.name)]
    samples = [TarSample(picture=one, data=data.get(_key(one.name))) for one in shown]
    return TarPictures(samples=samples, hidden=len(pictures) - len(shown))


def _members(stream: BinaryIO, uri: str) -> list[TarMember]:
    found: list[TarMember] = []
    bounded: Any = _Bounded(stream)
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as opened:
            tar: Any = opened
            end = 0
            while (one := tar.next()) is not None:
                if one.size < 0 or one.offset < end:
                    raise tarfile.ReadError(f"the header at byte {one.offset} contradicts itself")
                end, name = one.offset_data, one.name
                if len(found) > MOST_MEMBERS:
                    raise tarfile.ReadError(f"more than {MOST_MEMBERS:,} members; wanted several tars")
                if one.isreg() and not one.issparse():
                    if not name or "\x00" in name or is_no_utf8(name):
                        raise JobRefused(f"{uri}: the member name {name!a} is not UTF-8 text")
                    found.append(TarMember(container=uri, start=one.offset_data, size=one.size, name=name))
                tar.members.clear()  # or every header is kept
    except tarfile.TarError as error:
        raise JobRefused(
            f"{uri}: not a sound tar: {clean_text(str(error))}; wanted a plain, uncompressed one"
        ) from error
    return found


class _Bounded:
    """A stream that gives no more at once than a header may take, so that no header fills the memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; wanted at most {_HEADER_BYTES}")
        return self._stream.read(size)
