"""What people read (stderr) and what programs read (stdout), kept apart.

Tables, numbers and wording are made here so that every command says the same thing the same way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from pipeline.errors import clean_text
from pipeline.errors import count as count

_stdout_for_data: list[TextIO] = []  # the real one, while `sys.stdout` is something else


@contextlib.contextmanager
def stdout_for_data_alone() -> Iterator[None]:
    """None; meanwhile `data` and `data_json` alone write on stdout, and what others print goes to stderr.

    Ray prints the errors of its cluster on stdout whatever it is told (2.60), in the middle of our JSON.
    """
    _stdout_for_data.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout_for_data.pop()


def say(text: str = "") -> None:
    """Write one line for people on stderr; a closed stderr is no reason to end a job.

    Control characters are escaped, here and in `data`: a file's name may hold orders to a terminal.
    """
    _write(sys.stderr, visible(text))


def data(text: str) -> None:
    """Write one line of data on stdout."""
    _write(_data_stream(), visible(text))


def data_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object on stdout: one line, UTF-8, NaN and infinity as null."""
    _write(_data_stream(), json_line(value))


def json_line(value: Mapping[str, Any]) -> str:
    """One JSON object in one line, NaN and infinity as null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def pairs(rows: Sequence[tuple[str, str]], indent: int = 2) -> str:
    """Lines of `name  value`, the values in one column."""
    width = max((cells(name) for name, _ in rows), default=0)
    return "\n".join(" " * indent + name + " " * (width - cells(name) + 2) + value for name, value in rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 2) -> str:
    """A plain table, columns as wide as their longest cell; numbers (by their look) to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(cells(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        " " * indent + "  ".join(_fit(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def cells(text: str) -> int:
    """How many terminal cells `text` takes: wide East Asian characters take two, marks none."""
    return sum(_char_cells(c) for c in text)


def shown(text: str, most: int = 60) -> str:
    """`text` from outside made safe for a terminal, its middle left out when longer than `most`."""
    safe = clean_text(text)
    half = (most - 1) // 2
    return safe if len(safe) <= most else f"{safe[: most - 1 - half]}…{safe[-half:]}"


def fingerprint(text: str) -> str:
    """A fingerprint of words whole, of a hash its beginning."""
    return text if len(text) <= 40 else text[:12]


def visible(text: str) -> str:
    """`text` with every character escaped that a terminal does not print, but for the ends of lines."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def with_a_mask(masks: int, empty: int) -> str:
    """Return the boxes with a mask of a pixel or more, and the empty ones: `435 with a mask, 787 empty`."""
    return f"{masks:,} with a mask" + (f", {empty:,} empty" if empty else "")


def size(number: float) -> str:
    """Bytes for people, powers of 1000: `812 B`, `4.1 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds for people: `8.4 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
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
    """A rate with about three digits: `0.42`, `31.2`, `1,204`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def share(part: int, whole: int) -> str:
    """`part` of `whole` in per cent; never rounded to 0 or 100 when it is not."""
    if whole == 0:
        return "0%"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    return ">99.9%" if 99.9 < percent < 100 else f"{percent:.1f}%".replace(".0%", "%")


def command(words: Sequence[str]) -> str:
    """A command line that can be pasted into a shell as it stands."""
    return " ".join(_shell_word(word) for word in words)


def _shell_word(word: str) -> str:
    safe = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=@%+,")
    return word if word and set(word) <= safe else "'" + word.replace("'", "'\"'\"'") + "'"


def _fit(cell: str, width: int) -> str:
    space = " " * (width - cells(cell))
    return space + cell if cell[:1].isdigit() or cell[:1] in "<>-" else cell + space


def _char_cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _data_stream() -> TextIO:
    return _stdout_for_data[0] if _stdout_for_data else sys.stdout


def _write(stream: Any, text: str) -> None:
    """Write a line; characters that the terminal cannot show are escaped, a closed pipe is left alone."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(safe + "\n")
        stream.flush()
    except BrokenPipeError:
        # `hqlabel status | head`: what is left is not wanted. The job goes on.
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
