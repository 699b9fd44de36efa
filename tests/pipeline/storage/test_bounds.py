"""Every read, unpacking and listing has an end, whatever the other side sends."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import HqlabelError, ImageError, JobRefused, SystemicFault
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.inputs.box_tables import read_box_tables
from hqlabel.pipeline.inputs.coco_boxes import read_instances
from hqlabel.pipeline.inputs.webdataset import read_pictures
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage import cloud_buckets
from hqlabel.pipeline.storage.cloud_buckets import forget_backends
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.parquet_pages import read_pictures as read_group
from hqlabel.pipeline.storage.read_objects import list_inputs, open_input

LIMITS = Limits(fetch_timeout_s=20)
ENDLESS = 4 * 2**30
Answer = tuple[int, dict[str, str], bytes | int]
"""Status, headers, and a body, or how many zeros follow."""


@contextlib.contextmanager
def hostile(answer: Callable[[str, dict[str, str]], Answer]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers `answer(path, headers)`, and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            named = {name.lower(): value for name, value in self.headers.items()}
            status, headers, body = answer(f"{self.command} {self.path}", named)
            self.send_response(status)
            if not isinstance(body, int) and "Content-Length" not in headers:
                headers = {**headers, "Content-Length": str(len(body))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = isinstance(body, int)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if self.command == "GET":
                    self._send(body)

        do_HEAD = do_GET

        def _send(self, body: bytes | int) -> None:
            if not isinstance(body, int):
                self.wfile.write(body)
                return
            for _ in range(body >> 20):
                self.wfile.write(bytes(2**20))

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.block_on_close = False
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", asked
    finally:
        made.shutdown()
        made.server_close()
        forget_backends()


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def code(call: Callable[[], object]) -> str:
    with pytest.raises(ImageError) as caught:
        call()
    return caught.value.code


@contextlib.contextmanager
def little_memory(mib: int) -> Iterator[None]:
    before = peak_mib()
    began = time.monotonic()
    yield
    assert peak_mib() - before < mib
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------------------------------------
# Answers of servers
# ---------------------------------------------------------------------------------------------

UNENDING = {
    "ranges ignored": (200, {}),
    "ranges ignored, of stated length": (200, {"Content-Length": str(ENDLESS)}),
    "a longer range": (206, {"Content-Range": f"bytes 0-{ENDLESS - 1}/{ENDLESS}"}),
    "another range": (206, {"Content-Range": "bytes 7-9/2000"}),
    "a range that goes on": (206, {"Content-Range": "bytes 0-1111/2000", "ETag": '"1"'}),
    "a range of nothing": (206, {}),
}


@pytest.mark.parametrize("kind", UNENDING)
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_range_ends_where_it_was_asked_to_end(kind, scheme, aws_environment):
    status, headers = UNENDING[kind]
    size = {"Content-Length": "2000", "ETag": '"1"'}
    with hostile(
        lambda ask, _: (200, size, b"") if ask.startswith("HEAD") else (status, headers, ENDLESS)
    ) as (
        place,
        _,
    ):
        access = AccessRules(schemes=("http", "s3"), options={"s3": {"endpoint_url": place}})
        uri = f"{place}/a.tar" if scheme == "http" else "s3://bucket/a.tar"
        with little_memory(120):
            found = code(lambda: fetch_object(f"{uri}#512:600/a.png", access, LIMITS))
            assert found in ("unreachable", "too_many_bytes", "changed")


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_an_image_without_end_is_cut_off_at_its_limit(scheme, aws_environment):
    with hostile(lambda *_: (200, {}, ENDLESS)) as (place, _):
        access = AccessRules(schemes=("http", "s3"), options={"s3": {"endpoint_url": place}})
        uri = f"{place}/a.png" if scheme == "http" else "s3://bucket/a.png"
        small = Limits(max_image_bytes=10 * 2**20, fetch_timeout_s=20)
        with little_memory(120):
            assert code(lambda: fetch_object(uri, access, small)) == "too_many_bytes"


@pytest.mark.parametrize("tag", [{"ETag": '"1"'}, {"ETag": 'W/"1"'}, {"Last-Modified": "Mon"}, {}])
def test_a_tar_on_a_web_server_is_read_by_ranges_of_the_planned_version(tag):
    tar, now, matched = io.BytesIO(), dict(tag), list[str | None]()
    with tarfile.open(fileobj=tar, mode="w") as made:
        header = tarfile.TarInfo("a.png")
        header.size = 600
        made.addfile(header, io.BytesIO(b"x" * 600))
    body = tar.getvalue()

    def answer(ask: str, headers: dict[str, str]) -> Answer:
        if "range" not in headers:
            return 200, {**now, "Content-Length": str(len(body))}, body
        if "if-match" in headers and headers["if-match"] != now.get("ETag"):
            return 412, {}, b""
        start, stop = map(int, headers["range"].removeprefix("bytes=").split("-"))
        matched.append(headers.get("if-match"))
        part = body[start : stop + 1]
        return 206, {**now, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(body)}"}, part

    with hostile(answer) as (place, _):
        access = AccessRules(schemes=("http",))
        [row] = make_plan(InputSettings(images=f"{place}/a.tar"), access).table.to_pylist()
        found = fetch_object(row["image_uri"], access, LIMITS, row["source_version"])
        assert (found.data, found.etag) == (b"x" * 600, row["source_version"])
        assert set(matched) == {tag["ETag"] if tag.get("ETag", "W").startswith('"') else None}
        now.update({"ETag": '"2"'} if "ETag" in tag else {"Last-Modified": "Tue"})
        assert (
            code(lambda: fetch_object(row["image_uri"], access, LIMITS, row["source_version"])) == "changed"
        )


def test_a_compressed_body_is_never_unpacked():
    body = gzip.compress(bytes(50 * 2**20))
    with hostile(lambda *_: (200, {"Content-Encoding": "gzip"}, body)) as (place, _):
        access = AccessRules(schemes=("http",))
        assert code(lambda: fetch_object(f"{place}/a.png", access, LIMITS)) == "unreachable"


@pytest.mark.parametrize("status", [200, 500, 404])
def test_an_answer_of_a_store_that_never_ends_does_not_fill_the_memory(status, aws_environment, monkeypatch):
    from hqlabel.pipeline.storage import s3_session

    monkeypatch.setattr(s3_session, "MOST_ANSWER_BYTES", 2**20)
    with (
        hostile(lambda *_: (status, {"Content-Type": "application/xml"}, ENDLESS)) as (place, _),
        little_memory(400),
        pytest.raises(HqlabelError, match="more than"),
    ):
        Store(Place(uri="s3://bucket/out", options={"endpoint_url": place}), budget_s=1).list("units/")


def test_a_store_that_redirects_is_not_followed(aws_environment):
    with (
        hostile(lambda *_: (200, {}, b"stolen")) as (other, asked),
        hostile(lambda *_: (302, {"Location": f"{other}/a.png"}, b"")) as (place, _),
    ):
        access = AccessRules(options={"s3": {"endpoint_url": place}})
        found = code(lambda: fetch_object("s3://bucket/a.png", access, Limits(fetch_timeout_s=1)))
    assert (found, asked) == ("unreachable", [])


# ---------------------------------------------------------------------------------------------
# Listings
# ---------------------------------------------------------------------------------------------


def listing(keys: list[str], *, token: str | None) -> Answer:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><ETag>&quot;1&quot;</ETag></Contents>" for key in keys
    )
    more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    body = (
        f"<ListBucketResult><Name>bucket</Name><IsTruncated>{str(bool(token)).lower()}</IsTruncated>"
        f"{more}{contents}</ListBucketResult>"
    )
    return 200, {"Content-Type": "application/xml"}, body.encode()


def number_of(ask: str) -> int:
    given = parse_qs(urlsplit(ask.split(" ", 1)[1]).query).get("continuation-token", ["0"])
    return int(given[0])


HTML = b"<html><head><title>Sign in</title></head><body>Welcome</body></html>"
NO_LISTINGS: dict[str, Callable[[str, dict[str, str]], Answer]] = {
    "a web page": lambda *_: (200, {"Content-Type": "text/html"}, HTML),
    "an empty body": lambda *_: (200, {}, b""),
    "the same token": lambda *_: listing(["in/a.png"], token="7"),
    "the same token, nothing": lambda *_: listing([], token="7"),
    "new tokens, the same page": lambda ask, _: listing(["in/a.png"], token=str(number_of(ask) + 1)),
    "new tokens, nothing": lambda ask, _: listing([], token=str(number_of(ask) + 1)),
    "two pages in turn": lambda ask, _: listing([f"in/{number_of(ask) % 2}"], token=str(number_of(ask) + 1)),
    "new keys for ever": lambda ask, _: listing([f"in/{number_of(ask)}"], token=str(number_of(ask) + 1)),
}


@pytest.mark.parametrize("kind", NO_LISTINGS)
def test_a_listing_that_is_none_or_has_no_end_refuses_the_job(kind, aws_environment, monkeypatch):
    monkeypatch.setattr(cloud_buckets, "_EMPTY_PAGES", 20)
    monkeypatch.setattr(cloud_buckets, "MOST_OBJECTS", 30)
    with hostile(NO_LISTINGS[kind]) as (place, asked):
        options = {"endpoint_url": place}
        with pytest.raises((SystemicFault, JobRefused), match=r"listing|objects"):
            list_inputs("s3://bucket/in", options)
        with pytest.raises(SystemicFault, match=r"listing|objects"):
            Store(Place(uri="s3://bucket/in", options=options), budget_s=5).list()
        assert len(asked) <= (100 if kind in ("new tokens, nothing", "new keys for ever") else 6)


def test_pages_without_objects_among_others_are_no_fault(aws_environment):
    pages = [["in/a"], [], [], ["in/b"], [], ["in/c"]]

    def answer(ask: str, _: dict[str, str]) -> Answer:
        at = number_of(ask)
        return listing(pages[at], token=str(at + 1) if at + 1 < len(pages) else None)

    with hostile(answer) as (place, _):
        listed = list_inputs("s3://bucket/in", {"endpoint_url": place})
    assert [entry.key for entry in listed.entries] == [
        "s3://bucket/in/a",
        "s3://bucket/in/b",
        "s3://bucket/in/c",
    ]


HUB_PAGES = {
    "the same file": lambda at: [0],
    "new files for ever": lambda at: [at],
    "nothing": lambda at: [],
}


@pytest.mark.parametrize("kind", HUB_PAGES)
def test_a_listing_of_the_hub_that_has_no_end_refuses_the_job(kind, monkeypatch):
    monkeypatch.setattr(cloud_buckets, "_EMPTY_PAGES", 20)
    monkeypatch.setattr(cloud_buckets, "MOST_OBJECTS", 30)
    pages = hub_pages(lambda at: (HUB_PAGES[kind](at), True))
    with hostile(pages) as (place, asked), pytest.raises((SystemicFault, JobRefused), match="to an end"):
        list_inputs("hf://datasets/owner/photos/in", {"endpoint": place})
    assert len(asked) <= 40


def test_pages_of_the_hub_without_files_among_others_are_no_fault():
    found = [[0], [], [], [1], []]
    with hostile(hub_pages(lambda at: (found[at], at + 1 < len(found)))) as (place, _):
        listed = list_inputs("hf://datasets/owner/photos/in", {"endpoint": place})
    assert [entry.key for entry in listed.entries] == [
        f"hf://datasets/owner/photos/in/{at}.png" for at in (0, 1)
    ]


def hub_pages(page: Callable[[int], tuple[list[int], bool]]) -> Callable[[str, dict[str, str]], Answer]:
    """Answers of a hub: `page(n)` gives the numbers of the files on page n, and whether one follows."""

    def answer(asked: str, headers: dict[str, str]) -> Answer:
        path, api = asked.split()[1], "/api/datasets/owner/photos"
        if not path.startswith(f"{api}/tree/"):
            facts = {"_id": "1", "id": "owner/photos", "sha": "a" * 40, "private": False, "gated": False}
            facts |= {"siblings": [], "tags": [], "disabled": False, "downloads": 0, "likes": 0}
            return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()
        at = int(path.partition("cursor=")[2] or 0)
        numbers, more = page(at)
        files = [{"type": "file", "path": f"in/{n}.png", "size": 1, "oid": "a"} for n in numbers]
        url = f"http://{headers['host']}{api}/tree/main/in?recursive=true&cursor={at + 1}"
        return 200, {"Link": f'<{url}>; rel="next"'} if more else {}, json.dumps(files).encode()

    return answer


# ---------------------------------------------------------------------------------------------
# Parquet
# ---------------------------------------------------------------------------------------------


def pictures(values: pa.Array, **options) -> bytes:
    table = pa.table({"image": pa.StructArray.from_arrays([values], names=["bytes"])})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


MIB = 2**20


def one_value() -> bytes:
    return pictures(pa.array([bytes(60 * MIB)], pa.large_binary()), compression="zstd", use_dictionary=False)


def a_value_in_every_row() -> bytes:
    values = pa.array([bytes(MIB)], pa.large_binary())
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), values)
    return pictures(many, compression="zstd", dictionary_pagesize_limit=2**24)


def shared_prefixes() -> bytes:
    encoding = {"image.bytes": "DELTA_BYTE_ARRAY"}
    values = pa.array([bytes(MIB)] * 60, pa.large_binary())
    return pictures(values, compression="zstd", use_dictionary=False, column_encoding=encoding)


@pytest.mark.parametrize("bomb", [one_value, a_value_in_every_row, shared_prefixes])
def test_a_small_row_group_that_unpacks_to_a_huge_one_is_given_up_early(bomb, monkeypatch):
    from hqlabel.pipeline.storage import parquet_pages

    monkeypatch.setattr(parquet_pages, "GROUP_BYTES", 20 * MIB)
    body = bomb()
    assert len(body) < MIB
    with little_memory(150):
        found = code(lambda: read_group(lambda a, b: body[a:b], len(body), column="image", group=0))
    assert found == "too_many_bytes"


def test_a_footer_that_denies_what_a_page_unpacks_to_is_not_believed(monkeypatch):
    """The sizes in the footer are made small; those of the page stay as Arrow will believe them."""
    from hqlabel.pipeline.storage import parquet_pages

    monkeypatch.setattr(parquet_pages, "GROUP_BYTES", 20 * MIB)
    body = one_value()
    length = int.from_bytes(body[-8:-4], "little")
    size = varint(pq.read_metadata(io.BytesIO(body)).row_group(0).column(0).total_uncompressed_size)
    footer = body[-8 - length : -8]
    assert size in footer
    monkeypatch.setattr(parquet_pages, "open_closed", lambda *_, **__: pytest.fail("Arrow was asked"))
    denied = body[: -8 - length] + footer.replace(size, varint(100, len(size))) + body[-8:]

    found = code(lambda: read_group(lambda a, b: denied[a:b], len(denied), column="image", group=0))

    assert found == "too_many_bytes"


def varint(number: int, length: int = 0) -> bytes:
    number, found = number << 1, b""
    while number >= 128 or len(found) < length - 1:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def test_a_table_whose_one_row_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    from hqlabel.pipeline.storage import parquet_pages

    monkeypatch.setattr(parquet_pages, "PAGE_VALUES", 2**20)
    boxes = pa.LargeListArray.from_arrays(pa.array([0, 2**21]), pa.array(np.zeros(2**21, np.int8)))
    path = tmp_path / "boxes.parquet"
    pq.write_table(pa.table({"image_uri": ["a.png"], "bbox": boxes}), path, compression="zstd")
    assert path.stat().st_size < 2**16

    with pytest.raises(JobRefused, match=r"boxes\.parquet: not a sound .* values"):
        read_box_tables([str(path)], {}, AccessRules(roots=(str(tmp_path),)), folder="")


def test_a_text_that_repeats_in_every_row_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    from hqlabel.pipeline.storage import parquet_pages

    monkeypatch.setattr(parquet_pages, "REPEATED_BYTES", 2**24)
    label = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 2**20]))
    table = pa.table({"image_uri": ["a.png"] * 2000, "label": label})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, dictionary_pagesize_limit=2**22)
    with open(path, "rb") as stream:
        assert parquet_pages.rows_at_once(stream, ["image_uri", "label"]) == 15
        assert parquet_pages.rows_at_once(stream, ["image_uri"]) > 10_000


def test_a_footer_without_the_place_of_a_column_does_not_end_the_process(tmp_path):
    """pyarrow aborts when such a column is asked for; other damage is met as it comes."""
    import random

    buffer = io.BytesIO()
    pq.write_table(pa.table({"image_uri": ["a"] * 50, "boxes": [[[1.0, 2.0, 3.0, 4.0]]] * 50}), buffer)
    body, script = buffer.getvalue(), tmp_path / "read.py"
    start = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
    for number in range(300):
        rng, made = random.Random(number), bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            made[rng.randrange(start, len(body) - 8)] = rng.choice([0, 255, rng.randrange(256)])
        (tmp_path / f"{number}.parquet").write_bytes(made)
    script.write_text(
        "import pathlib, sys\n"
        "from hqlabel.pipeline.errors import HqlabelError\n"
        "from hqlabel.pipeline.inputs.box_tables import read_box_tables\n"
        "from hqlabel.pipeline.job_context import AccessRules\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.parquet')):\n"
        "    try: read_box_tables([str(path)], {}, AccessRules(roots=(sys.argv[1],)), folder='')\n"
        "    except HqlabelError: pass\n"
    )
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_footer_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    with open(path, "wb") as file:
        file.write(b"PAR1")
        file.truncate(2**30)
        file.seek(2**30 - 8)
        file.write((2**30 - 20).to_bytes(4, "little") + b"PAR1")
    with little_memory(100), pytest.raises(JobRefused, match="footer"):
        make_plan(InputSettings(boxes=str(path)))


def test_more_pictures_than_bytes_are_refused(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.nulls(2_000_000, kind)}), tmp_path / "a.parquet")
    with pytest.raises(JobRefused, match=r"it states 2,000,000 pictures"):
        make_plan(InputSettings(images=str(tmp_path / "a.parquet")))


# ---------------------------------------------------------------------------------------------
# Text and tars
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["boxes.jsonl.gz", "boxes.csv.gz"])
def test_a_gzip_that_unpacks_for_ever_is_given_up(tmp_path, monkeypatch, name):
    from hqlabel.pipeline.inputs import read_table

    monkeypatch.setattr(read_table, "FREE_BYTES", 8 * 2**20)
    row = b'{"image_uri": "a.png", "boxes": []}\n' if "jsonl" in name else b"a.png,1,2,3,4\n"
    head = b"" if "jsonl" in name else b"image_uri,x1,y1,x2,y2\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(head + row * (30 * 2**20 // len(row))))
    with pytest.raises(JobRefused, match=rf"{name}: .*unpacks to more than"):
        read_box_tables([str(path)], {}, AccessRules(roots=(str(tmp_path),)), folder="")


BOM = "\ufeff"
NULLS = [
    f'{{"images": [{{"id": 1, "file_name": "a.png"}}], "annotations": [{BOM}null]}}',
    '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [null]}',
    f'{{"images": [{BOM}null], "annotations": []}}',
    f'{{"images": [{{"id": 1, "file_name": "a.png"}}], "annotations": [\n\r\t {BOM} null, {{}}]}}',
    f'{{"images": [{BOM}{{"id": 1, "file_name": "a.png"}}, {BOM}null], "annotations": []}}',
    f'{{"images": [{{"id": 1, "file_name": "a.png"}}], "annotations": [{BOM}{BOM}nullx]}}',
]
LINES = [
    f"{BOM}null",
    "null",
    f'{BOM}{{"image_uri": "a"}}\rnull',
    "\r\r \tnull\n",
    f"\n{BOM} null{{}}",
    "null{}",
]


def test_no_null_where_an_object_belongs_ends_the_process(tmp_path):
    """In a process of its own, which Arrow's reader would end by a signal."""
    for number, text in enumerate(NULLS):
        (tmp_path / f"{number}.json").write_text(text)
    for number, text in enumerate(LINES):
        (tmp_path / f"{number}.jsonl").write_text(text, newline="")
    script = (
        "import pathlib, sys\n"
        "from hqlabel.pipeline.errors import JobRefused\n"
        "from hqlabel.pipeline.planning.make_plan import make_plan\n"
        "from hqlabel.pipeline.settings import InputSettings\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: make_plan(InputSettings(boxes=str(path))); print('planned', path.name)\n"
        "    except JobRefused as error: print('refused', path.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    said = done.stdout.splitlines()
    assert len(said) == len(NULLS) + len(LINES), done.stdout
    assert [line for line in said if "refused" not in line] == ["planned 4.json"]  # of two images one is null


def test_a_null_inside_a_record_is_still_none_of_our_business(tmp_path):
    text = {"images": [{"id": 1, "file_name": "null"}], "annotations": [], "info": None}
    (tmp_path / "a.json").write_text(json.dumps(text, indent=1))
    found = read_instances(str(tmp_path / "a.json"), AccessRules(roots=(str(tmp_path),)), folder="")
    assert found.image_uri.to_pylist() == ["null"]


def lying_tar(stated: str) -> bytes:
    header = tarfile.TarInfo("a.png")
    header.size, header.pax_headers = 10, {"size": stated}
    data = header.tobuf(tarfile.PAX_FORMAT) + b"x" * 512
    return data + tarfile.TarInfo("b.png").tobuf() + bytes(1024)


@pytest.mark.parametrize("stated", ["99999999999999", "-1", "-1024", "-2048", "1e9", "0x10", ""])
def test_a_tar_that_lies_about_sizes_is_read_to_an_end_or_refused(tmp_path, stated):
    path = tmp_path / "a.tar"
    path.write_bytes(lying_tar(stated))
    began = time.monotonic()
    with contextlib.suppress(JobRefused):
        found = read_pictures(str(path), AccessRules(roots=(str(tmp_path),)))
        assert len(found.samples) <= 2
        for sample in found.samples:
            access = AccessRules(roots=(str(tmp_path),))
            with contextlib.suppress(ImageError):
                assert len(fetch_object(str(sample.picture), access, LIMITS).data) <= 10
    assert time.monotonic() - began < 5


def test_a_sparse_member_is_no_picture_however_large_it_says_it_is(tmp_path):
    header = tarfile.TarInfo("a.png")
    header.pax_headers = {"GNU.sparse.size": str(2**40), "GNU.sparse.map": f"0,1,{2**40 - 1},1"}
    header.pax_headers |= {"GNU.sparse.name": "a.png", "GNU.sparse.numblocks": "2"}
    header.size = 2
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header, io.BytesIO(b"xx"))
    with contextlib.suppress(JobRefused):
        assert read_pictures(str(tmp_path / "a.tar"), AccessRules(roots=(str(tmp_path),))).samples == []


def test_a_local_file_that_grows_is_read_up_to_the_range(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 100)
    with open_input(str(path), {}) as stream:
        os.truncate(path, 2**40)
        with little_memory(50), pytest.raises(JobRefused, match="not the version"):
            stream.read()
