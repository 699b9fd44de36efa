"""What a kind of store does: single tries, no retry, no policy; see `local_disk` and `cloud_buckets`.

Each create is one atomic request: on a local disk a hidden temporary file, fsync and a hard link; on
S3 one PUT with `If-None-Match: *`; elsewhere the fsspec driver's own exclusive create. Nothing is ever
streamed under its final name: an exception inside `with fs.open(...)` publishes what was written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.storage.request_retries import ShortBody

T = TypeVar("T")

CHUNK = 4 * 2**20
MOST_TAG = 256
ODD_TAG = "sha256-of-tag-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One listed object: size in bytes, and a version tag where known.

    `key`: its path as the backend takes it; above the backends its uri, or its name below a store's place.
    `etag`: the store's etag; of a local file its time and size. Equal tags mean the same bytes.
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


class Listing(Protocol):
    """A listing on its way. A page that failed is what the next call requests again, and it alone."""

    done: bool

    def page(self, *, timeout_s: float) -> list[Entry]: ...  # noqa: D102


Each = Callable[[Callable[[float], T]], T]
"""Returns `call(seconds_left)` with all its tries, or raises what its caller promises."""


def pages(walk: Callable[[], Listing], each: Each[Any]) -> Iterator[list[Entry]]:
    """Yield the objects of a listing page by page; `each` runs one request, with a time of its own.

    So a listing of any length has time, as long as pages come, and one fault costs one page.
    """
    listing: Listing = each(lambda _: walk())  # makes a client, which can fail for what passes
    while not listing.done:
        yield each(lambda left: listing.page(timeout_s=left))


class FolderListing:
    """A listing of stores that answer folder by folder: a folder is a page."""

    def __init__(
        self, top: str, prefix: str, list_one: Callable[[str, float], tuple[list[Entry], list[str]]]
    ) -> None:
        """Take a folder, what the paths of its objects must begin with, and what lists one folder.

        `list_one(folder, timeout_s)` returns the objects in it and the folders in it.
        """
        self._left = [top]
        self._prefix = prefix
        self._list_one = list_one
        self.done = False

    def page(self, *, timeout_s: float) -> list[Entry]:
        """Return the objects of one folder more."""
        entries, folders = self._list_one(self._left[-1], timeout_s)
        self._left.pop()
        self._left += [folder for folder in folders if f"{folder}/".startswith(self._prefix)]
        self.done = not self._left
        return [entry for entry in entries if entry.key.startswith(self._prefix)]


class Backend(Protocol):
    """One kind of store. `path`: without scheme. `timeout_s`: for this one try.

    `get` raises FileNotFoundError, and ImageError `too_many_bytes` before it reads more than
    `max_bytes`. `create` raises FileExistsError and then has changed nothing; so does `replace_if`, when what
    is there is not the version `seen`, by size and tag. `get_range` returns at most the bytes that were
    requested, and raises ImageError `changed` unless they are of the version `version`, the tag that `stat`
    gave (None: any). `walk` lists every object whose path begins with `prefix`.
    """

    def get(self, path: str, *, max_bytes: int | None, timeout_s: float) -> FetchedObject: ...  # noqa: D102
    def get_range(  # noqa: D102
        self, path: str, start: int, stop: int, *, timeout_s: float, version: str | None = None
    ) -> bytes: ...
    def stat(self, path: str, *, timeout_s: float) -> Entry | None: ...  # noqa: D102
    def create(self, path: str, data: bytes, *, timeout_s: float) -> None: ...  # noqa: D102
    def replace(self, path: str, data: bytes, *, timeout_s: float) -> None: ...  # noqa: D102
    def replace_if(self, path: str, data: bytes, seen: Entry, *, timeout_s: float) -> None: ...  # noqa: D102
    def walk(self, prefix: str) -> Listing: ...  # noqa: D102
    def delete(self, paths: Sequence[str], *, timeout_s: float) -> None: ...  # noqa: D102
    def abort_stale(self, prefix: str, *, timeout_s: float) -> int: ...  # noqa: D102


def too_many_bytes(size: int | None, max_bytes: int | None) -> None:
    """Raise ImageError `too_many_bytes` for a `size` over `max_bytes`."""
    if size is not None and max_bytes is not None and size > max_bytes:
        raise ImageError("too_many_bytes", f"{size} bytes, more than limits.max_image_bytes = {max_bytes}")


def local_tag(status: os.stat_result) -> str:
    """Return the version tag of a local file: when it was written to, and its size."""
    return f"mtime-{status.st_mtime_ns}-size-{status.st_size}"


def plain_tag(tag: str) -> str:
    """Return a store's tag as a plan can keep it: itself, or a hash of one that is long or odd."""
    if len(tag) <= MOST_TAG and tag.isascii() and tag.isprintable():
        return tag
    return ODD_TAG + hashlib.sha256(tag.encode(errors="surrogatepass")).hexdigest()


def check_version(found: str | None, wanted: str | None) -> None:
    """Raise ImageError `changed` unless the tag of what was read is the wanted one (None: any)."""
    if wanted is not None and found != wanted:
        raise ImageError(
            "changed",
            f"the file is not the version that was planned (it was {wanted}, now {found}); put that version "
            "back and retry, or plan a new job",
        )


_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


def check_range(content_range: str | None, announced: int | None, start: int, stop: int) -> int | None:
    """Return the whole object's size, if an answer to a request for start..stop states it.

    Raises:
        ImageError: `unreachable`, the answer is of another range, or of none: a store that ignores ranges
            sends the whole object, which may have no end.
    """
    match = _CONTENT_RANGE.fullmatch(content_range or "")
    if match is None and start == 0 and announced is not None and announced <= stop:
        return announced  # the whole object, and it fits
    if match is None or int(match[1]) != start or int(match[2]) >= stop:
        found = f"range {content_range!r}" if content_range else "a whole object"
        raise ImageError(
            "unreachable",
            f"bytes {start} to {stop - 1} were requested, and {found} came; a server must answer ranges",
        )
    return None if match[3] == "*" else int(match[3])


async def drain(read: Callable[[int], Any], max_bytes: int | None) -> bytes:
    """Return all that a body's `read` gives; ImageError `too_many_bytes` at once when it is more."""
    chunks: list[bytes] = []
    size = 0
    while chunk := await read(CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        too_many_bytes(size, max_bytes)
    return b"".join(chunks)


def check_complete(data: bytes, announced: int | None) -> None:
    """Raise ShortBody, which is tried again, unless all announced bytes came."""
    if announced is not None and len(data) != announced:
        raise ShortBody(f"{len(data)} of {announced} bytes came")
