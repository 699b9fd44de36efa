"""Object stores behind fsspec, and `backend_for`: the one place that picks a backend by scheme.

fsspec's event loop does not survive a fork, so backends are made once per process and never pickled.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.spec import AbstractFileSystem

from hqlabel.pipeline.errors import ImageError, SystemicFault, UsageError
from hqlabel.pipeline.storage.backend import (
    ODD_TAG,
    Backend,
    Entry,
    FetchedObject,
    FolderListing,
    Listing,
    check_complete,
    check_range,
    check_version,
    drain,
    plain_tag,
    too_many_bytes,
)
from hqlabel.pipeline.storage.http_backend import HttpBackend
from hqlabel.pipeline.storage.local_disk import LocalBackend

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}
_ONE_PUT = 5 * 2**30  # S3's largest single PUT


def backend_for(scheme: str, options: Mapping[str, Any]) -> Backend:
    """Return the backend of a scheme with these fsspec options: one a process, made at first use."""
    name = (scheme, json.dumps(options, sort_keys=True, default=str))
    backend = _backends.get(name)
    if backend is None:
        with _making:  # many threads come at once, and each client more would keep its own connections
            backend = _backends.get(name) or _backends.setdefault(name, _make_backend(*name))
    return backend


_backends: dict[tuple[str, str], Backend] = {}
_making = threading.Lock()


def forget_backends() -> None:
    """Make the next call create new clients. Also run in every forked child, whose loop is dead."""
    global _making
    _making = threading.Lock()
    _backends.clear()


os.register_at_fork(after_in_child=forget_backends)


def _make_backend(scheme: str, options_json: str) -> Backend:
    options = json.loads(options_json)
    if scheme == "file":
        return LocalBackend()
    try:
        if scheme in ("s3", "s3a"):
            return S3Backend(options)
        if scheme == "memory":
            return MemoryBackend(fsspec.filesystem("memory"))
        if scheme in ("http", "https"):
            return HttpBackend(options)
        fs = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except TypeError as error:  # an option that the driver does not take
        raise UsageError(f"storage.{scheme}: its driver does not take an option of these ({error})") from None
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        hint = f"install it: pip install 'hqlabel[{extra}]'" if extra else "install its fsspec driver"
        raise UsageError(f"no driver for {scheme}:// uris here ({error}); {hint}") from None
    return HubBackend(fs) if scheme == "hf" else FsspecBackend(fs)


class FsspecBackend:
    """Any fsspec file system with an exclusive create (`mode="create"`): gs, az, abfs; hf for reading."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def _call(self, name: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Return one method of the file system, cut off after `timeout_s` where it is an asynchronous one."""
        if isinstance(self._fs, AsyncFileSystem):
            return sync(self._fs.loop, getattr(self._fs, f"_{name}"), *args, timeout=timeout_s, **kwargs)
        return getattr(self._fs, name)(*args, **kwargs)

    def get(self, path: str, *, max_bytes: int | None, timeout_s: float) -> FetchedObject:
        """Return the object's bytes; size and tag are requested before and after, so three requests."""
        found = self.stat(path, timeout_s=timeout_s)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", path)
        too_many_bytes(found.size, max_bytes)
        data = self.get_range(path, 0, found.size, timeout_s=timeout_s, version=found.etag)
        check_complete(data, found.size)
        return FetchedObject(data=data, size=len(data), etag=found.etag)

    def get_range(
        self, path: str, start: int, stop: int, *, timeout_s: float, version: str | None = None
    ) -> bytes:
        """Return bytes start..stop (end-exclusive) of `version`.

        These drivers cannot request a version, so what is there is looked up after the read: it was the same
        before, when the version was found.
        """
        data: bytes = b""
        if stop > start:
            data = self._call("cat_file", path, start=start, end=stop, timeout_s=timeout_s)
        if len(data) > stop - start:
            raise ImageError("unreachable", f"{len(data)} bytes came for a range of {stop - start}")
        if version is not None:
            there = self.stat(path, timeout_s=timeout_s)
            check_version(None if there is None else there.etag, version)
        return data

    def stat(self, path: str, *, timeout_s: float) -> Entry | None:
        """Return size and tag of an object; None when there is none."""
        try:
            info = self._call("info", path, timeout_s=timeout_s)
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else _found(info)

    def create(self, path: str, data: bytes, *, timeout_s: float) -> None:
        """Create the object whole, or raise FileExistsError."""
        self._call("pipe_file", path, data, mode="create", timeout_s=timeout_s)

    def replace(self, path: str, data: bytes, *, timeout_s: float) -> None:
        """Write the object with new bytes, whole."""
        self._call("pipe_file", path, data, timeout_s=timeout_s)

    def replace_if(self, path: str, data: bytes, seen: Entry, *, timeout_s: float) -> None:
        """Write the object anew unless it is no longer the one `seen`: FileExistsError.

        These drivers have no condition for it, so a moment remains between the comparison and the write.
        """
        there = self.stat(path, timeout_s=timeout_s)
        if there is None or (there.size, there.etag) != (seen.size, seen.etag):
            raise FileExistsError(errno.EEXIST, "another version is there", path)
        self.replace(path, data, timeout_s=timeout_s)

    def walk(self, prefix: str) -> Listing:
        """List folder by folder; or all at once by drivers that do so, with tries of their own for each page.

        fsspec's own walk passes over a folder that cannot be listed, in silence.
        """
        driver = type(self._fs)
        by_folder = (
            driver._find is AsyncFileSystem._find
            if issubclass(driver, AsyncFileSystem)
            else driver.find is AbstractFileSystem.find
        )
        return FolderListing(
            prefix.rpartition("/")[0], prefix, self._list_folder if by_folder else self._find
        )

    def _list_folder(self, folder: str, timeout_s: float) -> tuple[list[Entry], list[str]]:
        try:
            infos = self._call("ls", folder, detail=True, timeout_s=timeout_s)
        except FileNotFoundError:
            return [], []
        folders = [str(info["name"]).strip("/") for info in infos if info["type"] == "directory"]
        files = [_found(info) for info in infos if info["type"] != "directory"]
        return files, [one for one in folders if one != folder.strip("/")]

    def _find(self, folder: str, timeout_s: float) -> tuple[list[Entry], list[str]]:
        allowed_s = max(timeout_s, _WHOLE_LISTING_S)
        infos = self._call("find", folder, detail=True, timeout_s=allowed_s).values()
        return [_found(info) for info in infos if info["type"] != "directory"], []

    def delete(self, paths: Sequence[str], *, timeout_s: float) -> None:
        """Delete objects; one that is already gone is no error."""
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self._call("rm_file", path, timeout_s=timeout_s)

    def abort_stale(self, prefix: str, *, timeout_s: float) -> int:
        """Return 0: these stores drop unfinished uploads by themselves."""
        del prefix, timeout_s
        return 0


class HubBackend(FsspecBackend):
    """Hugging Face's hub."""

    def walk(self, prefix: str) -> Listing:
        """List the tree of a repository, 1,000 files and folders a request."""
        return _HubListing(self._fs, prefix)


class _HubListing:
    """The hub's pages, each of which links to the next; its own client begins anew after a fault."""

    def __init__(self, fs: Any, prefix: str) -> None:
        folder = prefix.rpartition("/")[0]
        place = fs.resolve_path(folder)
        below = f"/{quote(place.path_in_repo, safe='')}" if place.path_in_repo else ""
        self._api = fs._api
        self._prefix = prefix
        self._root = folder.removesuffix(place.path_in_repo).rstrip("/")
        self._next: str | None = (
            f"{self._api.endpoint}/api/{place.repo_type}s/{place.repo_id}/tree/"
            f"{quote(place.revision, safe='')}{below}?recursive=true&expand=false"
        )
        self._progress = _ListingProgress(f"hf://{self._root}")
        self.done = False

    def page(self, *, timeout_s: float) -> list[Entry]:
        """Return the files of one page more."""
        import huggingface_hub.utils  # here, because it takes 0.3 s

        client: Any = huggingface_hub.utils
        answer = client.http_backoff(
            "GET",
            self._next,
            headers=client.build_hf_headers(token=self._api.token),
            timeout=min(timeout_s, _HUB_REQUEST_S),
            max_retries=1,  # after as long as the hub's limit of requests says, which is known here alone
        )
        client.hf_raise_for_status(answer)
        tree = answer.json()
        following = answer.links.get("next", {}).get("url")
        self._next = self._progress.token_after([one["path"] for one in tree], following)
        self.done = self._next is None
        named = ((f"{self._root}/{one['path']}", one) for one in tree if one["type"] == "file")
        return [
            _found({"name": name, "size": one["size"], "blob_id": one["oid"]})
            for name, one in named
            if name.startswith(self._prefix)
        ]


def _found(info: Mapping[str, Any]) -> Entry:
    tag = next(
        (info[k] for k in ("ETag", "etag", "md5Hash", "blob_id", "created", "mtime") if info.get(k)), None
    )
    if isinstance(tag, dt.datetime):  # fsspec's memory gives a number in a listing, and this elsewhere
        tag = tag.timestamp()
    size = int(info.get("size") or 0)
    text = f"size-{size}" if tag is None else plain_tag(str(tag).strip('"'))
    return Entry(key=str(info["name"]).lstrip("/"), size=size, etag=text)


_MEMORY_LOCK = threading.RLock()  # one global store, whose files share their read position


class MemoryBackend(FsspecBackend):
    """fsspec's in-memory store, made safe for threads; for tests of the protocol only."""

    def _call(self, name: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        with _MEMORY_LOCK:
            return super()._call(name, *args, timeout_s=timeout_s, **kwargs)

    def replace_if(self, path: str, data: bytes, seen: Entry, *, timeout_s: float) -> None:
        """Compare and write in one step."""
        with _MEMORY_LOCK:
            super().replace_if(path, data, seen, timeout_s=timeout_s)


class S3Backend:
    """S3 and its likes. s3fs makes the client; the requests are spelled out, one for each promise.

    Retries of s3fs (5) and botocore (4) are off: `request_retries.with_retries` is the only loop (but for
    aiohttp, which repeats an idempotent request once when a kept connection turns out to be closed).
    """

    page_size = 1000

    def __init__(self, options: Mapping[str, Any]) -> None:
        config = {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            **options.get("config_kwargs", {}),
        }
        from hqlabel.pipeline.storage.s3_session import BoundedSession  # needs the extra, as s3fs does

        merged = {**options, "config_kwargs": {**config, "http_session_cls": BoundedSession}}
        self._fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, **merged)
        self._fs.retries = 1
        # Now, or the first requests of many threads would each make a client of their own.
        self._fs.connect()

    def _call(self, method: str, path: str, *, timeout_s: float, **kwargs: Any) -> Any:
        bucket, _, key = path.partition("/")
        return sync(self._fs.loop, self._request, method, bucket, key, timeout=timeout_s, **kwargs)

    async def _request(self, method: str, bucket: str, key: str, **kwargs: Any) -> Any:
        named = {"Key": key} if key else {}
        return await self._fs._call_s3(method, Bucket=bucket, **named, **kwargs)

    def get(self, path: str, *, max_bytes: int | None, timeout_s: float) -> FetchedObject:
        """Return one GET: its headers give size and tag of these very bytes, before the body is read.

        botocore compares the body with the stored checksum; a flipped byte raises.
        """
        bucket, _, key = path.partition("/")
        return sync(self._fs.loop, self._get, bucket, key, max_bytes, timeout=timeout_s)  # type: ignore[no-any-return]

    async def _get(self, bucket: str, key: str, max_bytes: int | None, **kwargs: Any) -> FetchedObject:
        response = await self._request("get_object", bucket, key, **kwargs)
        body = response["Body"]
        try:
            announced = response.get("ContentLength")
            too_many_bytes(announced, max_bytes)
            data = await drain(body.read, max_bytes)
        finally:
            body.close()
        check_complete(data, announced)
        return FetchedObject(data=data, size=len(data), etag=_s3_tag(response))

    def get_range(
        self, path: str, start: int, stop: int, *, timeout_s: float, version: str | None = None
    ) -> bytes:
        """Return bytes start..stop (end-exclusive) of `version`, by one request with `If-Match`.

        No checksum covers a range: Parquet's page sums do.
        """
        bucket, _, key = path.partition("/")
        try:
            return sync(  # type: ignore[no-any-return]
                self._fs.loop, self._range, bucket, key, start, stop, version, timeout=timeout_s
            )
        except OSError as error:
            if _http_status(error) == 412:
                check_version("another", version)
            if _http_status(error) == 416:  # the object ends before
                return b""
            raise

    async def _range(self, bucket: str, key: str, start: int, stop: int, version: str | None) -> bytes:
        has_tag = version is not None and not version.startswith(ODD_TAG)
        match = {"IfMatch": f'"{version}"'} if has_tag else {}
        span = f"bytes={start}-{stop - 1}"
        response = await self._request("get_object", bucket, key, Range=span, **match)
        body, announced = response["Body"], response.get("ContentLength")
        try:
            check_version(_s3_tag(response) or version, version)  # some stores state none next to a range
            check_range(response.get("ContentRange"), announced, start, stop)
            data = await drain(body.read, stop - start)
        finally:
            body.close()
        check_complete(data, announced)
        return data

    def stat(self, path: str, *, timeout_s: float) -> Entry | None:
        """Return size and tag by HEAD; None when there is no object (or no bucket: HEAD cannot tell)."""
        try:
            head = self._call("head_object", path, timeout_s=timeout_s)
        except FileNotFoundError:
            return None
        return Entry(key=path, size=head["ContentLength"], etag=_s3_tag(head))

    def create(self, path: str, data: bytes, *, timeout_s: float) -> None:
        """Create with one PUT with `If-None-Match: *`; FileExistsError on 412."""
        _check_one_put(data)
        self._put_under_condition(path, data, timeout_s, IfNoneMatch="*")

    def replace_if(self, path: str, data: bytes, seen: Entry, *, timeout_s: float) -> None:
        """Write with one PUT with `If-Match`; FileExistsError on 412."""
        _check_one_put(data)
        self._put_under_condition(path, data, timeout_s, IfMatch=f'"{seen.etag}"')

    def _put_under_condition(self, path: str, data: bytes, timeout_s: float, **condition: str) -> None:
        try:
            self._call("put_object", path, Body=data, timeout_s=timeout_s, **condition)
        except FileExistsError:
            raise
        except OSError as error:  # stores that leave <Condition> out of the 412
            if _http_status(error) == 412:
                raise FileExistsError(errno.EEXIST, "the condition does not hold", path) from error
            raise

    def replace(self, path: str, data: bytes, *, timeout_s: float) -> None:
        """Write with one PUT."""
        _check_one_put(data)
        self._call("put_object", path, Body=data, timeout_s=timeout_s)

    def walk(self, prefix: str) -> Listing:
        """List by 1,000 objects a request; S3 lists what was put."""
        return _S3Listing(self, prefix)

    def delete(self, paths: Sequence[str], *, timeout_s: float) -> None:
        """Delete objects, 1,000 keys a request; one that is already gone is no error."""
        for start in range(0, len(paths), 1000):
            batch = paths[start : start + 1000]
            bucket = batch[0].partition("/")[0]
            keys = [{"Key": path.partition("/")[2]} for path in batch]
            wanted = {"Objects": keys, "Quiet": True}
            reply = self._call("delete_objects", bucket, Delete=wanted, timeout_s=timeout_s)
            for error in reply.get("Errors", [])[:1]:
                raise PermissionError(errno.EACCES, f"{error.get('Code')}: not deleted", error.get("Key"))

    def abort_stale(self, prefix: str, *, timeout_s: float) -> int:
        """Abort unfinished multipart uploads under `prefix`, which we never start; return how many."""
        bucket, _, key = prefix.partition("/")
        page = self._call("list_multipart_uploads", bucket, Prefix=key, timeout_s=timeout_s)
        uploads = page.get("Uploads", [])
        for upload in uploads:
            path = f"{bucket}/{upload['Key']}"
            self._call("abort_multipart_upload", path, UploadId=upload["UploadId"], timeout_s=timeout_s)
        return len(uploads)


class _S3Listing:
    """S3's pages, each requested with the token that came with the one before."""

    def __init__(self, backend: S3Backend, prefix: str) -> None:
        self._backend = backend
        self._bucket, _, self._key = prefix.partition("/")
        self._progress = _ListingProgress(f"s3://{self._bucket}")
        self._more: dict[str, str] = {}
        self.done = False

    def page(self, *, timeout_s: float) -> list[Entry]:
        """Return the objects of one page more."""
        wanted = {"Prefix": self._key, "MaxKeys": self._backend.page_size, **self._more}
        page = self._backend._call("list_objects_v2", self._bucket, timeout_s=timeout_s, **wanted)
        if "IsTruncated" not in page:
            raise self._progress.fault(
                "the answer is no listing of S3 (a web page?): check endpoint and proxies"
            )
        objects, token = page.get("Contents", []), page.get("NextContinuationToken")
        token = (token or "") if page["IsTruncated"] else None
        token = self._progress.token_after([one["Key"] for one in objects], token)
        self.done = token is None
        self._more = {} if token is None else {"ContinuationToken": token}
        return [
            Entry(key=f"{self._bucket}/{one['Key']}", size=one["Size"], etag=_s3_tag(one)) for one in objects
        ]


MOST_OBJECTS = 20_000_000
"""In one listing: more would not fit in the memory of a plan."""
_WHOLE_LISTING_S = 3600.0  # where a driver gives no pages: its requests have tries and times of their own
_HUB_REQUEST_S = 30.0
_EMPTY_PAGES = 1000  # in a row: S3 sends some where many versions were deleted


class _ListingProgress:
    """What has been seen of a listing, so that one that does not come to an end is given up."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._tokens: set[str] = set()
        self._first_keys: set[str] = set()
        self._objects = self._empty = 0

    def token_after(self, keys: Sequence[str], token: str | None) -> str | None:
        """Return the token of the page after one with these keys; None after the last one.

        Raises:
            SystemicFault: `store`, this is not one more page of the listing.
        """
        self._objects += len(keys)
        self._empty = 0 if keys else self._empty + 1
        if self._objects > MOST_OBJECTS:
            raise self.fault(
                f"more than {MOST_OBJECTS:,} objects, or it does not come to an end: name them in a table, "
                "or list less"
            )
        if token is None:
            return None
        first = keys[0] if keys else None
        if not token or token in self._tokens or first in self._first_keys or self._empty > _EMPTY_PAGES:
            raise self.fault("the listing does not come to an end: a page came again, or none has objects")
        self._tokens.add(token)
        if first is not None:
            self._first_keys.add(first)
        return token

    def fault(self, reason: str) -> SystemicFault:
        """Return the error of a listing that is none."""
        return SystemicFault("store", f"{self._place}: {reason}")


def _http_status(error: OSError) -> int | None:
    """Return the HTTP status behind an error of s3fs."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _s3_tag(answer: Mapping[str, Any]) -> str | None:
    tag = answer.get("ETag")
    return plain_tag(str(tag).strip('"')) if tag else None


def _check_one_put(data: bytes) -> None:
    if len(data) > _ONE_PUT:
        raise UsageError(f"{len(data)} bytes do not fit in one S3 request ({_ONE_PUT}); use smaller parts")
