"""A bit that flips inside a page is found by whoever reads that page alone, without the file's seal."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.inputs import read_table
from hqlabel.pipeline.inputs.hf_parquet import read_hf_boxes
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.job_state.plan_files import plan_key, read_unit
from hqlabel.pipeline.schema import PLAN
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store
from tests.pipeline.made_units import planned_box, planned_image

SHA256 = "a" * 64


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def column_bytes(body: bytes, name: str) -> range:
    """The bytes of a column's pages in the first row group."""
    file = pq.ParquetFile(pa.BufferReader(body))
    group = file.metadata.row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == name)
    start = column.data_page_offset
    return range(start, start + column.total_compressed_size)


def test_a_worker_that_reads_its_unit_of_the_plan_finds_a_flipped_bit(tmp_path: Path) -> None:
    store = Store(Place(uri=str(tmp_path)))
    rows = [planned_image(f"{n}.jpg", boxes=[planned_box((n, n, n + 9.0, n + 9.0))]) for n in range(8)]
    table = pa.Table.from_pylist([{**row, "unit_id": 0} for row in rows], schema=PLAN)
    body = checksummed_parquet.write_body(table, {})
    key = plan_key(SHA256, 0)
    store.put(key, body)
    assert read_unit(store, SHA256, 0).equals(table.replace_schema_metadata())
    unnoticed = 0
    for at in column_bytes(body, "boxes.list.element.given.list.element"):
        bad = flipped(body, at)
        try:
            if pq.ParquetFile(pa.BufferReader(bad)).read_row_group(0).equals(table):
                continue
        except (OSError, pa.ArrowException):
            continue
        unnoticed += 1
        store.put(key, bad)
        with pytest.raises(DamageFound):
            read_unit(store, SHA256, 0)
    assert unnoticed > 0, "no flipped byte was read as other boxes: this test sees nothing"


@pytest.fixture
def data_set(tmp_path: Path) -> tuple[Path, pa.Table]:
    """A Hugging Face data set of another writer, with page checksums and plain pages."""
    boxes = [[[float(n), 1.0, 50.0, 60.0]] * 4 for n in range(40)]
    table = pa.table(
        {
            "image": [{"bytes": b"x", "path": f"{n}.png"} for n in range(40)],
            "objects": [{"bbox": one, "category": [1] * 4} for one in boxes],
        }
    )
    path = tmp_path / "train.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    return path, table


@pytest.mark.parametrize("reader", ["data set", "table"])
def test_a_flipped_bit_in_a_file_of_boxes_is_refused_and_no_other_box(
    reader: str, data_set: tuple[Path, pa.Table]
) -> None:
    path, table = data_set
    access = AccessRules(roots=(str(path.parent),))

    def read() -> int:
        if reader == "data set":
            return len(read_hf_boxes([str(path)], {}, access, root=str(path.parent)).image_id)
        with path.open("rb") as stream:
            return sum(batch.num_rows for batch in read_table._parquet_batches(stream, ["objects"]))

    assert read() == 40
    body = path.read_bytes()
    # In the middle of the pages: there is nothing but plain numbers, of which each is as good as another.
    place = column_bytes(body, "objects.bbox.list.element.list.element")
    path.write_bytes(flipped(body, (place.start + place.stop) // 2))
    assert not pq.read_table(path).equals(table)
    with pytest.raises((JobRefused, OSError, pa.ArrowException), match=r"(?i)checksum|crc"):
        read()


def test_a_file_of_other_columns_is_refused_by_their_names() -> None:
    body = checksummed_parquet.write_body(pa.table({"x": [1], "y": [2]}), {})
    with pytest.raises(DamageFound, match="unlike: y, z"):
        checksummed_parquet.open_body(
            pa.BufferReader(body), pa.schema([("x", pa.int64()), ("z", pa.int64())]), "a file"
        )
