"""An HTTP proxy before an S3 stand-in, which breaks chosen requests and counts what it broke.

A test adds `Fault`s and asserts on `fault.landed` afterwards: a fault that never landed proves nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

ERROR_XML = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(kw_only=True)
class Fault:
    """What to do with requests whose "METHOD /path?query" matches: the first `times` of them after `skip`.

    status: answer `status` with S3's `code`. reset: close before the store sees it. drop_after: the store
    does it, the client sees a reset. truncate: send `keep` bytes of the body. corrupt: flip a bit at
    `keep`. drip: send the body at `rate` bytes a second. delay: wait `seconds` first.
    `then` is called when it strikes, before the client can notice.
    """

    match: str
    do: Literal["status", "reset", "drop_after", "truncate", "corrupt", "drip", "delay"]
    times: int = 10**9
    skip: int = 0
    status: int = 503
    code: str = "SlowDown"
    keep: int = 100
    rate: float = 100.0
    seconds: float = 1.0
    seen: int = 0
    landed: int = 0
    then: Callable[[], None] = lambda: None


@dataclass
class FaultProxy:
    """The running proxy: `endpoint` for clients, `faults` to break with, `log` of request lines."""

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> Fault:
        """The fault, now active."""
        with self.lock:
            self.faults.append(fault)
        return fault

    def requests(self, pattern: str) -> int:
        """How many requests so far match."""
        return sum(bool(re.search(pattern, line)) for line in self.log)

    def fault_for(self, line: str) -> Fault | None:
        """The fault that strikes this request, now counted as landed."""
        with self.lock:
            self.log.append(line)
            for fault in self.faults:
                if not re.search(fault.match, line):
                    continue
                fault.seen += 1
                if fault.skip < fault.seen <= fault.skip + fault.times:
                    fault.landed += 1
                    return fault
        return None


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before `upstream` (an endpoint url), on a free loopback port, until the block ends."""
    proxy = FaultProxy(endpoint="")
    handler = type("Handler", (_Handler,), {"proxy": proxy, "upstream": urlsplit(upstream).netloc})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    upstream: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        body = self._read_body()
        fault = self.proxy.fault_for(f"{self.command} {self.path}")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._answer(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _answer(self, body: bytes, fault: Fault | None) -> None:
        action = fault.do if fault else None
        if action == "delay":
            time.sleep(fault.seconds)
        if action == "reset":
            fault.then()
            return self._reset()
        if action == "status":
            text = ERROR_XML.format(code=fault.code).encode()
            return self._send(fault.status, [("Content-Type", "application/xml")], text)
        status, headers, data = self._forward(body)
        if action == "drop_after":
            fault.then()
            return self._reset()
        if action == "corrupt" and data:
            at = fault.keep % len(data)
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if action == "truncate":
            return self._send(status, headers, data, sent=data[: fault.keep])
        if action == "drip":
            return self._send(status, headers, data, rate=fault.rate)
        return self._send(status, headers, data)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        client = http.client.HTTPConnection(self.upstream, timeout=60)
        client.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_HEADERS:
                client.putheader(name, value)
        client.putheader("Content-Length", str(len(body)))
        client.endheaders(body)
        answer = client.getresponse()
        data = answer.read()
        headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in HOP_HEADERS]
        if self.command == "HEAD":
            headers.append(("X-Length", answer.getheader("Content-Length") or "0"))
        client.close()
        return answer.status, headers, data

    def _send(self, status, headers, data, *, sent=None, rate=None) -> None:
        self.send_response(status)
        length = str(len(data))
        for name, value in headers:
            if name == "X-Length":
                length = value
            elif name.lower() not in ("date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if rate is not None:
            return self._drip(data, rate)
        self.wfile.write(data if sent is None else sent)
        if sent is not None:
            self.close_connection = True

    def _drip(self, data: bytes, rate: float) -> None:
        step = max(1, int(rate / 10))
        for at in range(0, len(data), step):
            self.wfile.write(data[at : at + step])
            self.wfile.flush()
            time.sleep(step / rate)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
