"""Hashes of keys by whole columns, the same in every process and on every machine.

They decide which partition a row is in, and find keys that may be there twice. Keys of equal hash are
compared as text before anything is said of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UInt64Array = npt.NDArray[np.uint64]

_AT_ONCE = 65_536  # rows: some 100 bytes of working memory for each byte of them
_WEIGHTS = np.random.default_rng(20261201).integers(0, 2**64, 4096, dtype=np.uint64) | np.uint64(1)


def hash64(texts: pa.Array) -> UInt64Array:
    """Return a hash of each text's bytes, uint64 (n,). `texts`: large_string, no null."""
    out = np.zeros(len(texts), dtype=np.uint64)
    if not len(texts):
        return out
    _, ends_buffer, data_buffer = texts.buffers()
    ends = np.frombuffer(ends_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)
    for start in range(0, len(texts), _AT_ONCE):
        some = ends[start : start + _AT_ONCE + 1]
        out[start : start + len(some) - 1] = _hashes(data[some[0] : some[-1]], some - some[0])
    return out


def _hashes(data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> UInt64Array:
    """Return a weighted sum of each text's bytes, mixed; `ends`: where texts begin and end, (n + 1,)."""
    lengths = np.diff(ends)
    place = np.arange(len(data), dtype=np.int64) - np.repeat(ends[:-1], lengths)
    products = data.astype(np.uint64) * _WEIGHTS[place % len(_WEIGHTS)]
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(products, out=sums[1:])  # modulo 2**64, so that differences are exact
    return _mixed(sums[ends[1:]] - sums[ends[:-1]] + lengths.astype(np.uint64))


def _mixed(values: UInt64Array) -> UInt64Array:
    """Return the values with every bit depending on all (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def with_several(keys: UInt64Array, values: UInt64Array) -> UInt64Array:
    """Return the keys that stand next to more than one value, each once; uint64, sorted."""
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    differs = (keys[1:] == keys[:-1]) & (values[1:] != values[:-1])
    return np.unique(keys[1:][differs])
