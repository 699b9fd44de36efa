"""The protocol that commits rest on, on every kind of store, and what each outside fault becomes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import multiprocessing
import os
import pickle
import resource
import ssl
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hqlabel.pipeline.errors import ImageError, JobRefused, SystemicFault, UsageError
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.storage import cloud_buckets as buckets
from hqlabel.pipeline.storage import local_disk, read_objects
from hqlabel.pipeline.storage.backend import Entry, check_complete
from hqlabel.pipeline.storage.local_disk import LocalBackend
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.storage.read_objects import (
    fingerprint,
    head_object,
    list_inputs,
    list_objects,
    open_input,
    read_object,
)
from hqlabel.pipeline.storage.request_retries import ShortBody, classify
from hqlabel.pipeline.storage.uri_rules import check_uri
from tests.s3_proxy import Fault

# ---------------------------------------------------------------------------------------------
# The protocol, on local disk, S3 over HTTP and memory
# ---------------------------------------------------------------------------------------------


def test_a_created_object_reads_back_and_is_never_replaced_by_a_second_create(store: Store):
    assert store.put_if_absent("units/a.parquet", b"first")
    assert not store.put_if_absent("units/a.parquet", b"second")
    assert store.read("units/a.parquet") == b"first"


def test_a_second_create_of_equal_bytes_counts_as_ours(store: Store):
    """A winner cannot tell a repeat of his own request from this, and need not."""
    assert store.put_if_absent("a", b"same")
    assert store.put_if_absent("a", b"same")


def test_a_writer_that_was_overtaken_replaces_nothing(store: Store):
    assert store.put_if_unchanged("a", b"one", None)
    seen = store.head("a")
    assert store.put_if_unchanged("a", b"other", seen)
    assert not store.put_if_unchanged("a", b"late", seen)
    assert not store.put_if_unchanged("a", b"late", None)
    assert store.read("a") == b"other"
    assert store.put_if_unchanged("a", b"other", seen), "its own lost reply"
    [listed] = store.list("a")
    assert store.put_if_unchanged("a", b"third", listed)
    now = store.fetch("a")
    store.delete(["a"])
    assert not store.put_if_unchanged("a", b"late", listed)
    assert now.data == b"third"
    assert store.fetch("a") is None


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.faults)])
def test_of_many_processes_that_count_none_overwrites_another(kind: str, request: pytest.FixtureRequest):
    """Each adds its name to one object, again and again, by what it has read: every name must be there."""
    store: Store = request.getfixturevalue(f"{kind}_store")
    store.put("list", b"")
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(store, f"{n}")) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(store.read("list").split()) == sorted(
        f"{n}.{i}".encode() for n in range(4) for i in range(8)
    )


def _append(store: Store, name: str) -> None:
    for number in range(8):
        while True:
            there = store.fetch("list")
            seen = Entry(key="list", size=there.size, etag=there.etag)
            if store.put_if_unchanged("list", there.data + f"{name}.{number}\n".encode(), seen):
                break


def test_put_replaces_whole(store: Store):
    store.put("a", b"long old content")
    store.put("a", b"new")
    assert store.read("a") == b"new"


def test_a_listing_shows_every_put_at_once_sorted_and_by_prefix(store: Store):
    assert store.list() == []
    for key in ("units/00000002.g0", "units/00000001.g1", "units.json", "units/deep/x"):
        store.put(key, key.encode())
    assert [e.key for e in store.list()] == [
        "units.json",
        "units/00000001.g1",
        "units/00000002.g0",
        "units/deep/x",
    ]
    assert [(e.key, e.size) for e in store.list("units/0000")] == [
        ("units/00000001.g1", 17),
        ("units/00000002.g0", 17),
    ]
    assert store.list("units/9") == []
    assert len(store.list(limit=2)) == 2


def test_a_place_does_not_see_its_neighbour_of_a_longer_name(store: Store):
    neighbour = Store(Place(uri=store.place.uri + "-b", options=store.place.options))
    neighbour.put("x", b"1")
    assert store.list() == []


def test_head_tells_size_and_absence(store: Store):
    assert store.head("a") is None
    store.put("a", b"12345")
    entry = store.head("a")
    assert entry is not None
    assert entry.size == 5


def test_reading_an_absent_key_raises_at_once(store: Store):
    started = time.monotonic()
    with pytest.raises(NotFound, match=r"nope\.parquet"):
        store.read("nope.parquet")
    with pytest.raises(NotFound):
        store.open_parquet("nope.parquet")
    assert time.monotonic() - started < 2


def test_delete_removes_and_takes_absent_keys_as_done(store: Store):
    store.put("a", b"1")
    store.put("b", b"2")
    store.delete(["a", "never-was"])
    assert [e.key for e in store.list()] == ["b"]


def test_open_parquet_reads_any_range(store: Store):
    data = os.urandom(100_000)
    store.put("a", data)
    with store.open_parquet("a") as file:
        assert file.seek(-10, os.SEEK_END) == 99_990
        assert file.read() == data[-10:]
        file.seek(5)
        assert file.read(7) == data[5:12]
        file.seek(0)
        assert file.read() == data


@pytest.mark.parametrize("key", ["/a", "../a", "a/../b", "a//b", "", "."])
def test_a_key_that_could_leave_the_place_is_a_bug(local_store: Store, key: str):
    with pytest.raises(ValueError, match="no key of a store"):
        local_store.put(key, b"")


def test_one_of_many_threads_wins_each_create(store: Store):
    names = [f"token-{i}".encode() for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for round_number in range(10):
            key = f"race/{round_number}"
            barrier = threading.Barrier(6)

            def run(token: bytes, key: str = key, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return store.put_if_absent(key, token)

            won = list(pool.map(run, names))
            assert sum(won) == 1
            assert store.read(key) == names[won.index(True)]


def _race_in_process(place: Place, rounds: int, token: bytes, barrier, wins) -> None:
    store = Store(place)
    store.list()  # the client is made before the start
    for n in range(rounds):
        barrier.wait()
        if store.put_if_absent(f"race/{n}", token):
            wins.put(n)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_one_of_many_processes_wins_each_create(kind: str, request: pytest.FixtureRequest):
    store: Store = request.getfixturevalue(f"{kind}_store")
    context = multiprocessing.get_context("spawn")
    barrier, wins, rounds = context.Barrier(3), context.Queue(), 12
    racers = [
        context.Process(target=_race_in_process, args=(store.place, rounds, bytes([i]), barrier, wins))
        for i in range(3)
    ]
    for racer in racers:
        racer.start()
    won = sorted(wins.get(timeout=120) for _ in range(rounds))
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert won == list(range(rounds))
    assert wins.empty()


def test_a_reader_never_sees_a_part_of_an_object(store: Store):
    sizes = (3 * 2**20, 2 * 2**20)
    bodies = [bytes([n]) * size for n, size in enumerate(sizes)]
    whole = {hashlib.sha256(b).digest() for b in bodies}
    done = threading.Event()
    seen: list[bytes] = []
    listed: set[int] = set()

    def watch() -> None:
        while not done.is_set():
            listed.update(e.size for e in store.list())
            if store.head("a") is not None:
                seen.append(hashlib.sha256(store.read("a")).digest())

    watcher = threading.Thread(target=watch)
    watcher.start()
    store.put_if_absent("a", bodies[0])
    for n in range(12):
        store.put("a", bodies[(n + 1) % 2])
    done.set()
    watcher.join()
    store.read("a")
    assert set(seen) <= whole
    assert listed <= set(sizes)


def test_a_file_is_created_once_though_the_reply_of_its_link_is_lost(tmp_path, monkeypatch):
    really_link = os.link

    def link(source: str, target: str) -> None:  # as over NFS, where the client sends it again
        really_link(source, target)
        raise FileExistsError(errno.EEXIST, "there already", target)

    monkeypatch.setattr(os, "link", link)
    LocalBackend().create(str(tmp_path / "a"), b"ours", timeout_s=1)
    assert (tmp_path / "a").read_bytes() == b"ours"
    with pytest.raises(FileExistsError):
        LocalBackend().create(str(tmp_path / "a"), b"other", timeout_s=1)


def test_a_file_that_another_process_holds_is_not_replaced(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"theirs")
    seen = LocalBackend().stat(str(path), timeout_s=1)
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process holds the file's lock"):
            LocalBackend().replace_if(str(path), b"ours", seen, timeout_s=0.05)
    assert path.read_bytes() == b"theirs"
    LocalBackend().replace_if(str(path), b"ours", seen, timeout_s=1)
    assert path.read_bytes() == b"ours"


def test_a_range_of_a_file_that_is_written_to_meanwhile_is_said_to_have_changed(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    seen = LocalBackend().stat(str(path), timeout_s=1)
    really_read = local_disk._read_up_to

    def read(descriptor: int, size: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"more")
        return really_read(descriptor, size)

    monkeypatch.setattr(local_disk, "_read_up_to", read)
    with pytest.raises(ImageError, match="not the version"):
        LocalBackend().get_range(str(path), 0, 10, timeout_s=1, version=seen.etag)


def test_an_object_that_is_replaced_while_it_is_read_is_read_anew(memory_store: Store, monkeypatch):
    """Drivers of fsspec cannot request a version: they look before and after, and it was another."""
    memory_store.put("a", b"first")
    driver = buckets.backend_for(memory_store._scheme, memory_store.place.options)
    really_get_range, others = driver.get_range, [b"second", b"third"]

    def get_range(path: str, start: int, stop: int, *, timeout_s: float, version: str | None = None) -> bytes:
        if others:
            memory_store.put("a", others.pop())
        return really_get_range(path, start, stop, timeout_s=timeout_s, version=version)

    monkeypatch.setattr(driver, "get_range", get_range)
    assert memory_store.read("a") == b"second"
    assert not others


def test_a_store_that_sends_more_than_was_asked_for_is_at_fault(memory_store: Store, monkeypatch):
    memory_store.put("a", b"first")
    driver = buckets.backend_for(memory_store._scheme, memory_store.place.options)
    monkeypatch.setattr(driver._fs, "cat_file", lambda *_a, **_k: b"first and more")
    for read in (lambda: memory_store.read("a"), lambda: memory_store.read_range("a", 0, 5)):
        with pytest.raises(SystemicFault, match="14 bytes came for a range of 5"):
            read()


def test_a_lost_reply_on_create_is_resolved_by_reading_back(store: Store, monkeypatch):
    """The create is done, its reply is lost; the second try meets our own object."""
    driver = buckets.backend_for(store._scheme, store.place.options)
    really_create, lost = driver.create, []

    def create(path: str, data: bytes, *, timeout_s: float) -> None:
        really_create(path, data, timeout_s=timeout_s)
        if not lost:
            lost.append(path)
            raise ConnectionResetError(errno.ECONNRESET, "reply lost")

    monkeypatch.setattr(driver, "create", create)
    assert store.put_if_absent("mine", b"token-1")
    assert len(lost) == 1


def test_after_a_lost_request_somebody_elses_object_is_not_taken_for_ours(store: Store, monkeypatch):
    driver = buckets.backend_for(store._scheme, store.place.options)
    really_create, lost = driver.create, []

    def create(path: str, data: bytes, *, timeout_s: float) -> None:
        if not lost:
            lost.append(path)
            really_create(path, b"theirs", timeout_s=timeout_s)
            raise ConnectionResetError(errno.ECONNRESET, "request lost, a rival was quicker")
        really_create(path, data, timeout_s=timeout_s)

    monkeypatch.setattr(driver, "create", create)
    assert not store.put_if_absent("mine", b"ours")
    assert store.read("mine") == b"theirs"


def test_a_store_travels_to_another_process(store: Store):
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


# ---------------------------------------------------------------------------------------------
# Local disk
# ---------------------------------------------------------------------------------------------

KILLED_WRITE = """
import os, signal, sys
from hqlabel.pipeline.storage import local_disk
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.storage.output_store import Store
step, verb, uri = sys.argv[1:4]
real = getattr(os, step)
def die(*args, **kwargs):
    if sys.argv[4] == "after":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(local_disk.os, step, die)
getattr(Store(Place(uri=uri)), verb)("units/a", b"new" * 1000)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("step", "verb"),
    [("fsync", "put_if_absent"), ("link", "put_if_absent"), ("unlink", "put_if_absent"), ("replace", "put")],
)
def test_a_killed_local_write_shows_nothing_or_the_whole(tmp_path, step: str, verb: str, when: str):
    command = [sys.executable, "-c", KILLED_WRITE, step, verb, str(tmp_path / "s"), when]
    assert subprocess.run(command, check=False).returncode == -9
    store = Store(Place(uri=str(tmp_path / "s")))
    assert [e.size for e in store.list()] in ([], [3000])
    store.put("units/a", b"after")
    assert store.read("units/a") == b"after"


def test_temporary_files_of_dead_writers_are_dropped_after_an_hour(local_store: Store):
    local_store.put("units/a", b"1")
    folder = os.path.join(local_store.place.uri, "units")
    for name, age in ((".a.1-ff.tmp", 7200), (".b.2-ff.tmp", 0)):
        with open(os.path.join(folder, name), "w"):
            pass
        os.utime(os.path.join(folder, name), (time.time() - age,) * 2)
    assert [e.key for e in local_store.list()] == ["units/a"]
    assert local_store.abort_stale_uploads() == 1
    assert sorted(os.listdir(folder)) == [".b.2-ff.tmp", "a"]


FULL_DISK = """
import sys
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.storage.output_store import Store
store = Store(Place(uri=sys.argv[1]))
for verb in (store.put_if_absent, store.put):
    try:
        verb("a", bytes(2_000_000))
    except SystemicFault as fault:
        assert fault.code == "disk", fault
    else:
        raise AssertionError("written")
assert store.list() == []
"""


def test_a_full_disk_is_a_systemic_fault_and_leaves_nothing(tmp_path):
    subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "s")],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert [n for _, _, names in os.walk(tmp_path) for n in names] == []


@pytest.mark.parametrize(("verb", "step"), [("put_if_absent", "link"), ("put", "replace")])
def test_a_local_write_is_synced_before_it_is_seen_and_its_name_after(
    local_store: Store, monkeypatch, verb, step
):
    """A power cut can then lose the file, but never leave an empty or half one under its name."""
    local_store.put("units/first", b"")  # the folders are there
    steps: list[str] = []
    real_sync, real_step = os.fsync, getattr(os, step)

    def sync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def name(*args: str) -> None:
        steps.append(step)
        real_step(*args)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, step, name)
    getattr(local_store, verb)("units/a", b"1")
    assert steps == ["file", step, "folder"]


def test_a_failing_fsync_is_not_a_commit(local_store: Store, monkeypatch):
    monkeypatch.setattr(local_store, "budget_s", 0.3)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemicFault, match="disk"):
        local_store.put_if_absent("a", b"1")
    assert local_store.list() == []


def test_a_file_system_without_links_is_refused_with_advice(local_store: Store, monkeypatch):
    def fail(*_args: object) -> None:
        raise OSError(errno.EPERM, "injected")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(UsageError, match="no hard links"):
        local_store.put_if_absent("a", b"1")


def test_a_file_that_changes_while_it_is_read_is_said_to(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"1" * 10)
    monkeypatch.setattr(
        "hqlabel.pipeline.storage.local_disk._read_within", lambda *_: path.write_bytes(b"22") and b"2"
    )
    with pytest.raises(ImageError, match="changed"):
        LocalBackend().get(str(path), max_bytes=None, timeout_s=5)


def _read(uri: str, *, options=None, max_bytes: int | None = None, within_s: float = 20.0):
    deadline = time.monotonic() + within_s
    return read_object(uri, options or {}, max_bytes=max_bytes, deadline_monotonic=deadline)


def test_reading_a_local_image_gives_bytes_size_and_tag(tmp_path):
    path = tmp_path / "a%20b::c #1?.jpg"
    path.write_bytes(b"12345")
    for uri in (str(path), f"file://{path}"):
        fetched = _read(uri)
        assert (fetched.data, fetched.size) == (b"12345", 5)
        assert fetched.etag is not None


def test_a_path_is_opened_as_it_was_checked(tmp_path):
    """`link/..` is the folder above the link's target, for the check and for the open alike."""
    root = tmp_path / "root"
    (root / "deep" / "deeper").mkdir(parents=True)
    os.symlink(root / "deep" / "deeper", root / "link")
    (root / "a.jpg").write_bytes(b"inside")
    (tmp_path / "a.jpg").write_bytes(b"secret")
    uri = f"{root}/link/../../a.jpg"  # folded without looking at the link, this would be the secret
    check_uri(uri, AccessRules(roots=(str(root.resolve()),)))
    assert _read(uri).data == b"inside"


@pytest.mark.timeout(60)  # to open a named pipe would wait for ever
def test_odd_local_files_fail_alone_and_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.symlink(tmp_path / "nothing", tmp_path / "dangling.jpg")
    codes = {"pipe.jpg": "uri_refused", "folder.jpg": "uri_refused", "dangling.jpg": "not_found"}
    codes |= {"absent.jpg": "not_found", "/dev/zero": "uri_refused"}
    for name, code in codes.items():
        with pytest.raises(ImageError) as caught:
            _read(os.path.join(tmp_path, name), within_s=3)
        assert caught.value.code == code, name


def test_an_object_over_the_limit_is_refused_before_its_body(tmp_path, s3_store: Store):
    (tmp_path / "a").write_bytes(bytes(1001))
    s3_store.put("a", bytes(1001))
    for uri, options in ((str(tmp_path / "a"), {}), (f"{s3_store.place.uri}/a", s3_store.place.options)):
        assert _read(uri, options=options, max_bytes=1001).size == 1001
        with pytest.raises(ImageError, match=r"too_many_bytes: 1001 bytes, more than .* 1000"):
            _read(uri, options=options, max_bytes=1000)


# ---------------------------------------------------------------------------------------------
# S3 over HTTP, broken on purpose
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(moto_s3, s3_faults):
    """(store behind the proxy, proxy); the place is fresh."""
    place = moto_s3.place()
    return Store(Place(uri=place.uri, options={"endpoint_url": s3_faults.endpoint})), s3_faults


def _read_image(store: Store, key: str, within_s: float = 20.0) -> bytes:
    return _read(f"{store.place.uri}/{key}", options=store.place.options, within_s=within_s).data


@pytest.mark.parametrize(
    "fault",
    [
        {"do": "status", "status": 503, "code": "SlowDown", "times": 2},
        {"do": "status", "status": 500, "code": "InternalError", "times": 2},
        {"do": "status", "status": 429, "code": "TooManyRequests", "times": 1},
        {"do": "status", "status": 400, "code": "RequestTimeout", "times": 1},
        {"do": "reset", "times": 2},
        {"do": "truncate", "times": 1},
        {"do": "corrupt", "times": 1},
    ],
    ids=lambda f: f.get("code", f["do"]),
)
def test_what_passes_by_itself_is_tried_again(broken, fault):
    store, proxy = broken
    data = os.urandom(20_000)
    store.put("a.jpg", data)
    landed = proxy.add(Fault(match=r"GET .*a\.jpg", **fault))
    assert _read_image(store, "a.jpg") == data
    assert landed.landed == fault["times"]
    assert proxy.requests(r"GET .*a\.jpg") == fault["times"] + 1


def test_s3_answers_of_one_request_are_not_multiplied_by_inner_retries(broken):
    store, proxy = broken
    store.put("a.jpg", b"x")
    fault = proxy.add(Fault(match=r"GET .*a\.jpg", do="status"))
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"unreachable.*SlowDown"):
        _read_image(store, "a.jpg", within_s=3.0)
    assert time.monotonic() - started < 4
    assert 4 <= fault.landed <= 8


@pytest.mark.parametrize("do", ["truncate", "corrupt"])
def test_a_body_that_never_arrives_whole_is_never_accepted(broken, do):
    store, proxy = broken
    store.put("a.jpg", os.urandom(20_000))
    fault = proxy.add(Fault(match=r"GET .*a\.jpg", do=do))
    with pytest.raises(ImageError, match="unreachable"):
        _read_image(store, "a.jpg", within_s=3.0)
    assert fault.landed > 1


@pytest.mark.parametrize("rate", [100.0, 40_000.0])
def test_a_drip_is_cut_by_the_deadline(broken, rate):
    store, proxy = broken
    store.put("a.jpg", bytes(400_000))
    fault = proxy.add(Fault(match=r"GET .*a\.jpg", do="drip", rate=rate))
    started = time.monotonic()
    with pytest.raises(ImageError, match="fetch_timeout"):
        _read_image(store, "a.jpg", within_s=2.0)
    assert time.monotonic() - started < 3
    assert fault.landed == 1


def test_a_missing_image_is_asked_for_once(broken):
    store, proxy = broken
    store.put("other", b"")
    with pytest.raises(ImageError, match="not_found"):
        _read_image(store, "nope.jpg")
    assert proxy.requests("nope") == 1


@pytest.mark.parametrize(
    ("status", "code", "systemic"),
    [
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "ExpiredToken", "credentials"),
        (400, "ExpiredToken", "credentials"),
        (403, "InvalidAccessKeyId", "credentials"),
        (403, "SignatureDoesNotMatch", "credentials"),
        (404, "NoSuchBucket", "store"),
    ],
)
def test_what_every_request_would_meet_is_no_images_fault(broken, status, code, systemic):
    store, proxy = broken
    fault = proxy.add(Fault(match="/", do="status", status=status, code=code))
    for call in (
        lambda: _read_image(store, "a.jpg"),
        lambda: store.put_if_absent("a", b""),
        lambda: store.list(),
    ):
        with pytest.raises(SystemicFault, match=f"{systemic}.*{code}") as caught:
            call()
        assert caught.value.code == systemic
    assert fault.landed == 3


def test_a_denied_image_is_its_own_fault_and_a_denied_store_is_systemic(broken):
    store, proxy = broken
    proxy.add(Fault(match="/", do="status", status=403, code="AccessDenied"))
    with pytest.raises(ImageError, match=r"denied.*AccessDenied"):
        _read_image(store, "a.jpg")
    with pytest.raises(SystemicFault, match=r"denied.*AccessDenied"):
        store.put_if_absent("a", b"")


def test_a_profile_that_is_missing_is_a_matter_of_credentials(aws_environment, monkeypatch):
    options = {"profile": "no-such-profile"}
    with pytest.raises(SystemicFault, match="credentials"):
        _read("s3://bucket/a.jpg", options=options)
    with pytest.raises(SystemicFault, match="credentials"):
        Store(Place(uri="s3://bucket/a", options=options)).list()
    with pytest.raises(JobRefused, match="no-such-profile"):
        open_input("s3://bucket/boxes.parquet", options)


def test_no_credentials_are_said_to_be_missing(moto_s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    buckets.forget_backends()
    with pytest.raises(SystemicFault, match="credentials"):
        Store(moto_s3.place()).list()
    buckets.forget_backends()


def test_many_threads_share_one_client(moto_s3):
    options = dict(moto_s3.options) | {"config_kwargs": {"connect_timeout": 7}}
    barrier = threading.Barrier(8)

    def open_driver(_n: int):
        barrier.wait()
        return buckets.backend_for("s3", options)

    with ThreadPoolExecutor(8) as pool:
        drivers = list(pool.map(open_driver, range(8)))
    assert len({id(driver) for driver in drivers}) == 1
    assert drivers[0]._fs._s3 is not None


@pytest.mark.timeout(60)
def test_a_forked_child_makes_its_own_client(s3_store: Store):
    s3_store.put("a", b"1")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, s3_store.read("a"))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        assert told.read() == b"1"
    assert os.waitpid(child, 0)[1] == 0


def test_a_lost_reply_over_http_leaves_the_winner_a_winner(broken):
    store, proxy = broken
    fault = proxy.add(Fault(match="PUT .*/commit", do="drop_after", times=1))
    assert store.put_if_absent("commit", b"token")
    assert fault.landed == 1
    assert proxy.requests("PUT .*/commit") == 2


def test_a_conflicting_conditional_write_is_tried_again(broken):
    store, proxy = broken
    code = "ConditionalRequestConflict"
    fault = proxy.add(Fault(match="PUT", do="status", status=409, code=code, times=1))
    assert store.put_if_absent("a", b"1")
    assert fault.landed == 1


def test_a_refused_create_without_a_condition_in_the_answer_counts_as_there(broken):
    store, proxy = broken
    store.put("a", b"theirs")
    proxy.add(Fault(match="PUT", do="status", status=412, code="PreconditionFailed"))
    assert not store.put_if_absent("a", b"1")


def test_a_create_is_one_conditional_put_however_large(broken):
    store, proxy = broken
    assert store.put_if_absent("big", bytes(101 * 2**20))  # s3fs by itself would send parts
    assert proxy.requests("PUT .*/big") == 1
    assert proxy.requests("POST") == 0


def test_open_uploads_under_the_place_are_aborted_and_no_others(s3_store: Store, moto_s3):
    import boto3

    client = boto3.client("s3", endpoint_url=moto_s3.endpoint)
    prefix = s3_store.place.uri.removeprefix("s3://bucket/")
    for key in (f"{prefix}/part-0", "elsewhere/part-0"):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    assert s3_store.abort_stale_uploads() == 1
    left = client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert [u["Key"] for u in left] == ["elsewhere/part-0"]
    client.abort_multipart_upload(Bucket="bucket", Key="elsewhere/part-0", UploadId=left[0]["UploadId"])


def test_listings_longer_than_one_page_are_whole(s3_store: Store, monkeypatch):
    monkeypatch.setattr(buckets.S3Backend, "page_size", 3)
    for n in range(10):
        s3_store.put(f"u/{n:05d}", b"")
    assert [e.key for e in s3_store.list("u/")] == [f"u/{n:05d}" for n in range(10)]


# ---------------------------------------------------------------------------------------------
# The table, and what people point at
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (OSError(errno.ENOSPC, ""), "systemic", "disk"),
        (OSError(errno.EDQUOT, ""), "systemic", "disk"),
        (OSError(errno.EFBIG, ""), "systemic", "disk"),
        (OSError(errno.EIO, ""), "retry", "disk"),
        (OSError(errno.ESTALE, ""), "retry", "store"),
        (PermissionError(errno.EACCES, ""), "systemic", "denied"),
        (FileNotFoundError("key"), "image", "not_found"),
        (TimeoutError(), "retry", "store"),
        (ConnectionResetError(errno.ECONNRESET, ""), "retry", "store"),
        (ssl.SSLError(1, "a bad record; 1 is no EPERM here"), "retry", "store"),
        (ssl.SSLWantReadError(2, "2 is no ENOENT"), "retry", "store"),
        (ssl.SSLEOFError(8, "cut off"), "retry", "store"),
        (KeyError("a bug of ours"), "bug", ""),
        (ValueError("another"), "bug", ""),
    ],
    ids=repr,
)
def test_errors_are_classified(error: Exception, kind: str, code: str):
    verdict = classify(error)
    assert (verdict.kind, verdict.code) == (kind, code)


def test_a_bug_is_not_swallowed_by_the_retry_loop(local_store: Store, monkeypatch):
    monkeypatch.setattr(LocalBackend, "walk", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local_store.list()


def test_secrets_in_options_are_refused_by_name_and_never_shown():
    options = {"endpoint_url": "http://x", "client_kwargs": {"aws_secret_access_key": "CANARY"}}
    with pytest.raises(UsageError, match=r"client_kwargs\.aws_secret_access_key") as caught:
        Store(Place(uri="s3://b/k", options=options))
    assert "CANARY" not in str(caught.value)


def test_error_text_carries_no_query_and_no_login():
    from hqlabel.pipeline.storage.request_retries import describe

    text = describe(OSError("GET http://me:CANARY1@host/a.jpg?X-Amz-Signature=CANARY2 failed\n\x1b[31m"))
    assert "CANARY" not in text
    assert "\n" not in text
    assert "\x1b" not in text
    assert "http://host/a.jpg" in text


def test_inputs_are_listed_with_sizes_and_odd_names_byte_for_byte(tmp_path, s3_store: Store):
    names = ["a b.jpg", "%20.jpg", "é.jpg", "e\u0301.jpg", "x#1?.jpg", "[1].jpg", "sub/日本.jpg", "-l;|.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
        s3_store.put(name, b"123")
    for root, options in ((str(tmp_path), {}), (s3_store.place.uri, s3_store.place.options)):
        found = list_objects(root, options)
        assert [e.key for e in found] == sorted(f"{root}/{n}" for n in names)
        assert {e.size for e in found} == {3}
        for entry in found:
            assert _read(entry.key, options=options).data == b"123"


def test_a_programs_folder_is_listed_without_following_its_linked_folders(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.jpg").write_bytes(b"1")
    os.symlink(tmp_path / "out", tmp_path / "in" / "link")
    os.symlink(tmp_path / "gone", tmp_path / "in" / "dangling.jpg")
    assert [os.path.basename(e.key) for e in list_objects(str(tmp_path / "in"), {})] == [
        "dangling.jpg",
        "link",
    ]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*.jpg", ["a.jpg", "b1.jpg"]),
        ("**/*.jpg", ["a.jpg", "b1.jpg", "d/c.jpg", "d/e/f.jpg"]),
        ("d/*.jpg", ["d/c.jpg"]),
        ("b[0-9].jpg", ["b1.jpg"]),
        ("?.jpg", ["a.jpg"]),
        ("*/c.*", ["d/c.jpg"]),
    ],
)
def test_globs(tmp_path, pattern, matches):
    for name in ("a.jpg", "b1.jpg", "c.png", "d/c.jpg", "d/e/f.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list_inputs(str(tmp_path), {}, pattern=pattern).entries
    assert [e.key for e in found] == [f"{tmp_path}/{m}" for m in matches]


def test_input_files_are_streamed_and_told_apart(tmp_path, s3_store: Store):
    data = os.urandom(9 * 2**20)
    (tmp_path / "boxes").write_bytes(data)
    s3_store.put("boxes", data)
    for uri, options in (
        (str(tmp_path / "boxes"), {}),
        (f"{s3_store.place.uri}/boxes", s3_store.place.options),
    ):
        with open_input(uri, options) as file:
            assert file.read() == data
        before = fingerprint(uri, options)
        assert before["size"] == len(data)
        assert "etag" in before or "sha256" in before
        assert fingerprint(uri, options) == before
        with pytest.raises(JobRefused, match="no such file"):
            open_input(uri + "x", options)
    os.utime(tmp_path / "boxes", (1, 1))
    assert fingerprint(str(tmp_path / "boxes"), {})["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.fixture
def small_ranges(monkeypatch) -> list[tuple[int, int]]:
    """Ranges of 64 KiB, later of 256 KiB at most; the list is of those that were requested."""
    monkeypatch.setattr(read_objects, "FIRST_RANGE", 2**16)
    monkeypatch.setattr(read_objects, "LARGEST_RANGE", 2**18)
    asked: list[tuple[int, int]] = []
    get_range = buckets.S3Backend.get_range

    def noted(self, path, start, stop, **how):
        asked.append((start, stop))
        return get_range(self, path, start, stop, **how)

    monkeypatch.setattr(buckets.S3Backend, "get_range", noted)
    return asked


def test_a_fault_in_a_large_file_costs_one_range(moto_s3, s3_faults, small_ranges):
    data, place = os.urandom(2**20), moto_s3.place()
    Store(place).put("weights.pth", data)
    fault = s3_faults.add(Fault(match=r"GET .*weights", do="truncate", keep=10, skip=3, times=2))
    with open_input(f"{place.uri}/weights.pth", {"endpoint_url": s3_faults.endpoint}) as file:
        assert file.read() == data
    assert fault.landed == 2
    assert small_ranges[3] == small_ranges[4] == small_ranges[5]
    once = [*small_ranges[:3], *small_ranges[5:]]
    assert [start for start, _ in once] == [0, *(stop for _, stop in once[:-1])], "none twice, none left out"
    assert max(stop - start for start, stop in once) == 2**18


def test_a_large_file_may_take_longer_than_a_budget_while_its_bytes_come(
    moto_s3, s3_faults, small_ranges, monkeypatch
):
    data, place = os.urandom(2**19), moto_s3.place()
    Store(place).put("weights.pth", data)
    monkeypatch.setattr(read_objects, "INPUT_BUDGET_S", 2.0)
    monkeypatch.setattr(read_objects, "SLOW_RANGE_S", 0.1)
    slow = s3_faults.add(Fault(match=r"GET .*weights", do="drip", rate=200_000.0))
    began = time.monotonic()
    with open_input(f"{place.uri}/weights.pth", {"endpoint_url": s3_faults.endpoint}) as file:
        assert file.read() == data
    assert slow.landed == len(small_ranges) == 8
    assert time.monotonic() - began > read_objects.INPUT_BUDGET_S


def test_a_large_file_is_held_once_while_it_is_read(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(300 * 2**20))
    script = """
import resource, sys
from hqlabel.pipeline.storage.read_objects import open_input

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_input(sys.argv[1], {}) as file:
    data = file.read()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, len(data))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "weights")], capture_output=True, text=True, check=True
    )
    mib, size = ran.stdout.split()
    assert int(size) == 300 * 2**20
    assert float(mib) < 500


@pytest.fixture
def site():
    """A web site that answers every path with the status it names, and with a body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path[1:4]))
            self.send_header("ETag", '"tag"')
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"12345")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_images_come_over_http_with_their_tag(site):
    fetched = _read(f"{site}/200/a%20b.jpg?size=2")
    assert (fetched.data, fetched.size, fetched.etag) == (b"12345", 5, "tag")
    with pytest.raises(ImageError, match="too_many_bytes"):
        _read(f"{site}/200", max_bytes=4)


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "denied"), (403, "denied"), (404, "not_found"), (410, "not_found"), (400, "unreachable"),
     (418, "unreachable"), (500, "unreachable"), (503, "unreachable"), (429, "unreachable")],
)  # fmt: skip
def test_what_one_site_answers_is_no_fault_of_the_job(site, status, code):
    with pytest.raises(ImageError) as caught:
        _read(f"{site}/{status}", within_s=0.5)
    assert caught.value.code == code
    assert str(status) in caught.value.message


def test_a_short_body_is_an_error_that_passes():
    check_complete(b"123", 3)
    check_complete(b"123", None)
    with pytest.raises(ShortBody) as caught:
        check_complete(b"12", 3)
    assert classify(caught.value).kind == "retry"


def test_head_object_tells_absence(tmp_path):
    assert head_object(str(tmp_path / "a"), {}) is None
