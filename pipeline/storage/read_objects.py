"""Images, tables, box files and weights, read by uri: what users name, as against the job's own store.

An image's fault is that image's (`ImageError`), unless it is one that every request would meet (credentials,
clock, no bucket: `SystemicFault`). A fault of a file that the whole job needs refuses the job before any
work.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, BinaryIO, TypeVar

from hqlabel.pipeline.errors import (
    ImageError,
    JobRefused,
    SystemicFault,
    UsageError,
    clean_text,
    count,
)
from hqlabel.pipeline.storage import list_folders
from hqlabel.pipeline.storage.backend import Backend, Each, Entry, FetchedObject, pages
from hqlabel.pipeline.storage.cloud_buckets import backend_for
from hqlabel.pipeline.storage.request_retries import StorageFault, describe, is_silence, with_retries
from hqlabel.pipeline.storage.uri_rules import check_regular, split_scheme

T = TypeVar("T")

INPUT_BUDGET_S = 120.0
READ_TRIES = 8
LOOK_UP_S = 20.0
FINGERPRINT_THREADS = 16
BLOCK = 4 * 2**20
FIRST_RANGE, LARGEST_RANGE = 2**20, 64 * 2**20
SLOW_RANGE_S = 0.5


class _BlockReader(io.RawIOBase):
    """A read-only file over a function that reads ranges, each with tries and a time of its own.

    What is larger than a range is read in several, so that a slow link only takes longer. Ranges grow while
    they come quickly, for their requests cost a fast link time.
    """

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range = read_range
        self._size = size
        self._at = 0
        self._range = FIRST_RANGE

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
        whole = io.BytesIO()  # grows in place and gives its bytes away uncopied: there is one copy of weights
        while data := self._read_on(self._size):
            whole.write(data)
        return whole.getvalue()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._read_on(self._at + len(view))
        view[: len(data)] = data
        return len(data)

    def _read_on(self, stop: int) -> bytes:
        stop = min(stop, self._size, self._at + self._range)
        if stop <= self._at:
            return b""
        began = time.monotonic()
        data = self._read_range(self._at, stop)
        self._at += len(data)
        if time.monotonic() - began > SLOW_RANGE_S:
            self._range = max(self._range // 2, FIRST_RANGE)
        elif len(data) == self._range:
            self._range = min(self._range * 2, LARGEST_RANGE)
        return data


def blockwise(read_range: Callable[[int, int], bytes], size: int, *, block: int = BLOCK) -> BinaryIO:
    """Return a seekable file of `size` bytes, read in blocks by a function that reads ranges."""
    return io.BufferedReader(_BlockReader(read_range, size), buffer_size=block)


@dataclass(frozen=True, kw_only=True)
class ObjectUri:
    """What a uri points at. The backend is made inside a try, because that can fail for what passes.

    A local path is opened as it is written: to fold `link/..` away would open another file than the
    one `check_uri` has checked.
    """

    uri: str
    options: Mapping[str, Any]

    @property
    def backend(self) -> Backend:
        """The kind of store that the uri's scheme names."""
        return backend_for(split_scheme(self.uri)[0], self.options)

    @property
    def path(self) -> str:
        """The object's path as the backend takes it."""
        scheme, rest = split_scheme(self.uri)
        return self.uri if scheme in ("http", "https") else rest


def read_object(
    uri: str, options: Mapping[str, Any], *, max_bytes: int | None, deadline_monotonic: float
) -> FetchedObject:
    """Return the bytes of one object with size and version tag; `check_uri` has already passed it.

    Raises:
        ImageError: not_found, denied, too_many_bytes, changed, unreachable, fetch_timeout, uri_refused.
        SystemicFault: credentials, clock, store (no such bucket), disk.
    """
    source = ObjectUri(uri=uri, options=options)

    def get(left: float) -> FetchedObject:
        return source.backend.get(source.path, max_bytes=max_bytes, timeout_s=left)

    return call_for_image("read", get, deadline_monotonic)


def call_for_image(what: str, call: Callable[[float], T], deadline: float) -> T:
    """Return `call(seconds_left)`, tried again; raise what its fault means in reading one image."""
    try:
        return with_retries(call, deadline=deadline, what=what, max_tries=READ_TRIES)
    except StorageFault as fault:
        verdict = fault.verdict
        if verdict.kind == "image":
            raise ImageError(verdict.code, fault.message) from fault
        if verdict.kind == "retry":
            raise ImageError("fetch_timeout" if fault.timed_out else "unreachable", fault.message) from fault
        if verdict.code == "denied":  # one object may be forbidden; the job judges a window of them
            raise ImageError("denied", fault.message) from fault
        raise SystemicFault(verdict.code, fault.message) from fault


def _call_for_input(uri: str, what: str, call: Callable[[float], T]) -> T:
    """Return `call(seconds_left)` for a file that the whole job needs: a fault refuses the job."""
    try:
        return with_retries(call, deadline=time.monotonic() + INPUT_BUDGET_S, what=f"{what} {uri}")
    except StorageFault as fault:
        raise JobRefused(fault.message) from fault
    except ImageError as error:
        raise JobRefused(f"{what} {uri}: {error.message}") from error


def ask_store(uri: str, options: Mapping[str, Any], *, within_s: float) -> str | None:
    """Return None when the store of `uri` answers a look-up in whatever words, else how it failed to.

    An error status is an answer; what it means is said where the store is used.
    """
    source = ObjectUri(uri=uri, options=options)
    try:
        with_retries(
            lambda left: source.backend.stat(source.path, timeout_s=left),
            deadline=time.monotonic() + within_s,
            what="look up",
        )
    except StorageFault as fault:
        error = fault.__cause__
        if fault.verdict.kind == "retry" and error is not None and is_silence(error):
            return describe(error)
    except Exception:  # a wrong uri, a missing package: the first real use says which
        return None
    return None


def head_object(uri: str, options: Mapping[str, Any]) -> Entry | None:
    """Return size and version tag of one object (`key` is the uri), or None when there is none."""
    source = ObjectUri(uri=uri, options=options)
    entry = _call_for_input(uri, "look up", lambda left: source.backend.stat(source.path, timeout_s=left))
    if entry is None:
        return None
    note_version(uri, entry.etag)
    return replace(entry, key=uri)


_first_tags: ContextVar[dict[str, str | None] | None] = ContextVar("first_tags", default=None)


@contextlib.contextmanager
def one_version_each() -> Iterator[None]:
    """Refuse, within the block, an input file that is opened again as another version than the first time.

    A plan opens its tables several times (columns, rows, fingerprint) and must be of one version of each.
    """
    token = _first_tags.set({})
    try:
        yield
    finally:
        _first_tags.reset(token)


def note_version(uri: str, tag: str | None) -> None:
    """Take note of a file's version; JobRefused where `one_version_each` has seen another one of it."""
    tags = _first_tags.get()
    first = tag if tags is None else tags.setdefault(uri, tag)
    if first != tag:
        raise JobRefused(
            f"{uri}: it was replaced or written to while it was read (it was {first}, now {tag}); start "
            "again when nothing writes to it"
        )


def in_this_context(call: Callable[..., T]) -> Callable[..., T]:
    """Return a function for other threads that calls `call` under this thread's `one_version_each`."""
    context = copy_context()
    return lambda *args: context.copy().run(call, *args)


def planned_versions(uris: Sequence[str], options_of: Callable[[str], Mapping[str, Any]]) -> list[str | None]:
    """Return the version tag of each file, as it was read within `one_version_each`, or as it is now.

    None for what cannot be looked up: its images fail when they are read, or are compared by name alone.
    """
    seen = _first_tags.get() or {}

    def tag_of(uri: str) -> str | None:
        if uri in seen:
            return seen[uri]
        source, deadline = ObjectUri(uri=uri, options=options_of(uri)), time.monotonic() + LOOK_UP_S
        try:
            entry = call_for_image(
                "look up", lambda left: source.backend.stat(source.path, timeout_s=left), deadline
            )
        except Exception:  # whatever a client makes of the uri; its images say so when they are read
            return None
        return None if entry is None else entry.etag

    with ThreadPoolExecutor(FINGERPRINT_THREADS) as pool:
        return list(pool.map(tag_of, uris))


def list_objects(uri: str, options: Mapping[str, Any]) -> list[Entry]:
    """Return every object below a folder or prefix, at any depth, hidden ones too, sorted by uri (the `key`).

    For the folder of a program, such as a checkpoint; what a user names is listed by `list_inputs`.
    """
    source = _folder(uri, options)
    return _entries(_walked(source, partial(_call_for_input, uri, "list")), source)


def _walked(source: ObjectUri, each: Each[Any]) -> list[Entry]:
    listing = pages(lambda: source.backend.walk(source.path), each)
    return [entry for page in listing for entry in page]


def _folder(uri: str, options: Mapping[str, Any]) -> ObjectUri:
    if not uri.strip("/") and uri != "/":
        raise UsageError(f"{uri!r} names no folder")
    return ObjectUri(uri=uri.rstrip("/") + "/", options=options)


def _entries(found: Sequence[Entry], source: ObjectUri) -> list[Entry]:
    entries = [
        replace(one, key=source.uri + one.key.removeprefix(source.path))
        for one in found
        if not one.key.endswith("/")  # the empty objects that S3 consoles make for folders
    ]
    entries.sort(key=lambda entry: entry.key)
    twice = next((one.key for one, other in pairwise(entries) if one.key == other.key), None)
    if twice is not None:
        raise JobRefused(f"list {source.uri}: {twice} came twice; start again when nobody writes there")
    return entries


def list_inputs(
    uri: str, options: Mapping[str, Any], *, roots: Sequence[str] = (), pattern: str | None = None
) -> list_folders.Listed:
    """List what is meant of a folder or prefix by uri, at any depth; `list_folders` has the rules.

    Args:
        uri: The folder or prefix.
        options: Of the store.
        roots: Local folders, links resolved, that links may lead to as well as to `uri` itself.
        pattern: A pattern of names below `uri`, or None for all of them.

    Raises:
        JobRefused: The place cannot be listed, or a part of it whose content would be lost: a folder that is
            closed, or one that a link leads to outside `roots`.
    """
    source = _folder(uri, options)
    names = None if pattern is None else list_folders.Pattern(pattern)

    each: Each[Any] = partial(_call_for_input, uri, "list")
    if split_scheme(uri)[0] == "file":
        listed = list_folders.walk(source.path, (*roots, os.path.realpath(source.path)), names, each)
    else:
        listed = list_folders.visible_of(_walked(source, each), source.path, names)
    _refuse_lost(listed)
    unnameable = {one.key for one in listed.entries if not one.key.isprintable() and is_no_utf8(one.key)}

    def uri_of(path: str) -> str:
        return source.uri + path.removeprefix(source.path)

    return replace(
        listed,
        entries=_entries([one for one in listed.entries if one.key not in unnameable], source),
        links={uri_of(path): real for path, real in listed.links.items() if path not in unnameable},
        odd=[uri_of(path) for path in listed.odd if path not in unnameable],
        unnameable=sorted(clean_text(path) for path in unnameable),
        notes=listed.sentences(clean_text(source.uri.rstrip("/"))),
    )


def _refuse_lost(listed: list_folders.Listed) -> None:
    """Raise JobRefused for folders whose content is not known."""
    if listed.leading_out:
        link, real = next(iter(listed.leading_out.items()))
        others = len(listed.leading_out) - 1
        more = f", one of {count(others + 1, 'linked folder')}" if others else ""
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


def is_no_utf8(path: str) -> bool:
    """Return whether a local name is bytes that are not UTF-8, as Python spells them."""
    return any("\ud800" <= c <= "\udfff" for c in path)


def what_is(path: str) -> str:
    """Return what a local path is that is no file, as text."""
    try:
        check_regular(os.stat(path).st_mode)
    except ImageError as error:
        return error.message
    except OSError as error:
        return f"there is no such file ({error.strerror})"
    return "a file"


def open_input(uri: str, options: Mapping[str, Any], *, block: int = BLOCK) -> BinaryIO:
    """Return a seekable binary file over one object, read in blocks; JobRefused when it is absent or refused.

    For tables, box files and weights: streams of any size in bounded memory. `block`: bytes of one read. All
    blocks are of the version that was opened; JobRefused when the object changes in between.
    """
    source = ObjectUri(uri=uri, options=options)
    entry = head_object(uri, options)
    if entry is None:
        is_there = split_scheme(uri)[0] == "file" and os.path.lexists(source.path)
        raise JobRefused(f"{uri}: {what_is(source.path) if is_there else 'there is no such file'}")

    def read_range(start: int, stop: int) -> bytes:
        data = _call_for_input(
            uri,
            "read",
            lambda left: source.backend.get_range(
                source.path, start, stop, timeout_s=left, version=entry.etag
            ),
        )
        if len(data) != stop - start:
            raise JobRefused(f"read {uri}: {len(data)} bytes came of {stop - start} from byte {start} on")
        return data

    return blockwise(read_range, entry.size, block=block)


LABEL_SUFFIXES = (".txt", ".yaml", ".yml")


def _folder_fingerprint(uri: str, options: Mapping[str, Any], roots: Sequence[str]) -> dict[str, str | int]:
    """Return one sha256 for a folder of many small files: over their names and versions."""
    listing = list_inputs(uri, options, roots=roots)
    entries = [one for one in listing.entries if one.key.lower().endswith(LABEL_SUFFIXES)]
    with ThreadPoolExecutor(FINGERPRINT_THREADS) as pool:
        found = list(pool.map(in_this_context(lambda one: _version(one, options)), entries))
    digest = hashlib.sha256()
    for entry, version in zip(entries, found, strict=True):
        digest.update(f"{entry.key.removeprefix(uri)}\0{version}\n".encode())
    return {"uri": uri, "files": len(entries), "sha256": digest.hexdigest()}


def _version(entry: Entry, options: Mapping[str, Any]) -> str | int:
    if entry.etag is not None and split_scheme(entry.key)[0] != "file":
        note_version(entry.key, entry.etag)
        return entry.etag
    return fingerprint(entry.key, options)["sha256"]


def fingerprint(uri: str, options: Mapping[str, Any], *, roots: Sequence[str] = ()) -> dict[str, str | int]:
    """Return what distinguishes versions of an input file: uri, size and sha256, or the store's etag.

    Local files are hashed, because a copy or a checkout changes their times; remote ones have etags. A folder
    (its uri ends in "/") means all label files in it; `roots`: where its links may lead.
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
