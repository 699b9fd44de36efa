"""`Store`: the folder or prefix of a job, with the conditional writes that everything rests on.

`put_if_absent` (one creator wins, readers see all or nothing) and `put_if_unchanged` (a writer that was
overtaken replaces nothing); `put` for what nobody contends for. A fault of the job's own store is
everybody's: `SystemicFault`. Images and input files are read by `read_objects`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import BinaryIO, TypeVar

from hqlabel.pipeline.errors import DamageFound, ImageError, JobRefused, SystemicFault, UsageError
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage.backend import Backend, Entry, FetchedObject, pages
from hqlabel.pipeline.storage.cloud_buckets import backend_for
from hqlabel.pipeline.storage.read_objects import blockwise
from hqlabel.pipeline.storage.request_retries import StorageFault, with_retries
from hqlabel.pipeline.storage.uri_rules import refuse_storage_secrets, split_scheme

T = TypeVar("T")

STORE_BUDGET_S = 120.0
SLOWEST_BYTES_PER_S = 2**20  # a large body gets this much longer
_DELETED_AT_ONCE = 1000  # one request of S3; each has a budget of its own


class NotFound(SystemicFault):
    """A key that should be in the job's store is not there."""

    def __init__(self, message: str) -> None:
        super().__init__("store", message)


class Replaced(SystemicFault):
    """An object of the job's store was replaced while it was read."""

    def __init__(self, message: str) -> None:
        super().__init__("store", message)


class Store:
    """The objects under one place. Safe in threads; picklable: each process makes its own client.

    `budget_s`: for one call with all its tries. Large bodies get a second more for every MiB.
    """

    def __init__(self, place: Place, *, budget_s: float = STORE_BUDGET_S) -> None:
        refuse_storage_secrets(place.options, where=place.uri)
        scheme, rest = split_scheme(place.uri)
        self.place = place
        self.budget_s = budget_s
        self._scheme = scheme
        self._base = _base_of(scheme, rest)

    @property
    def _backend(self) -> Backend:
        return backend_for(self._scheme, self.place.options)

    def _path(self, key: str) -> str:
        if key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"{key!r} is no key of a store; expected such as units/a.parquet")
        return self._base + key

    def _try(self, what: str, call: Callable[[float], T], *, size: int = 0) -> T:
        budget = self.budget_s + size / SLOWEST_BYTES_PER_S
        try:
            return with_retries(call, deadline=time.monotonic() + budget, what=f"{self.place.uri}: {what}")
        except StorageFault as fault:
            if fault.verdict.kind == "image":
                raise NotFound(fault.message) from fault
            raise SystemicFault(fault.verdict.code, fault.message) from fault

    def read(self, key: str, *, most: int | None = None) -> bytes:
        """Return all bytes under `key`. Raises NotFound, or SystemicFault when the store fails.

        Raises also DamageFound for more than `most` bytes, of which none is kept.
        """
        return self._fetch(key, most).data

    def fetch(self, key: str, *, most: int | None = None) -> FetchedObject | None:
        """Return the bytes under `key` with the tag of this very version, None when it is absent.

        `most`: as in `read`.
        """
        try:
            return self._fetch(key, most)
        except NotFound:
            return None

    def _fetch(self, key: str, most: int | None) -> FetchedObject:
        path = self._path(key)

        def get(left: float) -> FetchedObject:
            try:
                return self._backend.get(path, max_bytes=most, timeout_s=left)
            except ImageError as error:
                if error.code != "changed":
                    raise
                # A writer was faster: what is there now is as good, so it is read anew.
                raise OSError(errno.EAGAIN, "it was replaced while it was read", path) from error

        try:
            return self._try(f"read {key}", get)
        except ImageError as error:
            if most is None or error.code != "too_many_bytes":
                raise SystemicFault("store", f"{self.place.uri}/{key}: {error.message}") from error
            raise DamageFound(
                f"{self.place.uri}/{key}: over {most:,} bytes, which no such file of hqlabel has"
            ) from error

    def read_range(self, key: str, start: int, stop: int, *, version: str | None = None) -> bytes:
        """Return bytes start..stop (end-exclusive) under `key`; fewer at the end of the object.

        `version`: the tag they must be of; Replaced when they are not.
        """
        path = self._path(key)

        def get(left: float) -> bytes:
            return self._backend.get_range(path, start, stop, timeout_s=left, version=version)

        try:
            return self._try(f"read {key}", get)
        except ImageError as error:
            if error.code != "changed":
                raise SystemicFault("store", f"{self.place.uri}/{key}: {error.message}") from error
            raise Replaced(f"{self.place.uri}: {key} was replaced while it was read") from error

    def open_parquet(self, key: str) -> BinaryIO:
        """Return a seekable file, read in blocks with this store's retries; NotFound if absent.

        All blocks are of the version that was there when it was opened; Replaced when there is another.
        """
        entry = self.head(key)
        if entry is None:
            raise NotFound(f"{self.place.uri}: there is no {key}")
        return blockwise(
            lambda start, stop: self.read_range(key, start, stop, version=entry.etag), entry.size
        )

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Return whether `key` now holds these bytes; False when something else was there, which stays.

        Atomic: no reader sees a part, and callers with different bytes (a token inside, where it matters
        who won) have one winner in the world. What is there is read back and compared before False
        is returned, because a winner whose reply is lost meets his own object at the next try, and
        that try may be hidden: aiohttp repeats a PUT by itself when a kept connection breaks.
        """
        path = self._path(key)

        def create(left: float) -> bool:
            try:
                self._backend.create(path, data, timeout_s=left)
            except FileExistsError:
                return self._backend.get(path, max_bytes=None, timeout_s=left).data == data
            return True

        return self._try(f"create {key}", create, size=len(data))

    def put(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, replaced in one step."""
        path = self._path(key)
        self._try(
            f"write {key}", lambda left: self._backend.replace(path, data, timeout_s=left), size=len(data)
        )

    def put_if_unchanged(self, key: str, data: bytes, seen: Entry | None) -> bool:
        """Return whether `key` now holds these bytes; False when it is no longer what was `seen`.

        `seen`: of `head`, `fetch` or `list`; None: nothing. Atomic, and lost replies are read back, as in
        `put_if_absent`. What is written must be unlike all that was there before, or an old version passes
        for the seen one.
        """
        if seen is None:
            return self.put_if_absent(key, data)
        path = self._path(key)

        def swap(left: float) -> bool:
            try:
                self._backend.replace_if(path, data, seen, timeout_s=left)
            except (FileExistsError, FileNotFoundError):
                return self._backend.get(path, max_bytes=None, timeout_s=left).data == data
            return True

        try:
            return self._try(f"replace {key}", swap, size=len(data))
        except NotFound:
            return False

    def refuse_unconditional(self, key: str, body: bytes) -> None:
        """Raise JobRefused when this store ignores the conditions of writes; `key` holds `body` and is ours.

        Tried at every start that writes, because a store may be another one than when the job began.
        """
        path, other = self._path(key), body + b"\n"
        never_there = Entry(key=key, size=len(body), etag="0" * 32)

        def ignored(left: float) -> str | None:
            with contextlib.suppress(FileExistsError):
                self._backend.create(path, other, timeout_s=left)
                return "If-None-Match"
            with contextlib.suppress(FileExistsError):
                self._backend.replace_if(path, other, never_there, timeout_s=left)
                return "If-Match"
            return None

        header = self._try(f"prove the conditions of writes with {key}", ignored)
        if header is not None:
            raise JobRefused(
                f"{self.place.uri}: this store replaces objects that were to be written under a condition "
                f"({header} is ignored), so two commands would overwrite each other in silence; use a newer "
                "version of it, or another"
            )

    @property
    def lists_by_prefix(self) -> bool:
        """Whether a listing of a prefix that ends within a name costs only what it returns."""
        return self._scheme in ("s3", "s3a")

    def list(self, prefix: str = "", *, limit: int | None = None) -> list[Entry]:
        """Return the objects whose keys begin with `prefix`, at any depth, sorted; never from a cache.

        `limit`: that many at most, whichever come first, to check whether there is anything.
        """
        found: list[Entry] = []
        for page in self.pages(prefix):
            found += page
            if limit is not None and len(found) >= limit:
                break
        return sorted(found[:limit], key=lambda entry: entry.key)

    def pages(self, prefix: str = "") -> Iterator[Sequence[Entry]]:
        """Yield what `list` returns as it comes, in no order; each page has the budget of a call."""
        start, cut = self._base + prefix, len(self._base)
        for page in pages(lambda: self._backend.walk(start), lambda call: self._try(f"list {prefix}", call)):
            yield [Entry(key=one.key[cut:], size=one.size, etag=one.etag) for one in page]

    def head(self, key: str) -> Entry | None:
        """Return size and tag of `key`, or None when it is absent."""
        path = self._path(key)
        entry = self._try(f"look up {key}", lambda left: self._backend.stat(path, timeout_s=left))
        return None if entry is None else replace(entry, key=key)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete the keys. Only `hqlabel clean` calls this: no other command needs the right."""
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            paths = [self._path(key) for key in keys[start : start + _DELETED_AT_ONCE]]
            self._try(f"delete {len(paths)} objects", partial(self._delete, paths))

    def _delete(self, paths: Sequence[str], timeout_s: float) -> None:
        self._backend.delete(paths, timeout_s=timeout_s)

    def abort_stale_uploads(self) -> int:
        """Drop unfinished writes of dead processes (S3 uploads, local temporary files); return how many."""
        return self._try("abort uploads", lambda left: self._backend.abort_stale(self._base, timeout_s=left))


def _base_of(scheme: str, rest: str) -> str:
    """Return what every path of a store begins with, ending in "/"."""
    if scheme == "file":
        return os.path.abspath(rest).rstrip("/") + "/"
    if scheme in ("http", "https"):
        raise UsageError(f"{scheme}:// can be read, not written; choose a folder or an object store")
    base = rest.strip("/")
    if not base or any(part in ("", ".", "..") for part in base.split("/")):
        raise UsageError(f"{scheme}://{rest} names no bucket and folder")
    return base + "/"
