"""Images and tables over http(s): checked addresses, checked redirects, bounded bodies. Reading only.

The name in a uri is resolved once, and the address that a connection goes to is checked right before it is
opened, so no spelling of an address and no second answer of a name server leads around the rule. Redirects
are followed here, one by one, each checked like a uri of its own; headers of the configuration go to the
first server alone. Bodies are never decompressed.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fsspec.asyn import get_loop, sync

from hqlabel.pipeline.errors import ImageError, UsageError
from hqlabel.pipeline.storage.backend import (
    ODD_TAG,
    Entry,
    FetchedObject,
    FolderListing,
    check_complete,
    check_range,
    check_version,
    drain,
    plain_tag,
    too_many_bytes,
)
from hqlabel.pipeline.storage.uri_rules import check_address, check_web_place

REDIRECTS = 5
_REDIRECTED = (301, 302, 303, 307, 308)
_FIXED_OPTIONS = ("connector", "auto_decompress", "cookie_jar", "headers")


class HttpBackend:
    """Files of web servers. A server must state a size and answer ranges for tables and archives."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        import aiohttp  # comes with the extra s3; another scheme needs none of it

        self._aiohttp = aiohttp
        self._loop = get_loop()
        client = dict(options.get("client_kwargs") or {})
        self._headers = {**(client.get("headers") or {}), **(options.get("headers") or {})}
        self._client = {name: value for name, value in client.items() if name not in _FIXED_OPTIONS}
        self._session: Any = None

    def get(self, path: str, *, max_bytes: int | None, timeout_s: float) -> FetchedObject:
        """Return the body of one GET, cut off at `max_bytes` and at the deadline."""
        return sync(self._loop, self._get, path, max_bytes, timeout=timeout_s)  # type: ignore[no-any-return]

    async def _get(self, url: str, max_bytes: int | None) -> FetchedObject:
        async with self._asked("GET", url) as response:
            _check_status(response)
            too_many_bytes(response.content_length, max_bytes)
            data = await drain(response.content.read, max_bytes)
        return FetchedObject(data=data, size=len(data), etag=_tag(response, len(data)))

    def get_range(
        self, path: str, start: int, stop: int, *, timeout_s: float, version: str | None = None
    ) -> bytes:
        """Return bytes start..stop (end-exclusive) of `version`, requested with `If-Match`."""
        return sync(self._loop, self._range, path, start, stop, version, timeout=timeout_s)  # type: ignore[no-any-return]

    async def _range(self, url: str, start: int, stop: int, version: str | None) -> bytes:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if version is not None and not version.startswith(("W/", *_MADE)):  # a weak tag never matches
            headers["If-Match"] = f'"{version}"'
        async with self._asked("GET", url, headers) as response:
            if response.status == 412:
                check_version("another", version)
            if response.status == 416:  # the file ends before
                return b""
            _check_status(response)
            announced = response.content_length
            size = check_range(response.headers.get("Content-Range"), announced, start, stop)
            check_version(_tag(response, size), version)
            data = await drain(response.content.read, stop - start)
        check_complete(data, announced)
        return data

    def stat(self, path: str, *, timeout_s: float) -> Entry | None:
        """Return size and tag of a file; None when there is none."""
        return sync(self._loop, self._stat, path, timeout=timeout_s)  # type: ignore[no-any-return]

    async def _stat(self, url: str) -> Entry | None:
        async with self._asked("HEAD", url) as response:
            status, size = response.status, response.content_length
            tag = _tag(response, size)
        if status in (404, 410):
            return None
        if status >= 400 or size is None:  # servers that answer no HEAD, or state no size there
            async with self._asked("GET", url, {"Range": "bytes=0-0"}) as response:
                if response.status in (404, 410):
                    return None
                _check_status(response)
                stated = response.headers.get("Content-Range", "").rpartition("/")[2]
                size = int(stated) if stated.isdigit() and len(stated) < 20 else response.content_length
                tag = _tag(response, size)
        if size is None:
            raise ImageError("unreachable", "the server does not state the size of this file")
        return Entry(key=url, size=size, etag=tag)

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, url: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Any]:
        """Yield the answer at the end of the redirects; each place is checked before it is asked."""
        import yarl

        if self._session is None:
            self._session = self._new_session()
        at = _parsed(yarl.URL, url)
        first = at.origin()
        for _ in range(REDIRECTS + 1):
            given = self._headers if at.origin() == first else {}
            wanted = {"Accept-Encoding": "identity", **given, **(headers or {})}
            async with self._session.request(method, at, headers=wanted, allow_redirects=False) as response:
                target = response.headers.get("Location")
                if response.status not in _REDIRECTED or target is None:
                    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                        raise ImageError("unreachable", "the server sent a compressed body, unasked")
                    yield response
                    return
            at = _redirected(at, _parsed(yarl.URL, target))
        raise ImageError("unreachable", f"more than {REDIRECTS} redirects")

    def _new_session(self) -> Any:
        connector = self._aiohttp.TCPConnector(socket_factory=_checked_socket, happy_eyeballs_delay=None)
        session = self._aiohttp.ClientSession(
            connector=connector,
            cookie_jar=self._aiohttp.DummyCookieJar(),
            auto_decompress=False,
            **self._client,
        )
        weakref.finalize(self, _close, self._loop, session)
        return session

    def walk(self, prefix: str) -> FolderListing:
        """List nothing: web servers have no listing."""
        return FolderListing(prefix, prefix, lambda *_: ([], []))

    def _read_only(self, *_given: Any, **_named: Any) -> Any:
        """Raise UsageError."""
        raise UsageError("http(s):// can be read, not written")

    create = replace = replace_if = delete = abort_stale = _read_only


def _close(loop: Any, session: Any) -> None:
    if loop.is_running():
        with contextlib.suppress(TimeoutError):
            sync(loop, session.close, timeout=0.5)


def _parsed(parse: Any, url: str) -> Any:
    """Return a url as the client takes it apart, every part of it checked."""
    try:
        parsed = parse(url)
    except ValueError:  # whose text would repeat what the uri carries
        raise ImageError("uri_refused", "this is no url that a client takes") from None
    if parsed.is_absolute():
        check_web_place(parsed.scheme, parsed.raw_authority)
    return parsed


def _redirected(at: Any, target: Any) -> Any:
    """Return where a redirect leads; ImageError `uri_refused` where it may not lead."""
    there = at.join(target)
    check_web_place(there.scheme, there.raw_authority)
    if at.scheme == "https" and there.scheme != "https":
        raise ImageError("uri_refused", "a redirect leads from https to http")
    return there


def _checked_socket(address: Any) -> socket.socket:
    """Return a socket for a connection to a resolved address, which may not be a machine's own."""
    family, kind, protocol, _, place = address
    check_address(str(place[0]))
    return socket.socket(family, kind, protocol)


def _check_status(response: Any) -> None:
    """Raise for a status without a body to read. A site that refuses a request is no sign for others."""
    status = response.status
    if status in (401, 403):
        raise ImageError("denied", f"HTTP {status} {response.reason}")
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, f"HTTP {status} {response.reason}")
    if (300 <= status < 500 and status not in (408, 425, 429)) or status >= 600:
        raise ImageError("unreachable", f"HTTP {status} {response.reason}")
    response.raise_for_status()


_MADE = ("modified-", "size-", ODD_TAG)
"""What tags begin with that are no ETag of the server."""


def _tag(response: Any, size: int | None) -> str:
    """Return the version tag of an answer: its ETag, or else when the file was modified and its size."""
    tag = response.headers.get("ETag", "").strip()
    if tag:
        return plain_tag(tag if tag.startswith("W/") else tag.strip('"'))
    modified = response.headers.get("Last-Modified")
    return plain_tag(f"modified-{modified}-size-{size}") if modified else f"size-{size}"
