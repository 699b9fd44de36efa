"""Signals end the process with 130 within three seconds, whatever the main thread is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

START = """
import sys, time, hashlib
from hqlabel.jobs.terminal.signals import Interrupted, Interrupts, end_now
interrupts = Interrupts()
interrupts.install()
def release():
    print("released", flush=True)
interrupts.give_back_on_exit(release)
"""
ASLEEP = """
try:
    print("ready", flush=True)
    time.sleep(60)
except Interrupted:
    interrupts.give_back()
    print("unwound", flush=True)
    end_now()
"""
# "ready" comes from another thread, while the main one is inside the call: a signal that arrives just
# before the call would unwind the main thread instead.
STUCK = """
import threading
threading.Timer(1.0, print, ["ready"], {"flush": True}).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""
STUCK_RELEASE = """
import threading
interrupts.give_back_on_exit(lambda: time.sleep(60))
threading.Timer(1.0, print, ["ready"], {"flush": True}).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""
POLLING = """
try:
    print("ready", flush=True)
    while not interrupts.should_stop():
        pass
    print("asked", flush=True)
except Interrupted:
    print("raised", flush=True)
interrupts.give_back()
interrupts.give_back()
end_now()
"""

IN_A_FINALIZER = """
class Slow:
    def __del__(self):
        print("ready", flush=True)
        while not interrupts.requested.is_set():
            pass
slow = Slow()
del slow
time.sleep(60)
"""

# The main thread's own words about the same fault would come second.
FROM_A_THREAD = """
import threading
from hqlabel.pipeline.errors import SystemicFault
def end():
    interrupts.end_with(SystemicFault("resources", "Ray has died"))
interrupts.give_back_on_exit(lambda: time.sleep(0.3))
threading.Thread(target=end).start()
time.sleep(0.1)
interrupts.wait_if_ending()
print("the main thread went on")
"""


def ended_by(code: str, number: signal.Signals, *, ignored: bool = False) -> tuple[int, list[str], float]:
    """(exit code, lines, seconds from the signal to the end) of a process that runs `code`."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(START + code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[3],
        preexec_fn=ignore if ignored else None,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    return process.returncode, out.splitlines(), time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_waiting_main_thread_unwinds_at_once(number: signal.Signals) -> None:
    code, lines, seconds = ended_by(ASLEEP, number)
    assert (code, lines) == (130, ["released", "unwound"])
    assert seconds < 1.0


def test_an_inherited_ignore_does_not_hold() -> None:
    code, lines, _ = ended_by(ASLEEP, signal.SIGINT, ignored=True)
    assert (code, lines) == (130, ["released", "unwound"])


def test_a_main_thread_inside_a_long_call_is_ended_after_the_mark_is_given_back() -> None:
    code, lines, seconds = ended_by(STUCK, signal.SIGTERM)
    assert (code, lines) == (130, ["released"])
    assert seconds < 3.0


def test_a_signal_inside_a_finalizer_ends_the_process_without_a_trace() -> None:
    code, lines, seconds = ended_by(IN_A_FINALIZER, signal.SIGINT)
    assert (code, lines) == (130, ["released"])
    assert seconds < 3.0


def test_a_release_that_hangs_does_not_hold_the_process() -> None:
    code, _, seconds = ended_by(STUCK_RELEASE, signal.SIGTERM)
    assert code == 130
    assert seconds < 3.0


def test_a_mark_is_given_back_once() -> None:
    code, lines, _ = ended_by(POLLING, signal.SIGTERM)
    assert code == 130
    assert lines.count("released") == 1


def test_a_thread_ends_the_process_with_the_code_and_the_sentence_of_its_error_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + FROM_A_THREAD],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=20,
        check=False,
    )
    assert done.returncode == 5
    said = ["hqlabel: resources: Ray has died", "hqlabel: stopped; what is committed is safe"]
    assert [line.partition(", the")[0] for line in done.stdout.splitlines()] == [*said, "released"]
