"""Read one picture out of a tar or a Parquet file, with the rules of `read_objects.read_object`.

What is read must be what was planned: the file around it is of the planned version (its tag), and the member
or row has the planned name. A member of a tar is one range, its headers included, which must still state name
and size. Rows of a Parquet file are read a row group at a time, because pages cannot be cut; the last row
groups are kept, so the images of a unit, which are neighbours, cost one read.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hqlabel.pipeline.errors import ImageError, clean_text
from hqlabel.pipeline.storage.archive_uris import ParquetRow, TarMember
from hqlabel.pipeline.storage.backend import FetchedObject, too_many_bytes
from hqlabel.pipeline.storage.parquet_pages import read_pictures
from hqlabel.pipeline.storage.read_objects import ObjectUri, call_for_image

KEPT_GROUPS = 2
BLOCK = 512
NAMES_BEFORE = 16 * BLOCK
"""How much before a member's own header is read with it: a long or foreign name stands there."""
LONGEST_NAMES = 2**20
"""As much as planning allows for one header."""


def read_archived(
    member: TarMember | ParquetRow,
    options: Mapping[str, Any],
    *,
    version: str | None = None,
    max_bytes: int,
    deadline_monotonic: float,
) -> FetchedObject:
    """Return the bytes of one picture; the rules on uris have passed its container.

    `version`: the tag that the container must have; None for any. The tag is returned with the bytes.

    Raises:
        ImageError, SystemicFault: as `read_object`; `changed` where the file, or the member or row at the
            planned place, is not what was planned.
    """
    if isinstance(member, TarMember) and member.start < BLOCK:
        raise ImageError("changed", f"no member of a tar begins at byte {member.start}")
    source = ObjectUri(uri=member.container, options=options)
    archive = _Archive.at(source, version, deadline_monotonic)
    if isinstance(member, TarMember):
        too_many_bytes(member.size, max_bytes)
        data = _tar_bytes(archive, member)
    else:
        data = _row_bytes(archive, member, max_bytes)
    return FetchedObject(data=data, size=len(data), etag=archive.version)


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """A container's ranges, all of one version, tried again within one deadline; as `read_object` raises."""

    source: ObjectUri
    version: str | None
    deadline: float

    @classmethod
    def at(cls, source: ObjectUri, version: str | None, deadline: float) -> _Archive:
        """Return the container as planned; as it is now where no version was planned."""
        archive = cls(source=source, version=version, deadline=deadline)
        return (
            archive
            if version is not None
            else cls(source=source, version=archive.entry()[1], deadline=deadline)
        )

    @property
    def key(self) -> str:
        return json.dumps([self.source.uri, self.version, self.source.options], sort_keys=True, default=str)

    def entry(self) -> tuple[int, str | None]:
        """Return size and tag as they are now."""
        source = self.source
        entry = call_for_image(
            "look up", lambda left: source.backend.stat(source.path, timeout_s=left), self.deadline
        )
        if entry is None:
            raise ImageError("not_found", "the file that holds the picture is gone")
        return entry.size, entry.etag

    def range(self, start: int, stop: int) -> bytes:
        source = self.source
        return call_for_image(
            "read",
            lambda left: source.backend.get_range(
                source.path, start, stop, timeout_s=left, version=self.version
            ),
            self.deadline,
        )


def _tar_bytes(archive: _Archive, member: TarMember) -> bytes:
    first = max(0, member.start - BLOCK - NAMES_BEFORE)
    block = archive.range(first, member.start + member.size)
    headers, data = block[: member.start - first], block[member.start - first :]
    found = _stated(headers, member) if len(headers) == member.start - first else "the tar's end"
    if found is not None and first:  # once more, with all that planning would have read of a name
        start = max(0, member.start - BLOCK - LONGEST_NAMES)
        if _stated(archive.range(start, member.start), member) is None:
            found = None
    if found is not None or len(data) != member.size:
        raise ImageError(
            "changed",
            f"at byte {member.start} of the tar is {found or 'a part of it'}, planned {member.size} bytes of "
            f"{clean_text(member.name)[:100]}; put that tar back and retry, or plan a new job",
        )
    return data


def _stated(headers: bytes, member: TarMember) -> str | None:
    """Return None where the headers that end here state the member as planned, else what they state.

    A name that is long, or not ASCII, stands in a header of its own, before: whichever block begins a chain
    of headers that ends here is read as tarfile reads it.
    """
    last: str | None = None
    for start in range(len(headers) - BLOCK, -1, -BLOCK):
        one = _header_at(headers[start:])
        if one is not None and (one.name, one.size) == (member.name, member.size):
            return None
        last = last or (f"{one.size} bytes of {clean_text(one.name)[:100]}" if one else "no member")
    return last or "no member"


def _header_at(headers: bytes) -> tarfile.TarInfo | None:
    """Return the regular member whose chain of headers is exactly these bytes; None for other bytes."""
    try:
        with tarfile.open(fileobj=io.BytesIO(headers), mode="r:") as opened:
            tar: Any = opened
            one: tarfile.TarInfo | None = tar.firstmember
    except (tarfile.TarError, ValueError, OverflowError):
        return None
    is_whole = one is not None and one.isreg() and not one.issparse() and one.offset_data == len(headers)
    return one if is_whole else None


def _row_bytes(archive: _Archive, member: ParquetRow, max_bytes: int) -> bytes:
    rows = _groups.get(archive, member)
    if member.row >= len(rows):
        raise ImageError(
            "changed", f"row group {member.group} has {len(rows)} rows, planned row {member.row}"
        )
    row = rows.slice(member.row, 1)
    value = row.column("bytes")[0].as_buffer()
    too_many_bytes(0 if value is None else value.size, max_bytes)
    path = _stated_path(row) if member.name else None
    if member.name and path != member.name:
        raise ImageError(
            "changed",
            f"row {member.row} of row group {member.group} is {clean_text(path or '')[:100]!r}, planned "
            f"{clean_text(member.name)[:100]!r}; put that file back and retry, or plan a new job",
        )
    if value is None:
        raise ImageError("not_found", f"{member.column}.bytes is null in this row")
    return value.to_pybytes()  # type: ignore[no-any-return]


def _stated_path(row: pa.Table) -> str | None:
    """Return the name that a row states; None for none, and for bytes that are no text."""
    try:
        return row.column("path")[0].as_py() if "path" in row.column_names else None
    except UnicodeDecodeError:
        return None


class _RowGroups:
    """The row groups read last by this process, one reader for each at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, archive: _Archive, member: ParquetRow) -> pa.Table:
        """Return the pictures of one row group, and their paths."""
        key = (archive.key, member.column, member.group)
        with self._lock:  # also while reading: the other threads want the same group, and memory is bounded
            if key not in self._kept:
                while len(self._kept) >= KEPT_GROUPS:
                    self._kept.popitem(last=False)
                self._kept[key] = read_pictures(
                    archive.range, archive.entry()[0], column=member.column, group=member.group
                )
            self._kept.move_to_end(key)
            return self._kept[key]


_groups = _RowGroups()
