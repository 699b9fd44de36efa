"""Numbers, tables and commands as people see them."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.cells import cell_len

from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.44, "8.4 s"), (200, "3 min 20 s"), (59.96, "60.0 s"), (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_shares_are_never_rounded_to_none_or_all() -> None:
    assert console.share(0, 10) == "0%"
    assert console.share(1, 100_000) == "<0.1%"
    assert console.share(99_999, 100_000) == ">99.9%"
    assert console.share(10, 10) == "100%"
    assert console.share(1, 8) == "12.5%"


def test_counts_and_sizes() -> None:
    assert count(1, "box", "boxes") == "1 box"
    assert count(12_000, "image") == "12,000 images"
    assert console.size(812) == "812 bytes"
    assert console.size(4_100_000) == "4.1 MB"


def test_text_from_outside_is_one_safe_line() -> None:
    assert console.shown("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert console.shown("x" * 100, most=9) == "xxxx…xxxx"


def test_columns_line_up_with_wide_characters() -> None:
    lines = console.table(["id", "n"], [["猫.jpg", "3"], ["dog.jpg", "12"]]).splitlines()
    assert {cell_len(line) for line in lines[1:]} == {cell_len(lines[1])}


def test_json_has_no_nan_and_keeps_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.data_json({"name": "猫", "values": (1.5, float("nan"), float("inf"))})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": "猫", "values": [1.5, None, None]}
    assert "猫" in out


def test_a_terminal_that_lacks_a_character_gets_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", narrow)
    console.say("猫 · 3")
    narrow.seek(0)
    assert narrow.read() == "\\u732b \\xb7 3\n"


def test_orders_to_a_terminal_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a\x1b[2Jb\u202ec\rd\ne")
    console.data("x\x1b]0;title\x07")
    found = capsys.readouterr()

    assert found.err == "a\\x1b[2Jb\\u202ec\\rd\ne\n"
    assert found.out == "x\\x1b]0;title\\x07\n"


def test_what_others_print_stays_off_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stdout_for_data_alone():
        print("(raylet) a node died")  # noqa: T201 - as Ray does
        console.data_json({"counts": 1})
    console.data("after")
    found = capsys.readouterr()
    assert (found.out, found.err) == ('{"counts": 1}\nafter\n', "(raylet) a node died\n")


def test_a_box_is_never_broken_and_the_last_column_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    box, scores = "100.25, 200.5, 1300.75, 1400.5", ["0.123"] * 5
    rows = [["1", "person", box, "15,000", *scores, "no: nms:17"], ["2", "dog", "-", "-", *scores, "yes"]]
    head = ["#", "class", "box\n(x, y, w, h)", "area", *"abcde", "accepted"]
    text = console.table(head, rows)
    [line] = [line for line in text.splitlines() if "100.25" in line]
    assert f"{box} 15,000 0.123" in line
