"""Big JSON files cut into records: every record once, whatever the block size; nothing damaged passes."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.inputs import json_records
from hqlabel.pipeline.inputs.json_records import Lines, TextDamage, first_byte, split_arrays

keys = st.text(max_size=6) | st.sampled_from(['"', "\\", "]}", "a,b"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
records = st.lists(st.dictionaries(keys, values, max_size=3), max_size=5)


def split(text: bytes, *names: str) -> list[Lines]:
    return list(split_arrays(io.BytesIO(text), set(names or [""])))


def parsed(lines: list[Lines], name: str) -> list[Any]:
    parts = [part for part in lines if part.name == name and part.count]
    found = [json.loads(line) for part in parts for line in part.text.split(b"\n")]
    assert len(found) == sum(part.count for part in parts)
    return found


@settings(max_examples=80, deadline=None)
@given(
    wanted=records, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), block=st.integers(1, 64)
)
def test_a_list_comes_back_record_by_record_for_any_block_size(wanted, indent, ascii_only, block):
    text = json.dumps(wanted, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CUT_BYTES", block)
        lines = split(text)

    texts = [part.text.decode("utf-8", "surrogatepass") for part in lines if part.count]
    found = [json.loads(line) for text in texts for line in text.split("\n")]
    assert wanted == found
    assert len(wanted) == sum(part.count for part in lines)


@settings(max_examples=50, deadline=None)
@given(tree=st.dictionaries(st.sampled_from(["images", "info", 'a"b', "annotations", "x"]), values | records))
@pytest.mark.parametrize("block", [3, 7, 2**20])
def test_the_wanted_arrays_of_an_object_are_found_wherever_they_stand(tree, block):
    tree = {key: value for key, value in tree.items() if key in ("info", 'a"b', "x") or _is_records(value)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CUT_BYTES", block)
        lines = split(json.dumps(tree, indent=1).encode(), "images", "annotations")

    assert {part.name for part in lines} <= {"images", "annotations"}
    for name in ("images", "annotations"):
        assert tree.get(name, []) == parsed(lines, name)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(record, dict) for record in value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"hello", "begins with 'h'"),
        (b'{"a": 1}', "begins with '{'"),
        (b'[{"a": 1}', "ends early"),
        (b'[{"a": "1]', "ends early"),
        (b'[{"a": 1}] x', "after its end"),
        (b'[{"a": 1}][{"a": 2}]', "after its end"),
        (b'[{"a": 1}}', "do not match"),
        (b"[" * 65 + b"]" * 65, "more than 64 deep"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 2**20])
def test_damage_is_named(text, reason, block, monkeypatch):
    monkeypatch.setattr(json_records, "CUT_BYTES", block)

    with pytest.raises(TextDamage, match=reason):
        split(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"images": [{}], "images": []}', "given twice"),
        (b'{"images": [{}}, "annotations": []}', "after its end|do not match"),
        (b'{"images": [{"a": [1}], "annotations": []}', "do not match|ends early"),
        (b"{[]}", "where a key was expected"),
        (b"[]", "begins with"),
    ],
)
def test_damage_in_an_object_is_named(text, reason):
    with pytest.raises(TextDamage, match=reason):
        split(text, "images", "annotations")


def test_a_comma_at_the_end_counts_as_a_record_that_no_reader_finds(monkeypatch):
    assert [2] == [part.count for part in split(b"[{},]")]
    monkeypatch.setattr(json_records, "CUT_BYTES", 1)
    assert 2 == sum(part.count for part in split(b"[{} , ]"))


def test_a_record_of_any_length_is_refused_before_it_fills_memory(monkeypatch):
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_records, "CUT_BYTES", 100)

    with pytest.raises(TextDamage, match="longer than"):
        split(b'[{"a": "' + b"x" * 2000 + b'"}]')


def test_an_array_without_records_is_told_from_no_array():
    assert [("images", 0)] == [(part.name, part.count) for part in split(b'{"images": [ ]}', "images", "x")]


def test_a_byte_order_mark_is_skipped():
    text = b'\xef\xbb\xbf [{"a": 1}]'

    assert "[" == first_byte(io.BytesIO(text))
    assert [{"a": 1}] == parsed(split(text), "")
