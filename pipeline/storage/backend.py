"""What a kind of store does: single tries, no retry, no policy; see `local_disk` and `cloud_buckets`.

Each create is one atomic request: on a local disk a hidden temporary file, fsync and a hard link; on
S3 one PUT with `If-None-Match: *`; elsewhere the fsspec driver's own exclusive create. Nothing is ever
streamed under its final name: an exception inside `with fs.open(...)` publishes what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.storage.request_retries import ShortBody

CHUNK = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One listed object: size in bytes, and a version tag where known.

    `key`: its path as the backend takes it; above the backends its uri, or its name below a store's place.
    """

    key: str
    size: int
    etag: str | None = None


@dataclass(frozen=True, kw_only=True)
class FetchedObject:
    """The bytes of one object, and the version tag of exactly these bytes where the store has one."""

    data: bytes
    size: int
    etag: str | None


class Backend(Protocol):
    """One kind of store. `path`: without scheme. `timeout_s`: for this one try.

    `get` raises FileNotFoundError, and ImageError `too_many_bytes` before it reads more than
    `max_bytes`. `create` raises FileExistsError and then has changed nothing; so does `replace_if`, when what
    is there is not the version `seen`, by size and tag.
    """

    def get(self, path: str, *, max_bytes: int | None, timeout_s: float) -> FetchedObject: ...  # noqa: D102
    def get_range(self, path: str, start: int, stop: int, *, timeout_s: float) -> bytes: ...  # noqa: D102
    def stat(self, path: str, *, timeout_s: float) -> Entry | None: ...  # noqa: D102
    def create(self, path: str, data: bytes, *, timeout_s: float) -> None: ...  # noqa: D102
    def replace(self, path: str, data: bytes, *, timeout_s: float) -> None: ...  # noqa: D102
    def replace_if(self, path: str, data: bytes, seen: Entry, *, timeout_s: float) -> None: ...  # noqa: D102
    def walk(self, prefix: str, *, timeout_s: float, limit: int | None) -> list[Entry]: ...  # noqa: D102
    def delete(self, paths: Sequence[str], *, timeout_s: float) -> None: ...  # noqa: D102
    def abort_stale(self, prefix: str, *, timeout_s: float) -> int: ...  # noqa: D102


def too_many_bytes(size: int | None, max_bytes: int | None) -> None:
    """Raise ImageError `too_many_bytes` for a `size` over `max_bytes`."""
    if size is not None and max_bytes is not None and size > max_bytes:
        raise ImageError("too_many_bytes", f"{size} bytes, more than limits.max_image_bytes = {max_bytes}")


def check_complete(data: bytes, announced: int | None) -> None:
    """Raise ShortBody, which is tried again, unless all announced bytes came."""
    if announced is not None and len(data) != announced:
        raise ShortBody(f"{len(data)} of {announced} bytes came")
