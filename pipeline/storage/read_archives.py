"""Read one picture out of a tar or a Parquet file, with the rules of `read_objects.read_object`.

A member of a tar is one range, its header included, which must still state the planned size. Rows of a
Parquet file are read a row group at a time, because pages cannot be cut; the last row groups are kept, so the
images of a unit, which are neighbours, cost one read.
"""

from __future__ import annotations

import json
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.storage.archive_uris import ParquetRow, TarMember
from hqlabel.pipeline.storage.backend import FetchedObject, too_many_bytes
from hqlabel.pipeline.storage.checksummed_parquet import open_closed
from hqlabel.pipeline.storage.read_objects import ObjectUri, blockwise, call_for_image

KEPT_GROUPS = 2
GROUP_BYTES = 2**30
"""The largest row group that is read; larger ones would fill a worker's memory."""
HEADER = 512


def read_archived(
    member: TarMember | ParquetRow, options: Mapping[str, Any], *, max_bytes: int, deadline_monotonic: float
) -> FetchedObject:
    """Return the bytes of one picture; the rules on uris have passed its container.

    Raises:
        ImageError, SystemicFault: as `read_object`; `changed` where the tar is not what was planned.
    """
    archive = _Archive(source=ObjectUri(uri=member.container, options=options), deadline=deadline_monotonic)
    if isinstance(member, TarMember):
        too_many_bytes(member.size, max_bytes)
        data = _tar_bytes(archive, member)
    else:
        data = _row_bytes(archive, member)
        too_many_bytes(len(data), max_bytes)
    return FetchedObject(data=data, size=len(data), etag=None)


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """A container's ranges, tried again within one deadline; raises as `read_object` does."""

    source: ObjectUri
    deadline: float

    @property
    def key(self) -> str:
        return json.dumps([self.source.uri, self.source.options], sort_keys=True, default=str)

    def size(self) -> int:
        source = self.source
        entry = call_for_image(
            "look up", lambda left: source.backend.stat(source.path, timeout_s=left), self.deadline
        )
        if entry is None:
            raise ImageError("not_found", "the file that holds the picture is gone")
        return entry.size

    def range(self, start: int, stop: int) -> bytes:
        source = self.source
        return call_for_image(
            "read",
            lambda left: source.backend.get_range(source.path, start, stop, timeout_s=left),
            self.deadline,
        )


def _tar_bytes(archive: _Archive, member: TarMember) -> bytes:
    if member.start < HEADER:
        raise ImageError("changed", f"no member of a tar begins at byte {member.start}")
    block = archive.range(member.start - HEADER, member.start + member.size)
    try:
        found = tarfile.TarInfo.frombuf(block[:HEADER], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ImageError(
            "changed", f"there is no member at byte {member.start} of the tar any more ({error})"
        ) from None
    if not found.isreg() or found.size != member.size or len(block) != HEADER + member.size:
        raise ImageError(
            "changed",
            f"the member at byte {member.start} of the tar has {found.size} bytes, planned {member.size}; "
            "plan the changed tar as a new job",
        )
    return block[HEADER:]


def _row_bytes(archive: _Archive, member: ParquetRow) -> bytes:
    rows = _groups.get(archive, member)
    if member.row >= len(rows):
        raise ImageError(
            "changed", f"row group {member.group} has {len(rows)} rows, planned row {member.row}"
        )
    value = rows[member.row].as_buffer() if rows[member.row].is_valid else None
    if value is None:
        raise ImageError("not_found", f"{member.column}.bytes is null in this row")
    return value.to_pybytes()  # type: ignore[no-any-return]


class _RowGroups:
    """The row groups read last by this process, one reader for each at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, archive: _Archive, member: ParquetRow) -> pa.ChunkedArray:
        """Return the pictures of one row group."""
        key = (archive.key, member.column, member.group)
        with self._lock:  # also while reading: the other threads want the same group, and memory is bounded
            if key not in self._kept:
                while len(self._kept) >= KEPT_GROUPS:
                    self._kept.popitem(last=False)
                self._kept[key] = _read_group(archive, member)
            self._kept.move_to_end(key)
            return self._kept[key]


_groups = _RowGroups()


def _read_group(archive: _Archive, member: ParquetRow) -> pa.ChunkedArray:
    size = archive.size()
    began = time.monotonic()
    try:
        file = open_closed(blockwise(archive.range, size), page_checksum_verification=True)
        if member.group >= file.num_row_groups:
            raise ImageError(
                "changed", f"the file has {file.num_row_groups} row groups, planned {member.group}"
            )
        if size / file.num_row_groups > GROUP_BYTES:
            raise ImageError(
                "too_many_bytes",
                f"row groups of {size // file.num_row_groups} bytes, wanted at most {GROUP_BYTES}; write the "
                "file again with smaller ones",
            )
        table = file.read_row_group(member.group, columns=[f"{member.column}.bytes"])
        return pa.chunked_array(
            [chunk.field("bytes") for chunk in table.column(member.column).chunks], pa.binary()
        )
    except (pa.ArrowException, KeyError, OSError) as error:
        took = time.monotonic() - began
        raise ImageError(
            "corrupt", f"row group {member.group} of the Parquet file cannot be read ({error}), {took:.0f} s"
        ) from None
