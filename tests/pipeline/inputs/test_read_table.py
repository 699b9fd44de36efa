"""Tables people bring: good ones of every type read the same, others are refused by file and column."""

import contextlib
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs import csv_table as text_tables
from hqlabel.pipeline.inputs.columns import Kind
from hqlabel.pipeline.inputs.read_table import inspect_tables, read_batches
from hqlabel.pipeline.job_context import AccessRules

ACCESS = AccessRules()
WANTED = {
    "image_uri": Kind(0, "text"),
    "image_id": Kind(0, "key"),
    "boxes": Kind(2, "number"),
    "labels": Kind(1, "key"),
    "score": Kind(0, "number"),
    "category_id": Kind(0, "integer"),
}
BOXES = [[[1.0, 2.0, 3.0, 4.0]], [], None, [[1.0, None], None, [math.inf]]]
URIS = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def read(*paths, wanted=WANTED, mapping=None) -> dict:
    files = inspect_tables([str(path) for path in paths], wanted, mapping or {}, ACCESS)
    tables = [batch for file in files for batch in read_batches(file, ACCESS)]
    return pa.concat_tables(tables).to_pydict() if tables else {}


def parquet(path, columns, **options):
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **options)
    return path


def text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(*paths, **rest) -> str:
    with pytest.raises(JobRefused) as caught:
        read(*paths, **rest)
    assert str(paths[-1]) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float64())),
        pa.list_(pa.list_(pa.float32())),
        pa.large_list(pa.large_list(pa.float64())),
        pa.list_(pa.large_list(pa.float32())),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_wide_and_narrow_types_read_the_same(tmp_path, kind, name):
    path = parquet(
        tmp_path / "a.parquet",
        {
            "image_uri": pa.array(URIS, pa.string()).cast(name),
            "boxes": pa.array(BOXES, kind),
            "other": [1] * 4,
        },
    )

    assert {"image_uri": URIS, "boxes": BOXES} == read(path)


@pytest.mark.parametrize("number", [pa.int8(), pa.uint16(), pa.int64(), pa.float32()], ids=str)
def test_whole_numbers_and_fixed_size_lists_are_boxes_too(tmp_path, number):
    boxes = pa.array([[[1, 2, 3, 4]], None, []], pa.list_(pa.list_(number, 4)))

    found = read(parquet(tmp_path / "a.parquet", {"boxes": boxes}))

    assert [[[1.0, 2.0, 3.0, 4.0]], None, []] == found["boxes"]


def test_labels_in_a_dictionary_and_slices_read_whole(tmp_path):
    labels = pa.array([["x"], ["a", None], None, []], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    whole = pa.table({"labels": labels, "image_id": pa.array([7, 8, 9, 10], pa.uint8())})

    found = read(parquet(tmp_path / "a.parquet", whole.slice(1, 2)))

    assert {"labels": [["a", None], None], "image_id": [8, 9]} == found


def test_empty_lists_of_no_type_and_columns_of_nulls_are_taken_as_what_is_wanted(tmp_path):
    path = parquet(
        tmp_path / "a.parquet",
        {"boxes": pa.array([[], None], pa.list_(pa.null())), "score": pa.nulls(2), "labels": pa.nulls(2)},
    )

    assert {"boxes": [[], None], "labels": [None, None], "score": [None, None]} == read(path)


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("boxes", [[["1", "2"]]], "list<element: list<element: string>>"),
        ("boxes", [[1.0, 2.0]], "list<element: double>"),
        ("boxes", ["[[1,2,3,4]]"], "string"),
        ("boxes", [[[True]]], "bool"),
        ("image_uri", [3], "int64"),
        ("image_uri", [b"a"], "binary"),
        ("image_id", [True], "bool"),
        ("score", ["0.5"], "string"),
        ("category_id", ["1"], "string"),
    ],
)
def test_a_wrong_type_is_refused_with_file_column_wanted_and_found(tmp_path, name, values, found):
    message = refusal(parquet(tmp_path / "a.parquet", {name: values}))

    assert repr(name) in message
    assert found in message
    assert str(WANTED[name]) in message


@pytest.mark.parametrize("kind", [pa.bool_(), pa.date32(), pa.timestamp("us"), pa.binary()], ids=str)
def test_values_that_are_no_numbers_are_refused(tmp_path, kind):
    assert "'score'" in refusal(parquet(tmp_path / "a.parquet", {"score": pa.nulls(1, kind)}))


@pytest.mark.parametrize("kind", [pa.float16(), pa.decimal128(5, 2)], ids=str)
def test_halves_and_decimals_are_widened_without_loss(tmp_path, kind):
    """DuckDB writes the 0.5 of a query as a decimal."""
    values = pa.array([0.5, 0.0, None]).cast(kind)

    assert [0.5, 0.0, None] == read(parquet(tmp_path / "a.parquet", {"score": values}))["score"]


@pytest.mark.parametrize("name", ["image_id", "category_id"])
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(20, 1)], ids=str)
def test_whole_numbers_kept_as_floats_are_integers(tmp_path, name, kind):
    """pandas makes floats of an integer column with gaps."""
    values = pa.array([0, 7, None], pa.int64()).cast(pa.float64()).cast(kind)

    assert [0, 7, None] == read(parquet(tmp_path / "a.parquet", {name: values}))[name]


@pytest.mark.parametrize(
    ("value", "reason"), [(1.5, "1.5"), (math.nan, "NaN"), (2.0**53, "2**53"), (-(2.0**60), "2**53")]
)
def test_floats_that_are_no_whole_numbers_are_refused_as_ids(tmp_path, value, reason):
    message = refusal(parquet(tmp_path / "a.parquet", {"image_id": [value]}))

    assert [] == [part for part in ("'image_id'", reason) if part not in message]


def test_ids_as_large_as_uint64_keep_their_digits(tmp_path):
    ids = pa.array([0, 2**64 - 1], pa.uint64())
    lines = "".join(f'{{"image_id": {number}}}\n' for number in (0, 2**64 - 1))

    assert [0, 2**64 - 1] == read(parquet(tmp_path / "a.parquet", {"image_id": ids}))["image_id"]
    assert [0, 2**64 - 1] == read(text(tmp_path / "a.jsonl", lines))["image_id"]


def test_integers_and_floats_of_several_files_are_one_column(tmp_path):
    first = parquet(tmp_path / "1.parquet", {"image_id": [3]})
    second = parquet(tmp_path / "2.parquet", {"image_id": [4.0, None]})

    assert [3, 4, None] == read(first, second)["image_id"]


def test_a_number_too_large_for_a_float_is_refused_not_rounded(tmp_path):
    assert "'boxes'" in refusal(parquet(tmp_path / "a.parquet", {"boxes": [[[2**53 + 1]]]}))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )

    assert "'image_uri'" in refusal(parquet(tmp_path / "a.parquet", {"image_uri": bad}))


def test_extension_types_are_refused_unopened(tmp_path):
    field = pa.field(
        "boxes", pa.list_(pa.float64()), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"}
    )
    path = parquet(
        tmp_path / "a.parquet", pa.Table.from_arrays([pa.array([[1.0]])], schema=pa.schema([field]))
    )
    assert "ray.data.arrow_tensor" in refusal(path)

    nested = pa.array([[b"0" * 16]], pa.list_(pa.uuid().storage_type)).cast(pa.list_(pa.uuid()))
    assert "arrow.uuid" in refusal(parquet(tmp_path / "b.parquet", {"labels": nested}))


def test_an_extension_type_that_ray_has_registered_is_refused_by_name_all_the_same(tmp_path):
    from ray.data.extensions import ArrowTensorType

    with contextlib.suppress(pa.ArrowKeyError):  # it is there already, or was taken off by an earlier read
        pa.register_extension_type(ArrowTensorType((0,), pa.int64()))
    field = pa.field(
        "boxes", pa.list_(pa.float64()), metadata={"ARROW:extension:name": "ray.data.arrow_tensor"}
    )
    boxes = pa.Table.from_arrays([pa.array([[1.0]])], schema=pa.schema([field]))

    assert "ray.data.arrow_tensor" in refusal(parquet(tmp_path / "a.parquet", boxes))


def test_rays_own_extension_types_run_no_code_and_are_refused(tmp_path):
    import ray.data  # registers its types
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    del ray
    values = ArrowPythonObjectArray.from_objects([_Canary()])
    path = parquet(tmp_path / "a.parquet", pa.table({"boxes": values, "image_uri": ["a"]}))
    _Canary.opened = 0

    assert "extension type" in refusal(path)
    assert {"image_uri": ["a"]} == read(path, wanted={"image_uri": Kind(0, "text")})
    assert 0 == _Canary.opened


class _Canary:
    opened = 0

    def __reduce__(self):
        return (_open_canary, ())


def _open_canary() -> "_Canary":
    _Canary.opened += 1
    return _Canary()


def damaged(whole: bytes) -> dict[str, bytes]:
    flipped = bytearray(whole)
    flipped[whole.index(b"500.jpg")] ^= 1  # another name, and a sound one: only the checksum tells
    return {
        "cut": whole[:-20],
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "flipped": bytes(flipped),
    }


@pytest.mark.parametrize("what", ["cut", "half", "empty", "text", "flipped"])
def test_a_damaged_parquet_file_is_named(tmp_path, what):
    body = io.BytesIO()
    table = pa.table({"image_uri": [f"{i}.jpg" for i in range(1000)]})
    pq.write_table(table, body, write_page_checksum=True, compression="none", use_dictionary=False)

    refusal(text(tmp_path / "a.parquet", damaged(body.getvalue())[what]))


def test_a_missing_file_is_named(tmp_path):
    refusal(tmp_path / "a.parquet")


def test_files_of_one_table_must_agree(tmp_path):
    first = parquet(tmp_path / "1.parquet", {"image_uri": ["a"], "labels": [["x"]], "score": [0.5]})
    same = parquet(
        tmp_path / "2.parquet", {"score": pa.array([1], pa.float32()), "labels": [["y"]], "image_uri": ["b"]}
    )
    other = parquet(tmp_path / "3.parquet", {"image_uri": ["a"], "labels": [[1]], "score": [0.5]})
    fewer = parquet(tmp_path / "4.parquet", {"image_uri": ["a"], "score": [0.5]})

    assert ["a", "b"] == read(first, same)["image_uri"]
    assert "labels holds list<integer>, but list<string>" in refusal(first, same, other)
    assert "no column labels" in refusal(first, fewer)


def test_a_column_of_nulls_in_one_file_goes_with_the_others(tmp_path):
    nulls = parquet(tmp_path / "1.parquet", {"image_id": pa.nulls(1)})
    numbers = parquet(tmp_path / "2.parquet", {"image_id": [3]})

    assert [None, 3] == read(nulls, numbers)["image_id"]


def test_other_column_names_are_used_only_when_mapped(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"path": ["a"], "image_id": ["b"]})

    assert {"image_id": ["b"]} == read(path)
    assert {"image_uri": ["a"], "image_id": ["b"]} == read(path, mapping={"image_uri": "path"})


def test_a_wide_table_reads_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("hqlabel.pipeline.inputs.read_table.BATCH_BYTES", 10_000)
    rng = np.random.default_rng(0)
    path = parquet(tmp_path / "a.parquet", {"boxes": [rng.random((50, 4)).tolist() for _ in range(40)]})
    (file,) = inspect_tables([str(path)], WANTED, {}, ACCESS)

    batches = list(read_batches(file, ACCESS))

    assert len(batches) > 4
    assert 40 == sum(batch.num_rows for batch in batches)


# --- CSV ------------------------------------------------------------------------------------


def test_csv_fields_are_what_they_say(tmp_path):
    path = text(
        tmp_path / "a.csv",
        'score,image_uri,image_id,labels,boxes\n0.5,a.jpg,007,"[""x"",null]","[[1,2,3,4],[5, 6,\n7,8]]"\n'
        ',"",NA,,\nnan,"b\nc",null,[],[]\ninf,ü,,"[""y""]","[[NaN]]"\n',
    )

    found = read(path)

    assert ["a.jpg", "", "b\nc", "ü"] == found["image_uri"]
    assert ["007", "NA", "null", None] == found["image_id"]
    assert [["x", None], None, [], ["y"]] == found["labels"]
    assert [[[1, 2, 3, 4], [5, 6, 7, 8]], None, []] == found["boxes"][:3]
    assert math.isnan(found["boxes"][3][0][0])
    assert (0.5, None, math.inf) == (found["score"][0], found["score"][1], found["score"][3])
    assert math.isnan(found["score"][2])


def test_csv_lists_of_integers_are_told_from_names(tmp_path):
    path = text(tmp_path / "a.csv", 'labels\n"[]"\n"[3, 4]"\n')

    assert [[], [3, 4]] == read(path)["labels"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("score\nabc\n", "row 0 (from 0): 'score' holds 'abc'; wanted a number"),
        ("image_uri,size,score\na,1,1\nb,2,abc\n", "row 1 (from 0): 'score' holds 'abc'; wanted a number"),
        ("image_uri,score\na,1,2\n", "row 0 (from 0): has 3 fields; wanted 2"),
        ("image_uri,score\na,1\nb", "it ends early: its last row has 1 field; wanted 2"),
        ("image_uri,image_uri\na,b\n", "twice"),
        (b"image_uri\n\xff\xfe\n", "utf"),
        ('image_uri,score\n"a,1\nb,2\n', "csv"),
        ("", "empty"),
        ("boxes\n[[1]]}\n", "JSON"),
        ('boxes\n"[[""1""]]"\n', "'boxes[][]' holds text; wanted a number"),
        ('boxes\n"[1,2,3,4]"\n', "'boxes[]' holds a number; wanted a list"),
        ('boxes\n"[[1]]},{""boxes"":[[2]]"\n', "JSON"),
    ],
)
def test_a_csv_that_is_not_sound_is_refused(tmp_path, content, reason):
    assert reason.lower() in refusal(text(tmp_path / "a.csv", content)).lower()


def test_a_csv_of_many_blocks_reads_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("hqlabel.pipeline.inputs.csv_table.BLOCK_BYTES", 1000)
    rows = 2000
    pa_csv.write_csv(
        pa.table({"image_uri": [f"{i}.jpg" for i in range(rows)], "score": [i / 8 for i in range(rows)]}),
        tmp_path / "a.csv",
    )

    found = read(tmp_path / "a.csv")

    assert [f"{i}.jpg" for i in range(rows)] == found["image_uri"]
    assert [i / 8 for i in range(rows)] == found["score"]


def test_a_row_longer_than_a_block_is_refused(tmp_path, monkeypatch):
    for module in ("csv_table", "json_records"):
        monkeypatch.setattr(f"hqlabel.pipeline.inputs.{module}.BLOCK_BYTES", 1000)
    monkeypatch.setattr("hqlabel.pipeline.inputs.json_records.SAMPLE_BYTES", 1000)
    long = "x" * 5000

    assert "longer than" in refusal(text(tmp_path / "a.csv", f"image_uri\na\n{long}\n"))
    assert "longer than" in refusal(text(tmp_path / "a.jsonl", f'{{"image_uri": "{long}"}}\n' * 2))


# --- JSONL ----------------------------------------------------------------------------------


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl_keys_may_come_late_and_be_missing(tmp_path):
    path = text(
        tmp_path / "a.jsonl",
        lines(
            {"image_uri": "2024-01-01", "boxes": [], "z": {"deep": [1]}},
            {"boxes": [[1, 2.5, math.nan, math.inf]], "image_uri": "b", "labels": [3]},
            {"image_uri": "c", "boxes": None, "labels": None, "image_id": 12},
        ),
    )

    found = read(path)

    assert ["2024-01-01", "b", "c"] == found["image_uri"]
    assert [None, [3], None] == found["labels"]
    assert [None, None, 12] == found["image_id"]
    assert [[], None] == [found["boxes"][0], found["boxes"][2]]
    assert [1, 2.5, math.inf] == [found["boxes"][1][0][i] for i in (0, 1, 3)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("hello\n", "no JSON"),
        ('{"image_uri": "a"}\n[1]\n', "row 1 (from 0): holds a list"),
        ('[{"image_uri": "a"}]\n', ".json"),
        ('{"image_uri": "a"}\n{"image_uri": "b"\n', "row 1 (from 0): is no JSON"),
        ('{"boxes": [["1"]]}\n', "boxes"),
        ('{"boxes": [1]}\n', "boxes"),
        ('{"boxes": [[true]]}\n', "boxes"),
        ('{"image_uri": 3}\n', "image_uri"),
        ('{"labels": [1, "x"]}\n', "labels"),
        ('{"image_uri": "\\ud800"}\n', "jsonl"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "recursion"),
    ],
)
def test_a_jsonl_that_is_not_sound_is_refused(tmp_path, content, reason):
    assert reason in refusal(text(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("indent", range(40, 64))
def test_a_null_line_is_refused_wherever_a_block_begins(tmp_path, monkeypatch, indent):
    """Arrow's reader ends the process on a block that begins with one."""
    monkeypatch.setattr(text_tables, "BLOCK_BYTES", 64)
    monkeypatch.setattr(text_tables, "SAMPLE_BYTES", 64)
    line = '{"image_id": "a"}\n'

    assert "null" in refusal(text(tmp_path / "a.jsonl", line * 4 + " " * indent + "\nnull\n" + line * 3))


def test_a_table_of_unknown_kind_is_refused(tmp_path):
    assert ".parquet" in refusal(text(tmp_path / "a.xlsx", "x"))
