"""A supervised process that decodes: what a picture does to its decoder costs that picture alone.

`DecodeChild` is the parent's end, `serve` the child's. The child is a bare interpreter with numpy and
Pillow, started once for a worker process and used for every picture there; it has a bound on its
memory, no credentials in its environment, and the kernel's out-of-memory killer takes it
first. A crash, a hang (also one that holds the GIL) or a bomb ends the child; the next picture gets
a new one, 0.2 s later.

Bytes travel through two anonymous shared files, messages through two pipes: for a picture of one
megapixel the round trip costs about 1 ms (see docs/dev/measurements.md).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import hqlabel
from hqlabel.pipeline.errors import ImageError, SystemicFault, clean_text
from hqlabel.pipeline.images.decode_upright import DecodedImage

if TYPE_CHECKING:  # the child reads no settings, and pydantic would cost it 14 MB
    from hqlabel.model.records import Fit
    from hqlabel.pipeline.settings import Limits

MAX_DEATHS = 3
START_TIMEOUT_S = 60.0
_GRACE_S = 5  # the child's own alarm rings this much after the parent's deadline, if the parent is gone
# Those of the parent's variables that a decoder needs: no credentials.
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ", "HOME", "TMPDIR")
# Left alone, glibc hands every picture's pages back to the kernel and gets them again zeroed: where this was
# measured, that doubled the CPU time of decoding (16 against 7 ms at 1 megapixel). 128 MiB stay in the child.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20)}
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_BOOT = (
    "import sys; sys.path[:] = {path!r}; "
    "from hqlabel.pipeline.images.decode_process import serve; serve({config!r})"
)

Decoder = Callable[..., DecodedImage]


@dataclass(frozen=True, kw_only=True)
class _ChildConfig:
    """Settings of a child, passed at its start as text."""

    decoder: str
    max_pixels: int
    side: int
    memory_bytes: int
    files: tuple[int, int, int, int]  # requests, answers, bytes in, pixels out
    fit: Fit = "pad"
    detector_side: int | None = None
    draft_jpeg: bool = False


class DecodeChild:
    """Decode pictures in a child process, one at a time, each within its own deadline.

    Not safe for several threads. `decoder`: `module:function` with the signature of `decode_image`.
    Owns its process: `close()` ends it, and so does the end of this one.
    """

    def __init__(
        self,
        limits: Limits,
        side: int,
        *,
        decoder: str = "hqlabel.pipeline.images.decode_upright:decode_image",
        fit: Fit = "pad",
        detector_side: int | None = None,
        draft_jpeg: bool = False,
    ) -> None:
        self._limits = limits
        self._fit: Fit = fit
        self._draft_jpeg = draft_jpeg
        self._side = side
        self._detector_side = detector_side
        self._decoder = decoder
        self._process: subprocess.Popen[bytes] | None = None
        self._data_file = _shared_file()
        self._pixel_file = _shared_file()
        self._requests = -1
        self._answers = -1

    def decode(self, data: bytes) -> DecodedImage:
        """Return the decoded picture; its pixels are an own copy.

        Raises:
            ImageError: as `decode_image`, or `crashed` after the third death of a
                child over them, `timeout` after `limits.decode_timeout_s`, `out_of_memory`.
            RuntimeError: the decoder has a bug; its trace is in the message.
            SystemicFault: `resources`, when no child can be started.
        """
        deaths: list[str] = []
        while len(deaths) < MAX_DEATHS:
            answer = self._ask(data)
            if "death" not in answer:
                return self._result(answer)
            deaths.append(answer["death"])
        raise ImageError("crashed", f"{len(data)} bytes ended the decoder {len(deaths)} times: {deaths[-1]}")

    def close(self) -> None:
        """End the child and close its pipes. A later `decode` starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            os.close(self._requests)
            os.close(self._answers)
            self._process = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit the modules may be gone already
            self.close()
            os.close(self._data_file)
            os.close(self._pixel_file)

    def _ask(self, data: bytes) -> dict[str, Any]:
        """Return the child's answer, or {"death": how it ended} after which there is no child."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # died since the last picture: none of this one's doing
        if self._process is None:
            self._start()
        os.ftruncate(self._data_file, len(data))
        _write_all(self._data_file, data)
        request = {"size": len(data), "alarm_s": int(self._limits.decode_timeout_s) + _GRACE_S}
        try:
            with contextlib.suppress(BrokenPipeError):  # no answer will come either, and that is noticed
                os.write(self._requests, _line(request))
            answer = self._wait_for_answer(self._limits.decode_timeout_s)
        except BaseException:  # interrupted here: the child's late answer must not meet the next picture
            self.close()
            raise
        return {"death": self._bury()} if answer is None else answer

    def _result(self, answer: dict[str, Any]) -> DecodedImage:
        if "bug" in answer:
            last_line = answer["bug"].strip().rpartition("\n")[2]
            raise RuntimeError(f"a bug in the decoder: {last_line}\n{answer['bug']}")
        if "code" in answer:
            if answer["code"] == "out_of_memory":
                self.close()  # its heap may be full of what it could not finish
            raise ImageError(answer["code"], answer["message"])
        shapes = [(height, width, 3) for height, width in answer["shapes_hw"]]
        sizes = [height * width * 3 for height, width, _ in shapes]
        data = memoryview(_read_all(self._pixel_file, sum(sizes)))
        pixels = np.frombuffer(data[: sizes[0]], np.uint8).reshape(shapes[0])
        shown = np.frombuffer(data[sizes[0] :], np.uint8).reshape(shapes[1]) if len(shapes) > 1 else None
        return DecodedImage(
            pixels_hwc=pixels,
            detector_hwc=shown,
            size_hw=tuple(answer["size_hw"]),
            stored_size_hw=tuple(answer["stored_size_hw"]),
            exif_orientation=answer["exif_orientation"],
            format=answer["format"],
        )

    def _wait_for_answer(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the child's next line, a `timeout` answer of our own, or None when the child is dead."""
        deadline = time.monotonic() + timeout_s
        received = b""
        while not received.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], left)[0]:
                self.close()
                return {"code": "timeout", "message": f"not decoded within {timeout_s:g} s"}
            piece = os.read(self._answers, 65536)
            if not piece:
                return None
            received += piece
        answer: dict[str, Any] = json.loads(received)
        return answer

    def _bury(self) -> str:
        """Clean up after the dead child and return how it ended, as text."""
        assert self._process is not None
        status = self._process.wait()
        self.close()
        if status >= 0:
            return f"exit status {status}"
        name = signal.Signals(-status).name
        return f"{name} (often the kernel, short of memory)" if name == "SIGKILL" else name

    def _start(self) -> None:
        request_end, self._requests = os.pipe()
        self._answers, answer_end = os.pipe()
        files = (request_end, answer_end, self._data_file, self._pixel_file)
        config = _ChildConfig(
            decoder=self._decoder,
            max_pixels=self._limits.max_image_pixels,
            side=self._side,
            memory_bytes=self._limits.decode_memory_bytes,
            files=files,
            fit=self._fit,
            detector_side=self._detector_side,
            draft_jpeg=self._draft_jpeg,
        )
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        boot = _BOOT.format(path=_import_path(), config=json.dumps(vars(config)))
        with tempfile.TemporaryFile() as errors:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", boot],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=files,
                    env={**kept, **_KEEP_MEMORY, **_ONE_THREAD},
                )
            except OSError as error:  # no memory, no process numbers: the node's trouble
                os.close(self._requests)
                os.close(self._answers)
                raise SystemicFault(
                    "resources", clean_text(f"no decoder process can be started: {error}")
                ) from error
            finally:
                os.close(request_end)
                os.close(answer_end)
            answer = self._wait_for_answer(START_TIMEOUT_S)
            if answer is None or "ready" not in answer:
                self.close()
                errors.seek(0)
                stderr = errors.read()[-400:].decode(errors="replace")
                reason = f"{answer or 'it ended without an answer'}; {stderr}"
                raise SystemicFault("resources", clean_text(f"no decoder process can be started: {reason}"))


def _import_path() -> list[str]:
    """Return this process's import path, with this package's folder on it.

    An editable install is found by a hook that only `site` sets up, and the child starts without `site`.
    """
    here = str(Path(hqlabel.__file__).resolve().parents[1])
    return sys.path if here in sys.path else [*sys.path, here]


def _shared_file() -> int:
    """Return the descriptor of a nameless file in memory (on disk where the system has no memfd)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hqlabel-decode")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, data: memoryview | bytes, start: int = 0) -> None:
    """Write `data` into the file from `start` on. One call writes at most 2 GiB on Linux."""
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.pwrite(descriptor, view[at:], start + at)


def _read_all(descriptor: int, size: int) -> bytes:
    """Return the first `size` bytes of the file. One call reads at most 2 GiB on Linux."""
    pieces, at = [], 0
    while at < size:
        pieces.append(os.pread(descriptor, size - at, at))
        at += len(pieces[-1])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


# ---------------------------------------------------------------------------------------------
# The child's end
# ---------------------------------------------------------------------------------------------


def serve(config_json: str) -> None:
    """Answer requests until the parent closes its end of the pipe."""
    config = _ChildConfig(**json.loads(config_json))
    requests, answers, _, _ = config.files
    module, _, name = config.decoder.partition(":")
    decoder: Decoder = getattr(importlib.import_module(module), name)
    _bound_this_process(config.memory_bytes)
    os.write(answers, _line({"ready": os.getpid()}))
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            request = json.loads(line)
            signal.alarm(request["alarm_s"])
            answer = _answer(decoder, config, request["size"])
            signal.alarm(0)
            os.write(answers, _line(answer))


def _bound_this_process(memory_bytes: int) -> None:
    """Let this process take `memory_bytes` more at most, dump no core, and be killed first."""
    # The alarm's default action kills even a loop in native code: for a child whose parent is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # Linux only
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))


def _answer(decoder: Decoder, config: _ChildConfig, size: int) -> dict[str, Any]:
    """Return the answer to one request; the pixels of a success are in the shared file."""
    _, _, data_file, pixel_file = config.files
    try:
        data = _read_all(data_file, size)
        options = {"detector_side": config.detector_side, "draft_jpeg": config.draft_jpeg, "fit": config.fit}
        more = {name: value for name, value in options.items() if value and value != "pad"}
        found = decoder(data, max_pixels=config.max_pixels, side=config.side, **more)
    except ImageError as error:
        return {"code": error.code, "message": error.message}
    except MemoryError:
        bound = config.memory_bytes // 2**20
        return {
            "code": "out_of_memory",
            "message": f"needs more than {bound} MiB to decode (limits.decode_memory_bytes)",
        }
    except Exception:  # not the picture's fault: `decode_image` has a code for everything that is
        return {"bug": traceback.format_exc()}
    start, pictures = 0, [one for one in (found.pixels_hwc, found.detector_hwc) if one is not None]
    for picture in pictures:
        _write_all(pixel_file, np.ascontiguousarray(picture).reshape(-1).data, start)
        start += picture.size
    return {
        "shapes_hw": [picture.shape[:2] for picture in pictures],
        "size_hw": found.size_hw,
        "stored_size_hw": found.stored_size_hw,
        "exif_orientation": found.exif_orientation,
        "format": found.format,
    }
