"""Small real things that stand in for slow or lucky ones; each is told what to do by its input."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time

from pipeline.decode import DecodedImage, decode_image

TROUBLE = b"TROUBLE:"


def trouble(kind: str) -> bytes:
    """Bytes that make `troubled_decoder` misbehave: crash, exit, kill, sleep, spin, bomb or bug."""
    return TROUBLE + kind.encode()


def troubled_decoder(data: bytes, *, max_pixels: int, side: int) -> DecodedImage:
    """`decode_image`, except for the bytes that `trouble` makes, which harm their process."""
    if data.startswith(TROUBLE):
        _MISBEHAVE[data.removeprefix(TROUBLE).decode()]()
    return decode_image(data, max_pixels=max_pixels, side=side)


def _bug() -> None:
    raise RuntimeError("a bug in the decoder")


_MISBEHAVE = {
    "crash": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(137),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(10**6),
    "spin": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),  # for ever, and never lets go of the GIL
    "bomb": lambda: bytearray(64 * 2**30),
    "bug": _bug,
}
