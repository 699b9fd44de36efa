"""What users read (stderr) and what programs read (stdout), kept apart.

Tables, numbers and wording are made here so that every command writes the same thing the same way.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO

from rich import filesize
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hqlabel.pipeline.errors import HqlabelError, clean_text
from hqlabel.pipeline.storage.uri_rules import masked

_NUMBERS = frozenset("0123456789.,-+e ")
_stdout_for_data: list[TextIO] = []  # the real one, while `sys.stdout` is something else


@contextlib.contextmanager
def stdout_for_data_alone() -> Iterator[None]:
    """Let `data` and `data_json` alone write on stdout meanwhile; what others print goes to stderr.

    Ray prints the errors of its cluster on stdout whatever its settings (2.60), in the middle of our JSON.
    """
    _stdout_for_data.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout_for_data.pop()


def code_version() -> str:
    """Return the version of this code, as files carry it."""
    try:
        return importlib.metadata.version("hqlabel")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def say(text: str = "") -> None:
    """Write one line for users on stderr; a closed stderr is no reason to end a job.

    Control characters are escaped, here and in `data`: a file's name may hold commands to a terminal. What
    looks like a credential is replaced, whatever message it came with.
    """
    _write(sys.stderr, masked(visible(text)))


def say_error(error: HqlabelError) -> None:
    """Write for users why a command ends, and how to go on."""
    say(f"hqlabel: {error}")
    if error.exit_code == 5:
        say("hqlabel: stopped; what is committed is safe, the same command goes on from there")


def data(text: str) -> None:
    """Write one line of data on stdout."""
    _write(_data_stream(), visible(text))


def data_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object on stdout: one line, UTF-8, NaN and infinity as null."""
    _write(_data_stream(), json_line(value))


def json_line(value: Mapping[str, Any]) -> str:
    """Return one JSON object in one line, NaN and infinity as null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Return lines of `name  value`, the values in one column."""
    width = max((cell_len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name}{' ' * (width - cell_len(name))}  {value}" for name, value in rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table that fits the terminal, or 80 columns; columns of numbers to the right.

    Numbers, a box's four too, are never broken: other columns wrap, or else the lines get longer.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, cells in zip(head, zip(*rows, strict=True), strict=True):
        numbers = all(cell[:1].isdigit() or cell[:1] in "<>-" for cell in cells)
        whole = numbers and all(" " not in cell or _NUMBERS.issuperset(cell) for cell in cells)
        least = max(map(cell_len, cells), default=0) if whole else None
        justify: Literal["left", "right"] = "right" if numbers else "left"
        made.add_column(Text(name), justify=justify, overflow="fold", no_wrap=whole, min_width=least)
    for row in rows:
        made.add_row(*map(Text, row))
    width, wide = shutil.get_terminal_size().columns - 2, Console(width=1000)
    if wide.measure(made).maximum > width:
        made.padding = (0, 1, 0, 0)
    width = max(width, wide.measure(made).minimum)
    page = Console(file=io.StringIO(), width=width, color_system=None)
    with page.capture() as captured:
        page.print(made)
    return "\n".join(f"  {line.rstrip()}" for line in captured.get().splitlines())


def shown(text: str, most: int = 60) -> str:
    """Return `text` from outside made safe for a terminal, its middle cut when longer than `most`."""
    safe = clean_text(text)
    half = (most - 1) // 2
    return safe if len(safe) <= most else f"{safe[: most - 1 - half]}…{safe[-half:]}"


def fingerprint(text: str) -> str:
    """Return a fingerprint of words whole, of a hash its beginning."""
    return text if len(text) <= 40 else text[:12]


def visible(text: str) -> str:
    """Return `text` with every character escaped that a terminal does not print, but the ends of lines."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def with_a_mask(masks: int, empty: int) -> str:
    """Return the boxes with a mask of a pixel or more, and the empty ones: `435 with a mask, 787 empty`."""
    return f"{masks:,} with a mask" + (f", {empty:,} empty" if empty else "")


def size(number: float) -> str:
    """Return bytes for users, in powers of 1000: `812 bytes`, `4.1 MB`."""
    return filesize.decimal(int(number))


def duration(seconds: float) -> str:
    """Return seconds for users: `8.4 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def rate(number: float) -> str:
    """Return a rate with about three digits: `0.42`, `31.2`, `1,204`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def share(part: int, whole: int) -> str:
    """Return `part` of `whole` in per cent; never rounded to 0 or 100 when it is not."""
    if whole == 0:
        return "0%"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    return ">99.9%" if 99.9 < percent < 100 else f"{percent:.1f}%".replace(".0%", "%")


def _data_stream() -> TextIO:
    return _stdout_for_data[0] if _stdout_for_data else sys.stdout


def _write(stream: Any, text: str) -> None:
    """Write a line; characters that the terminal cannot show are escaped, a closed pipe is ignored."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(safe + "\n")
        stream.flush()
    except BrokenPipeError:
        # `hqlabel status | head`: the rest is not wanted. The job goes on.
        if stream in (sys.__stdout__, sys.__stderr__):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
