"""Masks in Label Studio's brush encoding, which shares nothing with COCO's runs but the name.

It is the run-length packing of @thi.ng/rle-pack over the bytes of an RGBA picture, row by row: a head
(number of bytes, word size, four sizes of run fields), then runs: one bit (1: a repeated word), two bits
that name the size of the next field, the run's length less one, the word. Only repeats are written here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WORD_BITS = 8
_FIELD_BITS = (3, 4, 8, 16)
_LONGEST = 1 << _FIELD_BITS[-1]
_CHANNELS = 4


def encode_brush(mask_hw: npt.NDArray[np.uint8]) -> list[int]:
    """Return a mask (1 inside) as Label Studio's `rle`: integers of bytes, 255 inside in all channels."""
    flat = mask_hw.reshape(-1)
    stops = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    lengths = np.diff(stops, prepend=0) * _CHANNELS
    words = flat[stops - 1]
    head = f"{flat.size * _CHANNELS:032b}{_WORD_BITS - 1:05b}" + "".join(f"{n - 1:04b}" for n in _FIELD_BITS)
    bits = head + "".join(
        _run(length, word) for length, word in zip(lengths.tolist(), words.tolist(), strict=True)
    )
    bits += "0" * (-len(bits) % 8)
    return list(int(bits, 2).to_bytes(len(bits) // 8, "big"))


def _run(length: int, word: int) -> str:
    value = "11111111" if word else "00000000"
    whole, rest = divmod(length, _LONGEST)
    text = f"111{'1' * _FIELD_BITS[-1]}{value}" * whole
    return text + _short_run(rest, value) if rest else text


def _short_run(length: int, value: str) -> str:
    field = next(place for place, bits in enumerate(_FIELD_BITS) if length <= 1 << bits)
    return f"1{field:02b}{length - 1:0{_FIELD_BITS[field]}b}{value}"
