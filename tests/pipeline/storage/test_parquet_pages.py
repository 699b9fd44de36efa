"""Page headers that no writer makes, read before Arrow sees them."""

from __future__ import annotations

import dataclasses
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.storage.parquet_pages import UnsoundPages, _footer, _Page, _pages, _Thrift


def test_pages_that_do_not_fill_their_column_are_refused():
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [f"{number}" for number in range(100)]}), buffer)
    data = buffer.getvalue()

    def read(start: int, stop: int) -> bytes:
        return data[start:stop]

    [[chunk]] = _footer(read, len(data))

    assert len(list(_pages(read, chunk))) > 0
    with pytest.raises(UnsoundPages, match="do not fill it"):
        list(_pages(read, dataclasses.replace(chunk, stop=chunk.stop - 1)))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"\x00", "a page without sizes"),
        (b"\x25\x02\x15\x02\x00", "a page without sizes"),  # no number of values
        (b"\x25\x01\x15\x02\x2c\x15\x02\x00\x00", "a page without sizes"),  # -1 bytes
        (b"\x25\x02\x15\x02\x2c\x15\x01\x00\x00", "a page without sizes"),  # -1 values
        (b"\x1c" * 5000, "too many levels"),
        (b"\x1f", "a value of type 15"),
        (b"\x15" + b"\xff" * 11, "more than 64 bits"),
    ],
)
def test_a_header_of_a_page_that_no_writer_makes_is_refused(header: bytes, said: str):
    with pytest.raises(UnsoundPages, match=said):
        _Thrift(header).page()
    sound = b"\x25\x02\x15\x02\x2c\x15\x02\x00\x00"
    assert _Thrift(sound).page() == (_Page(unpacked=1, packed=1, values=1, is_dictionary=False), len(sound))
