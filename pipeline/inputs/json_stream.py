"""Arrays of records inside one big JSON file, cut into lines for Arrow's reader in bounded memory.

COCO files are one JSON value of any size: a list (results), or an object with lists `images`,
`annotations`, `categories` (instances). This file finds where the records begin and end, by the depth
of brackets outside strings, and hands on blocks with one record a line; Arrow parses those with typed
columns. Nothing here looks inside a record. 0.1 s for 10 MB, about 20 MB of memory.

Why not ijson: a file of nested brackets, 400 kB long, made its C parser take more than 20 GB (measured,
3.6.0), it refuses the NaN that Python's own `json.dump` writes, and it makes a dict of every box.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 2 * 2**20
MAX_RECORD_BYTES = 64 * 2**20
MAX_DEPTH = 64

_DELTA = np.zeros(256, dtype=np.int8)
_DELTA[[ord("["), ord("{")]] = 1
_DELTA[[ord("]"), ord("}")]] = -1
_STRUCTURAL = np.zeros(256, dtype=np.bool_)
_STRUCTURAL[[ord(c) for c in '"[]{},']] = True
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*\Z')
_KEY_BYTES = 4096
_CLOSER = {b"[": ord("]"), b"{": ord("}")}

_AFTER = "there is text after its end (a file with one object a line must be named .jsonl)"

Positions = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class JsonDamage(ValueError):
    """The text is no JSON of the wanted shape; the message says what was found and wanted."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Records of the top-level array `name` ("" when the file is one array): `count` of them in `text`.

    One record a line, the last line without its newline.
    """

    name: str
    text: bytes
    count: int


def first_byte(file: BinaryIO) -> str:
    """The first character that is not white space ("" in an empty file); the file is rewound."""
    file.seek(0)
    start = file.read(BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return start[:1].decode("latin-1")


def split_arrays(file: BinaryIO, names: Collection[str]) -> Iterator[Lines]:
    """The records of the wanted arrays, in the order of the file, in blocks of about BLOCK_BYTES.

    An array without records gives one block of none, so that it can be told from no array.

    `names`: keys of the top-level object; {""} for a file that is one array.

    Raises:
        JsonDamage: cut short, trailing text, brackets that do not match, an array given twice, nested
            deeper than MAX_DEPTH, or a record of more than MAX_RECORD_BYTES.
    """
    cutter = _Cutter(names)
    while block := file.read(BLOCK_BYTES):
        yield from cutter.feed(block)
    cutter.finish()


class _Cutter:
    """Where we are in the file between two blocks."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._level = 1 if "" in names else 2  # the depth at which commas part the records
        self._opener = b""  # the file's first character
        self._over = False  # its last bracket has been read
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the block before ended within an escape
        self._seen: set[str] = set()
        self._current: str | None = None  # the wanted array we are in
        self._carry = b""  # its unfinished record
        self._parted = False  # it had a comma already
        self._tail = b""  # the text before the present block, where a key may stand

    def feed(self, block: bytes) -> Iterator[Lines]:
        """The records that end in this block."""
        if not self._opener:
            block = block.removeprefix(b"\xef\xbb\xbf")
        position, char, depth = self._structure(block)
        self._check_outer(block, position, char, depth)
        text = np.frombuffer(block, dtype=np.uint8).copy()
        text[(text == 10) | (text == 13)] = 32  # from here on a newline parts two records
        text[position[(char == ord(",")) & (depth == self._level)]] = 10
        opens = (char == ord("[")) & (depth == self._level)
        edges = opens | (char == ord("]")) & (depth == self._level - 1)
        start = 0
        for at, is_open in zip(position[edges].tolist(), opens[edges].tolist(), strict=True):
            if is_open:
                self._enter(block, at)
                start = at + 1
            elif self._current is not None:
                yield from self._close(text[start:at].tobytes())
        if self._current is not None:
            yield from self._extend(text[start:].tobytes())
        self._tail = (self._tail + block[-_KEY_BYTES:])[-_KEY_BYTES:]

    def finish(self) -> None:
        """None when the file was one whole JSON value; else JsonDamage."""
        if not self._opener:
            raise JsonDamage("it is empty; wanted a JSON list or object")
        if not self._over:
            raise JsonDamage("it ends early: a bracket or a string is not closed")

    def _structure(self, block: bytes) -> tuple[Positions, Bytes, Positions]:
        """Position and byte of every bracket and comma outside strings, and the depth after it."""
        plain = self._without_escapes(block)
        position = np.flatnonzero(_STRUCTURAL[plain])
        char = plain[position]
        quotes = char == ord('"')
        inside = (np.cumsum(quotes) + self._in_string) % 2 == 1
        if len(inside):
            self._in_string = bool(inside[-1])
        outside = ~quotes & ~inside
        position, char = position[outside], char[outside]
        depth = self._depth + np.cumsum(_DELTA[char], dtype=np.int64)
        if len(depth):
            self._depth = int(depth[-1])
        if depth.max(initial=0) > MAX_DEPTH:
            raise JsonDamage(f"its brackets are nested more than {MAX_DEPTH} deep")
        return position, char, depth

    def _without_escapes(self, block: bytes) -> Bytes:
        """The block with escaped quotes and backslashes blanked, byte for byte in place."""
        if self._escaped:
            block = b"_" + block[1:]
        if b"\\" in block:
            block = block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._escaped = block.endswith(b"\\")
        return np.frombuffer(block, dtype=np.uint8)

    def _check_outer(self, block: bytes, position: Positions, char: Bytes, depth: Positions) -> None:
        """The file is one value: its first bracket, its last one, and nothing around them."""
        wanted = b"[" if self._level == 1 else b"{"
        self._opener = self._opener or block.lstrip()[:1]
        if self._opener not in (b"", wanted):
            opener = self._opener.decode("ascii", "backslashreplace")
            raise JsonDamage(f"it begins with '{opener}'; wanted '{wanted.decode()}'")
        if self._over and block.strip():
            raise JsonDamage(_AFTER)
        ends = np.flatnonzero(depth == 0)
        if not len(ends):
            return
        if block[int(position[ends[0]]) + 1 :].strip():
            raise JsonDamage(_AFTER)
        if int(char[ends[0]]) != _CLOSER[wanted] or self._in_string:
            raise JsonDamage("its brackets do not match")
        self._over = True

    def _enter(self, block: bytes, at: int) -> None:
        """Begins the array that opens at `at`; the key before it is its name."""
        if self._current is not None:
            raise JsonDamage(f"its brackets do not match: {self._current!r} is not closed")
        name = "" if self._level == 1 else self._key_before(block, at)
        if name in self._seen:
            raise JsonDamage(f"{name!r} is given twice")
        self._seen.add(name)
        self._current = name if name in self._names else None
        self._carry, self._parted = b"", False

    def _key_before(self, block: bytes, at: int) -> str:
        match = _KEY.search((self._tail + block[max(0, at - _KEY_BYTES) : at])[-_KEY_BYTES:])
        if match is None:
            raise JsonDamage("a list stands where a key was expected")
        return match.group(1).decode("utf-8", errors="replace")

    def _extend(self, text: bytes) -> Iterator[Lines]:
        """More of the current array, which goes on: its whole records."""
        name = self._current or ""
        whole, comma, self._carry = (self._carry + text).rpartition(b"\n")
        if len(self._carry) > MAX_RECORD_BYTES:
            raise JsonDamage(f"a record of {name!r} is longer than {MAX_RECORD_BYTES >> 20} MiB")
        if comma:
            self._parted = True
            yield Lines(name=name, text=whole, count=whole.count(b"\n") + 1)

    def _close(self, text: bytes) -> Iterator[Lines]:
        """The last records of the current array. A blank one (after a comma) is counted, as no JSON."""
        name, last = self._current or "", self._carry + text
        self._current, self._carry = None, b""
        has_records = bool(last.strip()) or self._parted
        yield Lines(name=name, text=last, count=last.count(b"\n") + 1 if has_records else 0)
