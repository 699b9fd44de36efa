"""The prompts of an earlier output come back as they were given, under the same ids."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import JobRefused, UsageError
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import FilterSettings, InputSettings
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.publish_tables import publish
from tests.pipeline.made_units import make_job

ROOMY = AccessRules(schemes=("s3",))


@pytest.fixture
def output(tmp_path) -> tuple[Store, Plan, str]:
    """A finished, published job: its store, its planned rows and its folder."""
    store = Store(Place(uri=str(tmp_path / "out")))
    made = make_job(store)
    made.commit()
    publish(store, made.job, FilterSettings(), require_owner=lambda doing: None)
    return store, made.plan, str(tmp_path / "out")


def again(folder: str, **settings) -> Plan:
    return make_plan(InputSettings(boxes=folder, **settings), ROOMY, images_per_unit=4)


def test_the_plan_of_an_earlier_output_is_the_plan_it_was_made_from(output):
    _, rows, folder = output

    plan = again(folder)

    # detector scores are float32 in the tables
    assert rows.to_pylist() == plan.table.to_pylist()
    assert ("xyxy", "upright") == (plan.summary.box_format, plan.summary.box_frame)
    assert ({"id": 1, "name": "cat"},) == plan.categories
    assert () == plan.summary.warnings


def test_an_earlier_output_may_be_the_images_of_other_boxes(output, tmp_path):
    _, rows, folder = output
    pq.write_table(
        pa.table({"image_id": ["img-00003.jpg"], "bbox": [[1.0, 2.0, 3.0, 4.0]]}), tmp_path / "b.parquet"
    )

    plan = again(str(tmp_path / "b.parquet"), images=folder)

    assert rows.column("image_id") == plan.table.column("image_id")
    assert rows.column("image_uri") == plan.table.column("image_uri")
    assert 1 == plan.summary.boxes


def rewrite(store: Store, key: str, change) -> None:
    """One part written again with other rows or another footer."""
    table = pq.read_table(pa.BufferReader(store.read(key)))
    body = pa.BufferOutputStream()
    pq.write_table(change(table), body)
    store.put(key, body.getvalue().to_pybytes())


def parts(store: Store, table: str) -> list[str]:
    return [entry.key for entry in store.list(f"{table}/")]


def test_boxes_as_used_are_taken_where_none_were_given(output):
    store, rows, folder = output
    for key in parts(store, "instances"):
        rewrite(
            store,
            key,
            lambda t: t.set_column(
                t.column_names.index("prompt_bbox_given"),
                t.schema.field("prompt_bbox_given"),
                pa.nulls(t.num_rows, t.schema.field("prompt_bbox_given").type),
            ),
        )

    plan = again(folder)

    assert ("xywh", "upright") == (plan.summary.box_format, plan.summary.box_frame)
    for before, after in zip(rows.to_pylist(), plan.table.to_pylist(), strict=True):
        for old, new in zip(before["boxes"], after["boxes"], strict=True):
            x1, y1, x2, y2 = old["given"]
            assert new["given"] in (None, [x1, y1, x2 - x1, y2 - y1])


def test_boxes_as_used_are_taken_where_the_footer_does_not_say_how_to_read_them(output):
    store, _, folder = output
    for key in parts(store, "instances"):
        rewrite(store, key, lambda t: t.replace_schema_metadata())

    assert "xywh" == again(folder).summary.box_format


def test_the_frame_of_the_earlier_job_holds(output):
    store, _, folder = output
    for key in parts(store, "instances"):
        rewrite(
            store,
            key,
            lambda t: t.replace_schema_metadata({**t.schema.metadata, b"hqlabel.box_frame": b"stored"}),
        )

    assert "stored" == again(folder).summary.box_frame


@pytest.mark.parametrize("settings", [{"box_format": "xywh"}, {"box_frame": "stored"}])
def test_other_box_rules_than_the_earlier_jobs_are_a_usage_error(output, settings):
    with pytest.raises(UsageError, match="leave it out"):
        again(output[2], **settings)


def test_parts_of_different_rules_are_refused(output):
    store, _, folder = output
    key = parts(store, "instances")[0]
    rewrite(
        store, key, lambda t: t.replace_schema_metadata({**t.schema.metadata, b"hqlabel.box_format": b"xywh"})
    )

    with pytest.raises(JobRefused, match="different box rules"):
        again(folder)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [(0, "has 0 instances, its row states 1"), (1, "not numbered from 0"), (2, "has 1 instances")],
)
def test_an_output_with_instances_missing_is_refused(output, lost, reason):
    store, _, folder = output
    keep = lambda table: pa.concat_tables([table.slice(0, lost), table.slice(lost + 1)])  # noqa: E731
    rewrite(store, parts(store, "instances")[0], keep)

    with pytest.raises(JobRefused, match=reason):
        again(folder)


def test_null_lists_stay_null(output):
    store, _, folder = output

    def failed(table: pa.Table) -> pa.Table:
        codes = [
            "boxes_missing" if name == "img-00000.jpg" else None
            for name in table.column("image_id").to_pylist()
        ]
        at = table.column_names.index("error_code")
        return table.set_column(at, table.schema.field("error_code"), pa.array(codes, pa.string()))

    for key in parts(store, "images"):
        rewrite(store, key, failed)

    plan = again(folder)

    assert [True] + [False] * 21 == [row["boxes"] is None for row in plan.table.to_pylist()]


def test_an_output_that_is_not_published_is_refused(tmp_path):
    make_job(Store(Place(uri=str(tmp_path / "out")))).commit()

    with pytest.raises(JobRefused, match="hqlabel publish"):
        again(str(tmp_path / "out"))


def test_its_tables_alone_are_no_table_of_boxes(output):
    with pytest.raises(JobRefused, match="output folder"):
        again(f"{output[2]}/instances")


def test_scores_that_were_null_stay_null(output):
    found = [box["score"] for row in again(output[2]).table.to_pylist() for box in row["boxes"]]

    assert all(score == 0.5 and not math.isnan(score) for score in found)
