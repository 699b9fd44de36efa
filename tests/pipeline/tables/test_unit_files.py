"""Rows in = rows out: what a unit's file says of every image, and that no bit of it can rot unseen."""

from __future__ import annotations

import datetime as dt
import io
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import JobContext, Place
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables import unit_files
from hqlabel.pipeline.tables.unit_checks import check_against_plan, find_faults
from hqlabel.pipeline.tables.unit_files import (
    CommittedUnit,
    footer,
    list_committed,
    outcome_of,
    parse_key,
    put_unit,
    read_committed,
    replace_rows,
    unit_key,
)
from hqlabel.pipeline.tables.unit_table import build_unit_table
from tests.pipeline.made_units import (
    SIZE_HW,
    WHEN,
    build_unit,
    commit_units,
    draw,
    footer_of,
    labelled,
    make_context,
    make_plan,
    plan_table,
    planned_box,
    planned_image,
    resolve,
    segment,
    unit_of,
)
from tests.s3_proxy import Fault
from tests.table_digest import mask_columns_digest

CONTEXT = make_context()
BAD_BOX = (9.0, 9.0, 3.0, 20.0)


def encode_unit(table: pa.Table, context: JobContext) -> bytes:
    return checksummed_parquet.write_body(table, footer(context))


def row_of(result: ImageResult) -> dict:
    table = build_unit_table([result], CONTEXT, processed_at=WHEN)
    check_against_plan(table, plan_table([result.planned]))
    return table.to_pylist()[0]


# ---------------------------------------------------------------------------------------------
# One image
# ---------------------------------------------------------------------------------------------


def test_a_labelled_image_has_a_row_for_each_box_and_a_mask_for_each_usable_one():
    given = [planned_box(box_id="first"), planned_box(BAD_BOX), planned_box((30, 1, 50, 30), score=None)]
    row = row_of(labelled(planned_image("a", given, 7), attempts=2))
    assert (row["status"], row["unit_id"], row["attempts"], row["error_code"]) == ("labelled", 7, 2, None)
    assert (row["width"], row["height"]) == (60, 40)
    first, bad, last = row["instances"]
    assert [i["instance_index"] for i in row["instances"]] == [0, 1, 2]
    assert first["prompt_bbox_given"] == [5, 5, 25, 20]
    assert first["prompt_bbox"] == first["bbox"] == [5, 5, 20, 15]
    assert first["box_id"] == "first"
    assert (first["area"], first["category_id"], first["category_name"]) == (300, 1, "cat")
    assert (first["detector_score"], last["detector_score"]) == (0.5, None)
    assert first["box_iou"] == first["mask_in_box"] == 1.0
    assert (first["num_components"], first["touches_border"]) == (1, False)
    assert first["qc_flags"] == ["fills_box"]
    assert first["box_error"] is None
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), draw((5, 5, 25, 20)))
    assert bad["box_error"] == "box_inverted"
    assert bad["prompt_bbox_given"] == list(BAD_BOX)
    nulls = ("prompt_bbox", "bbox", "segmentation", "area", "predicted_iou", "stability_score", "box_iou")
    assert all(bad[name] is None for name in (*nulls, "mask_in_box", "num_components", "touches_border"))
    assert last["predicted_iou"] == pytest.approx(1.01)  # a regression may leave 0..1


def test_an_empty_mask_keeps_its_row_with_no_bbox():
    planned = planned_image("a", [planned_box()])
    row = row_of(labelled(planned, instances=segment([np.zeros(SIZE_HW, np.uint8)])))
    (instance,) = row["instances"]
    assert row["status"] == "labelled"
    assert (instance["area"], instance["bbox"], instance["qc_flags"]) == (0, None, ["empty"])
    assert instance["segmentation"]["size"] == list(SIZE_HW)
    assert (instance["box_iou"], instance["mask_in_box"]) == (0.0, None)


def test_an_image_without_boxes_is_no_boxes_and_was_not_opened():
    row = row_of(ImageResult(planned=planned_image("a", [])))
    assert (row["status"], row["instances"], row["width"], row["error_code"]) == ("no_boxes", [], None, None)


@pytest.mark.parametrize(
    ("planned", "result", "code", "stage"),
    [
        ({"boxes": None}, {}, "boxes_missing", "plan"),
        ({"error_code": "labels_mismatch", "error_message": "2 labels"}, {}, "labels_mismatch", "plan"),
        ({}, {"error_code": "truncated", "error_message": "ends early"}, "truncated", "decode"),
        ({}, {"error_code": "crashed", "error_message": "died"}, "crashed", "worker"),
    ],
)
def test_a_failed_image_says_why_and_keeps_its_boxes(planned, result, code, stage):
    image = planned_image(**({"image_id": "a", "boxes": [planned_box(), planned_box()]} | planned))
    row = row_of(ImageResult(planned=image, **result))
    assert (row["status"], row["error_code"], row["error_stage"]) == ("failed", code, stage)
    assert row["error_message"]
    assert [i["box_error"] for i in row["instances"]] == ["image_failed"] * len(image["boxes"] or [])


def test_no_usable_box_fails_the_image_and_counts_the_reasons():
    given = [planned_box(BAD_BOX), planned_box((1, 2, 3)), planned_box(BAD_BOX)]
    planned = planned_image("a", given)
    row = row_of(ImageResult(planned=planned, boxes=resolve(given), size_hw=SIZE_HW, stored_size_hw=SIZE_HW))
    assert row["error_code"] == "no_usable_box"
    assert row["error_message"] == "3 boxes: 2 box_inverted, 1 box_malformed"
    assert [i["box_error"] for i in row["instances"]] == ["box_inverted", "box_malformed", "box_inverted"]


def test_a_failed_image_keeps_the_own_reason_of_a_bad_box():
    given = [planned_box(), planned_box(BAD_BOX)]
    failed = ImageResult(
        planned=planned_image("a", given), boxes=resolve(given), error_code="out_of_memory", error_message="x"
    )
    assert [i["box_error"] for i in row_of(failed)["instances"]] == ["image_failed", "box_inverted"]


@pytest.mark.parametrize("name", ["predicted_iou", "stability_score"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_fails_its_box_alone_and_is_not_a_silent_null(name, value):
    given = [planned_box(), planned_box(BAD_BOX), planned_box(), planned_box()]
    planned = planned_image("a", given)
    drawn = [draw((5, 5, 25, 20)), draw((6, 5, 25, 20)), draw((7, 5, 25, 20))]
    sound = row_of(labelled(planned, instances=segment(drawn)))
    scores = getattr(segment(drawn), name).copy()
    scores[1] = value
    row = row_of(labelled(planned, instances=segment(drawn, **{name: scores})))

    assert (row["status"], row["error_code"]) == ("labelled", None)
    assert [one["box_error"] for one in row["instances"]] == [None, "box_inverted", "non_finite", None]
    lost = row["instances"][2]
    assert [lost[n] for n in ("segmentation", "bbox", "area", "predicted_iou", "stability_score")] == [
        None
    ] * 5
    assert lost["prompt_bbox"] == sound["instances"][2]["prompt_bbox"]
    for place in (0, 1, 3):
        assert row["instances"][place] == sound["instances"][place]

    scores[:] = value
    row = row_of(labelled(planned, instances=segment(drawn, **{name: scores})))
    assert (row["status"], row["error_code"]) == ("failed", "non_finite")
    reasons = [one["box_error"] for one in row["instances"]]
    assert reasons == ["image_failed", "box_inverted", "image_failed", "image_failed"]


@pytest.mark.parametrize(
    ("score", "stored", "flags"),
    [
        (None, None, []),
        (float("nan"), None, ["score_not_finite"]),
        (float("-inf"), None, ["score_not_finite"]),
        (1e300, None, ["score_not_finite"]),
        (-1.0, -1.0, []),
        (7.5, 7.5, []),
    ],
)
def test_odd_detector_scores(score, stored, flags):
    row = row_of(labelled(planned_image("a", [planned_box((0, 0, 50, 35), score=score)])))
    assert row["instances"][0]["detector_score"] == stored
    assert [f for f in row["instances"][0]["qc_flags"] if f.startswith("score")] == flags


def test_given_boxes_are_kept_as_they_came():
    odd = [None, [], [1.0, None, 3.0], [float("nan"), 1.0, 2.0, float("inf")]]
    given = [planned_box(), *(planned_box() | {"given": value} for value in odd)]
    boxes = resolve([given[0]])
    boxes = resolve(
        given,
        prompt_xyxy=np.vstack([boxes.prompt_xyxy, np.full((4, 4), np.nan)]),
        usable=np.array([True, False, False, False, False]),
        error=(None, "box_malformed", "box_malformed", "box_malformed", "box_not_finite"),
    )
    row = row_of(labelled(planned_image("a", given), boxes=boxes, instances=segment([draw((5, 5, 25, 20))])))
    found = [i["prompt_bbox_given"] for i in row["instances"][1:]]
    assert found[:3] == odd[:3]
    np.testing.assert_equal(found[3], odd[3])


def test_flags_of_box_mask_and_image_stand_together_in_one_order():
    planned = planned_image("a", [planned_box()])
    boxes = resolve(planned["boxes"], flags=(("box_clipped",),))
    instances = segment([draw((5, 5, 25, 20))], flags=("reduced_call_shape",))
    row = row_of(labelled(planned, boxes=boxes, instances=instances))
    assert row["instances"][0]["qc_flags"] == ["fills_box", "box_clipped", "reduced_call_shape"]


def test_results_that_contradict_themselves_are_a_bug():
    planned = planned_image("a", [planned_box(), planned_box()])
    with pytest.raises(ValueError, match=r"2 usable boxes, masks: 1"):
        row_of(labelled(planned, instances=segment([draw((5, 5, 25, 20))])))
    with pytest.raises(ValueError, match=r"2 usable boxes, masks: none"):
        row_of(labelled(planned, instances=None))
    with pytest.raises(ValueError, match="neither an error nor resolved boxes"):
        row_of(ImageResult(planned=planned))
    with pytest.raises(ValueError, match="unknown box error codes"):
        row_of(labelled(planned, boxes=resolve(planned["boxes"], error=(None, "odd"))))


def test_error_text_from_outside_is_cleaned():
    row = row_of(
        ImageResult(planned=planned_image("a", []), error_code="corrupt", error_message="\x1b[31m\n" * 400)
    )
    assert len(row["error_message"]) <= 500
    assert "\x1b" not in row["error_message"]
    assert "\n" not in row["error_message"]


def test_names_come_back_byte_for_byte():
    for image_id in ("é", "e\u0301", "日本 #?%20", "a\nb", "$(x)", " "):
        assert row_of(ImageResult(planned=planned_image(image_id, [])))["image_id"] == image_id


# ---------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------


def unit_and_plan() -> tuple[pa.Table, pa.Table]:
    plan = make_plan(10)
    return build_unit(plan, 1, CONTEXT), unit_of(plan, 1)


def changed(table: pa.Table, change) -> pa.Table:
    rows = table.to_pylist()
    change(rows)
    return pa.Table.from_pylist(rows, schema=schema.UNIT)


def instance(rows) -> dict:
    """A labelled instance of the made unit."""
    return next(i for row in rows for i in row["instances"] if i["segmentation"] is not None)


CHANGES = {
    "a row is missing": lambda rows: rows.pop(),
    "rows are swapped": lambda rows: rows.reverse(),
    "image_uri": lambda rows: rows[0].update(image_uri="s3://other"),
    "boxes, planned": lambda rows: rows[0]["instances"].pop(),
    "instance_index": lambda rows: instance(rows).update(instance_index=9),
    "unknown status": lambda rows: rows[0].update(status="ok"),
    "unknown error code": lambda rows: rows[0].update(status="failed", error_code="nonsense"),
    "with error code": lambda rows: rows[0].update(error_code="corrupt"),
    "exclude each other": lambda rows: instance(rows).update(box_error="box_empty"),
    "a mask without area": lambda rows: instance(rows).update(area=None),
    "a mask without predicted_iou": lambda rows: instance(rows).update(predicted_iou=None),
    "area 1, the mask has": lambda rows: instance(rows).update(area=1),
    "area 0 with bbox": lambda rows: instance(rows).update(area=0),
    "bbox .*, the mask has": lambda rows: instance(rows).update(bbox=[0, 0, 1, 1]),
    "mask of size": lambda rows: instance(rows)["segmentation"].update(size=[SIZE_HW[1], SIZE_HW[0]]),
    "instance 0: a character outside": lambda rows: instance(rows)["segmentation"].update(counts="zz"),
    "predicted_iou has 1 values": lambda rows: instance(rows).update(predicted_iou=float("nan")),
    "box_iou has 1 values": lambda rows: instance(rows).update(box_iou=float("inf")),
    "status no_boxes with . masks": lambda rows: [
        row.update(status="no_boxes") for row in rows if row["status"] == "labelled"
    ],
    "fetch_ms has 1 values": lambda rows: rows[0].update(fetch_ms=float("nan")),
}


@pytest.mark.parametrize("words", CHANGES)
def test_every_kind_of_fault_is_found_before_the_commit(words):
    table, planned = unit_and_plan()
    check_against_plan(table, planned)
    told = {"a row is missing": "rows, planned", "rows are swapped": "image_id"}.get(words, words)
    with pytest.raises(ValueError, match=f"unit 1 is not fit to be committed: .*{told}"):
        check_against_plan(changed(table, CHANGES[words]), planned)


def test_nulls_where_the_schema_has_none_are_found():
    table, _ = unit_and_plan()
    nullable = pa.schema([f.with_nullable(True) for f in schema.UNIT])
    rows = table.to_pylist()
    rows[0]["run_id"] = None
    arrays = pa.Table.from_pylist(rows, schema=nullable).columns
    broken = pa.Table.from_arrays(arrays, schema=schema.UNIT)
    assert find_faults(broken) == ["run_id has 1 nulls, and may have none"]


def test_another_schema_is_a_fault():
    table, _ = unit_and_plan()
    assert "schema.UNIT" in find_faults(table.drop_columns(["attempts"]))[0]


def test_an_image_with_more_masks_than_pycocotools_takes_at_once_is_checked():
    planned = planned_image("a", [planned_box() for _ in range(300)])
    row_of(labelled(planned))
    table = build_unit_table([labelled(planned)], CONTEXT)
    rows = table.to_pylist()
    rows[0]["instances"][299]["area"] = 5
    assert "instance 299: area 5" in find_faults(pa.Table.from_pylist(rows, schema=schema.UNIT))[0]


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def test_the_file_reads_back_equal_with_its_whole_schema(store):
    plan = make_plan(10)
    for unit_id in range(3):
        table = build_unit(plan, unit_id, CONTEXT)
        assert put_unit(store, unit_id, 0, encode_unit(table, CONTEXT))
        unit = list_committed(store)[unit_id]
        assert (unit.key, unit.generation) == (f"units/{unit_id:08d}.g0.parquet", 0)
        assert read_committed(store, unit).equals(table)
    empty = schema.UNIT.empty_table()
    body = encode_unit(empty, CONTEXT)
    assert checksummed_parquet.read_body(body, schema.UNIT, "empty").schema.equals(schema.UNIT)


def test_equal_tables_give_equal_bytes_however_they_are_held():
    plan = make_plan(10)
    table = build_unit(plan, 1, CONTEXT)
    again = build_unit(plan, 1, CONTEXT)
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert encode_unit(table, CONTEXT) == encode_unit(again, CONTEXT) == encode_unit(pieces, CONTEXT)


def test_two_runs_differ_only_in_the_volatile_columns():
    plan = make_plan(10)
    table = build_unit(plan, 1, CONTEXT)
    later = build_unit(plan, 1, make_context(run_id="run-2"), when=WHEN + dt.timedelta(days=1))
    assert not table.equals(later)
    assert mask_columns_digest(table) == mask_columns_digest(later)
    assert mask_columns_digest(pa.concat_tables([table.slice(0, 2), table.slice(2)])) == mask_columns_digest(
        table
    )


@pytest.mark.parametrize(
    "name", [n for n in schema.UNIT.names if n not in (*schema.VOLATILE, "instances")]
)  # fmt: skip
def test_every_other_column_moves_the_digest(name):
    table, _ = unit_and_plan()
    rows = table.to_pylist()
    value = rows[0][name]
    rows[0][name] = value + 1 if isinstance(value, int) else "x"
    if schema.UNIT.field(name).type in (pa.int32(), pa.int64()) and value is None:
        rows[0][name] = 1
    other = pa.Table.from_pylist(rows, schema=schema.UNIT)
    assert mask_columns_digest(other) != mask_columns_digest(table)


def test_the_footer_tells_the_lineage():
    table, _ = unit_and_plan()
    file = pq.ParquetFile(io.BytesIO(encode_unit(table, CONTEXT)))
    entries = footer_of(file)
    wanted = {"schema_version": "1", "run_id": "run-1", "weights_sha256": "5" * 64, "dtype": "float32"}
    wanted |= {"weights_license": "apache-2.0", "box_format": "xyxy", "code_version": "test"}
    assert wanted.items() <= entries.items()
    json.dumps(entries)


def test_pages_carry_checksums_and_an_index_and_counts_have_no_dictionary():
    table, _ = unit_and_plan()
    body = encode_unit(table, CONTEXT)
    group = pq.ParquetFile(io.BytesIO(body)).metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    counts = columns["instances.list.element.segmentation.counts"]
    assert "RLE_DICTIONARY" not in counts.encodings
    assert "RLE_DICTIONARY" in columns["status"].encodings
    assert all(c.compression == "ZSTD" and c.has_offset_index for c in columns.values())
    flipped = bytearray(body)
    flipped[counts.data_page_offset + counts.total_compressed_size - 3] ^= 1
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(io.BytesIO(flipped), page_checksum_verification=True).read()


def test_any_flipped_bit_in_a_unit_is_found(local_store):
    table = build_unit(make_plan(6), 0, CONTEXT)
    body = encode_unit(table, CONTEXT)
    rng = np.random.default_rng(0)
    places = {*range(12), *range(len(body) - 12, len(body)), *rng.integers(0, len(body), 400).tolist()}
    for place in places:
        flipped = bytearray(body)
        flipped[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(DamageFound, match="unit 0"):
            checksummed_parquet.read_body(bytes(flipped), schema.UNIT, "unit 0")
    for cut in (0, 1, 100, len(body) // 2, len(body) - 1):
        with pytest.raises(DamageFound):
            checksummed_parquet.read_body(body[:cut], schema.UNIT, "unit 0")


def test_a_second_commit_is_success_and_changes_nothing(store):
    plan = make_plan(4)
    first = encode_unit(build_unit(plan, 0, CONTEXT), CONTEXT)
    later = encode_unit(build_unit(plan, 0, CONTEXT, when=WHEN + dt.timedelta(1)), CONTEXT)
    assert put_unit(store, 0, 0, first)
    assert not put_unit(store, 0, 0, later)
    assert store.read(unit_key(0, 0)) == first
    assert put_unit(store, 0, 0, first)


def test_a_commit_over_a_damaged_file_is_not_success(store):
    body = encode_unit(build_unit(make_plan(4), 0, CONTEXT), CONTEXT)
    store.put(unit_key(0, 0), body[:-100])
    with pytest.raises(DamageFound, match=r"unit 0 \(units/00000000\.g0\.parquet\)"):
        put_unit(store, 0, 0, body)


def test_the_highest_generation_counts_and_foreign_names_do_not(local_store):
    plan = make_plan(12)
    commit_units(local_store, plan, CONTEXT, [0, 2])
    commit_units(local_store, plan, CONTEXT, [2], generation=1)
    commit_units(local_store, plan, CONTEXT, [2], generation=10)
    for name in (
        "units/1.g0.parquet",
        "units/00000001.g0.parquet.bak",
        "units/00000001.g00.parquet",
        "units/x",
    ):
        local_store.put(name, b"")
    assert [(u.unit_id, u.generation) for u in list_committed(local_store).values()] == [(0, 0), (2, 10)]
    assert [(u.unit_id, u.generation) for u in list_committed(local_store, 2).values()] == [(2, 10)]


def test_unit_numbers_beyond_eight_digits_have_names_of_their_own():
    assert parse_key(unit_key(123_456_789, 3)) == (123_456_789, 3)


def test_a_retry_changes_the_failed_rows_alone():
    plan = make_plan(8)
    failing = {"img-00005.jpg"}
    before = build_unit(plan, 1, CONTEXT, failing=failing)
    context = make_context(run_id="run-2")
    redone = build_unit(plan, 1, context, when=WHEN + dt.timedelta(1)).slice(1, 1)
    after = replace_rows(before, redone)
    check_against_plan(after, unit_of(plan, 1))
    for row in range(4):
        assert after.slice(row, 1).equals(redone if row == 1 else before.slice(row, 1))
    with pytest.raises(ValueError, match="not of this unit"):
        replace_rows(before, build_unit(plan, 0, context))


def test_the_outcome_counts_statuses_and_codes():
    table = build_unit(make_plan(8), 1, CONTEXT, failing={"img-00007.jpg"})
    outcome = outcome_of(table, 1, 0, size=123, created=True, seconds=1.5)
    statuses = table["status"].to_pylist()
    assert (outcome.images, outcome.bytes, outcome.repeated) == (4, 123, False)
    assert outcome.failed == statuses.count("failed")
    assert outcome.labelled == statuses.count("labelled")
    assert outcome.no_boxes == statuses.count("no_boxes") == 1
    assert outcome.failed_by_code["not_found"] == 1
    assert outcome.instances == sum(len(i) for i in table["instances"].to_pylist())


@dataclass
class Listed:
    """A store that lists so many units, each page made when it is requested."""

    units: int
    lists_by_prefix: bool = False

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        for start in range(0, self.units, 1000):
            stop = min(start + 1000, self.units)
            yield [Entry(key=unit_key(n, n % 2), size=n, etag=f"{n:032x}") for n in range(start, stop)]


def test_a_listing_of_units_takes_little_memory_and_is_a_mapping_of_their_files():
    listed = Listed(60_000)
    tracemalloc.start()
    committed = list_committed(listed)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert held < 40 * listed.units
    assert peak < 120 * listed.units
    assert len(committed) == listed.units
    assert committed[59_999] == CommittedUnit(
        unit_id=59_999, generation=1, key=unit_key(59_999, 1), size=59_999
    )
    assert list(committed) == list(range(listed.units))
    assert 60_000 not in committed
    assert -1 not in committed
    with pytest.raises(KeyError):
        committed[60_000]


def test_what_is_missing_of_a_plan_is_told_with_gaps_and_strangers(local_store):
    for unit_id in (0, 2, 3, 7, 10**17):
        local_store.put(unit_key(unit_id, 0), b"")
    local_store.put("units/9999999999999999999999.g0.parquet", b"")
    committed = list_committed(local_store)

    assert list(committed) == [0, 2, 3, 7, 10**17]
    assert committed.numbers.missing(range(9)).tolist() == [1, 4, 5, 6, 8]
    assert committed.numbers.missing(range(2, 4)).tolist() == []
    assert committed.numbers.outside([range(2, 8)]).tolist() == [0, 10**17]
    assert [unit.unit_id for unit in committed.within(range(1, 5))] == [2, 3]
    assert committed.generations(range(5)) == {0: 0, 2: 0, 3: 0}
    assert committed.numbers.union([range(1, 3)]) == {0, 1, 2, 3, 7, 10**17}
    assert set(range(4)) - committed.numbers == {1}
    assert list_committed(local_store, 1) == {}


def test_units_of_a_store_that_lists_by_prefix_are_listed_in_parts(moto_s3, s3_faults, monkeypatch):
    monkeypatch.setattr(unit_files, "LISTED_AS_ONE", 100)
    place = moto_s3.place()
    store = Store(Place(uri=place.uri, options={"endpoint_url": s3_faults.endpoint}))
    numbers = [0, 9, 10, 57, 99, 100, 119]
    for number in numbers:
        store.put(unit_key(number, number % 2), b"1")
    store.put(unit_key(57, 3), b"12")
    fault = s3_faults.add(Fault(match="list-type=2.*prefix=[^&]*0000005&", do="status", times=2))

    found = list_committed(store, units=120)

    assert dict(found) == dict(list_committed(store))
    assert list(found) == numbers
    assert found[57].generation == 3
    assert fault.landed == 2
    assert s3_faults.requests("list-type=2") == 12 + 2 + 1


def test_the_prefixes_of_many_units_are_those_of_each_of_their_keys_once():
    for units in (10_000, 10_001, 99_999, 1_000_000, 15_625_000, 20_000_000):
        prefixes = unit_files._prefixes(units)
        assert 2 <= len(prefixes) <= 100
        for number in (0, 1, units // 3, units // 2, units - 1):
            assert sum(unit_key(number, 0).startswith(prefix) for prefix in prefixes) == 1
