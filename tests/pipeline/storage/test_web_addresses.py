"""Where a web uri may lead: spellings of the metadata address, names that resolve to it, redirects."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import yarl

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.cloud_buckets import forget_backends
from hqlabel.pipeline.storage.http_backend import HttpBackend, _redirected
from hqlabel.pipeline.storage.read_objects import planned_versions
from hqlabel.pipeline.storage.uri_rules import check_address, check_uri
from tests.pipeline.made_formats import tar_of

ACCESS = AccessRules(schemes=("http", "https"))
LIMITS = Limits(fetch_timeout_s=10)


@contextlib.contextmanager
def server(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, list[dict]]]:
    """A web server: path to (status, headers, body); and what it was asked, with the headers."""
    asked: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            status, headers, body = answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", asked
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
        forget_backends()


def code(uri: str, access: AccessRules = ACCESS) -> str:
    with pytest.raises(ImageError) as caught:
        fetch_object(uri, access, LIMITS)
    return caught.value.code


SPELLED = [
    "169.254.169.254",
    "169.254.169.254:80",
    "169.254.169.254.",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376",
    "0251.254.43518",
    "169.254.43518",
    "169.16689662",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]:80",
    "[::169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fe80::1]",
    "[fd00:ec2::254]",
    "[fd00:0ec2:0:0::0254]",
    "[fd00:ec2::23]",
    "[64:ff9b:1::a9fe:a9fe]",
    "[::ffff:0:a9fe:a9fe]",
    "[2001:db8::5efe:a9fe:a9fe]",
    "[fd20:ce::254]",
    "100.100.100.200",
    "168.63.129.16",
    "metadata.google.internal",
    "METADATA.google.internal.",
    "169.254.0.1",
]
CONFUSED = [
    "169.254.169.254?x=a.jpg",
    "good.example?@169.254.169.254",
    "good.example#@169.254.169.254",
    "169.254.169.254#@good.example",
    "good.example\\@169.254.169.254",
    "good.example@169.254.169.254",
    "169.254.169.254%2f@good.example",
    "１６９.254.169.254",  # noqa: RUF001
    "①⑥⑨.254.169.254",
    "169。254。169。254",
    "mеtadata.google.internal",  # noqa: RUF001
    "169.254.169.254\t",
    " 169.254.169.254",
    "[fe80::1%25eth0]",
    "[::1",
    "h:99999",
    "h:port",
    "h:80:80",
    "",
    "a" * 300,
    ("a" * 63 + ".") * 5 + "a",
]


@pytest.mark.parametrize("host", SPELLED + CONFUSED)
def test_no_spelling_of_a_machines_own_address_is_opened(host, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was made"))
    began = time.monotonic()

    assert code(f"http://{host}/latest/a.jpg") == "uri_refused"
    assert time.monotonic() - began < 5
    with pytest.raises(ImageError):
        check_uri(f"http://{host}/latest/a.jpg", ACCESS)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "8.8.8.8", "::1", "fd00::1"])
def test_loopback_and_private_networks_are_allowed_by_design(address):
    check_address(address)


RESOLVED = ["169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "fe80::1", "64:ff9b::a9fe:a9fe"]


@pytest.mark.parametrize("address", RESOLVED)
def test_a_name_that_resolves_to_a_machines_own_address_is_not_connected_to(address, monkeypatch):
    def resolve(host, port, *_args, **_named):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        place = (address, port, 0, 0) if ":" in address else (address, port)
        return [(family, socket.SOCK_STREAM, 6, "", place)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    connected = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, place: connected.append(place))

    assert code("http://innocent.example/a.jpg") == "uri_refused"
    assert connected == []
    forget_backends()


def test_a_second_answer_of_the_name_server_is_never_asked_for(monkeypatch):
    with server({"/a.jpg": (200, {}, b"picture")}) as (place, _):
        port, asked = int(place.rpartition(":")[2]), []

        def resolve(host, *_args, **_named):
            asked.append(host)
            address = "127.0.0.1" if len(asked) == 1 else "169.254.169.254"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

        assert fetch_object(f"http://rebinding.example:{port}/a.jpg", ACCESS, LIMITS).data == b"picture"
        assert asked == ["rebinding.example"]


def test_redirects_are_followed_one_by_one_and_checked(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"local")
    targets = {
        "/own": "http://169.254.169.254/latest/meta-data/",
        "/decimal": "http://2852039166/",
        "/mapped": "http://[::ffff:169.254.169.254]/",
        "/name": "http://metadata.google.internal/",
        "/protocol-less": "//169.254.169.254/x",
        "/backslash": "http://good.example\\@169.254.169.254/",
        "/user": "http://user:password@good.example/",
        "/file": f"file://{secret}",
        "/ftp": "ftp://good.example/a.jpg",
        "/data": "data:text/plain,hello",
        "/s3": "s3://bucket/key",
    }
    answers = {path: (302, {"Location": target}, b"") for path, target in targets.items()}
    answers |= {"/loop": (302, {"Location": "/loop"}, b""), "/a.jpg": (200, {}, b"picture")}
    answers |= {f"/go{status}": (status, {"Location": "a.jpg"}, b"") for status in (301, 302, 303, 307, 308)}
    with server(answers) as (place, _):
        for path in targets:
            assert code(f"{place}{path}") == "uri_refused", path
        assert code(f"{place}/loop") == "unreachable"
        for status in (301, 302, 303, 307, 308):
            assert fetch_object(f"{place}/go{status}", ACCESS, LIMITS).data == b"picture"


def test_a_redirect_never_leaves_https():
    secure = yarl.URL("https://good.example/a")
    with pytest.raises(ImageError, match="a redirect leads from https to http") as caught:
        _redirected(secure, yarl.URL("http://good.example/a"))
    assert caught.value.code == "uri_refused"
    assert str(_redirected(secure, yarl.URL("b"))) == "https://good.example/b"
    assert str(_redirected(yarl.URL("http://h/a"), secure)) == str(secure)


@pytest.mark.parametrize("status", [600, 999])
def test_a_status_that_http_does_not_have_is_the_sites_trouble(status):
    with server({"/a.jpg": (status, {}, b"x")}) as (place, _):
        assert code(f"{place}/a.jpg") == "unreachable"


def test_no_credential_of_a_place_is_repeated():
    redirects = {
        f"/{n}": (302, {"Location": f"http://me:canary@h{n}/?token=canary"}, b"") for n in ("", ":x")
    }
    with server(redirects) as (place, _):
        for uri in (
            *(f"{place}{path}" for path in redirects),
            "http://me:canary@h/a",
            "http://canary@[::1/a",
        ):
            with pytest.raises(ImageError) as caught:
                fetch_object(uri, ACCESS, LIMITS)
            assert "canary" not in str(caught.value)


@pytest.mark.parametrize("tag", ['"' + "x" * 3000 + '"', '"\xe9\xff"', 'W/"1"', '"a b"', '""', "plain"])
def test_odd_tags_of_a_server_are_kept_and_compared(tag):
    tar = tar_of({"a.png": b"x" * 600})
    ranges = {"Accept-Ranges": "bytes", "Content-Type": "application/x-tar"}

    class Versions(dict):
        tag: str

        def get(self, path, _default=None):
            return 200, {**ranges, "ETag": self.tag}, tar

    answers = Versions()
    answers.tag = tag
    with server(answers) as (place, _):
        [version] = planned_versions([f"{place}/a.tar"], lambda _: {})
        assert version.isascii()
        assert len(version) < 300
        small = f"{place}/a.tar"
        entry = HttpBackend({}).stat(small, timeout_s=5)
        assert entry.etag == version
        whole = HttpBackend({}).get_range(small, 0, len(tar), timeout_s=5, version=version)
        assert whole == tar
        answers.tag = '"another"'
        with pytest.raises(ImageError, match="not the version"):
            HttpBackend({}).get_range(small, 0, len(tar), timeout_s=5, version=version)


def test_headers_of_the_configuration_go_to_the_first_server_alone():
    access = AccessRules(
        schemes=("http",), options={"http": {"client_kwargs": {"headers": {"X-Mine": "canary"}}}}
    )
    with server({"/a.jpg": (200, {}, b"picture")}) as (other, seen_there):
        answers = {"/go": (302, {"Location": f"{other}/a.jpg"}, b""), "/b": (302, {"Location": "/c"}, b"")}
        with server(answers | {"/c": (200, {}, b"here")}) as (first, seen):
            assert fetch_object(f"{first}/go", access, LIMITS).data == b"picture"
            assert fetch_object(f"{first}/b", access, LIMITS).data == b"here"
    assert [one.get("x-mine") for one in seen] == ["canary"] * 3
    assert [one.get("x-mine") for one in seen_there] == [None]


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server({"/a.jpg": (200, {}, b"picture")}) as (place, _):
        assert fetch_object(f"{place}/a.jpg", ACCESS, LIMITS).data == b"picture"
