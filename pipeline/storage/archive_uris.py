"""Uris of pictures inside other files: a member of a tar, a row of a Parquet file.

    s3://bucket/shards/0001.tar#1536:40231/cat/0001.jpg
        40,231 bytes from byte 1,536 of the tar on: the member `cat/0001.jpg`
    /data/train.parquet#image:3:12/000000039769.jpg
        row 12 of row group 3, the bytes of column `image`; the name is as the file has it, and may be empty

Planning writes such a uri, so that a worker reads one picture with one request, and no index. The rules on
uris check the file that holds the picture. The name behind the place is for readers; nothing is opened by it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hqlabel.pipeline.errors import JobRefused, clean_text

TAR = ".tar"
_TAR_MEMBER = re.compile(r"(.+?\.tar)#(\d{1,15}):(\d{1,15})/(.+)", re.DOTALL | re.IGNORECASE)
_ROW = re.compile(
    r"(.+?\.(?:parquet|pq))#([A-Za-z0-9_\-]{1,64}):(\d{1,9}):(\d{1,9})/(.*)", re.DOTALL | re.IGNORECASE
)
PLACE = (
    r"(?is)(?:(\.tar)#\d{1,15}:\d{1,15}|(\.(?:parquet|pq))#[A-Za-z0-9_\-]{1,64}:\d{1,9}:\d{1,9})/[^\x00]*\z"
)
"""The end of such a uri, for Arrow: all but the ending of the container's name, which it captures."""
COLUMN = re.compile(r"[A-Za-z0-9_\-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """`size` bytes from `start` on of the tar at `container`."""

    container: str
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.container}#{self.start}:{self.size}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class ParquetRow:
    """Row `row` of row group `group` of the Parquet file at `container`: the field `bytes` of `column`."""

    container: str
    column: str
    group: int
    row: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.container}#{self.column}:{self.group}:{self.row}/{self.name}"


def parse_archive_uri(uri: str) -> TarMember | ParquetRow | None:
    """Return what a uri names inside another file; None for a file by itself."""
    if (match := _TAR_MEMBER.fullmatch(uri)) is not None:
        container, start, size, name = match.groups()
        return TarMember(container=container, start=int(start), size=int(size), name=name)
    if (match := _ROW.fullmatch(uri)) is not None:
        container, column, group, row, name = match.groups()
        return ParquetRow(container=container, column=column, group=int(group), row=int(row), name=name)
    return None


def container_of(uri: str) -> str:
    """Return the file that has to be opened for a uri."""
    member = parse_archive_uri(uri)
    return uri if member is None else member.container


def check_column(uri: str, column: str) -> None:
    """Raise JobRefused unless a uri can name the column."""
    if COLUMN.fullmatch(column) is None:
        raise JobRefused(
            f"{uri}: column {clean_text(column)!r} holds the pictures; wanted a name of letters, digits, _ "
            "and -: rename it"
        )
