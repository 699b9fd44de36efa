"""A stand-in for the Hugging Face hub over HTTP: one data set, its listing and its files, for reading."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "owner/photos"
COMMIT = "a" * 40


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where it answers; `uri` is the data set's."""

    endpoint: str
    files: dict[str, bytes]
    uri: str = f"hf://datasets/{REPOSITORY}"

    @property
    def options(self) -> dict[str, object]:
        return {"endpoint": self.endpoint}


def _listing(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    below = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
    found: list[dict[str, object]] = []
    for name, data in sorted(below.items()):
        rest = name.removeprefix(f"{folder}/") if folder else name
        if recursive or "/" not in rest:
            found.append({"type": "file", "path": name, "size": len(data), "oid": f"{hash(data):x}"})
    parts = {"/".join(name.split("/")[:depth]) for name in below for depth in range(1, name.count("/") + 1)}
    for part in sorted(parts):
        rest = part.removeprefix(f"{folder}/") if folder else part
        is_below = rest != part if folder else True
        if is_below and (recursive or "/" not in rest):
            found.append({"type": "directory", "path": part, "size": 0, "oid": "d"})
    return found


def _handler(files: dict[str, bytes], page_size: int) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: object, headers: Mapping[str, str] = {}) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            url = urlsplit(self.path)
            path = unquote(url.path)
            api = f"/api/datasets/{REPOSITORY}"
            if path == api or path.startswith(f"{api}/revision/"):
                facts = {"_id": "1", "id": REPOSITORY, "sha": COMMIT, "private": False, "gated": False}
                self._json(
                    facts | {"siblings": [], "tags": [], "disabled": False, "downloads": 0, "likes": 0}
                )
            elif path.startswith(f"{api}/tree/"):
                folder = path.removeprefix(f"{api}/tree/").partition("/")[2].strip("/")
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                found = _listing(files, folder, recursive=recursive)
                start = int(parse_qs(url.query).get("cursor", ["0"])[0])
                stop = start + page_size
                link = f"<http://{self.headers['Host']}{url.path}?recursive={recursive}&cursor={stop}>"
                more = {"Link": f'{link}; rel="next"'} if stop < len(found) else {}
                if found:
                    self._json(found[start:stop], more)
                else:
                    self._missing("EntryNotFound")
            elif path.startswith(f"{api}/paths-info/"):
                asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                self._json([one for one in _listing(files, "", recursive=True) if one["path"] in asked])
            elif path.startswith(f"/datasets/{REPOSITORY}/resolve/"):
                self._file(path.removeprefix(f"/datasets/{REPOSITORY}/resolve/").partition("/")[2])
            else:
                self._missing("RepoNotFound")

        do_POST = do_HEAD = do_GET

        def _missing(self, code: str) -> None:
            self._send(404, b"{}", {"X-Error-Code": code})

        def _file(self, name: str) -> None:
            data = files.get(name)
            if data is None:
                self._missing("EntryNotFound")
                return
            asked = self.headers.get("Range")
            headers = {"ETag": f'"{hash(data):x}"', "X-Repo-Commit": COMMIT}
            if asked is None:
                self._send(200, data, headers)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(len(data), int(last) + 1) if last else len(data)
            span = {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
            self._send(206, data[int(first) : stop], headers | span)

    return Handler


@contextlib.contextmanager
def hub_server(files: dict[str, bytes], page_size: int = 1000) -> Iterator[Hub]:
    """The stand-in, serving `files` of REPOSITORY until the block ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(files, page_size))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(endpoint=f"http://127.0.0.1:{server.server_port}", files=files)
    finally:
        server.shutdown()
        server.server_close()
