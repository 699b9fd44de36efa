"""docs/schema.md is the code's own schema, and its snippets run unchanged."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from hqlabel.pipeline import schema
from hqlabel.pipeline.tables import mask_quality as quality
from tests.docs.markdown import blocks, column, section, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "schema.md").read_text()


def written(kind: pa.DataType) -> str:
    """An Arrow type as the page writes it: element names and nullability left out."""
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{written(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list<{written(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {written(field.type)}' for field in kind)}>"
    return str(kind)


@pytest.mark.parametrize(("name", "expected"), [("instances", schema.INSTANCES), ("images", schema.IMAGES)])
def test_the_page_lists_every_column_in_order_with_type_and_null_rule(name: str, expected: pa.Schema) -> None:
    rows = table(section(PAGE, name))

    assert column(rows, "column") == expected.names
    assert column(rows, "type") == [written(field.type) for field in expected]
    assert [not row["null"].startswith("never") for row in rows] == [field.nullable for field in expected]
    assert all(row["meaning"] and row["example"] for row in rows)


def test_the_page_names_the_version_that_the_files_carry() -> None:
    assert f"`schema version {schema.SCHEMA_VERSION}`" in PAGE


def test_the_statuses_are_the_codes_own() -> None:
    row = next(r for r in table(section(PAGE, "images")) if r["column"] == "status")

    assert all(status in row["meaning"] for status in schema.STATUSES)


def test_the_flags_are_the_codes_own_with_their_meaning() -> None:
    rows = table(section(PAGE, "Flags"))

    assert [(row["flag"], row["meaning"]) for row in rows] == list(quality.FLAGS.items())


def instance(image_id: str, index: int, **changes: Any) -> dict[str, Any]:
    """A row of `instances` with a real 40 x 60 mask."""
    pixels = np.zeros((40, 60), np.uint8, order="F")
    pixels[10:20, 5:25] = 1
    counts = coco_mask.encode(pixels)["counts"].decode("ascii")
    row = {
        "image_id": image_id,
        "instance_index": index,
        "box_id": None,
        "image_uri": f"photos/{image_id}",
        "category_id": 1,
        "category_name": "spoon",
        "prompt_bbox_given": [5.0, 10.0, 25.0, 20.0],
        "prompt_bbox": [5.0, 10.0, 20.0, 10.0],
        "bbox": [5.0, 10.0, 20.0, 10.0],
        "segmentation": {"size": [40, 60], "counts": counts},
        "area": int(pixels.sum()),
        "detector_score": None,
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        "box_iou": 1.0,
        "mask_in_box": 1.0,
        "num_components": 1,
        "touches_border": False,
        "qc_flags": [],
        "accepted": True,
        "reject_reason": None,
        "run_id": "run",
    }
    return row | changes


def image(image_id: str, **changes: Any) -> dict[str, Any]:
    """A row of `images`."""
    row = dict.fromkeys(schema.IMAGES.names) | {
        "image_id": image_id,
        "image_uri": f"photos/{image_id}",
        "status": "labelled",
        "num_boxes": 2,
        "num_instances": 1,
        "num_accepted": 1,
        "attempts": 1,
        "unit_id": 0,
        "run_id": "run",
        "processed_at": datetime.datetime(2026, 2, 3, tzinfo=datetime.UTC),
    }
    return row | changes


MADE_BY_THE_MODEL = (
    "prompt_bbox bbox segmentation area predicted_iou stability_score box_iou mask_in_box num_components "
    "touches_border"
)
NO_MASK = dict.fromkeys(MADE_BY_THE_MODEL.split()) | {"accepted": False, "reject_reason": "box_outside"}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small `out/`, and the current directory in it, as the snippets expect."""
    tables = {
        "instances": ([instance("coffee.jpg", 0), instance("coffee.jpg", 1, **NO_MASK)], schema.INSTANCES),
        "images": (
            [
                image("coffee.jpg"),
                image(
                    "torn.jpg",
                    status="failed",
                    error_code="truncated",
                    num_boxes=0,
                    num_instances=0,
                    num_accepted=0,
                ),
            ],
            schema.IMAGES,
        ),
    }
    for name, (rows, expected) in tables.items():
        (tmp_path / "out" / name).mkdir(parents=True)
        part = tmp_path / "out" / name / "part-00000.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=expected), part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["schema.md", "errors.md"])
def test_the_sql_snippets_run(out: Path, page: str) -> None:
    found = blocks((DOCS / page).read_text(), "sql")

    assert found
    for query in found:
        assert duckdb.sql(query).fetchall() != [], query


def test_the_python_snippets_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(PAGE, "python")

    assert len(found) == 3
    for snippet in found:
        exec(compile(snippet, "docs/schema.md", "exec"), {})
    assert "spoon" in capsys.readouterr().out
