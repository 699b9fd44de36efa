"""What people point at: images, tables, box files and weights, read by uri.

An image's fault is that image's (`ImageError`), unless it is one that every request would meet
(credentials, clock, no bucket: `SystemicFault`). A fault of a file that the whole job needs refuses the
job before any work. Product code imports these from `pipeline.storage.store`, the one door.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn, TypeVar

from pipeline.errors import ImageError, JobRefused, SystemicFault, UsageError, clean_text
from pipeline.storage import list_folders
from pipeline.storage.backend import Backend, FetchedObject, Found
from pipeline.storage.object_store import backend_for
from pipeline.storage.retries import StorageFault, with_retries
from pipeline.storage.uri_rules import check_regular, split_scheme

T = TypeVar("T")

INPUT_BUDGET_S = 120.0
READ_TRIES = 8
FINGERPRINT_THREADS = 16
BLOCK = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a store: key relative to the place, size in bytes, version tag where known."""

    key: str
    size: int
    etag: str | None = None


class _BlockReader(io.RawIOBase):
    """A read-only file over a function that reads ranges."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range = read_range
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readall(self) -> bytes:  # the inherited one asks for 8 KiB at a time
        data = self._read_range(self._at, self._size) if self._at < self._size else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        data = self._read_range(self._at, stop)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def blockwise(read_range: Callable[[int, int], bytes], size: int, *, block: int = BLOCK) -> BinaryIO:
    """A seekable file of `size` bytes, read in blocks by a function that reads ranges."""
    return io.BufferedReader(_BlockReader(read_range, size), buffer_size=block)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What a uri points at. The driver is made inside a try, because that can fail for what passes.

    A local path is opened as it is written: to fold `link/..` away would open another file than the
    one `check_uri` has looked at.
    """

    uri: str
    options: Mapping[str, Any]

    @property
    def backend(self) -> Backend:
        return backend_for(split_scheme(self.uri)[0], self.options)

    @property
    def is_there(self) -> bool:
        """Whether a local path exists, whatever it is."""
        return split_scheme(self.uri)[0] == "file" and os.path.lexists(self.path)

    @property
    def path(self) -> str:
        scheme, rest = split_scheme(self.uri)
        return self.uri if scheme in ("http", "https") else rest


def read_object(
    uri: str, options: Mapping[str, Any], *, max_bytes: int | None, deadline_monotonic: float
) -> FetchedObject:
    """The bytes of one object with size and version tag; `check_uri` has already passed it.

    Raises:
        ImageError: not_found, denied, too_many_bytes, changed, unreachable, fetch_timeout, uri_refused.
        SystemicFault: credentials, clock, store (no such bucket), disk.
    """
    target = _Target(uri=uri, options=options)

    def get(left: float) -> FetchedObject:
        return target.backend.get(target.path, max_bytes=max_bytes, timeout_s=left)

    try:
        return with_retries(get, deadline=deadline_monotonic, what="read", max_tries=READ_TRIES)
    except StorageFault as fault:
        raise_for_image(fault)


def raise_for_image(fault: StorageFault) -> NoReturn:
    """Never comes back: raises what a fault in reading one image means."""
    verdict = fault.verdict
    if verdict.kind == "image":
        raise ImageError(verdict.code, fault.message) from fault
    if verdict.kind == "retry":
        raise ImageError("fetch_timeout" if fault.timed_out else "unreachable", fault.message) from fault
    if verdict.code == "denied":  # one object may be forbidden; the job judges a window of them
        raise ImageError("denied", fault.message) from fault
    raise SystemicFault(verdict.code, fault.message) from fault


def _for_input(uri: str, what: str, call: Callable[[float], T]) -> T:
    """`call`, for a file the whole job needs: what fails here refuses the job before any work."""
    try:
        return with_retries(call, deadline=time.monotonic() + INPUT_BUDGET_S, what=f"{what} {uri}")
    except StorageFault as fault:
        raise JobRefused(fault.message) from fault
    except ImageError as error:
        raise JobRefused(f"{what} {uri}: {error.message}") from error


def head_object(uri: str, options: Mapping[str, Any]) -> Entry | None:
    """Size and version tag of one object (`key` is the uri), or None when there is none."""
    target = _Target(uri=uri, options=options)
    found = _for_input(uri, "look up", lambda left: target.backend.stat(target.path, timeout_s=left))
    return None if found is None else Entry(key=uri, size=found.size, etag=found.etag)


def list_objects(uri: str, options: Mapping[str, Any]) -> list[Entry]:
    """Every object below a folder or prefix, at any depth, hidden ones too, sorted by uri (`key` is the uri).

    For the folder of a program, such as a checkpoint; what a person points at is listed by `list_inputs`.
    """
    if not uri.strip("/") and uri != "/":
        raise UsageError(f"{uri!r} names no folder")
    target = _Target(uri=uri.rstrip("/") + "/", options=options)
    found = _for_input(uri, "list", lambda left: target.backend.walk(target.path, timeout_s=left, limit=None))
    return _entries(found, target.path, target.uri)


def _entries(found: Sequence[Found], prefix: str, base: str) -> list[Entry]:
    entries = [
        Entry(key=base + one.path.removeprefix(prefix), size=one.size, etag=one.etag)
        for one in found
        if not one.path.endswith("/")  # the empty objects that S3 consoles make for list_folders
    ]
    return sorted(entries, key=lambda entry: entry.key)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies below a place that a person points at, sorted by uri.

    `links`: uris of linked files -> the paths they lead to. `odd`: uris of pipes, devices and the like.
    `unnameable`: names that are not UTF-8, escaped; no entries. `notes`: what was left out, in sentences.
    """

    entries: tuple[Entry, ...]
    links: Mapping[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()
    unnameable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def list_inputs(
    uri: str, options: Mapping[str, Any], *, roots: Sequence[str] = (), pattern: str | None = None
) -> Listing:
    """List what is meant of a folder or prefix, at any depth; `list_folders` has the rules.

    Args:
        uri: The folder or prefix.
        options: Of the store.
        roots: Local list_folders, links resolved, that links may lead to besides `uri` itself.
        pattern: A pattern of names below `uri`, or None for all of them.

    Raises:
        JobRefused: The place cannot be listed, or a part of it whose content would be lost: a folder that is
            closed, or one that a link leads to outside `roots`.
    """
    if not uri.strip("/") and uri != "/":
        raise UsageError(f"{uri!r} names no folder")
    target = _Target(uri=uri.rstrip("/") + "/", options=options)
    wanted = None if pattern is None else list_folders.Pattern(pattern)

    def look(left: float) -> list_folders.Listed:
        if split_scheme(uri)[0] == "file":
            return list_folders.walk(target.path, (*roots, os.path.realpath(target.path)), wanted)
        found = target.backend.walk(target.path, timeout_s=left, limit=None)
        return list_folders.shown_of(found, target.path, wanted)

    listed = _for_input(uri, "list", look)
    _refuse_lost(listed)
    return _listing(listed, target)


def _refuse_lost(listed: list_folders.Listed) -> None:
    """Raise JobRefused where nobody knows what a folder holds."""
    if listed.leading_out:
        link, real = next(iter(listed.leading_out.items()))
        others = len(listed.leading_out) - 1
        more = f", one of {list_folders.counted(others + 1, 'linked folder')}" if others else ""
        flags = list_folders.allow_root(listed.leading_out.values())
        raise JobRefused(
            f"{clean_text(link)} is a link to {clean_text(real)}{more}: outside what may be read, and the "
            f"files there would be lost. Allow it with {flags}, or take the link away"
        )
    if listed.unreadable:
        folder, reason = next(iter(listed.unreadable.items()))
        more = f" (and {len(listed.unreadable) - 1} more)" if len(listed.unreadable) > 1 else ""
        raise JobRefused(
            f"{clean_text(folder)}{more}: this folder cannot be read ({reason}), and the files there would "
            "be lost. Make it readable, take it away, or name what is wanted by a pattern in quotes"
        )


def _listing(listed: list_folders.Listed, target: _Target) -> Listing:
    there = listed.found
    bad = {one.path for one in there if not one.path.isprintable() and is_no_utf8(one.path)}

    def uri(path: str) -> str:
        return target.uri + path.removeprefix(target.path)

    return Listing(
        entries=tuple(_entries([one for one in there if one.path not in bad], target.path, target.uri)),
        links={uri(path): real for path, real in listed.links.items() if path not in bad},
        odd=tuple(uri(path) for path in listed.odd if path not in bad),
        unnameable=tuple(sorted(clean_text(path) for path in bad)),
        notes=tuple(listed.notes(clean_text(target.uri.rstrip("/")))),
    )


def is_no_utf8(path: str) -> bool:
    """Return whether a local name is bytes that are not UTF-8, as Python spells them."""
    return any("\ud800" <= c <= "\udfff" for c in path)


def what_is(path: str) -> str:
    """Return in words what a local path is that is no file."""
    try:
        check_regular(os.stat(path).st_mode)
    except ImageError as error:
        return error.message
    except OSError as error:
        return f"there is no such file ({error.strerror})"
    return "a file"


def open_input(uri: str, options: Mapping[str, Any], *, block: int = BLOCK) -> BinaryIO:
    """A seekable binary file over one object, read in blocks; JobRefused when it is absent or refused.

    For tables, box files and weights: streams of any size in bounded memory. `block`: what one read asks for.
    """
    target = _Target(uri=uri, options=options)
    found = _for_input(uri, "look up", lambda left: target.backend.stat(target.path, timeout_s=left))
    if found is None:
        raise JobRefused(f"{uri}: {what_is(target.path) if target.is_there else 'there is no such file'}")

    def read_range(start: int, stop: int) -> bytes:
        return _for_input(
            uri, "read", lambda left: target.backend.get_range(target.path, start, stop, timeout_s=left)
        )

    return blockwise(read_range, found.size, block=block)


LABEL_SUFFIXES = (".txt", ".yaml", ".yml")


def _folder_fingerprint(uri: str, options: Mapping[str, Any], roots: Sequence[str]) -> dict[str, str | int]:
    """One figure for a folder of many small files: names, and what `fingerprint` says of each."""
    listing = list_inputs(uri, options, roots=roots)
    entries = [one for one in listing.entries if one.key.lower().endswith(LABEL_SUFFIXES)]
    with ThreadPoolExecutor(FINGERPRINT_THREADS) as pool:
        found = list(pool.map(lambda one: _version(one, options), entries))
    digest = hashlib.sha256()
    for entry, version in zip(entries, found, strict=True):
        digest.update(f"{entry.key.removeprefix(uri)}\0{version}\n".encode())
    return {"uri": uri, "files": len(entries), "sha256": digest.hexdigest()}


def _version(entry: Entry, options: Mapping[str, Any]) -> str | int:
    if entry.etag is not None and split_scheme(entry.key)[0] != "file":
        return entry.etag
    return fingerprint(entry.key, options)["sha256"]


def fingerprint(uri: str, options: Mapping[str, Any], *, roots: Sequence[str] = ()) -> dict[str, str | int]:
    """What tells one version of an input file from another: uri, size and sha256, or the store's etag.

    Local files are hashed, because a copy or a checkout changes their times; remote ones have etags. A folder
    (its uri ends in "/") stands for all label files in it; `roots`: where links of it may lead.
    """
    if uri.endswith("/"):
        return _folder_fingerprint(uri, options, roots)
    entry = head_object(uri, options)
    if entry is None:
        raise JobRefused(f"{uri}: there is no such file")
    if entry.etag is not None and split_scheme(uri)[0] != "file":
        return {"uri": uri, "size": entry.size, "etag": entry.etag}
    digest = hashlib.sha256()
    with open_input(uri, options) as file:
        while chunk := file.read(BLOCK):
            digest.update(chunk)
    return {"uri": uri, "size": entry.size, "sha256": digest.hexdigest()}
