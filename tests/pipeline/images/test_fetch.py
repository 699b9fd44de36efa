"""Uris to bytes: what one object's fault costs, and when a whole unit's faults stop the job."""

from __future__ import annotations

import http.server
import threading
import time

import pytest

from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.images.fetch import fetch_ahead, fetch_object
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.output_store import Store


@pytest.fixture
def folder(tmp_path):
    for name in "abcdefghij":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode() * 100)
    return tmp_path


@pytest.fixture
def dripping_server():
    """Serves `/fast` at once and `/slow` at one byte every 50 ms: no read timeout ever fires."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "400")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            try:
                for _ in range(400):
                    self.wfile.write(b"x")
                    if self.path == "/slow":
                        time.sleep(0.05)
            except OSError:
                pass  # the client gave up, as it should

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def rules(folder, *schemes):
    return AccessRules(roots=(str(folder.resolve()),), schemes=schemes)


def code_of(uri, access, **limits):
    with pytest.raises(ImageError) as caught:
        fetch_object(uri, access, Limits(**limits))
    return caught.value.code


def test_an_object_comes_with_its_size(folder):
    found = fetch_object(str(folder / "c.jpg"), rules(folder), Limits())

    assert (found.data, found.size) == (b"c" * 100, 100)


def test_an_object_of_a_bucket_comes_with_its_etag(moto_s3):
    place = moto_s3.place()
    Store(place).put("x.jpg", b"bytes")
    access = AccessRules(schemes=("s3",), options={"s3": moto_s3.options})

    found = fetch_object(f"{place.uri}/x.jpg", access, Limits())

    assert found.data == b"bytes"
    assert found.etag
    assert code_of(f"{place.uri}/missing.jpg", access) == "not_found"
    with pytest.raises(SystemicFault, match="store"):
        fetch_object("s3://no-such-bucket-here/x.jpg", access, Limits(fetch_timeout_s=5))


def test_faults_of_one_object_have_their_own_codes(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.jpg"
    outside.write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(outside)
    (folder / "dir.jpg").mkdir()

    assert code_of(str(folder / "zzz.jpg"), rules(folder)) == "not_found"
    assert code_of(str(folder / "link.jpg"), rules(folder)) == "uri_refused"
    assert code_of(str(outside), rules(folder)) == "uri_refused"
    assert code_of("http://example.com/x.jpg", rules(folder)) == "uri_refused"
    assert code_of(str(folder / "a.jpg"), rules(folder), max_image_bytes=99) == "too_many_bytes"
    assert code_of(str(folder / "dir.jpg"), rules(folder)) in ("not_found", "uri_refused")


def test_every_uri_of_a_unit_gets_one_outcome_in_order(folder):
    uris = [str(folder / f"{name}.jpg") for name in "abcXdefYghijZ"]

    outcomes = list(fetch_ahead(uris, rules(folder), Limits(), threads=3))

    found = [one.fetched.data[:1].decode() if one.fetched else one.error.code for one in outcomes]
    missing = "not_found"
    assert found == [*"abc", missing, *"def", missing, *"ghij", missing]
    assert all(one.fetch_ms >= 0 for one in outcomes)
    assert list(fetch_ahead([], rules(folder), Limits())) == []


def test_no_more_objects_are_held_ahead_than_there_are_threads(folder, monkeypatch):
    opened = []
    monkeypatch.setattr("hqlabel.pipeline.images.fetch.fetch_object", lambda uri, *_: opened.append(uri))
    arriving = fetch_ahead([f"{i}.jpg" for i in range(50)], rules(folder), Limits(), threads=4)

    next(arriving)
    time.sleep(0.2)

    assert len(opened) <= 5  # the one in hand, and four
    arriving.close()


def test_a_dripping_object_meets_its_deadline_and_costs_no_other(folder, dripping_server):
    access = rules(folder, "http")
    uris = [f"{dripping_server}/slow", *[f"{dripping_server}/fast"] * 5]
    start = time.monotonic()

    outcomes = list(fetch_ahead(uris, access, Limits(fetch_timeout_s=1.5), threads=2))

    assert outcomes[0].error.code == "fetch_timeout"
    assert [one.error for one in outcomes[1:]] == [None] * 5
    assert time.monotonic() - start < 8


def test_a_fault_of_the_surroundings_costs_the_uri_that_met_it_and_says_what_it_is(folder, monkeypatch):
    def broken(uri, *_):
        if uri == "4":
            raise SystemicFault("credentials", "expired")

    monkeypatch.setattr("hqlabel.pipeline.images.fetch.fetch_object", broken)

    found = list(fetch_ahead([str(i) for i in range(40)], rules(folder), Limits()))

    [error] = [one.error for one in found if one.error is not None]
    assert found[4].error is error
    assert (error.code, error.fault.code, error.message) == ("unreachable", "credentials", "4: expired")
