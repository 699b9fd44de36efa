"""The supervised decoder: what one picture does to it costs that picture alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.images import decode_process as decode_child
from hqlabel.pipeline.images.decode_process import MAX_DEATHS, DecodeChild
from hqlabel.pipeline.images.decode_upright import decode_image
from hqlabel.pipeline.settings import Limits
from tests.fakes import trouble

SIDE = 96


def picture(seed=0, height=60, width=90):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def child():
    made = DecodeChild(Limits(decode_timeout_s=20), SIDE)
    yield made
    made.close()


@pytest.fixture
def troubled():
    limits = Limits(decode_timeout_s=1.0, decode_memory_bytes=2**30)
    made = DecodeChild(limits, SIDE, decoder="tests.fakes:troubled_decoder")
    yield made
    made.close()


def code_of(child, data):
    with pytest.raises(ImageError) as caught:
        child.decode(data)
    return caught.value.code


def test_the_child_answers_what_the_function_answers(child):
    for seed, height, width in [(1, 60, 90), (2, 200, 31), (3, 96, 96)]:
        data = picture(seed, height, width)
        expected = decode_image(data, max_pixels=10**6, side=SIDE)

        found = child.decode(data)

        assert np.array_equal(found.pixels_hwc, expected.pixels_hwc)
        assert (found.size_hw, found.stored_size_hw) == (expected.size_hw, expected.stored_size_hw)
        assert (found.exif_orientation, found.format) == (None, "PNG")


def test_an_error_of_the_bytes_is_passed_on_and_the_child_lives(child):
    child.decode(picture())
    pid = child._process.pid

    assert code_of(child, picture()[:500]) == "truncated"
    assert code_of(child, b"") == "empty"
    assert child.decode(picture()).size_hw == (60, 90)
    assert child._process.pid == pid


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("crash", "crashed"),
        ("exit", "crashed"),
        ("kill", "crashed"),
        ("sleep", "timeout"),
        ("spin", "timeout"),
        ("bomb", "out_of_memory"),
    ],
)
def test_trouble_costs_its_own_picture_and_no_other(troubled, kind, code):
    before = troubled.decode(picture(1))
    start = time.monotonic()

    assert code_of(troubled, trouble(kind)) == code

    assert time.monotonic() - start < 15
    assert np.array_equal(troubled.decode(picture(1)).pixels_hwc, before.pixels_hwc)


def test_a_bug_in_the_decoder_is_no_fault_of_a_picture(troubled):
    with pytest.raises(RuntimeError, match="a bug in the decoder"):
        troubled.decode(trouble("bug"))


def test_a_crash_is_tried_three_times_and_says_how_it_ended(troubled):
    starts = []
    start = troubled._start
    troubled._start = lambda: (starts.append(1), start())

    with pytest.raises(ImageError, match="3 times: SIGSEGV"):
        troubled.decode(trouble("crash"))

    assert len(starts) == MAX_DEATHS


def test_a_child_that_died_between_two_pictures_is_not_charged_to_the_next(child):
    child.decode(picture())
    child._process.kill()
    child._process.wait()

    assert child.decode(picture()).size_hw == (60, 90)


def test_memory_is_bounded(child):
    big = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(big, "PNG")
    tight = DecodeChild(Limits(decode_memory_bytes=64 * 2**20), SIDE)
    try:
        assert code_of(tight, big.getvalue()) == "out_of_memory"
        assert tight.decode(picture()).size_hw == (60, 90)
    finally:
        tight.close()
    assert child.decode(big.getvalue()).size_hw == (5000, 5000)


def test_an_interrupted_call_leaves_no_answer_for_the_next(child, monkeypatch):
    child.decode(picture(1))
    wait = child._wait_for_answer
    monkeypatch.setattr(child, "_wait_for_answer", lambda timeout_s: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        child.decode(picture(2, 50, 50))
    monkeypatch.setattr(child, "_wait_for_answer", wait)

    assert child.decode(picture(3, 40, 80)).size_hw == (40, 80)


def test_the_child_starts_where_only_an_import_hook_finds_the_package(monkeypatch):
    """As in an editable install, used from a folder that is not the repository."""
    here = Path(decode_child.__file__).resolve().parents[2]
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != here])
    made = DecodeChild(Limits(), SIDE)
    try:
        assert made.decode(picture()).size_hw
    finally:
        made.close()


def test_the_child_sees_no_credentials(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    made = DecodeChild(Limits(), SIDE)
    try:
        made.decode(picture())
        with open(f"/proc/{made._process.pid}/environ", "rb") as file:
            assert b"canary" not in file.read()
    finally:
        made.close()


def test_a_decoder_that_cannot_be_imported_stops_the_job():
    made = DecodeChild(Limits(), SIDE, decoder="nowhere:decode")
    try:
        with pytest.raises(SystemicFault, match="nowhere"):
            made.decode(picture())
    finally:
        made.close()


def test_the_child_ends_with_its_parent():
    code = (
        f"import sys, time; sys.path[:] = {sys.path!r}\n"
        "from hqlabel.pipeline.images.decode_process import DecodeChild\n"
        "from hqlabel.pipeline.settings import Limits\n"
        "from tests.pipeline.images.test_decode_process import picture\n"
        "child = DecodeChild(Limits(), 64); child.decode(picture()); print(child._process.pid, flush=True)\n"
        "time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the child lived on for 5 s")


def test_a_node_that_can_start_no_process_is_at_fault_itself(monkeypatch):
    def start(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    child, before = DecodeChild(Limits(), 64), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("hqlabel.pipeline.images.decode_process.subprocess.Popen", start)

    for _ in range(2):
        with pytest.raises(SystemicFault, match=r"can be started: .*unavailable") as caught:
            child.decode(b"x")

    assert caught.value.code == "resources"
    assert len(os.listdir("/proc/self/fd")) == before
