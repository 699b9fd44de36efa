"""Small JSON files of an output, read as data of unknown origin: bounded in bytes, depth and message.

Whoever can write to an output, or hands one over, chooses every byte of them. A file that is larger than any
that we write is refused before it is read, and one that is nested deeper is never built.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from hqlabel.pipeline.errors import clean_text
from hqlabel.pipeline.storage.output_store import Store

MOST_BYTES = 64 * 2**20
"""Of job.json and manifest.json: 1 kB for each of 60,000 parts, or 100 B for each of 600,000 categories."""
FEW_BYTES = 64 * 2**10
"""Of files with a fixed number of fields."""


def read_json(store: Store, key: str, *, most: int = MOST_BYTES) -> Any:
    """Return the value in a JSON file of a store; the parser stops at 200 levels.

    Raises:
        NotFound: there is no such file. DamageFound: it has more than `most` bytes.
        ValueError: it is not JSON, or nested too deep.
    """
    return from_json(store.read(key, most=most))


def reason(error: BaseException) -> str:
    """Return what is wrong with a file's content as one bounded line, whatever the content is."""
    return clean_text(" ".join(f"{type(error).__name__}: {str(error)[:1000]}".split()))
