"""Tables as other programs write them: each kind is read, refused with the way out, or warned of.

DuckDB, Polars and PyArrow write here themselves. What pandas 3.1, R and spreadsheets write stands as text.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal.input_report import describe_inputs
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.csv_table import read_list
from hqlabel.pipeline.inputs.json_records import TextDamage
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import InputSettings
from tests.pipeline.made_formats import tar_of

Box = tuple[list[float | None] | None, int | None, str | None, float | None]

ROWS = {
    "image_uri": ["a.jpg", "a.jpg", "b.jpg", "none.jpg"],
    "x1": [0.0, 2.5, 3.0, None],
    "y1": [0.0, 1.0, 0.0, None],
    "x2": [50.0, 60.0, 70.0, None],
    "y2": [40.0, 50.0, 60.5, None],
    "score": [0.0, 0.5, 0.25, None],
    "label": ["cat", "NA", "cat", None],
}
"""A left join of three images with their boxes: the last has none."""
EXPECTED: dict[str, list[Box] | None] = {
    "a.jpg": [([0.0, 0.0, 50.0, 40.0], 2, "cat", 0.0), ([2.5, 1.0, 60.0, 50.0], 1, "NA", 0.5)],
    "b.jpg": [([3.0, 0.0, 70.0, 60.5], 2, "cat", 0.25)],
    "none.jpg": [],
}
HEAD = "image_uri,x1,y1,x2,y2,score,label"
CSV = f"""{HEAD}
a.jpg,0.0,0.0,50.0,40.0,0.0,cat
a.jpg,2.5,1.0,60.0,50.0,0.5,NA
b.jpg,3.0,0.0,70.0,60.5,0.25,cat
none.jpg,,,,,,
"""
"""`pandas.DataFrame(ROWS).to_csv(index=False)`"""


def planned(path: Path, **settings: Any) -> Plan:
    return make_plan(InputSettings(boxes=str(path), **settings))


def found(path: Path, **settings: Any) -> dict[str, list[Box] | None]:
    rows = planned(path, **settings).table.to_pylist()
    names = ("given", "category_id", "category_name", "score")
    return {
        row["image_id"]: None
        if row["boxes"] is None
        else [tuple(box[n] for n in names) for box in row["boxes"]]
        for row in rows
    }


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(JobRefused) as caught:
        planned(path, **settings)
    return str(caught.value)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- a row without a box --------------------------------------------------------------------


def by_duckdb(query: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with duckdb.connect() as connection:
            connection.register("rows", pa.table(ROWS))
            options = ", HEADER" if path.suffix == ".csv" else ""
            kind = path.suffix[1:].upper().replace("JSONL", "JSON")
            connection.execute(f"COPY ({query}) TO '{path}' (FORMAT {kind}{options})")

    return write


BOXED = (
    pl.DataFrame(ROWS).with_columns(bbox=pl.concat_list("x1", "y1", "x2", "y2")).drop("x1", "y1", "x2", "y2")
)
WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "pyarrow": ("t.parquet", lambda path: pq.write_table(pa.table(ROWS), path)),
    "polars parquet": ("t.parquet", lambda path: pl.DataFrame(ROWS).write_parquet(path)),
    "polars csv": ("t.csv", lambda path: pl.DataFrame(ROWS).write_csv(path)),
    "polars tsv": ("t.tsv", lambda path: pl.DataFrame(ROWS).write_csv(path, separator="\t")),
    "polars ndjson": ("t.ndjson", lambda path: pl.DataFrame(ROWS).write_ndjson(path)),
    "polars list of nulls": ("t.parquet", lambda path: BOXED.write_parquet(path)),
    "polars array": (
        "t.parq",
        lambda path: BOXED.with_columns(pl.col("bbox").cast(pl.Array(pl.Float32, 4))).write_parquet(path),
    ),
    "polars struct": (
        "t.parquet",
        lambda path: (
            pl.DataFrame(ROWS)
            .with_columns(bbox=pl.struct(xmax="x2", xmin="x1", ymin="y1", ymax="y2"))
            .drop("x1", "y1", "x2", "y2")
            .write_parquet(path)
        ),
    ),
    "polars categorical": (
        "t.parquet",
        lambda path: (
            pl.DataFrame(ROWS).with_columns(pl.col("label").cast(pl.Categorical)).write_parquet(path)
        ),
    ),
    "duckdb parquet": ("t.parquet", by_duckdb("FROM rows")),
    "duckdb csv": ("t.csv", by_duckdb("FROM rows")),
    "duckdb json": ("t.jsonl", by_duckdb("FROM rows")),
    "duckdb lists in csv": (
        "t.csv",
        by_duckdb("SELECT image_uri, [x1, y1, x2, y2] AS bbox, score, label FROM rows"),
    ),
    "duckdb struct": (
        "t.parquet",
        by_duckdb("SELECT image_uri, {x1: x1, y1: y1, x2: x2, y2: y2} AS bbox, score, label FROM rows"),
    ),
    "duckdb decimals": (
        "t.parquet",
        by_duckdb("SELECT * REPLACE (x1::DECIMAL(9, 2) AS x1, score::DECIMAL(4, 3) AS score) FROM rows"),
    ),
    "pandas csv": ("t.csv", lambda path: written(path, CSV)),
    "pandas csv.gz": ("t.csv.gz", lambda path: written(path, gzip.compress(CSV.encode()))),
    "pandas, index": (
        "t.csv",
        lambda path: written(
            path, "".join(f"{'' if not i else i - 1},{line}\n" for i, line in enumerate(CSV.split()))
        ),
    ),
    "pandas, all quoted": (
        "t.csv",
        lambda path: written(
            path, "".join('"' + '","'.join(line.split(",")) + '"\n' for line in CSV.split())
        ),
    ),
    "pandas, na_rep NULL": ("t.csv", lambda path: written(path, CSV.replace(",,,,,,", ",NULL" * 6))),
    "spreadsheet": (
        "t.csv",
        lambda path: written(path, ("\ufeff" + CSV + ",,,,,,\n").replace(",", ";").replace("\n", "\r\n")),
    ),
    "spreadsheet with sep=": ("t.csv", lambda path: written(path, "sep=|\n" + CSV.replace(",", "|"))),
    "R": (
        "t.csv",
        lambda path: written(
            path,
            '"image_uri","x1","y1","x2","y2","score","label"\n"a.jpg",0,0,50,40,0,"cat"\n'
            '"a.jpg",2.5,1,60,50,0.5,"NA"\n"b.jpg",3,0,70,60.5,0.25,"cat"\n"none.jpg",NA,NA,NA,NA,NA,NA\n',
        ),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_left_join_lists_an_image_without_boxes_whoever_writes_it(tmp_path: Path, writer: str) -> None:
    name, write = WRITERS[writer]
    write(tmp_path / name)

    assert EXPECTED == found(tmp_path / name)


def test_an_empty_row_adds_nothing_to_real_boxes_and_half_a_box_stays_a_box(tmp_path: Path) -> None:
    lines = (
        "both.jpg,1,2,3,4,0.5,cat", "both.jpg,,,,,,", "corner.jpg,,2,,,,", "label.jpg,,,,,,dog",
        "score.jpg,,,,,0,", "zeros.jpg,0,0,0,0,0,", "empty.jpg,,,,,,", "empty.jpg,,,,,,",
    )  # fmt: skip
    path = written(tmp_path / "t.csv", "\n".join((HEAD, *lines)))

    assert {
        "both.jpg": [([1.0, 2.0, 3.0, 4.0], 1, "cat", 0.5)],
        "corner.jpg": [([None, 2.0, None, None], None, None, None)],
        "empty.jpg": [],
        "label.jpg": [(None, 2, "dog", None)],
        "score.jpg": [(None, None, None, 0.0)],
        "zeros.jpg": [([0.0, 0.0, 0.0, 0.0], None, None, 0.0)],
    } == found(path)
    assert (6, 5, 1) == tuple(
        getattr(planned(path).summary, name) for name in ("images", "boxes", "without_boxes")
    )


@pytest.mark.parametrize("writer", ["polars", "duckdb", "jsonl"])
def test_a_left_join_gathered_into_lists_lists_an_image_without_boxes(tmp_path: Path, writer: str) -> None:
    path = tmp_path / ("t.jsonl" if writer == "jsonl" else "t.parquet")
    lists = BOXED.group_by("image_uri", maintain_order=True).agg(boxes="bbox", labels="label", scores="score")
    if writer == "duckdb":
        boxes = "list([x1, y1, x2, y2]) AS boxes, list(label) AS labels, list(score) AS scores"
        by_duckdb(f"SELECT image_uri, {boxes} FROM rows GROUP BY image_uri")(path)
    else:
        (lists.write_ndjson if writer == "jsonl" else lists.write_parquet)(path)

    assert EXPECTED == found(path)
    assert (3, 1) == (planned(path).summary.boxes, planned(path).summary.without_boxes)


def test_of_lists_only_those_of_empty_boxes_alone_are_images_without_boxes(tmp_path: Path) -> None:
    given = [[[9.0] * 4, [None] * 4], [[None] * 4], [[None, 2.0, None, None]], [[]], [None, None], None, []]
    labels = [["x", None], ["x"], [None], [None], [None, None], None, []]
    names = [f"{i}" for i in range(len(given))]
    pq.write_table(pa.table({"image_uri": names, "boxes": given, "labels": labels}), tmp_path / "t.parquet")

    counts = [None if boxes is None else len(boxes) for boxes in found(tmp_path / "t.parquet").values()]

    assert [2, 1, 1, 1, 0, None, 0] == counts


def test_empty_rows_between_those_of_other_images_shift_no_box(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 40, 400)
    boxes = [
        None if number % 3 == 0 or index % 7 == 0 else [float(index)] * 4
        for index, number in enumerate(images)
    ]
    pq.write_table(pa.table({"image_id": images, "bbox": boxes}), tmp_path / "t.parquet")
    pq.write_table(
        pa.table({"image_id": np.arange(40), "image_uri": [f"{i}" for i in range(40)]}),
        tmp_path / "i.parquet",
    )
    expected = {
        str(image): [box for number, box in zip(images, boxes, strict=True) if number == image and box]
        for image in range(40)
    }

    plan = found(tmp_path / "t.parquet", images=str(tmp_path / "i.parquet"))

    assert expected == {key: [box[0] for box in value or []] for key, value in plan.items()}


def test_blank_rows_of_a_spreadsheet_are_left_out_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", CSV + ",,,,,,\n,,,,,,\n")

    assert EXPECTED == found(path)
    assert "2 blank rows" in " ".join(planned(path).summary.warnings)
    assert "row 1: image_uri is null" in refusal(written(path, f"{HEAD}\n,,,,,,\n,1,2,3,4,,\n"))


# --- numbers --------------------------------------------------------------------------------


def test_labels_that_became_floats_beside_gaps_are_ids(tmp_path: Path) -> None:
    rows = "".join(f"a.jpg,1,2,3,4,{label}\n" for label in ("0.0", "7.0", ""))
    for column in ("label", "category_id"):
        path = written(tmp_path / "t.csv", f"image_uri,x1,y1,x2,y2,{column}\n{rows}")
        assert [0, 7, None] == [box[1] for box in found(path)["a.jpg"] or []]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('"1,5",2,3,4', ["'x1' holds '1,5'", "decimal commas", "1234.5"]),
        ('"1,000.5",2,3,4', ["'x1' holds '1,000.5'", "decimal commas"]),
        ("-,2,3,4", ["'x1' holds '-'", "an empty field"]),
        ("1,2,3,4.5.6", ["'y2' holds '4.5.6'; wanted a number"]),
    ],
)
def test_numbers_that_could_be_two_are_refused(tmp_path: Path, line: str, parts: list[str]) -> None:
    message = refusal(written(tmp_path / "t.csv", f"image_uri,x1,y1,x2,y2\na.jpg,{line}\n"))

    assert [] == [part for part in parts if part not in message]


def test_a_late_odd_field_costs_no_row_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow has given out blocks before it meets the first field that it does not take."""
    monkeypatch.setattr("hqlabel.pipeline.inputs.csv_table.BLOCK_BYTES", 1000)
    monkeypatch.setattr("hqlabel.pipeline.inputs.csv_table.SAMPLE_BYTES", 500)
    rows = [f'"{i}.jpg","{i}","0","{i + 9}","9","{i}{".0" if i > 900 else ""}"' for i in range(1000)]
    body = "\n".join([*rows, '"none.jpg","","","","",""'])
    path = written(tmp_path / "t.csv", f'"image_id","x1","y1","x2","y2","category_id"\n{body}\n')
    names = [*(f"{i}.jpg" for i in range(1000)), "none.jpg"]
    images = written(
        tmp_path / "i.csv", "image_id,image_uri\n" + "".join(f"{name},{name}\n" for name in names)
    )

    boxes = found(path, images=str(images))

    expected = {f"{i}.jpg": [([i, 0.0, i + 9, 9.0], i, None, None)] for i in range(1000)}
    assert expected | {"none.jpg": []} == boxes


@pytest.mark.parametrize("sample", [500, 2**20])
def test_quoted_empty_fields_are_null_in_every_column_however_late_numbers_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    monkeypatch.setattr("hqlabel.pipeline.inputs.csv_table.BLOCK_BYTES", 1000)
    monkeypatch.setattr("hqlabel.pipeline.inputs.csv_table.SAMPLE_BYTES", sample)
    early = "".join(f'"{i}.jpg","1","2","3","4","{"" if sample > 500 else "cat"}"\n' for i in range(100))
    path = written(
        tmp_path / "t.csv", f'"image_uri","x1","y1","x2","y2","label"\n{early}"none.jpg","","","","",""\n'
    )

    boxes = found(path)

    assert [] == boxes.pop("none.jpg")
    label = (None, None) if sample > 500 else (1, "cat")
    assert [[([1.0, 2.0, 3.0, 4.0], *label, None)]] * 100 == list(boxes.values())


def test_a_score_that_is_nan_is_none_where_there_is_no_box(tmp_path: Path) -> None:
    columns = {"image_uri": ["a"], "bbox": pa.nulls(1, pa.list_(pa.float64())), "score": [float("nan")]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")

    assert {"a": []} == found(tmp_path / "t.parquet")


# --- lists as text --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[[1, 2.5, 3, 4]]", [[1, 2.5, 3, 4]]),
        ("[(1, 2, 3, 0)]", [[1, 2, 3, 0]]),
        ("((0, 2), (3, 4),)", [[0, 2], [3, 4]]),
        ("[[1. 2. 3. 4.]\n [0. -5.5 1e3 .5]]", [[1.0, 2.0, 3.0, 4.0], [0.0, -5.5, 1000.0, 0.5]]),
        ("[ 1  2 30  4]", [1, 2, 30, 4]),
        ("['a' \"it's\"]", ["a", "it's"]),
        ("['a', 'b,c]', 'd\\'e', '\\xe9']", ["a", "b,c]", "d'e", "é"]),
        ('["a\\u00e9", null]', ["aé", None]),
        ("[1, None, NULL]", [1, None, None]),
        ("[]", []),
        ("None", None),
    ],
)
def test_lists_are_read_as_json_python_and_numpy_write_them(text: str, values: Any) -> None:
    assert values == read_list(text)


@pytest.mark.parametrize("seed", range(20))
def test_what_python_and_numpy_print_is_read_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = np.round(rng.uniform(-9, 2000, (rng.integers(1, 40), 4)), 3)

    assert boxes.tolist() == read_list(repr(boxes.tolist())) == read_list(json.dumps(boxes.tolist()))
    np.testing.assert_allclose(read_list(str(boxes)), boxes, rtol=1e-6)
    assert boxes.astype(int).tolist() == read_list(str(boxes.astype(int)))
    words = ["".join(chr(c) for c in rng.integers(32, 0x250, rng.integers(1, 9))) for _ in range(5)]
    assert words == read_list(repr(words)) == read_list(str(np.array(words))) == read_list(repr(tuple(words)))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[array([1., 2., 3., 4.])]", ".tolist()"),
        ("[np.float64(1.0), 2, 3, 4]", ".tolist()"),
        ("tensor([[1., 2., 3., 4.]])", ".tolist()"),
        (str(np.arange(8000.0).reshape(-1, 4)), "numpy left numbers out"),
        ("1 2 3 4", "wanted"),
        ("1, 2, 3, 4", "wanted"),
        ("{1,2,3,4}", "wanted"),
        ("[cat, dog]", '["a", "b"]'),
        ("['a''b']", "wanted"),
        ("[1, 2, 3, 4", "wanted"),
        ("[1, 2)]", "wanted"),
        ("[1, 2]]", "wanted"),
        ("[1, 2] [3]", "wanted"),
        ("[1-2]", "wanted"),
        ("[007]", "wanted"),
        ("[True]", "wanted"),
        ("(0)", "wanted"),
        ("[0],", "wanted"),
        ("[(1, 2), (3)]", "wanted"),
        ("__import__('os').system('true')", "wanted"),
        ("[" * 100_000, "wanted"),
        ("[" + "9" * 5000 + "]", "wanted"),
    ],
)
def test_what_is_no_list_is_named(text: str, hint: str) -> None:
    with pytest.raises(TextDamage, match=re.escape(hint)):
        read_list(text, "boxes")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="[](),'\"\\ \n01.eE+-nul Naif", max_size=40))
def test_any_text_is_a_list_or_named(text: str) -> None:
    try:
        values = read_list(text)
    except TextDamage:
        return
    assert values is None or repr(values) == repr(read_list(repr(values)))
    with contextlib.suppress(ValueError, SyntaxError, MemoryError):
        literal = ast.literal_eval(text.strip())
        if not re.search(
            r"""['"]\s*['"]|[0-9.]\s*[-+]""", text
        ):  # Python joins the words, and adds the numbers
            assert repr(values).replace("(", "[") == repr(_as_lists(literal)).replace("(", "[")


def _as_lists(value: Any) -> Any:
    return [_as_lists(one) for one in value] if isinstance(value, list | tuple) else value


def test_lists_in_a_csv_of_pandas(tmp_path: Path) -> None:
    """pandas writes the str() of a cell: of lists, tuples and arrays."""
    path = written(
        tmp_path / "t.csv",
        "image_uri,boxes,labels,scores\na.jpg,\"[[1. 2. 3. 4.]\n [0. 0. 5. 5.]]\",['a' 'b'],[0.5 0. ]\n"
        'b.jpg,"[(0, 0, 9, 9)]","(\'a\',)","(0.25,)"\nc.jpg,[],[],[]\nd.jpg,,,\n',
    )

    assert {
        "a.jpg": [([1.0, 2.0, 3.0, 4.0], 1, "a", 0.5), ([0.0, 0.0, 5.0, 5.0], 2, "b", 0.0)],
        "b.jpg": [([0.0, 0.0, 9.0, 9.0], 1, "a", 0.25)],
        "c.jpg": [],
        "d.jpg": None,
    } == found(path)


# --- other files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("t.csv", CSV.encode("utf-16"), ["UTF-16", "iconv -f UTF-16"]),
        ("t.jsonl", '{"image_uri": "a"}'.encode("utf-16-le"), ["UTF-16"]),
        (
            "t.csv",
            "image_uri,x1,y1,x2,y2,label\na.jpg,1,2,3,4,café\n".encode("latin-1"),
            ["'label'", "not UTF-8", "iconv"],
        ),
        ("t.csv", gzip.compress(CSV.encode()), ["compressed by gzip", ".csv.gz"]),
        ("t.csv.gz", gzip.compress(CSV.encode())[:-9], ["t.csv.gz: not a sound csv file"]),
        ("t.csv.gz", CSV, ["t.csv.gz: not a sound csv file"]),
        ("t.csv", b"PK\x03\x04rest", ["workbook"]),
        ("t.csv", f"# from detector 3\n{CSV}", ["line 1 is a comment", "take it out"]),
        ("t.csv", "a.jpg,1,2,3,4\nb.jpg,1,2,3,4\n", ["no column boxes", "first line holds numbers"]),
        ("t.csv", "", ["empty"]),
        ("t.csv", "\n\n", ["CSV"]),
        ("t.jsonl", "\n", ["no columns at all"]),
        ("t.xlsx", "x", ["no known kind", "save the sheet as CSV"]),
        ("t.csv.zip", "x", ["no known kind", "unpack it"]),
        ("t.feather", "x", ["no known kind", "write it as Parquet"]),
        ("t.jsonl", '[{"image_uri": "a"}]', ["line 1 holds a list", "jq -c '.[]'"]),
        ("t.jsonl", '[\n {"image_uri": "a"}\n]', ["one JSON list", "jq -c '.[]'"]),
        ("t.jsonl", '{\n "image_uri": "a"\n}\n', ["must be on one line", "jq -c ."]),
        ("t.jsonl", '{"image_uri": "a", "boxes": [], "labels": ["x"]}' + '\n{"labels": [NaN]}' * 2, ["NaN"]),
        ("t.json", '{"image_uri": "a"}\n{"image_uri": "b"}\n', ["named .jsonl"]),
        ("t.json", '[{"image_uri": "a", "bbox": [1, 2, 3, 4]}]', ["no image_id", "jq -c '.[]'"]),
        ("t.json", '{"a.jpg": [[1, 2, 3, 4]], "b.jpg": []}', ["first key is 'a.jpg'", ".jsonl"]),
        ("t.json", '{"images": [], "annotations": null}', ["`annotations` is null", "[]"]),
        ("t.json", "[]".encode("utf-16"), ["UTF-16", "iconv"]),
        ("t.json", gzip.compress(b"[]"), ["compressed by gzip", "unpack it"]),
        ("t.json", '{"images": null, "annotations": []}', ["`images` is null"]),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_refused_with_the_way_out(
    tmp_path: Path, name: str, content: str | bytes, parts: list[str]
) -> None:
    message = refusal(written(tmp_path / name, content))

    assert [] == [part for part in [str(tmp_path), *parts] if part not in message]


@pytest.mark.parametrize(
    "name", ["t.JSONL", "t.ndjson", "t.NDJSON", "t.jsonl.gz", "t.Csv", "t.tsv", "t.TSV.GZ", "t.parq", "t.PQ"]
)
def test_endings_are_known_in_any_case_and_packed(tmp_path: Path, name: str) -> None:
    kind = name.lower()
    if "json" in kind:
        body = "".join(json.dumps(row) + "\r\n\r\n" for row in pa.table(ROWS).to_pylist()).encode()
    elif "sv" in kind:
        body = CSV.replace(",", "\t" if "tsv" in kind else ",").encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(ROWS), sink)
        body = sink.getvalue().to_pybytes()
    written(tmp_path / name, gzip.compress(body) if kind.endswith(".gz") else body)

    assert EXPECTED == found(tmp_path / name)


@pytest.mark.parametrize("head", [HEAD, HEAD.replace(",", ";"), HEAD.replace(",", "\t")])
def test_a_table_of_a_header_alone_has_no_images(tmp_path: Path, head: str) -> None:
    assert {} == found(written(tmp_path / "t.csv", head)) == found(written(tmp_path / "t.csv", head + "\r\n"))


BOX = [0.0, 0.0, 5.0, 5.0]


# --- ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.parquet", lambda ids: pa.table({"image_id": pa.array(ids, pa.float64()), "bbox": [BOX] * 2})),
        ("t.jsonl", lambda ids: "".join(f'{{"image_id": {float(i)}, "bbox": [0, 0, 5, 5]}}\n' for i in ids)),
        ("t.json", lambda ids: json.dumps([{"image_id": float(i), "bbox": BOX} for i in ids])),
        ("t.json", lambda ids: json.dumps([{"image_id": str(i), "bbox": BOX} for i in ids])),
    ],
)  # fmt: skip
def test_ids_that_became_floats_join_as_the_integers_they_were(
    tmp_path: Path, name: str, write: Callable[[list[int]], Any]
) -> None:
    images = written(tmp_path / "i.csv", "image_id,image_uri\n0,a.jpg\n139,b.jpg\n")
    content = write([0, 139])
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    else:
        written(tmp_path / name, content)

    boxes = found(tmp_path / name, images=str(images))

    assert {"0": [[0.0, 0.0, 5.0, 5.0]], "139": [[0.0, 0.0, 5.0, 5.0]]} == {
        key: [box[0] for box in value or []] for key, value in boxes.items()
    }


def test_classes_that_became_floats_beside_gaps_are_ids_in_json_lines_too(tmp_path: Path) -> None:
    """As `to_json(orient="records", lines=True)` of pandas writes a left join; gaps come late, or first."""
    box = '"bbox":[1.0,2.0,3.0,4.0],"category_id":%s,"points":[[1,2]],"point_labels":[%s]}'
    row = '{"image_uri":"%s.jpg",' + box
    ids = ["0"] * 1500 + ["null", "3.0", "0.0"]
    path = written(tmp_path / "t.jsonl", "\n".join(row % (i, one, "1.0") for i, one in enumerate(ids)))

    classes = [boxes[0][1] for boxes in found(path).values() if boxes]

    assert {0: 1501, 3: 1, None: 1} == {one: classes.count(one) for one in (0, 3, None)}
    assert 0 == planned(path).summary.invalid_prompts
    assert "holds 1.5; wanted a whole number" in refusal(written(path, row % ("a", "1.5", "1")))


def test_labels_of_points_may_be_floats_in_lists_as_text_and_in_tars(tmp_path: Path) -> None:
    written(
        tmp_path / "t.csv",
        'image_uri,boxes,points,point_labels\na.jpg,"[[1,2,3,4]]","[[[1,2]]]","[[1.0]]"\n',
    )
    beside = {"boxes": [[1, 2, 3, 4]], "points": [[[1, 2]]], "point_labels": [[1.0]]}
    written(tmp_path / "t.tar", tar_of({"a.jpg": b"jpg", "a.json": json.dumps(beside).encode()}))

    for name in ("t.csv", "t.tar"):
        plan = planned(tmp_path / name)
        assert [[1]] == [box["point_labels"] for box in plan.table.to_pylist()[0]["boxes"]]
        assert 0 == plan.summary.invalid_prompts


@pytest.mark.parametrize(
    ("value", "word"),
    [("null", "null"), ("true", "true"), ("7", "a number"), ('"a"', "text"), ("[]", "a list")],
)
def test_values_of_json_are_called_as_json_calls_them(tmp_path: Path, value: str, word: str) -> None:
    path = written(tmp_path / "t.jsonl", f"{value}\n")
    written(tmp_path / "t.tar", tar_of({"a.jpg": b"jpg", "a.json": value.encode()}))

    assert f"holds {word}; wanted an object" in refusal(path)
    said = refusal(tmp_path / "t.tar")
    assert f"a.json: it holds {word}; wanted a JSON object with `boxes`" in said
    assert said.count("t.tar") == 1


def test_classes_that_are_there_twice_are_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.jsonl", '{"image_uri": "a", "bbox": [1, 2, 3, 4], "label": 1, "category_id": 1}'
    )

    assert f"{path}: integer labels and category_id are both given" in refusal(path)


def test_a_column_of_crowds_under_another_name_is_proposed(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "image_uri,x1,y1,x2,y2,is_crowd\na,1,2,3,4,1\n")

    warnings = " ".join(planned(path).summary.warnings)
    plan = make_plan(pasted(path, warnings))

    assert "'is_crowd' as iscrowd" in warnings
    assert 1 == plan.summary.crowd_boxes


def test_gaps_that_pandas_gathered_into_lists_are_null(tmp_path: Path) -> None:
    """`groupby("image_uri").agg(list)` of a left join, by `to_csv`."""
    path = written(
        tmp_path / "t.csv",
        "image_uri,boxes,labels,scores\n"
        "none.jpg,[None],[nan],[nan]\n"
        'a.jpg,"[[0.0, 0.0, 50.0, 40.0], [2.5, 1.0, 60.0, 50.0]]","[nan, \'cat\']","[nan, 0.5]"\n',
    )
    words = {"a.jpg": [None, "cat"], "none.jpg": []}
    assert words == {key: [box[2] for box in boxes or []] for key, boxes in found(path).items()}

    path = written(path, path.read_text().replace("'cat'", "3.0"))
    assert [None, 3] == [box[1] for box in found(path)["a.jpg"] or []]


def test_words_without_quotes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    duckdb.sql(f"COPY (SELECT 'a.jpg' image_uri, [[1, 2, 3, 4]] boxes, ['cat'] labels) TO '{tmp_path}/t.csv'")

    assert "words must be in quotes (DuckDB writes them so by to_json(COLUMN))" in refusal(tmp_path / "t.csv")

    columns = "'a.jpg' image_uri, [[1, 2, 3, 4]] boxes, to_json(['cat']) labels"
    duckdb.sql(f"COPY (SELECT {columns}) TO '{tmp_path}/t.csv'")
    assert {"a.jpg": [([1.0, 2.0, 3.0, 4.0], 1, "cat", None)]} == found(tmp_path / "t.csv")


def test_boxes_that_are_null_beside_a_class_are_warned_of(tmp_path: Path) -> None:
    columns = {"image_uri": list("abc"), "bbox": [[1.0, 2.0, 3.0, 4.0], None, None], "label": ["x"] * 3}
    pl.DataFrame(columns).write_parquet(tmp_path / "t.parquet")

    assert "2 of 3 boxes checked have null" in " ".join(planned(tmp_path / "t.parquet").summary.warnings)


def test_ids_of_floats_in_a_csv_are_text_and_explained(tmp_path: Path) -> None:
    images = written(tmp_path / "i.csv", "image_id,image_uri\n0,a.jpg\n139,b.jpg\n")
    boxes = written(tmp_path / "t.csv", "image_id,x1,y1,x2,y2\n0.0,0,0,5,5\n139.0,0,0,5,5\n")

    message = refusal(boxes, images=str(images))

    assert [] == [part for part in (".astype('Int64')", "'0.0' and '0'") if part not in message]


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 2**64 - 1, 2**53 + 1])
def test_ids_of_64_bits_join_digit_by_digit(tmp_path: Path, number: int) -> None:
    images = written(tmp_path / "i.csv", f"image_id,image_uri\n{number},a.jpg\n")
    kinds: dict[str, Any] = {
        "t.csv": f"image_id,x1,y1,x2,y2\n{number},0,0,5,5\n",
        "t.jsonl": f'{{"image_id": {number}, "bbox": [0, 0, 5, 5]}}\n',
        "t.json": f'[{{"image_id": {number}, "bbox": [0, 0, 5, 5]}}]',
    }
    paths = [written(tmp_path / name, content) for name, content in kinds.items()]
    pl.DataFrame({"image_id": pl.Series([number], dtype=pl.UInt64), "bbox": [[0, 0, 5, 5]]}).write_parquet(
        tmp_path / "t.parquet"
    )

    for path in (*paths, tmp_path / "t.parquet"):
        assert [str(number)] == list(found(path, images=str(images)))


@pytest.mark.parametrize(
    ("number", "reason"), [(float(2**60), "2**53"), (1.5, "holds 1.5; wanted a whole number")]
)
def test_float_ids_that_lost_digits_are_refused(tmp_path: Path, number: float, reason: str) -> None:
    body = json.dumps([{"image_id": number, "bbox": [0, 0, 5, 5]}])

    assert reason in refusal(written(tmp_path / "t.json", body))
    assert "'image_id'" in refusal(written(tmp_path / "t.json", body))


def test_coco_written_with_floats_throughout(tmp_path: Path) -> None:
    tree = {
        "images": [{"id": 0.0, "file_name": "a.jpg", "width": 9.0, "height": 9.0}],
        "annotations": [{"id": 0.0, "image_id": 0.0, "bbox": [0, 0, 5, 5], "category_id": 0.0, "score": 0}],
        "categories": [{"id": 0.0, "name": "zero"}],
    }

    assert {"0": [([0.0, 0.0, 5.0, 5.0], 0, "zero", 0.0)]} == found(
        written(tmp_path / "t.json", json.dumps(tree))
    )


# --- columns of other names -----------------------------------------------------------------


def pasted(path: Path, message: str) -> InputSettings:
    """The settings of a command with what the message proposes, read as a shell and the product read it."""
    start = message.find("--set ") if "--set " in message else message.index("--box-format")
    words = shlex.split(message[start:])
    sets = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    formats = [words[at + 1].rstrip(";") for at, word in enumerate(words) if word == "--box-format"]
    flags = {"input.boxes": str(path), "input.box_format": formats[0] if formats else None}
    return ConfigSources(flags=flags, sets=[text.rstrip(";") for text in sets]).load().input


XYXY, XYWH, CXCYWH = [8.0, 0.0, 40.0, 30.0], [8.0, 0.0, 32.0, 30.0], [24.0, 15.0, 32.0, 30.0]
OF_DETECTORS = {
    "yolov5": ("image,xmin,ymin,xmax,ymax,confidence,class,name\n", XYXY, "xyxy", "0.5,0,cat"),
    "pandas index, ultralytics": (
        ",image,box.x1,box.y1,box.x2,box.y2,confidence,class,name\n0,",
        XYXY,
        "xyxy",
        "0.5,0,cat",
    ),
    "capitals": ("Image,X1,Y1,X2,Y2,Score,Category_ID,Label\n", XYXY, "xyxy", "0.5,0,cat"),
    "blanks": ("image_uri, x1, y1, x2, y2, score, category_id, label\n", XYXY, "xyxy", "0.5,0,cat"),
    "quotes": ("'image_uri','x1','y1','x2','y2','score','category_id','label'\n", XYXY, "xyxy", "0.5,0,cat"),
    "sides": ("path,left,top,right,bottom,score,class_id,label\n", XYXY, "xyxy", "0.5,0,cat"),
    "from 0": ("filename,x0,y0,x1,y1,conf,cls,class_name\n", XYXY, "xyxy", "0.5,0,cat"),
    "prefix": ("file_name,bbox_x1,bbox_y1,bbox_x2,bbox_y2,conf,cls,class_name\n", XYXY, "xyxy", "0.5,0,cat"),
    "letters": ("image,x,y,w,h,score,category_id,label\n", XYWH, "xywh", "0.5,0,cat"),
    "ltwh": ("image,left,top,width,height,score,category_id,label\n", XYWH, "xywh", "0.5,0,cat"),
    "x1 and widths": ("image_uri,x1,y1,w,h,score,category_id,label\n", XYWH, "xywh", "0.5,0,cat"),
    "centres": (
        "image_path,x_center,y_center,width,height,conf,class_id,name\n",
        CXCYWH,
        "cxcywh",
        "0.5,0,cat",
    ),
}


@pytest.mark.parametrize("kind", OF_DETECTORS)
@pytest.mark.parametrize("shares", [False, True])
def test_columns_of_detectors_are_read_or_need_what_one_refusal_proposes(
    tmp_path: Path, kind: str, shares: bool
) -> None:
    head, box, box_format, rest = OF_DETECTORS[kind]
    numbers = ",".join(str(value / 64 if shares else value) for value in box)
    path = written(tmp_path / "t.csv", f"{head}a.jpg,{numbers},{rest}\n")

    is_refused = shares or kind in ("letters", "x1 and widths")
    plan = make_plan(pasted(path, refusal(path))) if is_refused else planned(path)

    (row,) = plan.table.to_pylist()
    assert row["image_uri"] == f"{tmp_path}/a.jpg"
    (given,) = row["boxes"]
    assert [value / 64 if shares else value for value in box] == given["given"]
    assert (0, "cat", 0.5) == (given["category_id"], given["category_name"], given["score"])
    assert plan.summary.box_format == f"{box_format}-normalised" if shares else box_format
    assert () == plan.summary.unused_columns


def test_the_shares_of_openimages_are_proposed_as_such(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.csv",
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded\n"
        "0001eeaf,xclick,/m/0cmf2,1,0.022673031,0.9642005,0.07103825,0.80054647,0\n"
        "0001eeaf,xclick,/m/0cmf3,0,0,1,0,0.5,0\n",
    )
    images = written(tmp_path / "i.csv", "image_id,image_uri\n0001eeaf,a.jpg\n")

    message = refusal(path, images=str(images))
    plan = planned(path, images=str(images), box_format="xyxy-normalised")

    assert "--box-format xyxy-normalised" in message
    assert [[0.022673031, 0.07103825, 0.9642005, 0.80054647], [0.0, 0.0, 1.0, 0.5]] == [
        box["given"] for box in plan.table.to_pylist()[0]["boxes"]
    ]
    assert ("Source", "IsOccluded") == plan.summary.unused_columns


def test_a_proposal_keeps_what_is_mapped_already(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "Bild,x,y,w,h\na.jpg,8,0,40,30\n")

    message = refusal(path, columns={"image_uri": "Bild"})

    assert {"image_uri": "Bild", "x1": "x", "y1": "y", "x2": "w", "y2": "h"} == pasted(path, message).columns


@pytest.mark.parametrize(
    "name",
    [
        *("no", "null", "1", "a: b", "ß ü", "#x", "{x}", 'say "x"', "it's", "a\\b", "-", "~", "🐈"),
        *("a\u00a0", "\ufeffa", "a\u200bb", "a\tb", "a\x1b"),
    ],
)
def test_any_name_is_proposed_so_that_yaml_and_the_shell_keep_it(tmp_path: Path, name: str) -> None:
    pq.write_table(
        pa.table({"image_uri": ["a"], f"bbox {name}": [[1.0, 2.0, 3.0, 4.0]]}), tmp_path / "t.parquet"
    )
    from hqlabel.pipeline.inputs.columns import setting_of

    for columns in ({"bbox": name}, {"bbox": name, "image_uri": f"bbox {name}"}):
        setting = setting_of(columns, {})
        assert columns == pasted(tmp_path / "t.parquet", setting).columns
        assert setting.isprintable()


@pytest.mark.parametrize("sign", ["\u00a0", "\ufeff", "\u200b"])
def test_a_header_with_signs_that_do_not_show_is_read(tmp_path: Path, sign: str) -> None:
    path = written(tmp_path / "t.csv", f"image_uri{sign},{sign}x1,y1,x2,y2\na.jpg,1,2,3,4\n")

    plan = planned(path)

    assert [[1.0, 2.0, 3.0, 4.0]] == [box["given"] for box in plan.table.to_pylist()[0]["boxes"]]


def test_a_name_beyond_what_yaml_can_escape_is_not_proposed(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "image\U000e0001,x1,y1,x2,y2\na.jpg,1,2,3,4\n")

    assert "if it is called otherwise: --set input.columns.image_uri=NAME" in refusal(path)


def test_what_is_called_like_nothing_is_said_with_the_setting_that_names_it(tmp_path: Path) -> None:
    otherwise = "if it is called otherwise: --set input.columns.image_uri=NAME"
    head = "файл,name,class,xmin,ymin,xmax,ymax\na.jpg,cat,cat,1,2,30,40\n"
    path = written(tmp_path / "t.csv", head)
    corners = dict(zip(("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), strict=True))

    assert otherwise in refusal(path)
    message = refusal(path, columns=corners | {"label": "name"})  # `class` holds words, which are no ids
    assert message.endswith(otherwise)
    assert "meant" not in message


def test_text_that_looks_like_a_list_is_refused_in_json_lines_with_the_reason(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", '{"image_uri": "a.jpg", "boxes": "[[1, 2, 3, 4]]"}\n')

    assert "'boxes' holds text; wanted a list (text that looks like a list is read" in refusal(path)


def test_the_frame_and_not_the_track_names_the_image(tmp_path: Path) -> None:
    head = "frame,id,bb_left,bb_top,bb_width,bb_height,conf\n"
    path = written(tmp_path / "t.csv", f"{head}12,1,8,0,32,30,0.5\n")

    assert "image_id: frame" in refusal(path)


def test_lists_under_the_name_of_the_other_shape_are_told_by_their_type(tmp_path: Path) -> None:
    box = [1.0, 2.0, 3.0, 4.0]
    pq.write_table(pa.table({"image_uri": ["a"], "bbox": [[box]]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"image_uri": ["a"], "boxes": [box]}), tmp_path / "2.parquet")

    for path in (tmp_path / "1.parquet", tmp_path / "2.parquet"):
        assert {"a": [(box, None, None, None)]} == found(path, columns=pasted(path, refusal(path)).columns)


# --- nothing is lost in silence -------------------------------------------------------------


def test_columns_that_are_not_read_are_said_in_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", f",{HEAD},iou,model\n0,a.jpg,1,2,3,4,0,cat,0.5,m\n")
    config = ConfigSources(flags={"input.boxes": str(path)}).load()
    plan = planned(path)

    assert ("iou", "model") == plan.summary.unused_columns
    shown = describe_inputs(
        config, {**vars(plan.summary), "unmatched_boxes": vars(plan.summary.unmatched_boxes)}
    )
    assert ("", "columns not used: iou, model") in shown
    many = written(path, f"{HEAD},{','.join(f'f{i}' for i in range(100))}\na.jpg,1,2,3,4,0,cat{',0' * 100}\n")
    summary = vars(planned(many).summary)
    lines = [
        text
        for _, text in describe_inputs(
            config, {**summary, "unmatched_boxes": vars(summary["unmatched_boxes"])}
        )
    ]
    (line,) = [text for text in lines if text.startswith("columns not used")]
    assert "f0, f1" in line
    assert line.endswith("and 88 more")


def test_a_column_that_is_called_like_one_of_ours_is_read_but_where_that_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "image_uri,x1,y1,x2,y2,conf,class\na.jpg,1,2,3,4,0,cat\n")

    assert {"a.jpg": [([1.0, 2.0, 3.0, 4.0], 1, "cat", 0.0)]} == found(path)
    assert {"a.jpg": [([1.0, 2.0, 3.0, 4.0], None, None, 0.0)]} == found(path, columns={"label": ""})


def test_one_column_of_classes_is_enough_and_words_are_no_ids(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "image_uri,x1,y1,x2,y2,label,class\na.jpg,1,2,3,4,0,cat\n")
    assert () == planned(path).summary.warnings
    assert ("class",) == planned(path).summary.unused_columns

    written(path, "image,xmin,ymin,xmax,ymax,name,class\na.jpg,1,2,3,4,x,cat\n")
    said = refusal(path)
    chosen = re.search(r"input\.columns\.label=(\w+)", said)[1]
    label = {"name": "x", "class": "cat"}[chosen]
    assert {"a.jpg": [([1.0, 2.0, 3.0, 4.0], 1, label, None)]} == found(path, columns={"label": chosen})
    assert """to read none of them: --set 'input.columns={label: ""}'""" in said
    assert {"a.jpg": [([1.0, 2.0, 3.0, 4.0], None, None, None)]} == found(path, columns={"label": ""})


def test_of_one_file_for_images_and_boxes_what_neither_reads_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "image_uri,x1,y1,x2,y2,iou\na.jpg,1,2,3,4,1\n")
    images = written(tmp_path / "i.csv", "image_uri,width\na.jpg,64\n")

    assert ("iou",) == planned(path, images=str(path)).summary.unused_columns
    assert ("width", "iou") == planned(path, images=str(images)).summary.unused_columns
    written(path, "image_uri,x1,y1,x2,y2\na.jpg,1,2,3,4\na.jpg,1,2,3,4\n")
    both = planned(path, images=str(path)).summary
    assert (1, 2) == (both.images, both.boxes)


def test_keys_beside_pictures_in_tars_and_fields_of_objects_that_are_not_read_are_said(
    tmp_path: Path,
) -> None:
    beside = json.dumps({"boxes": [[0, 0, 5, 5]], "labels": [0.0], "iou": [1]}).encode()
    (tmp_path / "0.tar").write_bytes(tar_of({"a.png": b"x", "a.json": beside}))
    objects = {"bbox": [[0.0, 0.0, 5.0, 5.0]], "category": [0.0], "area": [25.0]}
    rows = {"image": [{"bytes": b"x", "path": "a.png"}], "objects": [objects], "width": [5]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")

    of_tar, of_set = planned(tmp_path / "0.tar"), planned(tmp_path / "t.parquet")

    assert ("iou",) == of_tar.summary.unused_columns
    assert ("width", "objects.area") == of_set.summary.unused_columns
    for plan in (of_tar, of_set):
        assert [0] == [box["category_id"] for row in plan.table.to_pylist() for box in row["boxes"]]


def test_a_column_that_is_a_folder_is_said(tmp_path: Path) -> None:
    rows = pl.DataFrame({"image_uri": ["a", "b"], "bbox": [[1.0, 2.0, 3.0, 4.0]] * 2, "label": ["x", "y"]})
    with duckdb.connect() as connection:
        connection.register("rows", rows.to_arrow())
        connection.execute(f"COPY rows TO '{tmp_path / 'out'}' (FORMAT PARQUET, PARTITION_BY (label))")

    (warning,) = planned(tmp_path / "out").summary.warnings

    assert "label of its folders is not read" in warning


def test_white_space_around_labels_is_kept_and_said(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "image_uri,x1,y1,x2,y2,label\na.jpg,1,2,3,4, cat\n")

    assert [" cat"] == [box[2] for box in found(path)["a.jpg"] or []]
    assert "' cat'" in " ".join(planned(path).summary.warnings)


# --- boxes of another length ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([5] * 1234, ["all 1,234 boxes have 5 numbers each", "turned boxes", "wanted 4"]),
        ([8] * 3, ["all 3 boxes have 8 numbers each", "polygons"]),
        ([6], ["all 1 boxes have 6 numbers each", "a score and a class"]),
        ([0] * 3, ["all 3 boxes have 0 numbers each", "empty lists"]),
        ([4, 4, 5, 5, 6], ["3 of 5 boxes have other than 4 numbers, most of them 5"]),
        ([4] * 19 + [5], []),
        ([4] * 3, []),
    ],
)
def test_boxes_of_other_lengths_are_warned_of_before_work(
    tmp_path: Path, lengths: list[int], parts: list[str]
) -> None:
    boxes = [[1.0, 2.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0][:count] for count in lengths]
    names = [f"{i}.jpg" for i in range(len(boxes))]
    one = pa.table(
        {"image_uri": names, "bbox": pa.array(boxes, pa.list_(pa.float64())), "label": ["x"] * len(boxes)}
    )
    many = pa.table(
        {"image_uri": names, "boxes": pa.array([[box] for box in boxes], pa.list_(pa.list_(pa.float64())))}
    )

    for table in (one, many):
        pq.write_table(table, tmp_path / "t.parquet")
        warnings = " ".join(planned(tmp_path / "t.parquet").summary.warnings)
        assert [] == [part for part in parts if part not in warnings]
        assert bool(parts) == ("box_malformed" in warnings)


@pytest.mark.parametrize(("bad", "warned"), [(3, True), (2, False)])
@pytest.mark.parametrize("number", [None, float("nan"), float("-inf")])
def test_boxes_that_lack_numbers_are_warned_of_before_work(
    tmp_path: Path, number: float | None, bad: int, warned: bool
) -> None:
    boxes = [[1.0, 2.0, 30.0, 40.0]] * (20 - bad) + [[1.0, number, 30.0, 40.0]] * bad
    pl.DataFrame({"image_uri": list(map(str, range(20))), "bbox": boxes}).write_parquet(
        tmp_path / "t.parquet"
    )

    warnings = " ".join(planned(tmp_path / "t.parquet").summary.warnings)

    assert warned == ("3 of 20 boxes checked have null, NaN or infinity" in warnings)
    assert warned == ("box_not_finite" in warnings)


def test_prompts_without_a_box_are_of_no_wrong_length(tmp_path: Path) -> None:
    columns = {
        "image_uri": ["a"],
        "bbox": pa.nulls(1, pa.list_(pa.float64())),
        "points": [[[1.0, 2.0]]],
        "point_labels": [[1]],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")

    assert () == planned(tmp_path / "t.parquet").summary.warnings
