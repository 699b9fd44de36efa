"""One bad row of a table costs itself: it fails by a code, or is named; every other row is planned."""

import gzip
import io
import json
import math
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs import json_records, read_table
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings

ROWS = 20
BAD = 7
BOX = [1.0, 2.0, 3.0, 4.0]
LOST, FAILED, BOX_LOST, KEPT = "left out", "failed", "box without four numbers", "kept"


def one_box(at: int) -> dict:
    return {"image_id": f"i{at:02}", "image_uri": f"{at:02}.jpg", "bbox": BOX, "label": "cat", "score": 0.5}


def corners(at: int) -> dict:
    row = {"image_uri": f"{at:02}.jpg", "category_id": 3, "iscrowd": 0}
    return row | dict(zip(("x1", "y1", "x2", "y2"), BOX, strict=True))


def lists(at: int) -> dict:
    return {"image_uri": f"{at:02}.jpg", "boxes": [BOX], "labels": ["cat"], "scores": [0.5]}


def images(at: int) -> dict:
    return {"image_id": f"i{at:02}", "image_uri": f"{at:02}.jpg"}


SURROGATE = "\udcff"  # what a byte that is no UTF-8 is written from

# rows, what is wrong with one of them, what becomes of it
FAULTS = [
    (one_box, {"image_uri": None, "image_id": None}, LOST),
    (one_box, {"image_uri": None}, FAILED),
    (one_box, {"image_uri": ""}, FAILED),
    (one_box, {"image_uri": {"a": 1}}, FAILED),
    (one_box, {"image_id": None}, KEPT),
    (one_box, {"image_id": SURROGATE}, BOX_LOST),
    (one_box, {"image_uri": SURROGATE, "image_id": ""}, LOST),
    (one_box, {"bbox": "none"}, BOX_LOST),
    (one_box, {"bbox": [1.0, 2.0, 3.0]}, BOX_LOST),
    (one_box, {"bbox": [1.0, "2", 3.0, 4.0]}, BOX_LOST),
    (one_box, {"bbox": {"x": 1}}, BOX_LOST),
    (one_box, {"bbox": [math.nan, 2.0, 3.0, 4.0]}, BOX_LOST),
    (one_box, {"bbox": [math.inf, 2.0, 3.0, 4.0]}, BOX_LOST),
    (one_box, {"label": ["cat"]}, BOX_LOST),
    (one_box, {"label": SURROGATE}, BOX_LOST),
    (one_box, {"score": "high"}, BOX_LOST),
    (corners, {"image_uri": None}, LOST),
    (corners, {"image_uri": ""}, LOST),
    (corners, {"image_uri": SURROGATE}, LOST),
    (corners, {"x1": "left"}, BOX_LOST),
    (corners, {"x1": math.nan}, BOX_LOST),
    (corners, {"y2": [1]}, BOX_LOST),
    (corners, {"category_id": 2**40}, BOX_LOST),
    (corners, {"category_id": 1.5}, BOX_LOST),
    (corners, {"category_id": "cat"}, BOX_LOST),
    (corners, {"iscrowd": 7}, BOX_LOST),
    (lists, {"image_uri": None}, LOST),
    (lists, {"image_uri": SURROGATE}, LOST),
    (lists, {"image_uri": [5]}, LOST),
    (lists, {"boxes": "none"}, FAILED),
    (lists, {"boxes": [[1.0, "b"]]}, FAILED),
    (lists, {"labels": "cat"}, FAILED),
    (lists, {"scores": {"a": 0.5}}, FAILED),
    (images, {"image_uri": None}, FAILED),
    (images, {"image_uri": ""}, FAILED),
    (images, {"image_uri": None, "image_id": None}, LOST),
    (images, {"image_uri": SURROGATE}, FAILED),
    (images, {"image_id": None}, KEPT),
    (images, {"image_id": [1]}, KEPT),
]


def as_jsonl(rows: list[dict]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")


def as_csv(rows: list[dict]) -> bytes:
    def field(value: object) -> str:
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"' if set('",') & set(text) else text

    lines = [",".join(rows[0]), *(",".join(map(field, row.values())) for row in rows)]
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")


def as_parquet(rows: list[dict]) -> bytes:
    """Return a table of one type a column; raise TypeError for a value that it cannot hold."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if len({type(one) for one in values} - {type(None)}) > 1:
            raise TypeError(name)
        columns[name] = pa.array(values) if not isinstance(values[0], str) else any_text(values)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def any_text(values: list[str | None]) -> pa.Array:
    """Return text as a program writes it that checks no UTF-8."""
    raw = pa.array([None if one is None else one.encode(errors="surrogateescape") for one in values])
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


WRITERS = {"t.jsonl": as_jsonl, "t.csv": as_csv, "t.parquet": as_parquet}


def outcome(row: dict | None) -> str:
    """Return what became of an image's row of the plan."""
    if row is None:
        return LOST
    if row["error_code"] is not None:
        assert row["error_message"]
        return FAILED
    given = [box["given"] for box in row["boxes"]]
    return BOX_LOST if any(len(one) != 4 or not all(map(math.isfinite, one)) for one in given) else KEPT


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(("make", "change", "wanted"), FAULTS)
def test_one_bad_row_costs_itself_and_is_named(tmp_path, name, make, change, wanted):
    if name == "t.csv" and not set(map(type, change.values())) <= {type(None), str, float, int}:
        pytest.skip("every text is a uri, an id or a label")
    rows = [make(at) for at in range(ROWS)]
    rows[BAD] |= change
    try:
        (tmp_path / name).write_bytes(WRITERS[name](rows))
    except (TypeError, pa.ArrowException):
        pytest.skip("no column of Parquet holds two types")
    place = str(tmp_path / name)

    plan = make_plan(InputSettings(images=place) if make is images else InputSettings(boxes=place))

    there = set(plan.table.column("image_uri").to_pylist())
    assert {f"{tmp_path}/{at:02}.jpg" for at in range(ROWS) if at != BAD} <= there
    assert len(there) == plan.table.num_rows == ROWS - (wanted == LOST)
    names = {row["image_uri"].rpartition("/")[2]: row for row in plan.table.to_pylist()}
    assert wanted == outcome(names.get(f"{BAD:02}.jpg", names.get("")))
    told = " ".join(plan.summary.warnings)
    odd_numbers = wanted == BOX_LOST and isinstance(change.get("bbox", change.get("x1")), list | float)
    assert odd_numbers or (f"row {BAD}" in told and f"1 of {ROWS} rows" in told)


COCO_FAULTS = [
    ("annotations", {"image_id": None}, LOST),
    ("annotations", {"image_id": {"a": 1}}, LOST),
    ("annotations", {"bbox": "none"}, BOX_LOST),
    ("annotations", {"bbox": [1.0, "2", 3.0, 4.0]}, BOX_LOST),
    ("annotations", {"bbox": [1.0, 2.0, 3.0]}, BOX_LOST),
    ("annotations", {"bbox": {"x": 1}}, BOX_LOST),
    ("annotations", {"bbox": [math.inf, 2.0, 3.0, 4.0]}, BOX_LOST),
    ("annotations", {"category_id": 1.5}, BOX_LOST),
    ("annotations", {"category_id": 2**40}, BOX_LOST),
    ("annotations", {"score": "high"}, BOX_LOST),
    ("annotations", {"iscrowd": 7}, BOX_LOST),
    ("images", {"file_name": None}, FAILED),
    ("images", {"file_name": ""}, FAILED),
    ("images", {"file_name": {"a": 1}}, FAILED),
    ("images", {"file_name": SURROGATE}, FAILED),
    ("images", {"width": "wide"}, KEPT),
]


@pytest.mark.parametrize(("array", "change", "wanted"), COCO_FAULTS)
def test_one_bad_record_of_coco_costs_itself_and_is_named(tmp_path, array, change, wanted):
    row = {"category_id": 1, "bbox": BOX, "score": 0.5, "iscrowd": 0}
    tree = {
        "images": [{"id": at, "file_name": f"{at:02}.jpg", "width": 9, "height": 9} for at in range(ROWS)],
        "annotations": [{"id": at, "image_id": at} | row for at in range(ROWS)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    tree[array][BAD] |= change
    path = tmp_path / "coco.json"
    path.write_bytes(json.dumps(tree, ensure_ascii=False).encode(errors="surrogateescape"))

    plan = make_plan(InputSettings(boxes=str(path)))

    assert plan.table.num_rows == ROWS
    found = next(one for one in plan.table.to_pylist() if one["image_id"] == str(BAD))
    assert found["boxes"] == [] if wanted == LOST else wanted == outcome(found)
    told = " ".join(plan.summary.warnings)
    assert wanted == KEPT or isinstance(change.get("bbox"), list) or f"row {BAD}" in told


def coco_plan(tmp_path, **changed: list[dict]) -> tuple[list[dict], str]:
    """Return the rows of the plan of a sound file with more records, and what is told of it."""
    tree = {
        "images": [{"id": at, "file_name": f"{at:02}.jpg"} for at in range(ROWS)],
        "annotations": [{"id": at, "image_id": at, "category_id": 1, "bbox": BOX} for at in range(ROWS)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for name, more in changed.items():
        tree[name] += more
    (tmp_path / "c.json").write_text(json.dumps(tree))
    plan = make_plan(InputSettings(boxes=str(tmp_path / "c.json")))
    return plan.table.to_pylist(), " ".join(plan.summary.warnings)


def test_an_image_of_coco_twice_counts_once(tmp_path):
    rows, told = coco_plan(tmp_path, images=[{"id": BAD, "file_name": f"{BAD:02}.jpg"}])

    assert rows == coco_plan(tmp_path)[0]
    assert f"1 image with the id and file of another, such as id '{BAD}': counted once" in told


def test_an_id_of_coco_with_two_files_fails_alone(tmp_path):
    rows, told = coco_plan(tmp_path, images=[{"id": BAD, "file_name": "other.jpg"}])

    (failed,) = [row for row in rows if row["error_code"]]
    assert (failed["image_id"], failed["error_code"]) == (str(BAD), "labels_mismatch")
    message = f"image id '{BAD}' stands for several files: '{BAD:02}.jpg', 'other.jpg'"
    assert message in failed["error_message"]
    assert message in told
    assert len(failed["boxes"]) == 1
    sound = [row for row in coco_plan(tmp_path)[0] if row["image_id"] != str(BAD)]
    assert [row for row in rows if row is not failed] == sound


def test_annotations_of_no_image_are_left_out_and_told(tmp_path):
    more = [{"id": ROWS, "image_id": 4711, "category_id": 1, "bbox": BOX}]
    rows, told = coco_plan(tmp_path, annotations=more)

    assert rows == coco_plan(tmp_path)[0]
    assert "1 box of 1 unlisted image, such as '4711': left out" in told


def test_annotations_most_of_which_are_of_no_image_are_refused(tmp_path):
    more = [{"id": at, "image_id": at, "bbox": BOX} for at in range(100, 100 + 2 * ROWS)]

    with pytest.raises(JobRefused, match="have no image"):
        coco_plan(tmp_path, annotations=more)


def test_annotation_ids_twice_are_two_boxes(tmp_path):
    rows, _ = coco_plan(tmp_path, annotations=[{"id": BAD, "image_id": 3, "category_id": 1, "bbox": OTHER}])

    assert sum(len(row["boxes"]) for row in rows) == ROWS + 1
    assert not any(row["error_code"] for row in rows)


def test_a_category_of_coco_with_two_names_has_one_of_them(tmp_path):
    rows, told = coco_plan(tmp_path, categories=[{"id": 1, "name": "Bus"}])

    assert {box["category_name"] for row in rows for box in row["boxes"]} == {"Bus"}
    assert "1 category with several names, such as 1: 'Bus', 'cat'; the first of these is taken" in told


@pytest.mark.parametrize("turned", [False, True])
def test_an_id_of_two_uris_in_a_table_of_boxes_fails_alone(tmp_path, turned):
    rows = [one_box(at) for at in range(ROWS)]
    rows.append(one_box(BAD) | {"image_uri": "other.jpg"})
    (tmp_path / "t.jsonl").write_bytes(as_jsonl(rows[::-1] if turned else rows))

    plan = make_plan(InputSettings(boxes=str(tmp_path / "t.jsonl")))

    found = plan.table.to_pylist()
    assert [KEPT] * BAD + [FAILED] + [KEPT] * (ROWS - BAD - 1) == [outcome(row) for row in found]
    assert found[BAD]["image_uri"].endswith(f"{BAD:02}.jpg")
    assert f"'i{BAD:02}' names two images: '{BAD:02}.jpg' and 'other.jpg'" in found[BAD]["error_message"]


OTHER = [5.0, 6.0, 7.0, 8.0]


def planned(tmp_path, make, more: list[dict], images: list[str] = ()) -> tuple[list[dict], str, list[dict]]:
    """Return the rows of a plan with `more` rows of its table, what is told, and the rows without these."""
    rows = [make(at) for at in range(ROWS)]
    found = []
    for name, table in (("without", rows), ("with", rows[:3] + more + rows[3:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(as_jsonl(table))
        (tmp_path / "i.csv").write_text("image_uri\n" + "".join(f"{one}\n" for one in images))
        listed = str(tmp_path / "i.csv") if images else None
        plan = make_plan(InputSettings(images=listed, boxes=str(path)))
        found.append((plan.table.to_pylist(), " ".join(plan.summary.warnings)))
    (without, _), (rows, told) = found
    return rows, told, without


LISTED = [f"{at:02}.jpg" for at in range(ROWS)]


@pytest.mark.parametrize("images", [(), LISTED])
def test_an_image_in_two_rows_that_say_the_same_counts_once(tmp_path, images):
    rows, told, without = planned(tmp_path, lists, [lists(BAD)], images)

    assert rows == without
    assert f"1 image in several rows that say the same, such as '{tmp_path}/{BAD:02}.jpg'" in told


@pytest.mark.parametrize("images", [(), LISTED])
@pytest.mark.parametrize(
    "change",
    [
        {"boxes": [OTHER]},
        {"boxes": [BOX, OTHER], "labels": ["cat"] * 2, "scores": [0.5] * 2},
        {"boxes": None},
        {"scores": [0.25]},
        {"labels": ["dog"]},
    ],
)
def test_an_image_in_two_rows_that_differ_fails_alone(tmp_path, images, change):
    rows, told, without = planned(tmp_path, lists, [lists(BAD) | change], images)

    assert rows[:BAD] + rows[BAD + 1 :] == without[:BAD] + without[BAD + 1 :]
    assert rows[BAD]["error_code"] == "labels_mismatch"
    assert "has 2 rows that differ" in rows[BAD]["error_message"]
    assert len(rows[BAD]["boxes"]) == 1 + len(change.get("boxes", [BOX]) or ())
    assert "1 image in rows that do not agree" in told


def test_boxes_of_a_uri_in_two_spellings_are_of_one_image(tmp_path):
    def by_uri(at: int) -> dict:
        return {"image_uri": f"{at:02}.jpg", "bbox": BOX}

    more = [{"image_uri": f"./{BAD:02}.jpg", "bbox": OTHER}]
    rows, told, without = planned(tmp_path, by_uri, more, LISTED)

    assert [OTHER, BOX] == [box["given"] for box in rows[BAD]["boxes"]]
    assert rows[BAD]["error_code"] is None
    assert rows[:BAD] + rows[BAD + 1 :] == without[:BAD] + without[BAD + 1 :]
    assert "1 image in several spellings" in told


def test_boxes_of_a_uri_with_two_ids_fail_that_image(tmp_path):
    rows, told, without = planned(tmp_path, one_box, [one_box(BAD) | {"image_id": "a"}], LISTED)

    (failed,) = [row for row in rows if row["error_code"]]
    assert failed["error_code"] == "labels_mismatch"
    assert f"has several ids in the box file: 'a', 'i{BAD:02}'" in failed["error_message"]
    assert len(failed["boxes"]) == 2
    others = [[row["image_id"], row["boxes"]] for row in rows if not row["error_code"]]
    assert others == [[row["image_id"], row["boxes"]] for row in without[:BAD] + without[BAD + 1 :]]
    assert "1 image in rows that do not agree" in told


def test_a_label_file_that_could_be_of_two_pictures_fails_those(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for at in range(ROWS):
        (tmp_path / "images" / f"{at:02}.jpg").touch()
        (tmp_path / "labels" / f"{at:02}.txt").write_bytes(b"0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "images" / f"{BAD:02}.png").touch()

    plan = make_plan(InputSettings(images=str(tmp_path / "images"), boxes=str(tmp_path / "labels")))

    rows = {row["image_id"]: row for row in plan.table.to_pylist()}
    failed = {name for name, row in rows.items() if outcome(row) == FAILED}
    assert failed == {f"{BAD:02}.jpg", f"{BAD:02}.png"}
    assert len(rows) == ROWS + 1
    message = f"{BAD:02}.txt could hold the boxes of '{BAD:02}.jpg', '{BAD:02}.png'"
    assert all(message in rows[name]["error_message"] for name in failed)
    assert message in " ".join(plan.summary.warnings)


def in_megadetector(change: dict, detection: dict) -> bytes:
    one = {"category": "1", "conf": 0.5, "bbox": [0.1, 0.1, 0.2, 0.2]}
    rows = [{"file": f"{at:02}.jpg", "detections": [dict(one)]} for at in range(ROWS)]
    rows[BAD] |= change
    if detection:
        rows[BAD]["detections"][0] |= detection
    return json.dumps({"images": rows, "detection_categories": {"1": "cat"}}).encode()


@pytest.mark.parametrize(
    ("change", "detection", "wanted"),
    [
        ({"file": None}, {}, LOST),
        ({"file": 5}, {}, LOST),
        ({"detections": None}, {}, FAILED),
        ({"detections": "none"}, {}, FAILED),
        ({}, {"bbox": "none"}, FAILED),
        ({}, {"category": "animal"}, FAILED),
        ({}, {"conf": "high"}, FAILED),
        ({}, {"bbox": [0.1]}, BOX_LOST),
    ],
)
def test_one_bad_entry_of_megadetector_costs_itself_and_is_named(tmp_path, change, detection, wanted):
    (tmp_path / "md.json").write_bytes(in_megadetector(change, detection))

    plan = make_plan(InputSettings(boxes=str(tmp_path / "md.json")))

    rows = {row["image_uri"].rpartition("/")[2]: row for row in plan.table.to_pylist()}
    assert {f"{at:02}.jpg" for at in range(ROWS) if at != BAD} <= rows.keys()
    assert wanted == outcome(rows.get(f"{BAD:02}.jpg"))
    assert wanted == BOX_LOST or f"row {BAD}: " in " ".join(plan.summary.warnings)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b"0 0.5 0.5 0.1\n", BOX_LOST),
        (b"cat 0.5 0.5 0.1 0.1\n", BOX_LOST),
        (b"1.5 0.5 0.5 0.1 0.1\n", BOX_LOST),
        (b"0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n", BOX_LOST),
        (b"0 0.5 0.5 \xff 0.1\n", FAILED),
    ],
)
def test_one_bad_line_or_file_of_yolo_labels_costs_itself_and_is_named(tmp_path, body, wanted):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for at in range(ROWS):
        (tmp_path / "images" / f"{at:02}.jpg").touch()
        (tmp_path / "labels" / f"{at:02}.txt").write_bytes(body if at == BAD else b"0 0.5 0.5 0.1 0.1\n")

    plan = make_plan(InputSettings(images=str(tmp_path / "images"), boxes=str(tmp_path / "labels")))

    rows = plan.table.to_pylist()
    assert [KEPT] * BAD + [wanted] + [KEPT] * (ROWS - BAD - 1) == [outcome(row) for row in rows]
    what = "file" if wanted == FAILED else "line"
    told = " ".join(plan.summary.warnings)
    assert f"1 of {ROWS} {what}s" in told
    assert f"{BAD:02}.txt: " in told


def header(name: str, size: int = 3, **fields: object) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.size = size
    for key, value in fields.items():
        setattr(one, key, value)
    return one


def with_size(field: bytes) -> bytes:
    """A header with other bytes as its size and a sum that is right."""
    block = bytearray(header(f"{BAD:02}.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[148:156] = field, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def torn(block: bytes) -> bytes:
    return block[:50] + b"\xff" + block[51:]


SOUND = header(f"{BAD:02}.png").tobuf(tarfile.GNU_FORMAT)
# the header of one member, what becomes of it, and of which word it is told
TAR_FAULTS = [
    (header("\udcff.png").tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), LOST, "not UTF-8"),
    (header(f"{BAD:02}.png", 0, type=tarfile.SYMTYPE, linkname="00.png").tobuf(), LOST, "is a link to"),
    (header("00.png").tobuf(tarfile.GNU_FORMAT), LOST, "'00.png' is there again"),
    (with_size(b"77777777777\0"), LOST, "which is wrong"),
    (with_size(b"00000001001\0"), LOST, "which is wrong"),
    (with_size(b"\xff" * 12), LOST, "is damaged"),
    (with_size(b"zzzzzzzzzzz\0"), LOST, "is damaged"),
    (torn(SOUND), LOST, "is damaged"),
    (bytes(512), LOST, "is damaged"),
]


@pytest.mark.parametrize(("bad", "wanted", "said"), TAR_FAULTS)
def test_one_bad_member_of_a_tar_costs_itself_and_is_named(tmp_path, bad, wanted, said):
    blocks = [header(f"{at:02}.png").tobuf(tarfile.GNU_FORMAT) for at in range(ROWS)]
    blocks[BAD] = bad
    data = b"" if b"2" == bad[156:157] else b"abc".ljust(512, b"\0")
    body = b"".join(block + (data if block is bad else b"abc".ljust(512, b"\0")) for block in blocks)
    (tmp_path / "t.tar").write_bytes(body + bytes(1024))

    plan = make_plan(InputSettings(images=str(tmp_path / "t.tar")))

    names = [f"{at:02}.png" for at in range(ROWS) if at != BAD or wanted != LOST]
    assert names == plan.table.column("image_id").to_pylist()
    told = " ".join(plan.summary.warnings)
    assert "1 of 20 members" in told
    assert said in told


@pytest.mark.parametrize("cut", [600, 900, 1200])
def test_a_tar_that_ends_early_is_refused(tmp_path, cut):
    body = b"".join(header(f"{at}.png").tobuf() + b"abc".ljust(512, b"\0") for at in range(3))
    (tmp_path / "t.tar").write_bytes(body[: 1024 + cut])

    if cut == 600:
        (tmp_path / "t.tar").write_bytes(body[: 1024 + 100])  # amid a header, which looked like the end
    with pytest.raises(JobRefused, match="unexpected end of data"):
        make_plan(InputSettings(images=str(tmp_path / "t.tar")))


@pytest.mark.parametrize(
    "text", [b"{", b"[1]", b'{"boxes": "none"}', b'{"boxes": [[1, "b", 3, 4]]}', b"\xff"]
)
def test_one_bad_json_of_a_tar_fails_its_picture_and_is_named(tmp_path, text):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for at in range(ROWS):
            own = text if at == BAD else b'{"boxes": [[1, 2, 3, 4]]}'
            for name, data in ((f"{at:02}.png", b"abc"), (f"{at:02}.json", own)):
                tar.addfile(header(name, len(data)), io.BytesIO(data))

    plan = make_plan(InputSettings(boxes=str(tmp_path / "t.tar")))

    rows = plan.table.to_pylist()
    assert [KEPT] * BAD + [FAILED] + [KEPT] * (ROWS - BAD - 1) == [outcome(row) for row in rows]
    assert f"t.tar: {BAD:02}.json: " in " ".join(plan.summary.warnings)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"path": b"\xff.png"}, KEPT),
        ({"path": None, "bytes": None}, KEPT),  # a worker finds no bytes: not_found
        ({"category": [b"\xff"]}, FAILED),
        ({"category": None}, KEPT),
    ],
)
def test_one_bad_row_of_a_hugging_face_table_costs_itself(tmp_path, change, wanted):
    rows = [{"path": b"a.png", "bytes": b"x", "category": [b"cat"]} for _ in range(ROWS)]
    rows[BAD] |= change
    paths = pa.array([row["path"] for row in rows])
    words = pa.array([row["category"] for row in rows])
    text = pa.Array.from_buffers(pa.string(), len(words.values), words.values.buffers())
    image = pa.StructArray.from_arrays(
        [pa.array([row["bytes"] for row in rows]), pa.Array.from_buffers(pa.string(), ROWS, paths.buffers())],
        ["bytes", "path"],
    )
    category = pa.ListArray.from_arrays(words.offsets, text, mask=words.is_null())
    boxes = pa.array([[BOX]] * ROWS, pa.list_(pa.list_(pa.float64())))
    objects = pa.StructArray.from_arrays([boxes, category], ["bbox", "category"])
    pq.write_table(pa.table({"image": image, "objects": objects}), tmp_path / "t.parquet")

    plan = make_plan(InputSettings(boxes=str(tmp_path / "t.parquet")))

    found = [outcome(row) for row in plan.table.to_pylist()]
    assert [KEPT] * BAD + [wanted] + [KEPT] * (ROWS - BAD - 1) == found
    assert wanted == KEPT or f"row {BAD}: " in " ".join(plan.summary.warnings)


JSON = '{{"image_uri": "{}.jpg"}}\n'
CSV = "{}.jpg,1,2,3,4\n"


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("t.csv", "image_uri,x1,y1,x2,y2\n" + CSV * 7 + "a,b.jpg,1,2,3,4\n" + CSV, "has 6 fields"),
        ("t.jsonl", JSON * 7 + '{{"image_uri": "a\n' + JSON, "no JSON"),
        ("t.jsonl", JSON * 7 + "[1]\n" + JSON, "holds a list"),
        ("t.jsonl", JSON * 7 + "null\n" + JSON, "holds null"),
        ("t.jsonl.gz", JSON * 7 + "5\n" + JSON, "holds a number"),
    ],
)
def test_a_line_that_is_no_row_is_left_out_and_named(tmp_path, name, body, said):
    text = body.format(*range(8)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)

    plan = make_plan(InputSettings(images=str(tmp_path / name)))

    assert [f"{at}.jpg" for at in range(8)] == plan.table.column("image_id").to_pylist()
    told = " ".join(plan.summary.warnings)
    assert "1 of 9 rows" in told
    assert "row 7: " in told
    assert said in told


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
@pytest.mark.parametrize(
    "change",
    [
        lambda at: {"bbox": "none"},
        lambda at: {"bbox": f"[1, 2, {at}"},
        lambda at: {"bbox": {"x": at}},
        lambda at: {"score": f"high {at}"},
        lambda at: {"label": f"{SURROGATE}{at}"},
    ],
)
def test_many_bad_rows_cost_a_few_calls_of_arrows_reader_and_not_some_each(
    tmp_path, monkeypatch, name, change
):
    """A call takes 0.3 ms: with nine for each bad row, 100,000 rows of which a third are bad took 32 s."""
    rows = [one_box(at) | (change(at) if at % 3 == 1 else {}) for at in range(900)]
    (tmp_path / name).write_bytes(WRITERS[name](rows))
    calls, read = [], json_records.pa_json.read_json
    monkeypatch.setattr(
        json_records.pa_json,
        "read_json",
        lambda *given, **options: calls.append(1) or read(*given, **options),
    )

    plan = make_plan(InputSettings(boxes=str(tmp_path / name)))

    assert plan.table.num_rows == 900
    assert any("300 of 900 rows" in text for text in plan.summary.warnings)
    assert len(calls) < 90


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_that_is_another_is_refused_by_its_name(tmp_path, name):
    """Bad values are most of it: the wrong column was meant."""
    rows = [corners(at) | ({"y2": "left"} if at % 3 else {}) for at in range(ROWS)]
    if name == "t.parquet":
        rows = [row | {"y2": "left"} for row in rows]
    (tmp_path / name).write_bytes(WRITERS[name](rows))

    with pytest.raises(JobRefused, match=r"'y2'.*wanted.*number"):
        make_plan(InputSettings(boxes=str(tmp_path / name)))


def test_a_table_that_unpacks_to_too_much_is_refused_before_a_row_is_read(tmp_path, monkeypatch):
    """Rows take several times the memory of their text."""
    monkeypatch.setattr(read_table, "FREE_BYTES", 10**6)
    monkeypatch.setattr(read_table, "jsonl_sample", lambda stream: pytest.fail("a row was read"))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"image_uri":"a"}\n' * 60_000))

    with pytest.raises(JobRefused, match="unpacks to more than"):
        make_plan(InputSettings(images=str(tmp_path / "t.jsonl.gz")))
