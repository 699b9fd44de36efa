"""Files on a local disk (or a mounted one): whole, synced, and created once by a hard link."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from hqlabel.pipeline.errors import ImageError, UsageError
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.storage.backend import (
    CHUNK,
    Entry,
    FetchedObject,
    FolderListing,
    check_version,
    local_tag,
    too_many_bytes,
)
from hqlabel.pipeline.storage.uri_rules import check_regular

STALE_TEMPORARY_S = 3600.0
LOCK_PAUSE_S = 0.01


class LocalBackend:
    """Files under absolute paths. Commits survive a power cut: file and folder are synced."""

    def get(self, path: str, *, max_bytes: int | None, timeout_s: float) -> FetchedObject:
        """Return the file's bytes; ImageError `changed` when it was written to meanwhile."""
        deadline = time.monotonic() + timeout_s
        with _opened(path) as (descriptor, before):
            too_many_bytes(before.st_size, max_bytes)
            data = _read_within(lambda size: os.read(descriptor, size), deadline, max_bytes)
            after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ImageError("changed", "the file was written to while it was read")
        return FetchedObject(data=data, size=len(data), etag=local_tag(after))

    def get_range(
        self, path: str, start: int, stop: int, *, timeout_s: float, version: str | None = None
    ) -> bytes:
        """Return bytes start..stop (end-exclusive) of `version`; fewer at the end of the file."""
        del timeout_s
        with _opened(path) as (descriptor, before):
            check_version(local_tag(before), version)
            data = b""
            if start < before.st_size:  # seeking far past it is an error of the system
                os.lseek(descriptor, start, os.SEEK_SET)
                data = _read_up_to(descriptor, min(stop, before.st_size) - start)
            check_version(local_tag(os.fstat(descriptor)), version)
        return data

    def stat(self, path: str, *, timeout_s: float) -> Entry | None:
        """Return size and tag of a regular file; None when there is none."""
        del timeout_s
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Entry(key=path, size=status.st_size, etag=local_tag(status))

    def create(self, path: str, data: bytes, *, timeout_s: float) -> None:
        """Create the file, whole and synced, or raise FileExistsError: a hard link decides who was first."""
        del timeout_s
        with self._synced_temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if os.stat(temporary).st_nlink < 2:  # over NFS the reply of our own link may be lost
                    raise
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise UsageError(
                        f"{os.path.dirname(path)}: this file system has no hard links, so two drivers could "
                        "overwrite each other's commits; choose an output folder on another one"
                    ) from error
                raise

    def replace(self, path: str, data: bytes, *, timeout_s: float) -> None:
        """Write the file anew, whole and synced; readers see the old or the new, nothing between."""
        del timeout_s
        with self._synced_temporary(path, data) as temporary:
            os.replace(temporary, path)

    def replace_if(self, path: str, data: bytes, seen: Entry, *, timeout_s: float) -> None:
        """Write the file anew unless it is no longer the one `seen`: FileExistsError, FileNotFoundError.

        Compared and replaced under a lock on the file that is there. Whoever waited for the lock holds that
        of a file without a name by then, and finds another one under the name.
        """
        deadline = time.monotonic() + timeout_s
        with _open_to_lock(path) as there, self._synced_temporary(path, data) as temporary:
            _lock_within(there.fileno(), deadline)
            held, now = os.fstat(there.fileno()), os.stat(path)
            if not os.path.samestat(held, now) or (now.st_size, local_tag(now)) != (seen.size, seen.etag):
                raise FileExistsError(errno.EEXIST, "another version is there", path)
            os.replace(temporary, path)

    @contextlib.contextmanager
    def _synced_temporary(self, path: str, data: bytes) -> Iterator[str]:
        folder, name = os.path.split(path)
        _make_folders(folder)
        temporary = os.path.join(folder, f".{name[:50]}.{os.getpid()}-{secrets.token_hex(6)}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                visit("disk.written")
                os.fsync(descriptor)
            visit("disk.synced")
            yield temporary
            visit("disk.named")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_folder(folder)

    def walk(self, prefix: str) -> FolderListing:
        """List all files but temporary ones whose path begins with `prefix`; links to folders are files."""
        folder = prefix if prefix.endswith("/") else os.path.dirname(prefix)
        return FolderListing(folder.rstrip("/") or "/", prefix, _list_folder)

    def delete(self, paths: Sequence[str], *, timeout_s: float) -> None:
        """Delete files; one that is already gone is no error."""
        del timeout_s
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            visit("disk.deleting")

    def abort_stale(self, prefix: str, *, timeout_s: float) -> int:
        """Remove temporary files of dead writers (untouched for an hour); return how many."""
        del timeout_s
        removed = 0
        for folder, _, names in os.walk(prefix):
            for name in filter(_is_temporary, names):
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - os.stat(path).st_mtime > STALE_TEMPORARY_S:
                        os.unlink(path)
                        removed += 1
        return removed


def _open_to_lock(path: str) -> BinaryIO:
    """Return the file, open for writing if it may be written: over NFS only such files can be locked."""
    try:
        return open(path, "r+b")
    except PermissionError:
        return open(path, "rb")


def _lock_within(descriptor: int, deadline: float) -> None:
    """Lock an open file against other writers, on this machine alone where its file system has no more."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("another process holds the file's lock") from None
            time.sleep(LOCK_PAUSE_S)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                return  # compared all the same: what remains is the moment between that and the renaming
            raise


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Yield the descriptor of a regular file, and its status; ImageError `uri_refused` for what is none."""
    # Non-blocking, because opening a named pipe would wait for ever for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        check_regular(status.st_mode)
        yield descriptor, status
    finally:
        os.close(descriptor)


def _read_up_to(descriptor: int, size: int) -> bytes:
    chunks: list[bytes] = []
    while size > 0 and (chunk := os.read(descriptor, size)):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _read_within(read: Callable[[int], bytes], deadline: float, max_bytes: int | None) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := read(CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        too_many_bytes(size, max_bytes)
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {size} bytes within the deadline")
    return b"".join(chunks)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _make_folders(folder: str) -> None:
    """Make the folder and its parents; each new one is synced into its parent, or a power cut loses it."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folders(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list_folder(folder: str, _timeout_s: float) -> tuple[list[Entry], list[str]]:
    files: list[Entry] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not _is_temporary(entry.name):
                    files += _listed(entry)
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    return files, folders


def _listed(entry: os.DirEntry[str]) -> list[Entry]:
    """Return the file as it is listed; nothing when it is gone by now."""
    try:
        status = entry.stat()
    except OSError as error:
        if entry.is_symlink():  # dangling, or a circle: listed, so that its reader can report what is wrong
            return [Entry(key=entry.path, size=0)]
        if isinstance(error, FileNotFoundError):
            return []
        raise
    return [Entry(key=entry.path, size=status.st_size, etag=local_tag(status))]
