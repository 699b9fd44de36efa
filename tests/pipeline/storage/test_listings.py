"""A listing is requested page by page: a fault costs one page, and pages that come are time enough."""

from __future__ import annotations

import errno
import os
import re
import time
from types import SimpleNamespace

import pytest
from fsspec.spec import AbstractFileSystem

from hqlabel.pipeline.errors import JobRefused, SystemicFault
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage import cloud_buckets as buckets
from hqlabel.pipeline.storage import local_disk, output_store, read_objects
from hqlabel.pipeline.storage.backend import Entry, FolderListing
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.read_objects import list_inputs, list_objects
from tests.s3_proxy import Fault, FaultProxy

KEYS = [f"u/{number:05d}" for number in range(10)]
PAGE = r"GET .*list-type=2"


@pytest.fixture(scope="module")
def ten(moto_s3) -> Store:
    """A store with ten objects."""
    store = Store(moto_s3.place())
    for key in KEYS:
        store.put(key, b"1")
    return store


@pytest.fixture
def listed(ten: Store, s3_faults: FaultProxy, monkeypatch) -> tuple[Store, FaultProxy]:
    """Ten objects, listed by two a page through a proxy that breaks what it is told to."""
    monkeypatch.setattr(buckets.S3Backend, "page_size", 2)
    options = {"endpoint_url": s3_faults.endpoint}
    return Store(Place(uri=ten.place.uri, options=options), budget_s=10), s3_faults


def tokens(proxy: FaultProxy) -> list[str]:
    """Return the pages that were requested, in order: each one's token."""
    found = (re.search(r"continuation-token=([^&]*)", line) for line in proxy.log if "list-type=2" in line)
    return [match[1] if match else "" for match in found]


@pytest.mark.parametrize("what", ["status", "reset", "truncate"])
def test_a_fault_of_a_page_costs_that_page(what, listed):
    store, proxy = listed
    fault = proxy.add(Fault(match=PAGE, do=what, skip=2, times=3))
    assert [entry.key for entry in store.list("u/")] == KEYS
    found = list_inputs(f"{store.place.uri}/u", store.place.options).entries
    assert [entry.key for entry in found] == [f"{store.place.uri}/{key}" for key in KEYS]
    assert fault.landed == 3
    [first, second, third, *rest] = tokens(proxy)
    assert rest[:3] == [third] * 3, "the third page, again and again"
    assert len(rest) == 3 + 2 + 5
    assert len({first, second, third}) == 3


def test_a_listing_whose_pages_come_may_take_longer_than_a_budget(listed, monkeypatch):
    store, proxy = listed
    monkeypatch.setattr(read_objects, "INPUT_BUDGET_S", 2.0)
    late = proxy.add(Fault(match=PAGE, do="status", skip=4, times=1))
    slow = proxy.add(Fault(match=PAGE, do="delay", seconds=0.5))
    began = time.monotonic()
    assert len(list_objects(f"{store.place.uri}/u", store.place.options)) == len(KEYS)
    assert (slow.landed, late.landed) == (5, 1)
    assert time.monotonic() - began > read_objects.INPUT_BUDGET_S


@pytest.mark.parametrize("skip", [0, 3])
def test_a_page_that_never_comes_ends_the_listing_within_its_budget_by_name(skip, listed, monkeypatch):
    store, proxy = listed
    monkeypatch.setattr(read_objects, "INPUT_BUDGET_S", 2.0)
    fault = proxy.add(Fault(match=PAGE, do="status", skip=skip))
    with pytest.raises(JobRefused, match=rf"list {store.place.uri}/u: .*SlowDown.*given up"):
        list_inputs(f"{store.place.uri}/u", store.place.options)
    assert fault.landed >= 2
    assert len(set(tokens(proxy)[skip:])) == 1
    with pytest.raises(SystemicFault, match=rf"{store.place.uri}: list u/: .*SlowDown"):
        Store(store.place, budget_s=2).list("u/")


def test_many_objects_are_deleted_by_requests_that_are_repeated_alone(moto_s3, s3_faults, monkeypatch):
    monkeypatch.setattr(output_store, "_DELETED_AT_ONCE", 2)
    place = moto_s3.place()
    store = Store(Place(uri=place.uri, options={"endpoint_url": s3_faults.endpoint}))
    for key in KEYS[:5]:
        store.put(key, b"1")
    fault = s3_faults.add(Fault(match="POST .*delete", do="status", skip=1, times=2))
    store.delete(KEYS[:5])
    assert store.list() == []
    assert (fault.landed, s3_faults.requests("POST .*delete")) == (2, 3 + 2)


class Driver(AbstractFileSystem):
    """A driver of fsspec that knows folders alone; `ls` of some fails a few times."""

    cachable = False

    def __init__(self, failing: dict[str, list[OSError]]) -> None:
        super().__init__()
        self.failing = failing
        self.asked: list[str] = []

    def ls(self, path, detail=True, **_):
        self.asked.append(path)
        if self.failing.get(path):
            raise self.failing[path].pop(0)
        below = {"b/in": ["x/", "y/", "1"], "b/in/x": ["2"], "b/in/y": ["3", "z/"], "b/in/y/z": ["4"]}
        kind = {True: "directory", False: "file"}
        return [
            {"name": f"{path}/{name.rstrip('/')}", "size": 1, "type": kind[name.endswith("/")]}
            for name in below[path]
        ]


def test_a_folder_that_a_driver_cannot_list_is_tried_again_and_never_passed_over(monkeypatch):
    passing, lasting = (errno.ECONNRESET, "reset"), (errno.EACCES, "closed")
    driver = Driver({"b/in/y": [OSError(*passing), OSError(*passing)]})
    monkeypatch.setattr(read_objects, "backend_for", lambda *_: buckets.FsspecBackend(driver))
    found = list_inputs("any://b/in", {}).entries
    assert [entry.key for entry in found] == [f"any://b/in/{n}" for n in ("1", "x/2", "y/3", "y/z/4")]
    assert sorted(driver.asked) == ["b/in", "b/in/x", *["b/in/y"] * 3, "b/in/y/z"]

    driver.failing["b/in/x"] = [OSError(*lasting)]
    with pytest.raises(JobRefused, match="closed"):
        list_inputs("any://b/in", {})


@pytest.mark.parametrize("whose", ["the job's", "a user's"])
def test_a_folder_of_a_mounted_disk_that_is_stale_for_a_moment_is_read_again(whose, tmp_path, monkeypatch):
    for name in ("a/1", "b/2", "c/3"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"1")
    asked = []
    scandir = os.scandir

    def stale(path):
        asked.append(os.path.relpath(path, tmp_path))
        if asked[-1] == "b" and asked.count("b") < 3:
            raise OSError(errno.ESTALE, "stale file handle")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    if whose == "the job's":
        found = [entry.key for entry in Store(Place(uri=str(tmp_path))).list()]
    else:
        found = [os.path.relpath(entry.key, tmp_path) for entry in list_inputs(str(tmp_path), {}).entries]
    assert found == ["a/1", "b/2", "c/3"]
    assert sorted(asked) == [".", "a", *["b"] * 3, "c"]


def test_a_file_whose_state_cannot_be_told_is_no_file_that_is_gone(tmp_path, monkeypatch):
    """An error of the disk for a committed unit must not read as: not committed."""

    def failing(_):
        raise OSError(errno.EIO, "input/output error")

    entry = SimpleNamespace(
        path=f"{tmp_path}/a", name="a", stat=lambda: failing(0), is_symlink=lambda: False,
        is_dir=lambda follow_symlinks: False,
    )  # fmt: skip
    with pytest.raises(OSError, match="input/output"):
        local_disk._listed(entry)


def test_an_object_that_a_listing_gives_twice_is_not_planned_twice(monkeypatch):
    one = Entry(key="b/in/1.png", size=1)
    whole = SimpleNamespace(walk=lambda _: FolderListing("b/in", "b/in/", lambda *_: ([one, one], [])))
    monkeypatch.setattr(read_objects, "backend_for", lambda *_: whole)
    with pytest.raises(JobRefused, match=r"any://b/in/1\.png came twice"):
        list_inputs("any://b/in", {})
