"""Both shapes of a table of boxes say the same; every list entry stays with its box."""

import csv
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.box_tables import align, flatten_points, read_box_tables
from hqlabel.pipeline.inputs.image_box_lists import BoxList
from hqlabel.pipeline.job_context import AccessRules


def read(tmp_path, *tables, mapping=None, suffix=".parquet") -> BoxList:
    uris = []
    for index, table in enumerate(tables):
        path = tmp_path / f"{index}{suffix}"
        if isinstance(table, str):
            path.write_text(table)
        else:
            pq.write_table(pa.table(table), path)
        uris.append(str(path))
    return read_box_tables(uris, mapping or {}, AccessRules(), folder=str(tmp_path))


def rows(boxes: BoxList, *names) -> dict[str, list]:
    """What each image has, by its name."""
    keys = (boxes.image_id if boxes.image_id is not None else boxes.image_uri).to_pylist()
    found = {}
    for place, key in enumerate(keys):
        at = pa.array(boxes.rows_of(np.array([place])))
        found[key] = [tuple(row.values()) for row in boxes.boxes.select(names).take(at).to_pylist()]
    return found


def refusal(tmp_path, *tables, **rest) -> str:
    with pytest.raises(JobRefused) as caught:
        read(tmp_path, *tables, **rest)
    return str(caught.value)


A, B, C = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]


def test_one_row_an_image_keeps_every_list_with_its_boxes(tmp_path):
    boxes = read(
        tmp_path,
        {
            "image_uri": ["b", "a", "c", "d"],
            "boxes": [[A, B], [C], [], None],
            "labels": [["x", None], None, [], None],
            "scores": [[0.5, math.nan], [None], None, None],
            "box_ids": [[7, 8], [9], None, [1]],
        },
    )

    found = rows(boxes, "given", "category_name", "score", "box_id")
    assert (A, "x", 0.5, "7") == found["b"][0]
    assert (B, None, "8") == (found["b"][1][0], found["b"][1][1], found["b"][1][3])
    assert math.isnan(found["b"][1][2])
    assert {"a": [(C, None, None, "9")], "c": [], "d": []} == {key: found[key] for key in "acd"}
    assert [False, False, False, True] == boxes.is_null.tolist()
    assert [None] * 4 == boxes.error.to_pylist()


def test_lists_of_unlike_length_are_an_error_of_the_image_and_shift_nothing(tmp_path):
    boxes = read(
        tmp_path,
        {
            "image_uri": ["a", "b", "c"],
            "boxes": [[A], [A, B], [C]],
            "labels": [["x"], ["y"], ["z"]],
            "scores": [[0.1], [0.2, 0.3], [0.4, 0.5]],
        },
    )

    assert [
        None,
        "labels has 1 values for 2 boxes",
        "scores has 2 values for 1 boxes",
    ] == boxes.error.to_pylist()
    assert {"a": [("x", 0.1)], "b": [(None, 0.2), (None, 0.3)], "c": [("z", None)]} == rows(
        boxes, "category_name", "score"
    )


def test_one_row_a_box_is_grouped_in_the_order_of_the_input(tmp_path):
    boxes = read(
        tmp_path,
        {"image_uri": ["b", "a", "b", "c", "b"], "bbox": [A, B, C, None, [1.0]], "score": [1, 2, 3, 4, 5]},
        {"image_uri": ["a", "d"], "bbox": [A, A], "score": [6, 7]},
    )

    assert {
        "b": [(A, 1.0), (C, 3.0), ([1.0], 5.0)],
        "a": [(B, 2.0), (A, 6.0)],
        "c": [(None, 4.0)],
        "d": [(A, 7.0)],
    } == rows(boxes, "given", "score")


def test_corners_in_columns_are_boxes_and_null_numbers_stay_null(tmp_path):
    boxes = read(
        tmp_path,
        {
            "image_id": [2, 1, 2],
            "x1": [1, None, None],
            "y1": [2.5, 6.0, None],
            "x2": [3, 7, None],
            "y2": [math.inf, 8, None],
            "category_id": [3, None, 4],
        },
    )

    assert {
        "2": [([1.0, 2.5, 3.0, math.inf], 3), (None, 4)],
        "1": [([None, 6.0, 7.0, 8.0], None)],
    } == rows(boxes, "given", "category_id")


@pytest.mark.parametrize(
    ("labels", "name", "found"),
    [
        (["1", "20", ""], "category_id", [1, 20, None]),
        (["1", "x", ""], "category_name", ["1", "x", None]),
        (["01", "2", ""], "category_name", ["01", "2", None]),
        (["", "", ""], "category_name", [None, None, None]),
    ],
)
def test_csv_labels_that_are_all_integers_are_ids(tmp_path, labels, name, found):
    lines = "".join(f"a,1,2,3,4,{label}\n" for label in labels)

    boxes = read(tmp_path, f"image_uri,x1,y1,x2,y2,label\n{lines}", suffix=".csv")

    assert found == boxes.boxes.column(name).to_pylist()


def test_the_same_boxes_from_every_kind_of_file(tmp_path):
    table = pa.table(
        {"image_id": ["a", "b", "a"], "bbox": [A, B, C], "label": ["x", None, "y"], "score": [0.5, 1.0, None]}
    )
    jsonl = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    cells = [["" if v is None else v for v in row.values()] for row in table.to_pylist()]
    csv = "image_id,bbox,label,score\n" + "".join(f'{i},"{b}",{label},{s}\n' for i, b, label, s in cells)
    names = ("given", "category_name", "score")

    expected = {"a": [(A, "x", 0.5), (C, "y", None)], "b": [(B, None, 1.0)]}
    assert expected == rows(read(tmp_path, table), *names)
    assert expected == rows(read(tmp_path, jsonl, suffix=".jsonl"), *names)
    assert expected == rows(read(tmp_path, csv, suffix=".csv"), *names)


def test_points_and_masks_stay_with_their_boxes(tmp_path):
    mask = {"size": [4, 5], "counts": "abc"}
    boxes = read(
        tmp_path,
        {
            "image_uri": ["a"],
            "boxes": [[A, None, B]],
            "points": pa.array(
                [[[[1.0, 2.0], [3.0, 4.0]], None, [[5.0]]]], pa.list_(pa.list_(pa.list_(pa.float64())))
            ),
            "point_labels": [[[1, 0], None, [1]]],
            "prompt_mask": [[None, mask, None]],
        },
    )

    (first, second, third) = rows(boxes, "given", "points_xy", "point_labels", "prompt_mask")["a"]
    assert (A, [1.0, 2.0, 3.0, 4.0], [1, 0], None) == first
    assert (None, None, None, mask) == second
    assert (B, [1], None) == (third[0], *third[2:])
    assert [True] == [math.isnan(value) for value in third[1]]


BROKEN = {"size": [], "counts": ""}
# A mask as it may stand in a row of JSON, and what it is taken for; of BROKEN, the row alone has no mask.
MASKS = [
    (None, None),
    ({"size": [4, 5], "counts": "d0"}, {"size": [4, 5], "counts": "d0"}),
    ({"size": [4, 5], "counts": [3, 17]}, {"size": [4, 5], "counts": "3a0"}),
    ({"size": [4.0, 5.0], "counts": "d0", "id": 7}, {"size": [4, 5], "counts": "d0"}),
    ({"size": [4, 5], "counts": "b'd0'"}, {"size": [4, 5], "counts": "b'd0'"}),
    ({"size": [4.5, True], "counts": "d0"}, {"size": [-1, -1], "counts": "d0"}),
    ({"size": [-4, 2**40], "counts": "d0"}, {"size": [-1, -1], "counts": "d0"}),
    ({"size": ["4", None], "counts": "d0"}, {"size": [-1, -1], "counts": "d0"}),
    ({"size": "4x5", "counts": {"a": 1}}, BROKEN),
    ({"size": [4, 5], "counts": [3, -1, 18]}, {"size": [4, 5], "counts": ""}),
    ({"size": [4, 5], "counts": [[3, 4, 5, 6, 7, 8]]}, {"size": [4, 5], "counts": ""}),
    ({"size": [4, 5], "counts": None}, {"size": [4, 5], "counts": ""}),
    ({"size": [4, 5], "counts": "d\ud800"}, {"size": [4, 5], "counts": ""}),
    ({"size": [4, 5]}, {"size": [4, 5], "counts": ""}),
    ({}, BROKEN),
    ([[3, 4, 5, 6, 7, 8]], BROKEN),
    ("d0", BROKEN),
    (7, BROKEN),
]


@pytest.mark.parametrize("shape", ["rows.jsonl", "lists.jsonl", "rows.csv", "lists.csv"])
def test_a_mask_of_any_make_costs_no_other_row(tmp_path, shape):
    given, wanted = [mask for mask, _ in MASKS], [mask for _, mask in MASKS]
    kind, _, ending = shape.partition(".")
    path, table = tmp_path / shape, []
    if kind == "rows":
        table = [{"image_id": "a", "bbox": A, "prompt_mask": mask} for mask in given]
    else:
        table = [{"image_id": "a", "boxes": [A] * len(given), "prompt_mask": given}]
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table[0])
            writer.writerows(
                [v if isinstance(v, str) else "" if v is None else json.dumps(v) for v in row.values()]
                for row in table
            )

    boxes = read_box_tables([str(path)], {}, AccessRules(), folder=str(tmp_path))

    assert [(A, mask) for mask in wanted] == rows(boxes, "given", "prompt_mask")["a"]


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("", None),
        ("{'size': [4, 5], 'counts': b'd0'}", {"size": [4, 5], "counts": "d0"}),
        (" {'counts': 'd\\\\0', 'size': (4, 5)}", {"size": [4, 5], "counts": "d\\0"}),
        ('{"size": [4, 5], "counts": "d\\u0027"}', {"size": [4, 5], "counts": "d'"}),
        ("{'size': [4, 5], 'counts': [3, 17]}", {"size": [4, 5], "counts": "3a0"}),
        ("{'size': array([4, 5]), 'counts': b'd0'}", BROKEN),
        ("{[]: 1}", BROKEN),
        ("10 5 30 5", BROKEN),
        ("[" * 5000, BROKEN),
        ("-" * 100_000 + "1", BROKEN),
        ("1," * 5000, BROKEN),
        ("{'size': [4, 5], 'counts': b'd0'} if 1 else 2", BROKEN),
        ("{'size': [4, 5], 'counts': 'd0', 'size': 9" + "9" * 5000 + "}", BROKEN),
    ],
)
def test_a_field_of_csv_shows_a_mask_or_one_that_cannot_be_used(tmp_path, field, wanted):
    with open(tmp_path / "boxes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image_id", "bbox", "prompt_mask"], ["a", "[1,2,3,4]", field]])

    boxes = read_box_tables([str(tmp_path / "boxes.csv")], {}, AccessRules(), folder=str(tmp_path))

    assert [(wanted,)] == rows(boxes, "prompt_mask")["a"]


def test_a_list_of_masks_in_a_csv_is_read_as_python_prints_it_or_named(tmp_path):
    masks = [{"size": [4, 5], "counts": b"d0"}, None, {"size": [4, 5], "counts": "d\\0'"}]
    for field, error in (
        (str(masks), None),
        (str([{"size": np.arange(2)}]), "'prompt_mask' holds \"[{'size'"),
    ):
        with open(tmp_path / "boxes.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["image_id", "boxes", "prompt_mask"], ["a", str([A, A, A]), field], ["b", str([A]), ""]]
            )

        boxes = read_box_tables([str(tmp_path / "boxes.csv")], {}, AccessRules(), folder=str(tmp_path))
        if error is None:
            wanted = [
                mask and mask | {"counts": text}
                for mask, text in zip(masks, ("d0", "", "d\\0'"), strict=True)
            ]
            assert [(mask,) for mask in wanted] == rows(boxes, "prompt_mask")["a"]
            continue
        assert error in boxes.error[0].as_py()
        assert "no list of masks; wanted JSON such as" in boxes.error[0].as_py()
        assert boxes.error[1].as_py() is None


@pytest.mark.parametrize(
    ("kind", "counts", "wanted"),
    [
        (pa.binary(), [b"d0", None, b"\xff"], ["d0", None, "\ufffd"]),
        (pa.large_binary(), [b"d0"], ["d0"]),
        (pa.large_string(), ["d0"], ["d0"]),
        (pa.list_(pa.uint32()), [[3, 17], None, [3, None]], ["3a0", None, ""]),
    ],
)
@pytest.mark.parametrize("sides", [pa.int64(), pa.uint64(), pa.int16()])
def test_masks_of_parquet_may_hold_bytes_and_runs(tmp_path, kind, counts, wanted, sides):
    struct = pa.struct([("counts", kind), ("size", pa.list_(sides)), ("more", pa.int8())])
    masks = pa.array([{"counts": one, "size": [4, 5]} for one in counts] + [None], struct)
    table = {"image_id": ["a"] * len(masks), "bbox": [A] * len(masks), "prompt_mask": masks}

    found = rows(read(tmp_path, table), "prompt_mask")["a"]

    assert found == [*(({"size": [4, 5], "counts": text},) for text in wanted), (None,)]


def test_numbers_of_masks_and_labels_that_take_more_than_32_bits_cost_their_row_alone(tmp_path):
    sizes = [[2**40, 5], [-(2**40), 5], [None, 5], [2**63 - 1, 5]]
    masks = pa.array(
        [{"size": size, "counts": "d0"} for size in sizes],
        pa.struct([("size", pa.list_(pa.int64())), ("counts", pa.string())]),
    )
    labels = pa.array([[2**40, 1], [-1, 0], [None], [2**63 - 1]], pa.list_(pa.int64()))
    table = {"image_id": ["a"] * 4, "bbox": [A] * 4, "prompt_mask": masks, "point_labels": labels}

    found = rows(read(tmp_path, table), "prompt_mask", "point_labels")["a"]

    assert [mask["size"] for mask, _ in found] == [[2**31 - 1, 5], [-1, 5], [-1, 5], [2**31 - 1, 5]]
    assert [one for _, one in found] == [[2, 1], [-1, 0], [None], [2]]


def test_long_lines_with_masks_are_read_in_pieces(tmp_path):
    """Lines that reach over the blocks of the file and of the reader, one of them without its end."""
    counts = ["0" * length for length in (1, 5 * 2**20, 2 * 2**20, 3 * 2**20 + 1, 7)]
    lines = [
        json.dumps({"image_id": str(i), "bbox": A, "prompt_mask": {"size": [4.0, 5], "counts": text}})
        for i, text in enumerate(counts)
    ]
    (tmp_path / "boxes.jsonl").write_text("\n\n".join(lines))

    boxes = read_box_tables([str(tmp_path / "boxes.jsonl")], {}, AccessRules(), folder=str(tmp_path))

    found = rows(boxes, "prompt_mask")
    assert [len(found[str(i)][0][0]["counts"]) for i in range(5)] == [len(text) for text in counts]


def test_a_table_without_rows_has_no_images(tmp_path):
    lists = {"image_uri": pa.array([], pa.string()), "boxes": pa.array([], pa.list_(pa.list_(pa.float64())))}
    single = {"image_uri": pa.array([], pa.string()), "bbox": pa.array([], pa.list_(pa.float64()))}

    for table in (lists, single):
        boxes = read(tmp_path, table)
        assert (0, 0) == (len(boxes.lengths), len(boxes.image_uri))


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({"image_uri": ["a"]}, ["no column boxes or bbox or x1", "found image_uri"]),
        ({"image_uri": ["a"], "bboxes": [[A]]}, ["'bboxes'", "input.columns.boxes=bboxes"]),
        ({"boxes": [[A]]}, ["no column image_uri or image_id"]),
        (
            {"path": ["a"], "file": ["b"], "boxes": [[A]]},
            ["'path' or 'file'", "input.columns.image_uri=path"],
        ),
        ({"image_uri": ["a"], "x1": [1], "y1": [1], "x2": [1]}, ["no column y2"]),
        ({"image_uri": ["a"], "boxes": [[A]], "bbox": [A]}, ["more than once", "boxes, bbox"]),
        ({"image_uri": ["a", None, None], "boxes": [[A], [], []]}, ["row 1: image_uri is null", "2 of 3"]),
        ({"image_id": [1, None, None], "bbox": [A, A, A]}, ["row 1: image_id is null", "2 of 3"]),
        ({"image_id": [1], "bbox": [A], "category_id": [2**40]}, ["category_id", "1099511627776"]),
        ({"image_id": [1], "bbox": [A], "label": [2], "category_id": [2]}, ["both given"]),
        ({"image_id": [1], "bbox": [A], "prompt_bbox": [A], "prompt_bbox_given": [A]}, ["output folder"]),
        (
            {"image_id": ["i", "i", "i"], "image_uri": ["a", "c", "a"], "bbox": [A, A, A]},
            ["'i' names two images: 'a' and 'c'"],
        ),
    ],
)
def test_a_table_that_does_not_say_enough_is_refused(tmp_path, table, parts):
    message = refusal(tmp_path, table)

    assert [] == [part for part in parts if part not in message]


def test_ids_and_uris_may_both_be_given(tmp_path):
    boxes = read(tmp_path, {"image_id": ["i", "j", "i"], "image_uri": ["a", "b", "a"], "bbox": [A, B, C]})

    assert ["i", "j"] == boxes.image_id.to_pylist()
    assert ["a", "b"] == boxes.image_uri.to_pylist()
    assert {"i": [(A,), (C,)], "j": [(B,)]} == rows(boxes, "given")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.none() | st.lists(st.integers(0, 9), max_size=5)), max_size=8)
)
def test_lists_are_aligned_with_boxes_or_left_out(pairs):
    lengths = np.array([length for length, _ in pairs], dtype=np.int64)
    lists = pa.array([values for _, values in pairs], pa.list_(pa.int64()))

    flat, differs = align(lists, lengths)

    expected = [
        entry
        for length, values in pairs
        for entry in (values if values is not None and len(values) == length else [None] * length)
    ]
    assert expected == flat.to_pylist()
    assert [values is not None and len(values) != length for length, values in pairs] == differs.tolist()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.none() | st.lists(st.none() | st.lists(st.none() | st.floats(0, 9), max_size=4), max_size=4),
        max_size=5,
    )
)
def test_points_are_flattened_and_odd_ones_made_unusable_in_place(points):
    flat = flatten_points(pa.array(points, pa.list_(pa.list_(pa.float64()))))

    def expected(point):
        sound = point is not None and len(point) == 2
        return [math.nan if value is None else value for value in point] if sound else [math.nan]

    wanted = [None if one is None else [v for point in one for v in expected(point)] for one in points]
    assert repr(wanted) == repr(flat.to_pylist())
