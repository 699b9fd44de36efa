"""The stage for other people's pipelines: what it makes of a batch, and on a real dataset of Parquet rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.model.segmenter import Segmenter
from hqlabel.predict import SamHQ
from hqlabel.ray_data_stage import COLUMNS, SegmentImages

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
CAT = (PHOTOS / "cat.jpg").read_bytes()
BOX = [50.0, 20.0, 400.0, 290.0]
ROWS: list[dict[str, Any]] = [
    {"image": CAT, "boxes": [BOX]},
    {"image": CAT, "boxes": []},
    {"image": b"x", "boxes": [BOX]},
    {"image": CAT, "boxes": [BOX, [500.0, 500.0, 600.0, 600.0]]},
    {"image": CAT, "boxes": None},
    {"image": None, "boxes": [BOX]},
    {"image": CAT, "boxes": [[1.0, 2.0, 3.0]]},
]
TABLE = pa.table(
    {
        "image": pa.array([row["image"] for row in ROWS], pa.binary()),
        "boxes": pa.array([row["boxes"] for row in ROWS], pa.list_(pa.list_(pa.float64()))),
    }
)
ERRORS = [None, None, "not_an_image", None, "boxes_missing", "not_an_image", None]
BOX_ERRORS = [[None], [], None, [None, "box_outside"], None, None, ["box_malformed"]]


@pytest.fixture(scope="module")
def stage() -> SegmentImages:
    return SegmentImages(dtype="float32", allow_roots=[str(PHOTOS)])


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, Any], float]:
    answer = SamHQ.from_pretrained(dtype="float32").predict(CAT, boxes=[BOX])
    return answer.rle[0], float(answer.scores[0])


def check(rows: list[dict[str, Any]], expected: tuple[dict[str, Any], float]) -> None:
    """Compare the seven rows of `ROWS` with what must come out."""
    assert [row["error"] and row["error"].partition(":")[0] for row in rows] == ERRORS
    found = [None if row["box_errors"] is None else list(row["box_errors"]) for row in rows]
    assert found == BOX_ERRORS
    for place in (0, 3):
        mask = rows[place]["masks"][0]
        assert {"size": list(mask["size"]), "counts": mask["counts"]} == expected[0]
        assert rows[place]["mask_scores"][0] == pytest.approx(expected[1], abs=1e-5)
    assert list(rows[3]["masks"])[1] is None
    assert all(rows[place]["masks"] is None for place in (2, 4, 5))


def test_each_row_answers_for_itself(stage: SegmentImages, expected: Any) -> None:
    answer = stage(TABLE)
    assert {name: answer.schema.field(name).type for name in COLUMNS} == COLUMNS
    check(answer.to_pylist(), expected)


def test_arrays_structs_and_uris_are_images_too(stage: SegmentImages, expected: Any) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    images = [
        {"bytes": CAT, "path": "x"}, str(PHOTOS / "cat.jpg"), pixels, "/etc/passwd", np.zeros((3, 3)), 7,
    ]  # fmt: skip
    batch = {"image": np.empty(6, object), "boxes": np.empty(6, object)}
    batch["image"][:] = images
    batch["boxes"][:] = [np.array([BOX])] * 2 + [[[1, 2, 30, 20]]] * 4
    answer = stage(batch)
    assert [error and error.partition(":")[0] for error in answer["error"]] == (
        [None, None, None, "uri_refused", "not_an_image", "not_an_image"]
    )
    assert answer["masks"][0] == answer["masks"][1] == [expected[0]]
    assert answer["masks"][2][0]["size"] == [40, 60]


def test_an_image_that_makes_the_model_raise_costs_only_itself(
    stage: SegmentImages, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = Segmenter.segment_prepared

    def broken(self: Segmenter, images: Any) -> Any:
        if any(len(image.prompts.boxes_xyxy) == 2 for image in images):
            raise RuntimeError("two boxes")
        return segment(self, images)

    monkeypatch.setattr(Segmenter, "segment_prepared", broken)
    two = {"image": CAT, "boxes": [BOX, [60.0, 30.0, 300.0, 200.0]]}
    answer = stage(pa.Table.from_pylist([ROWS[0], two, ROWS[0]])).to_pylist()
    assert [row["error"] for row in answer] == [None, "internal: RuntimeError: two boxes", None]
    assert answer[0]["masks"] == answer[2]["masks"] == [expected[0]]


def test_what_every_row_would_fail_of_ends_the_pipeline(stage: SegmentImages) -> None:
    with pytest.raises(ValueError, match="no column 'boxes'; the batch has image, bbox"):
        stage(TABLE.rename_columns(["image", "bbox"]))
    with pytest.raises(ValueError, match="box_format is 'xyxyx'; wanted one of xyxy, xywh"):
        SegmentImages(box_format="xyxyx")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_format", ["default", pytest.param("pyarrow", marks=pytest.mark.faults)])
def test_a_dataset_of_parquet_rows_is_labelled_on_ray(
    local_ray: None, tmp_path: Path, expected: Any, batch_format: str
) -> None:
    import ray

    pq.write_table(TABLE.append_column("id", pa.array(range(len(ROWS)))), tmp_path / "rows.parquet")
    answer = ray.data.read_parquet(str(tmp_path)).map_batches(
        SegmentImages,
        fn_constructor_kwargs={"checkpoint": "demo", "dtype": "float32"},
        batch_size=3,
        batch_format=batch_format,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    answer.write_parquet(str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out").sort_by("id").to_pylist()
    assert [row["id"] for row in rows] == list(range(len(ROWS)))
    check(rows, expected)
