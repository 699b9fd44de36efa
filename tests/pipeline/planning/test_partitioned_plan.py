"""A plan in partitions is the plan of one process: the same rows, hash, numbers, sentences and refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import JobRefused, UsageError
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.job_state.plan_files import iter_plan
from hqlabel.pipeline.planning import partition_inputs
from hqlabel.pipeline.planning.make_plan import Plan, make_plan, write_plan
from hqlabel.pipeline.planning.partitioned_plan import PlanInPartitions, Sizes, plan_of_any_size
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage.output_store import Store
from tests.pipeline.planning.tasks_here import TasksHere

SMALL = Sizes(piece=5, partition=7, bucket=3)
Table = dict[str, list[Any]]


def write(folder: Path, table: Table, files: int = 3, types: dict[str, pa.DataType] | None = None) -> None:
    """Write a table as several files, in row groups of two rows."""
    folder.mkdir(parents=True)
    columns = {name: pa.array(values, (types or {}).get(name)) for name, values in table.items()}
    whole = pa.table(columns)
    edges = np.linspace(0, whole.num_rows, files + 1).astype(int).tolist()
    for number, (start, stop) in enumerate(pairwise(edges)):
        path = folder / f"part-{number}.parquet"
        pq.write_table(whole.slice(start, stop - start), path, row_group_size=2)


ACCESS = AccessRules(roots=("/p",))


def settings_of(folder: Path, **more: Any) -> InputSettings:
    places = {name: str(folder / name) for name in ("images", "boxes") if (folder / name).exists()}
    return InputSettings(**places, **more)


def in_partitions(settings: InputSettings, sizes: Sizes = SMALL, **more: Any) -> PlanInPartitions:
    plan = plan_of_any_size(settings, ACCESS, tasks=lambda _: TasksHere(), sizes=sizes, large_rows=0, **more)
    assert isinstance(plan, PlanInPartitions)
    return plan


def told(sentence: str) -> str:
    """Return a sentence without the names and boxes that it gives as examples: which they are may differ."""
    return re.sub(r"'[^']*'|box \d+ of image|\brow \d+: iscrowd: .*", "'…'", sentence)


def assert_equal(settings: InputSettings, tmp_path: Path, *, units: int = 2) -> Plan:
    """Compare both plans: hash, summary and every row that is read back; return the one of one process."""
    whole = make_plan(settings, ACCESS, images_per_unit=units)
    parts = in_partitions(settings, images_per_unit=units)
    assert parts.sha256 == whole.sha256
    assert parts.categories == whole.categories
    assert parts.access == whole.access
    for field in dataclasses.fields(whole.summary):
        mine, its = (getattr(one.summary, field.name) for one in (whole, parts))
        if field.name == "unmatched_boxes":
            mine, its = ((one.boxes, one.images, len(one.examples)) for one in (mine, its))
        if field.name == "warnings":
            mine, its = (list(map(told, one)) for one in (mine, its))
        assert its == mine, field.name
    stores = [Store(Place(uri=str(tmp_path / name))) for name in ("whole", "parts")]
    write_plan(stores[0], whole)
    parts.write(stores[1])
    files = [[(one.key, stores[at].read(one.key)) for one in stores[at].list("plan/")] for at in (0, 1)]
    assert files[0] == files[1]
    rows = sum(unit.num_rows for unit in iter_plan(stores[1], parts.sha256))
    assert rows == whole.summary.images
    return whole


def assert_both_refuse(settings: InputSettings) -> str:
    """Return what both planners refuse the inputs with."""
    with pytest.raises(JobRefused) as whole:
        make_plan(settings, ACCESS)
    with pytest.raises(JobRefused) as parts:
        in_partitions(settings)
    assert told(str(parts.value)) == told(str(whole.value))
    return str(parts.value)


def image_rows(count: int = 40, *, ids: bool = True) -> Table:
    order = np.random.default_rng(1).permutation(count).tolist()
    uris = {"image_uri": [f"s3://bucket/{at % 3}/{at:03d}.jpg" for at in order]}
    return uris | ({"image_id": [f"id-{at:03d}" for at in order]} if ids else {})


def box_rows(count: int = 90, *, by: str = "image_id", images: int = 40) -> Table:
    rng = np.random.default_rng(2)
    of = rng.integers(0, images, count).tolist()
    names = [f"id-{at:03d}" if by == "image_id" else f"s3://bucket/{at % 3}/{at:03d}.jpg" for at in of]
    first = rng.uniform(0, 100, (count, 2))
    corners = np.concatenate([first, first + 5 + first / 2], axis=1)
    return {
        by: names,
        **dict(zip(("x1", "y1", "x2", "y2"), corners.T.tolist(), strict=True)),
        "label": [("cat", "dog", "person")[at % 3] for at in of],
        "score": rng.random(count).tolist(),
    }


def box_lists(images: int = 40, *, by: str = "image_id") -> Table:
    rows = box_rows(by=by, images=images)
    table: Table = {by: [], "boxes": [], "labels": [], "scores": []}
    for name in dict.fromkeys(rows[by]):
        own = [at for at, one in enumerate(rows[by]) if one == name]
        table[by].append(name)
        table["boxes"].append([[rows[corner][at] for corner in ("x1", "y1", "x2", "y2")] for at in own])
        table["labels"].append([rows["label"][at] for at in own])
        table["scores"].append([rows["score"][at] for at in own])
    return table


@pytest.mark.parametrize("shape", [box_rows, box_lists])
@pytest.mark.parametrize("by", ["image_id", "image_uri"])
@pytest.mark.parametrize("ids", [True, False])
def test_two_tables_give_the_plan_of_one_process(tmp_path: Path, shape: Any, by: str, ids: bool) -> None:
    images = image_rows(ids=ids)
    boxes = shape(by=by)
    if not ids and by == "image_id":  # ids follow from the uris, below the folder that they start from
        boxes[by] = [f"{int(name[3:]) % 3}/{name[3:]}.jpg" for name in boxes[by]]
        settings = {"image_root": "s3://bucket"}
    else:
        settings = {}
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path, **settings), tmp_path)

    assert plan.summary.images == 40
    assert plan.summary.boxes == 90


@pytest.mark.parametrize("shape", [box_rows, box_lists])
@pytest.mark.parametrize("by", ["image_uri", "both"])
def test_one_table_gives_the_plan_of_one_process(tmp_path: Path, shape: Any, by: str) -> None:
    boxes = shape(by="image_uri")
    if by == "both":
        boxes["image_id"] = [name[-7:] for name in boxes["image_uri"]]
    write(tmp_path / "boxes", boxes)

    assert_equal(settings_of(tmp_path), tmp_path)


@pytest.mark.parametrize("ids", [True, False])
def test_images_without_boxes_give_the_plan_of_one_process(tmp_path: Path, ids: bool) -> None:
    images = image_rows(ids=ids)
    for name in images:
        images[name] += images[name][3:9]
    images["image_uri"][0] = images["image_uri"][30]  # with ids, another one's
    write(tmp_path / "images", images)

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert plan.summary.boxes == 0
    assert plan.summary.refused_uris == (2 if ids else 0)


def test_ids_of_the_box_file_are_those_of_the_plan_where_images_have_none(tmp_path: Path) -> None:
    boxes = box_rows(by="image_uri")
    boxes["image_id"] = [f"z{999 - int(name[-7:-4])}" for name in boxes["image_uri"]]
    write(tmp_path / "images", image_rows(ids=False))
    write(tmp_path / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert "z998" in plan.table["image_id"].to_pylist()


@pytest.mark.parametrize("root", [None, "images", "boxes"])
def test_relative_uris_are_found_below_either_folder(tmp_path: Path, root: str | None) -> None:
    images, boxes = image_rows(ids=False), box_rows(by="image_uri")
    images["image_uri"] = [uri.removeprefix("s3://bucket/") for uri in images["image_uri"]]
    below = str(tmp_path / (root or "boxes"))
    boxes["image_uri"] = [
        uri.replace("s3://bucket/", "" if root != "boxes" else "./") for uri in boxes["image_uri"]
    ]
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", boxes)

    assert_equal(settings_of(tmp_path, image_root=None if root is None else below), tmp_path)


def test_the_order_of_files_and_the_sizes_of_pieces_do_not_show(tmp_path: Path) -> None:
    for name, order in (("a", 1), ("b", -1)):
        images, boxes = image_rows(), box_lists()
        write(tmp_path / name / "images", {key: values[::order] for key, values in images.items()}, files=5)
        write(tmp_path / name / "boxes", {key: values[::order] for key, values in boxes.items()}, files=4)
    sizes = [SMALL, Sizes(piece=1, partition=1, bucket=1), Sizes(piece=100, partition=30), Sizes()]

    hashes = {in_partitions(settings_of(tmp_path / name), one).sha256 for name in ("a", "b") for one in sizes}

    assert len(hashes) == 1


@pytest.mark.parametrize("limit", [1, 17, 40, 100])
def test_a_limit_takes_the_first_ids_of_all(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", box_rows())

    plan = assert_equal(settings_of(tmp_path, limit=limit), tmp_path)

    assert plan.summary.images == min(limit, 40)
    assert plan.summary.listed_images == 40


def test_one_in_a_hundred_boxes_without_an_image_are_counted_exactly(tmp_path: Path) -> None:
    boxes = box_rows(300)
    for at in range(0, 300, 100):
        boxes["image_id"][at], boxes["label"][at] = f"lost-{at}", f"class of lost {at}"
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    refused = assert_both_refuse(settings_of(tmp_path))
    plan = assert_equal(settings_of(tmp_path, allow_unmatched=True), tmp_path)

    assert "3 boxes of 3 images (of 43) have no image" in refused
    assert plan.summary.unmatched_boxes.boxes == 3
    assert [one["name"] for one in plan.categories] == ["cat", "dog", "person"]


@pytest.mark.parametrize("empty", ["images", "boxes"])
def test_a_table_without_rows_is_one(tmp_path: Path, empty: str) -> None:
    for name, table in (("images", image_rows()), ("boxes", box_rows())):
        write(tmp_path / name, table)
        if name == empty:
            for path in (tmp_path / name).iterdir():
                pq.write_table(pq.read_table(path).slice(0, 0), path)

    if empty == "images":
        assert "have no image" in assert_both_refuse(settings_of(tmp_path))
    else:
        assert assert_equal(settings_of(tmp_path), tmp_path).summary.boxes == 0


def test_it_is_told_why_boxes_find_no_image(tmp_path: Path) -> None:
    boxes = box_rows()
    boxes["image_id"] = [name.upper() for name in boxes["image_id"]]
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    assert "upper and lower case" in assert_both_refuse(settings_of(tmp_path))


def test_an_image_listed_twice_counts_once(tmp_path: Path) -> None:
    images = image_rows()
    for name in images:
        images[name] += images[name][5:15]
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", box_rows())

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert plan.summary.images == 40
    assert any(sentence.startswith("10 rows of images listed before") for sentence in plan.summary.warnings)


@pytest.mark.parametrize("by", ["image_id", "image_uri"])
def test_doubles_across_files_are_found_by_id_and_by_uri(tmp_path: Path, by: str) -> None:
    images = image_rows()
    images["image_id"] += [images["image_id"][0], images["image_id"][0], "another id", "id-000"]
    images["image_uri"] += ["s3://b/2.jpg", "s3://b/3.jpg", images["image_uri"][20], "s3://b/4.jpg"]
    write(tmp_path / "images", images, files=7)
    write(tmp_path / "boxes", box_rows(by=by))

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert plan.summary.refused_uris == 4
    assert plan.summary.images == 41


def test_a_file_named_in_two_ways_is_one_image(tmp_path: Path) -> None:
    images = {"image_uri": [f"/p/{at}.jpg" for at in range(20)] + ["file:///p/3.jpg"]}
    boxes = box_rows(30, by="image_uri")
    boxes["image_uri"] = [f"file:///p/{at % 20}.jpg" for at in range(30)]
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", boxes)

    assert_equal(settings_of(tmp_path), tmp_path)


def test_most_images_not_told_apart_are_refused(tmp_path: Path) -> None:
    images = image_rows()
    images["image_id"] = ["one" for _ in images["image_id"]]
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", {"image_id": ["one"], "x1": [1.0], "y1": [1.0], "x2": [9.0], "y2": [9.0]}, 1)

    assert "images are not distinguished by image_id" in assert_both_refuse(settings_of(tmp_path))


def test_ids_of_boxes_that_name_two_images_fail_alone_or_refuse_all(tmp_path: Path) -> None:
    boxes = box_rows(by="image_uri")
    boxes["image_id"] = [name[-7:] for name in boxes["image_uri"]]
    boxes["image_uri"][3] = "s3://bucket/other.jpg"
    write(tmp_path / "few" / "boxes", boxes)
    boxes["image_uri"] = [f"{name}{at}" for at, name in enumerate(boxes["image_uri"])]
    write(tmp_path / "most" / "boxes", boxes)

    assert_equal(settings_of(tmp_path / "few"), tmp_path)

    assert "names two images" in assert_both_refuse(settings_of(tmp_path / "most"))


def test_rows_of_an_image_with_two_of_them_count_once_fail_or_refuse_all(tmp_path: Path) -> None:
    lists = box_lists()
    few = {name: lists[name] + lists[name][:3] for name in lists}
    few["scores"][-1] = [0.125] * len(few["scores"][-1])
    few["scores"][-2] = None
    most = {name: lists[name] * 2 for name in lists}
    most["scores"] = lists["scores"] + [None] * len(lists["scores"])
    for name, boxes in (("few", few), ("most", most)):
        write(tmp_path / name / "images", image_rows())
        write(tmp_path / name / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path / "few"), tmp_path)

    assert plan.table.column("error_code").to_pylist().count("labels_mismatch") == 2
    told = " ".join(plan.summary.warnings)
    assert "1 image in several rows that say the same" in told
    assert "2 images in rows that do not agree" in told
    assert f"{len(lists['boxes'])} of {len(lists['boxes'])} images, such as" in assert_both_refuse(
        settings_of(tmp_path / "most")
    )


def test_spellings_of_a_uri_and_ids_of_one_are_settled_as_in_one_process(tmp_path: Path) -> None:
    boxes = box_rows(by="image_uri")
    boxes["image_id"] = list(boxes["image_uri"])
    for at in range(0, 30, 3):
        boxes["image_id"][at] = f"other-{boxes['image_uri'][at]}"
    write(tmp_path / "images", image_rows(ids=False))
    write(tmp_path / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert "has several ids in the box file" in str(plan.table.column("error_message").drop_null()[0])


def test_classes_are_numbered_over_all_partitions(tmp_path: Path) -> None:
    boxes = box_rows()
    boxes["label"] = [f"class {at % 31:02d}" for at in range(90)]
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert [one["id"] for one in plan.categories] == list(range(1, 32))


@pytest.mark.parametrize("conflict", [False, True])
def test_ids_and_names_of_classes_complete_each_other_across_partitions(
    tmp_path: Path, conflict: bool
) -> None:
    boxes = box_rows()
    boxes["category_id"] = [{"cat": 7, "dog": 9, "person": None}[name] for name in boxes["label"]]
    boxes["label"] = [None if at % 5 == 0 else name for at, name in enumerate(boxes["label"])]
    if conflict:
        boxes["category_id"][80] = {7: 9, 9: 7, None: 7}[boxes["category_id"][80]]
        boxes["label"][80] = "cat" if boxes["category_id"][80] == 9 else "dog"
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert conflict == any("with several names" in told for told in plan.summary.warnings)


def test_rows_that_cannot_be_used_are_counted_and_told_as_by_one_process(tmp_path: Path) -> None:
    boxes = box_lists()
    boxes["labels"][4] = ["one too many", *boxes["labels"][4]]
    boxes["boxes"][9] = None
    boxes["image_id"][13] = None
    boxes["iscrowd"] = [[0] * len(labels) for labels in boxes["labels"]]
    boxes["iscrowd"][20] = [7] * len(boxes["labels"][20])
    images = image_rows()
    images["image_uri"][6] = None
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", boxes)

    plan = assert_equal(settings_of(tmp_path, allow_unmatched=True), tmp_path)

    assert plan.summary.mismatched_labels == 2
    assert plan.summary.null_boxes == 1


def test_points_and_masks_are_checked(tmp_path: Path) -> None:
    boxes = box_rows()
    boxes["points"] = [[[1.0, 2.0]] if at % 2 else [[1.0, 2.0], [3.0, 4.0]] for at in range(90)]
    boxes["point_labels"] = [[1] for _ in range(90)]
    boxes["prompt_mask"] = [{"size": [4, 4], "counts": "bad" if at % 9 else "88"} for at in range(90)]
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    assert assert_equal(settings_of(tmp_path), tmp_path).summary.invalid_prompts > 50


def test_boxes_of_another_format_are_refused(tmp_path: Path) -> None:
    boxes = box_rows()
    for corner in ("x1", "y1", "x2", "y2"):
        boxes[corner] = [value / 300 for value in boxes[corner]]
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    assert "--box-format" in assert_both_refuse(settings_of(tmp_path))


@pytest.mark.parametrize("start", ["https://host", "/elsewhere"])
def test_a_flag_that_most_images_need_is_named(tmp_path: Path, start: str) -> None:
    images = image_rows()
    images["image_uri"] = [uri.replace("s3://bucket", start) for uri in images["image_uri"]]
    write(tmp_path / "images", images)
    write(tmp_path / "boxes", box_rows())

    assert "allow them with" in assert_both_refuse(settings_of(tmp_path))


def test_a_column_that_is_bad_in_most_rows_is_refused(tmp_path: Path) -> None:
    boxes = box_rows()
    boxes["iscrowd"] = [7] * 90
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)

    assert_both_refuse(settings_of(tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", box_rows(), files=9)
    path = tmp_path / "boxes" / "part-7.parquet"
    body = bytearray(path.read_bytes())
    body[20:60] = bytes(40)
    path.write_bytes(bytes(body))

    with pytest.raises(JobRefused, match=r"part-7\.parquet"):
        in_partitions(settings_of(tmp_path))


def test_ids_that_only_other_rows_know_are_left_to_one_process(tmp_path: Path) -> None:
    boxes = box_rows(by="image_uri")
    boxes["image_id"] = [name[-7:] if at % 3 else None for at, name in enumerate(boxes["image_uri"])]
    write(tmp_path / "boxes", boxes)
    settings = settings_of(tmp_path)

    plan = plan_of_any_size(settings, tasks=lambda _: TasksHere(), sizes=SMALL, large_rows=0)

    assert isinstance(plan, Plan)
    assert plan.sha256 == make_plan(settings).sha256


def as_text(folder: Path, ending: str) -> None:
    """Put the Parquet files of a folder into files of text."""
    for path in sorted(folder.glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        names = rows[0] if rows else []
        if ending == "jsonl":
            lines = [json.dumps(row) for row in rows]
        else:
            lines = [",".join(names), *(",".join(map(str, row.values())) for row in rows)]
        path.with_suffix(f".{ending}").write_text("".join(f"{line}\n" for line in lines))
        path.unlink()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("shape", [box_rows, box_lists])
def test_tables_of_text_give_the_plan_of_one_process(tmp_path: Path, ending: str, shape: Any) -> None:
    if ending == "csv" and shape is box_lists:
        pytest.skip("its lists have commas")
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", shape())
    for name in ("images", "boxes"):
        as_text(tmp_path / name, ending)

    assert assert_equal(settings_of(tmp_path), tmp_path).summary.boxes == 90


@pytest.mark.parametrize("late", [None, "cat", "2147483648"])
def test_labels_of_a_csv_are_ids_where_all_are_integers(tmp_path: Path, late: str | None) -> None:
    boxes = box_rows()
    boxes["label"] = [str(at % 7 + 3) for at in range(90)]
    if late is not None:
        boxes["label"][70] = late
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)
    as_text(tmp_path / "boxes", "csv")

    if late == "2147483648":
        assert_both_refuse(settings_of(tmp_path))
        return
    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert (plan.categories[0]["name"] is None) == (late is None)


def test_integer_labels_next_to_category_ids_of_a_csv_are_refused(tmp_path: Path) -> None:
    boxes = box_rows()
    boxes["label"] = [str(at % 7 + 3) for at in range(90)]
    boxes["category_id"] = [1] * 90
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", boxes)
    as_text(tmp_path / "boxes", "csv")

    assert "both given" in assert_both_refuse(settings_of(tmp_path))


def test_bad_lines_of_text_are_counted_and_told(tmp_path: Path) -> None:
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", box_rows())
    as_text(tmp_path / "boxes", "jsonl")
    path = sorted((tmp_path / "boxes").iterdir())[1]
    lines = path.read_text().splitlines()
    lines[3], lines[5] = "{not JSON", lines[5].replace('"x1": ', '"x1": "a", "was": ')
    path.write_text("\n".join(lines) + "\n")

    plan = assert_equal(settings_of(tmp_path), tmp_path)

    assert any("2 of 90 rows cannot be used as given" in one for one in plan.summary.warnings)


def test_rows_are_parted_in_runs_of_bounded_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_inputs, "_CHUNK_ROWS", 3)
    for name, shape in (("lists", box_lists), ("rows", box_rows)):
        write(tmp_path / name / "images", image_rows())
        write(tmp_path / name / "boxes", shape())

        assert_equal(settings_of(tmp_path / name), tmp_path / name)


def test_small_inputs_and_other_kinds_are_planned_in_this_process(tmp_path: Path) -> None:
    write(tmp_path / "images", image_rows())
    write(tmp_path / "boxes", box_rows())
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))

    def no_tasks(_: Any) -> Any:
        raise AssertionError("nothing is large")

    small = plan_of_any_size(settings_of(tmp_path), tasks=no_tasks, large_rows=130)
    of_coco = plan_of_any_size(InputSettings(boxes=str(tmp_path / "coco.json")), tasks=no_tasks, large_rows=0)

    assert isinstance(small, Plan)
    assert isinstance(of_coco, Plan)


def test_a_plan_that_was_half_written_is_completed(tmp_path: Path) -> None:
    write(tmp_path / "images", image_rows(600))
    write(tmp_path / "boxes", box_rows(images=600))
    settings = settings_of(tmp_path)
    store = Store(Place(uri=str(tmp_path / "out")))
    plan = in_partitions(settings, Sizes(piece=100, partition=50), images_per_unit=2)
    plan.write(store)
    keys = [entry.key for entry in store.list("plan/")]
    bodies = [store.read(key) for key in keys]
    (tmp_path / "out" / keys[2]).unlink()
    (tmp_path / "out" / keys[4]).unlink()

    in_partitions(settings, Sizes(piece=100, partition=50), images_per_unit=2).write(store)

    assert len(keys) == 5
    assert [store.read(key) for key in keys] == bodies


@pytest.mark.parametrize("seed", range(40))
def test_any_small_tables_give_the_same_plan_or_the_same_refusal(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, boxes = 12, 25
    names = [f"{at}" for at in range(9)]
    uris = [*(f"/p/{at}.jpg" for at in range(9)), *(f"file:///p/{at}.jpg" for at in range(2)), "7.jpg", ""]
    some = {"image_uri": rng.choice(uris, images).tolist()}
    if rng.random() < 0.5:
        some["image_id"] = [
            str(rng.choice(names)) if rng.random() < 0.3 else f"u{uri}" for uri in some["image_uri"]
        ]
    table: Table = {}
    if rng.random() < 0.6:
        table["image_uri"] = rng.choice(uris, boxes).tolist()
    if not table or rng.random() < 0.5:
        ids = [f"u{uri}" for uri in rng.choice(uris, boxes)]
        table["image_id"] = [f"u{uri}" for uri in table["image_uri"]] if table and rng.random() < 0.7 else ids
    for corner, value in zip(("x1", "y1", "x2", "y2"), (1.0, 2.0, 30.0, 40.0), strict=True):
        table[corner] = [value + at for at in range(boxes)]
    table["label"] = rng.choice(["a", "b", "c", ""], boxes).tolist()
    if rng.random() < 0.3:
        table["category_id"] = rng.integers(1, 4, boxes).tolist()
    which = rng.random()
    if which < 0.75:
        write(tmp_path / "images", some)
    if which > 0.1:
        write(tmp_path / "boxes", table)
    settings = settings_of(tmp_path, allow_unmatched=bool(rng.random() < 0.7))

    try:
        make_plan(settings, ACCESS)
    except JobRefused:
        assert_both_refuse(settings)
    except UsageError:
        with pytest.raises(UsageError):
            in_partitions(settings)
    else:
        assert_equal(settings, tmp_path)
