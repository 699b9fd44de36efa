"""The page's filter, picked list and table: the SQL it hands on selects, by the real parser, what it says.

The script's pure functions run in Node, a shell and the command line take what they give; the page itself is
worked in a browser. Names are as bad as names can be.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.jobs.report import page as report
from hqlabel.jobs.report.tile_facts import CSV_COLUMNS, boxes_json, class_choices, equals, state_choices
from hqlabel.jobs.results.read_tables import Row
from hqlabel.jobs.results.select_rows import Selection, condition
from hqlabel.pipeline.settings import FilterSettings
from tests.jobs.browser import CHROMIUM, browser
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output
from tests.jobs.report.test_page import Tags

SCRIPT = Path(report.__file__).parent / "templates" / "report.js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no Node.js on this machine (apt-get install nodejs)")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"
)
SECRET = "https://user:pass@host/a.jpg?token=AbCdEf0123456789AbCdEf0123456789"
NAMES = [
    "plain.jpg", "it's.jpg", '"q".jpg', "$(id) `id` \\ !x.jpg", "</script><img src=x onerror=alert(1)>",
    "=cmd|' /C calc'!A0", "@sum, 1", "-2", "line\u2028and\u2029more.jpg", "tab\tand\nline", "'); DROP--",
    "\u202egpj.exe", "鳥 ü😀.jpg", "%s {{ 7*7 }}", "$HOME", "`id`", "a\\\\b", SECRET,
    "x" * 400, "&amp;&quot;", " ", "data-boxes=\"[]\"",
]  # fmt: skip
LINES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
KINDS = [(1, "cat"), (2, "</script>"), (3, "=1+1"), (4, 'o\'clock \u2028 "x" $HOME'), (5, None), (None, None)]


def in_node(expression: str, **values: Any) -> Any:
    """What an expression over the script's functions and these values is."""
    said = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    code = f"{SCRIPT.read_text('utf-8')}\n{said}process.stdout.write(JSON.stringify({expression}))"
    ran = subprocess.run([str(NODE), "-"], input=code.encode(), capture_output=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr.decode()
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of bad names, with two masks and a box without one each; their scores lie on round lines."""
    rng = random.Random(4)
    images = [
        MadeImage(
            image_id=name, uri=f"/photos/{n}.jpg", masks=[blob(3 * n + k) for k in range(3)],
            boxes=[[1, 1, 30, 30], [5, 5, 50, 40], [9, 9, 9, 9]], box_ids=[f"{n}", "=b", None],
            categories=[KINDS[(n + k) % len(KINDS)] for k in range(3)],
            scores=[rng.choice(LINES), None, 0.1], predicted_iou=[rng.choice(LINES), rng.choice(LINES)],
        )
        for n, name in enumerate(NAMES)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("choosing")
    return make_output(folder / "out", images, filters=FilterSettings(min_predicted_iou=0.6))


@pytest.fixture(scope="module")
def page(output: str) -> str:
    code, _, err = run("report", output)
    assert code == 0, err
    return (Path(output) / "report" / "index.html").read_text("utf-8")


@pytest.fixture(scope="module")
def table(output: str) -> pa.Table:
    """All rows of `instances`, without masks."""
    return pq.read_table(f"{output}/instances").drop_columns(["segmentation"])


def chosen(table: pa.Table, where: str | None) -> list[Row]:
    """The rows that `export --where` takes, by its own parser."""
    keep = condition(Selection(where=where))
    return (table if keep is None else table.filter(keep(table))).to_pylist()


def keys(rows: Sequence[Row]) -> set[tuple[str, int]]:
    return {(row["image_id"], row["instance_index"]) for row in rows}


def after_a_shell(flag: str) -> str:
    """What a shell passes on of `--where ...`."""
    ran = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {flag}"], capture_output=True, check=True, timeout=60
    )
    name, where, _ = ran.stdout.decode().split("\0")
    assert name == "--where"
    return where


def test_names_of_any_kind_are_told_in_sql_and_no_credential_is(table: pa.Table) -> None:
    rows = chosen(table, None)
    names = {row["image_id"] for row in rows}

    assert names == set(NAMES)
    for name in names:
        assert keys(chosen(table, equals("image_id", name))) == {(name, k) for k in range(3)}
    assert "pass" not in equals("image_id", SECRET)
    assert len(equals("image_id", "é" * 5000)) < 100


def test_each_line_of_the_lists_to_filter_by_selects_the_rows_it_counts(table: pa.Table) -> None:
    rows = chosen(table, None)
    lines = [*class_choices(rows), *state_choices(rows)]

    kept = sum(row["accepted"] for row in rows)
    said = {f"accepted ({kept})", f"marked, with a mask ({2 * len(NAMES) - kept})", f"no mask ({len(NAMES)})"}
    assert {line.text for line in lines} >= said
    assert len(class_choices(rows)) == len(KINDS)
    for line in lines:
        found = chosen(table, line.where)
        assert line.text.endswith(f"({len(found)})"), line
        boxes = json.loads(boxes_json(found))
        assert all(line.value == box["kind"] or line.value in box["states"] for box in boxes)


@needs_node
def test_the_filter_shows_what_its_where_selects(table: pa.Table) -> None:
    rows = chosen(table, None)
    states = {one.value: one.where for one in state_choices(rows)} | {"": ""}
    kinds = [one.value for one in class_choices(rows)] + ["", "", ""]
    rng = random.Random(1)
    wanted = [
        {
            "kind": rng.choice(kinds), "state": rng.choice(list(states)),
            "score": rng.choice(["predicted_iou", "detector_score", "mask_in_box"]),
            "low": rng.choice([None, 0.3, 0.6, 0.7, 0]), "high": rng.choice([None, 0.7, 0.8, 0.9, 1]),
        }
        for _ in range(24)
    ]  # fmt: skip
    wanted += [
        {"kind": "", "state": "", "score": "predicted_iou", "low": line, "high": line} for line in LINES
    ]

    answers = in_node(
        "wanted.map((one) => [whereOfFilter(one, states[one.state]), "
        "boxes.flatMap((box, at) => matches(box, one, columns) ? [at] : [])])",
        wanted=wanted, states=states, boxes=json.loads(boxes_json(rows)), columns=CSV_COLUMNS,
    )  # fmt: skip

    sizes = []
    for where, places in answers:
        expected = chosen(table, where) if where else rows
        assert keys(rows[at] for at in places) == keys(expected), where
        sizes.append(len(places))
    assert 0 < sum(size > 0 for size in sizes) < 30, "some select nothing"
    assert sum(0 < size < len(rows) for size in sizes) > 8
    assert in_node("['', 'x', '0.7', '0.1234567', '1e-9'].map(boundOf)") == [None, None, 0.7, 0.123457, 0]
    assert in_node("whereOfFilter({score: 's', low: 1e-6, high: 100}, '')") == "s >= 0.000001 AND s <= 100"


@needs_node
def test_picked_boxes_come_through_a_shell_as_those_rows_and_no_others(output: str, table: pa.Table) -> None:
    rows = chosen(table, None)
    boxes = json.loads(boxes_json(rows))
    rng = random.Random(2)
    picks = [rng.sample(range(len(rows)), rng.randint(1, 9)) for _ in range(3)]
    picks += [[3 * n + n % 3] for n in range(len(NAMES))] + [list(range(len(rows)))]

    flags = in_node(
        "picks.map((places) => `--where ${shellQuoted(whereOfBoxes(places.map((at) => boxes[at])))}`)",
        picks=picks, boxes=boxes,
    )  # fmt: skip

    for places, flag in zip(picks, flags, strict=True):
        assert keys(chosen(table, after_a_shell(flag))) == keys(rows[at] for at in places), flag
    assert in_node("shellQuoted('!')") == "'!'", "a history is expanded in double quotes"
    one = picks[0]
    code, _, err = run(*("export", "coco", output, f"{output}-picked", "--where", after_a_shell(flags[0])))
    assert code == 0, err
    masks = json.loads((Path(f"{output}-picked") / "instances.json").read_text())["annotations"]
    assert len(masks) == sum(rows[at]["area"] is not None for at in one)


@needs_node
def test_the_table_is_read_back_as_it_was_and_computes_nothing(table: pa.Table) -> None:
    rows = chosen(table, None)

    text = in_node("csvOf(columns, boxes)", columns=CSV_COLUMNS, boxes=json.loads(boxes_json(rows)))

    head, *read = csv.reader(io.StringIO(text, newline=""))
    assert tuple(head) == CSV_COLUMNS
    assert len(read) == len(rows)
    for cells, row in zip(read, rows, strict=True):
        found = dict(zip(head, cells, strict=True))
        assert not any(cell.lstrip()[:1] in ("=", "+", "-", "@") for cell in cells if cell)
        if row["image_id"] != SECRET:
            assert found["image_id"].removeprefix("'") == row["image_id"].removeprefix("'")
        assert found["instance_index"] == str(row["instance_index"])
        iou = row["predicted_iou"]
        assert found["predicted_iou"] == "" if iou is None else np.float32(found["predicted_iou"]) == iou
        assert found["accepted"] == str(row["accepted"]).lower()
        assert found["category_name"].removeprefix("'") == (row["category_name"] or "")
    assert "pass" not in text
    tricks = ["=1", "+1", "-1", "@a", " =1", "\t=1", "\r", "\n=1", "\ufeff=1", "\uff1d1"]
    guarded = in_node("tricks.map(cellOf)", tricks=tricks)
    assert [one.strip('"') for one in guarded] == [f"'{trick}" for trick in tricks]
    assert in_node("[-1, 0.5, true, null, 'a=b'].map(cellOf)") == ["-1", "0.5", "true", "", "a=b"]


def test_bad_names_stay_inside_their_attributes(page: str, output: str) -> None:
    tags = Tags(page)
    figures = [json.loads(one["data-boxes"]) for one in tags.of("figure")]
    found = {(box["image"], box["index"]) for boxes in figures for box in boxes}

    assert {image for image, _ in found} == {equals("image_id", name) for name in NAMES}
    assert page.count("</script") == 1
    assert all(attributes["src"].startswith("data:") for attributes in tags.of("img"))
    assert "49" not in [one.get("value") for one in tags.of("option")]
    assert "user:pass" not in page
    assert "AbCdEf0123456789" not in page
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]


def test_only_the_pages_own_script_may_run(page: str) -> None:
    [script] = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    assert script == SCRIPT.read_text("utf-8")
    assert f"script-src 'sha256-{digest}'\"" in page
    assert "<!--" not in script


def test_without_its_script_the_page_offers_nothing_that_would_not_work(page: str) -> None:
    tags = Tags(page)
    hidden = {attributes.get("id") for _, attributes in tags.tags if "hidden" in attributes}

    assert {"filter", "picked"} <= hidden
    assert ".pick { display:none;" in page
    assert not any("hidden" in figure for figure in tags.of("figure"))


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_person_filters_picks_and_hands_on(
    page: str, output: str, table: pa.Table, tmp_path: Path, width: int
) -> None:
    saved = tmp_path / "saved"
    with browser(tmp_path) as shown:
        shown.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
        shown.open((Path(output) / "report" / "index.html").as_uri(), width=width, dark=False)
        assert shown.ask("document.documentElement.scrollWidth") <= width
        shown.ask("""(() => {
          const form = document.querySelector("#filter");
          form.elements.state.value = "accepted";
          form.elements.low.value = "0.7";
          form.elements.low.dispatchEvent(new Event("input", {bubbles: true}));
        })()""")
        said = shown.ask("document.querySelector('#filter output').textContent")
        flag = shown.ask("document.querySelector('#filter .copy').dataset.text")
        kept = chosen(table, after_a_shell(flag))
        number = int(said.removesuffix(" boxes here"))
        assert 5 < number <= len(kept), "the page shows a choice of the rows"
        assert keys(kept) == keys(row for row in chosen(table, "accepted") if row["predicted_iou"] > 0.69)

        shown.ask("document.querySelector('#g1 figure:not([hidden]) .pick input').focus()")
        shown.press(" ")
        assert shown.ask("document.querySelector('#picked output').textContent") == "1 box of 1 image picked"
        shown.ask("document.querySelector('[data-does=pick]').click()")
        flag = shown.ask("document.querySelector('#picked .copy').dataset.text")
        picked = keys(chosen(table, after_a_shell(flag)))
        assert picked <= keys(kept)
        assert len(picked) == number
        command = shown.ask("document.querySelector('#picked textarea').value")
        assert command == f"hqlabel export coco {output} picked-coco {flag}"
        shown.ask("document.querySelector('[data-does=save]').click()")
        until = time.monotonic() + 30
        while not (saved / "picked.csv").is_file() and time.monotonic() < until:
            time.sleep(0.05)
        _, *rows = csv.reader((saved / "picked.csv").open(encoding="utf-8", newline=""))
        assert len(rows) == number

        shown.reload()
        assert shown.ask("document.querySelector('#picked .copy').dataset.text") == flag
        shown.ask("document.querySelector('#filter').reset()")
        shown.ask("document.querySelector('[data-does=clear]').click()")
        assert shown.ask("document.querySelector('#picked').hidden")
        complaints = shown.complaints
    assert complaints == []
