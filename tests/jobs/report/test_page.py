"""hqlabel report: the page says what the tables hold, shows the rows its SQL finds, and stands alone."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image

from hqlabel.jobs.report import page as report
from hqlabel.jobs.report.numbers import gather
from hqlabel.jobs.report.queries import published
from hqlabel.jobs.report.sections import sections
from hqlabel.jobs.results.read_tables import require_published
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage.output_store import Store
from tests.jobs.browser import CHROMIUM, browser
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output, write_truth

KINDS = [(1, "cat"), (2, "dog"), (3, "<b>&'quoted\"")]
FILTERS = FilterSettings(min_predicted_iou=0.6, min_area_px=2500)
SIZE = (90, 120)
COUNT = 24


def made_images(photos: Path) -> list[MadeImage]:
    """24 images with 0 to 4 masks; two failed, one whose file is gone, one pair of equal masks."""
    rng = np.random.default_rng(5)
    images = []
    for n in range(COUNT):
        masks = [blob(50 * n + k, SIZE) for k in range(n % 5)]
        if n == 8:
            masks[1] = masks[0]
        if n == 12:
            masks[0][30:60, :20] = 1  # reaches the border
        scores = rng.uniform(0.2, 1.02, (2, len(masks)))
        picture = np.full((*SIZE, 3), 90 + 4 * n, np.uint8)
        for mask in masks:
            picture[mask > 0] = rng.integers(0, 255, 3)
        if n != 13:
            Image.fromarray(picture).save(photos / f"{n:02d}.jpg")
        images.append(
            MadeImage(
                image_id=f"{n:02d}.jpg", size_hw=SIZE, masks=masks, uri=str(photos / f"{n:02d}.jpg"),
                categories=[KINDS[(n + k) % 3] for k in range(len(masks))],
                scores=scores[0].tolist(), predicted_iou=scores[1].tolist(),
                error="not_found" if n in (4, 9) else None,
            )
        )  # fmt: skip
    return images


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    (folder / "photos").mkdir()
    made = make_output(folder / "out", made_images(folder / "photos"), filters=FILTERS)
    (folder / "out" / "config.yaml").write_text(f"input:\n  images: {folder / 'photos'}\n")
    return made


@pytest.fixture(scope="module")
def page(output: str) -> str:
    code, _, err = run("report", "--output", output, "--allow-root", str(Path(output).parent / "photos"))
    assert code == 0, err
    return (Path(output) / "report" / "index.html").read_text()


class Tags(HTMLParser):
    """Every start tag with its attributes, in order, and the buttons around images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def text_of(page: str) -> str:
    visible = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", visible)))


def test_the_page_states_the_counts_of_the_tables(page: str, output: str) -> None:
    text = text_of(page)
    boxes = sum(n % 5 for n in range(COUNT))
    masks = boxes - 4 - 4  # images 4 and 9 failed, with 4 boxes each
    [(accepted,)] = duckdb.sql(
        f"SELECT count(*) FILTER (accepted) FROM '{output}/instances/*.parquet'"
    ).fetchall()

    assert f"{COUNT} images 2 failed, 5 without boxes" in text
    assert f"{masks} masks of {boxes} boxes" in text
    assert f"{accepted} of {boxes}" in text
    assert f"hqlabel retry --output {output}" in text
    assert "not_found fetch 2" in text
    assert "min_predicted_iou 0.6, min_area_px 2500" in text


def test_every_class_has_its_row_with_medians(page: str, output: str) -> None:
    found = duckdb.sql(
        f"""SELECT category_name, count(DISTINCT image_id), count(*), count(*) FILTER (area > 0),
            median(predicted_iou)
        FROM '{output}/instances/*.parquet' GROUP BY 1"""
    ).fetchall()
    rows = re.findall(r"<tr>(.*?)</tr>", page.split('id="classes"')[1].split("</table>")[0], flags=re.S)[1:]
    cells = [
        [text_of(cell).strip() for cell in re.findall(r"<td>(.*?)</td>", row, flags=re.S)] for row in rows
    ]

    assert len(cells) == len(found) == 3
    for name, images, boxes, masks, median in found:
        [row] = [row for row in cells if row[0].startswith(name)]
        assert row[1:4] == [str(images), str(boxes), str(masks)]
        assert row[7] == f"{median:.2f}"


def test_each_section_shows_the_rows_that_its_sql_finds(output: str) -> None:
    store = Store(Place(uri=output))
    manifest = require_published(store)
    chosen = sections(manifest.filters, manifest.counts.rejected, masks=manifest.counts.masks)
    data = gather(store, manifest, chosen)

    assert len(chosen) >= 14
    empty = []
    for section in chosen:
        rows = duckdb.sql(section.sql(published(output, "instances"))).fetchall()
        ours = data.chosen[section.key]
        assert ours == [row[:2] for row in rows], section.key
        empty += [] if ours else [section.key]
    assert empty == [], "every section has something to show in this output"


def answers_below(page: str, head: str) -> list[tuple]:
    """What DuckDB answers to the query under a summary of the page."""
    [body] = re.findall(rf"<summary>{re.escape(head)}</summary><pre>(.*?)</pre>", page, flags=re.S)
    return duckdb.sql(html.unescape(body)).fetchall()


def cells_below(page: str, head: str) -> list[list[str]]:
    """The rows of the first table after these words, without its head."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.split(head)[1].split("</table>")[0], flags=re.S)[1:]
    return [
        [text_of(cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row, flags=re.S)] for row in rows
    ]


def bars_of(page: str, name: str) -> dict[str, tuple[int, int]]:
    """Of one chart, (all, accepted) by what each bar says of its lower edge."""
    chart = page.split(f"<h3>{name} <span")[1].split("</svg>")[0]
    said = re.findall(r"<title>(\S+) to \S+: ([\d,]+)(?:, ([\d,]+) accepted)?</title>", chart)
    return {low: (int(number), int(kept or 0)) for low, number, kept in said}


def test_the_queries_under_tables_give_the_numbers_of_the_tables(page: str) -> None:
    text = text_of(page)
    totals = {row[0]: row[1:] for row in answers_below(page, "SQL: totals")}

    assert sum(row[0] for row in totals.values()) == COUNT
    assert (totals["failed"][0], totals["no_boxes"][0]) == (2, 5)
    masks, boxes = (sum(row[place] for row in totals.values()) for place in (2, 1))
    assert f"{masks} masks of {boxes} boxes" in text
    assert f"{sum(row[3] for row in totals.values())} of {boxes} " in text
    rejected = answers_below(page, "SQL: boxes that were not accepted")
    shown = cells_below(page, "Boxes that were not accepted")
    assert sorted(shown) == sorted([reason, str(number)] for reason, number in rejected)
    assert sum(number for _, number in rejected) + sum(row[3] for row in totals.values()) == boxes
    [times] = answers_below(page, "SQL: milliseconds")
    for name, *shown in cells_below(page, "milliseconds an image"):
        found = dict(zip(("fetch", "decode", "detect", "segment"), times, strict=True))[name]
        assert shown == [f"{value:,.1f}" for value in found]
    assert sum(row[-1] for row in answers_below(page, "SQL: images finished")) == COUNT
    lines = {name: shares for name, *shares in answers_below(page, "SQL: lines")}
    for name, *shares in cells_below(page, "Share of masks that a line would keep"):
        assert [float(share.strip("<>%")) for share in shares] == pytest.approx(
            [100 * share for share in lines[name]], abs=0.051
        )
    assert len(lines) == 5


def test_the_queries_under_charts_give_their_bars(page: str) -> None:
    scores = answers_below(page, "SQL: scores")

    for name in ("detector_score", "predicted_iou", "stability_score", "box_iou", "mask_in_box"):
        expected = {f"{low:.3g}": (number, kept) for of, low, number, kept in scores if of == name}
        assert bars_of(page, name) == expected
        assert len(expected) > 0
    sizes = {f"{low:,.0f}": (number, kept) for low, number, kept in answers_below(page, "SQL: area")}
    assert bars_of(page, "area") == sizes
    parts = {f"{low}": (number, kept) for low, number, kept in answers_below(page, "SQL: num_components")}
    assert bars_of(page, "num_components") == parts
    boxes = {f"{low}": (number, 0) for low, number in answers_below(page, "SQL: boxes per image")}
    assert bars_of(page, "boxes per image") == boxes
    assert len(boxes) == 5


def test_the_query_under_failures_gives_code_stage_and_number(page: str) -> None:
    section = page.split('id="failures"')[1].split("</details>")[0]
    query = html.unescape(re.search(r"<pre>(.*?)</pre>", section, flags=re.S).group(1))

    [(stage, code, number, _)] = duckdb.sql(query).fetchall()

    [[shown_code, shown_stage, shown_number, _]] = cells_below(page, 'id="failures"')
    assert (
        (shown_code, shown_stage, shown_number) == (code, stage, str(number)) == ("not_found", "fetch", "2")
    )


def test_every_query_of_the_page_runs_and_finds_something(page: str) -> None:
    queries = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, flags=re.S)]

    assert len(queries) > 25
    assert all(duckdb.sql(query).fetchall() for query in queries)


def test_a_score_that_lies_on_a_line_is_kept_by_it_as_by_the_filter(tmp_path: Path) -> None:
    """0.7 as float32 is a little less than 0.7."""
    lines = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
    image = MadeImage(image_id="a.jpg", masks=[blob(k) for k in range(7)], predicted_iou=lines)
    output = make_output(tmp_path / "out", [image])

    code, _, err = run("report", "--output", output)

    assert code == 0, err
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    [shares] = [row[1:] for row in cells_below(page, "would keep") if row[0] == "predicted_iou"]
    assert shares == [f"{100 * left / 7:.1f}%".replace(".0%", "%") for left in range(7, 0, -1)]
    assert set(bars_of(page, "predicted_iou")) == {f"{line:.3g}" for line in lines}


def test_masks_of_unlike_classes_that_are_one_are_shown_as_a_disagreement(page: str) -> None:
    section = page.split('id="pairs"')[1].split("</section>")[0]

    assert {"08.jpg #0", "08.jpg #1"} <= set(re.findall(r"08\.jpg #\d", section))
    query = html.unescape(re.search(r"<pre>(.*?)</pre>", section, flags=re.S).group(1))
    found = duckdb.sql(query).fetchall()
    assert found[0][:3] == ("08.jpg", 0, 1)
    assert found[0][-1] == 1


def test_the_page_asks_for_nothing_outside_itself_and_is_small(page: str) -> None:
    tags = Tags(page)

    assert len(page) < 20_000_000
    sources = [attributes["src"] for name, attributes in tags.tags if "src" in attributes]
    assert len(sources) > 60
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    links = [attributes["href"] for name, attributes in tags.tags if "href" in attributes]
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert "default-src 'none'" in page


def test_every_picture_has_words_and_can_be_reached_by_keyboard(page: str) -> None:
    tags = Tags(page)
    images = tags.of("img")

    assert all(len(image["alt"]) > 20 for image in images)
    assert all(svg["aria-label"] for svg in tags.of("svg"))
    names = [name for name, _ in tags.tags]
    for place, name in enumerate(names):
        if name == "img":
            assert "button" in names[place - 2 : place], "each pair of pictures is in a button"
    ids = {attributes["id"] for _, attributes in tags.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in tags.of("a")} <= ids


def test_names_from_outside_are_text_never_markup(page: str) -> None:
    assert "<b>&'quoted" not in page
    assert html.escape("<b>&'quoted\"").replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


def test_an_image_that_is_gone_leaves_its_tile_with_the_reason(page: str) -> None:
    assert page.count("No picture: ") >= 1
    assert "13.jpg" in text_of(page)


def test_pictures_that_would_make_the_page_too_large_are_left_out_and_said(
    output: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_MOST_BYTES", 300_000)

    photos = str(Path(output).parent / "photos")

    code, _, err = run(
        "report", "--output", output, "--allow-root", photos, "--to", str(tmp_path / "page.html")
    )

    assert code == 0, err
    small = (tmp_path / "page.html").read_text()
    assert small.count("left out for size") > 10
    assert 0 < small.count("data:image/jpeg") < page.count("data:image/jpeg") / 2
    shown = Counter(image["src"] for image in Tags(small).of("img"))
    spent = sum(len(source) * times for source, times in shown.items())
    most = max(len(source) * times for source, times in shown.items())
    assert spent - 2 * most < 300_000, "counted as often as shown; only the last two may go beyond"


def test_a_picture_is_read_only_where_the_call_allows_it(output: str, tmp_path: Path) -> None:
    code, _, err = run("report", "--output", output, "--to", str(tmp_path / "page.html"))

    assert code == 0, err
    assert err.count("note: no picture") == 1
    assert "allow them with --allow-root" in err  # although config.yaml in the output names the folder
    assert "data:image/jpeg" not in (tmp_path / "page.html").read_text()


def test_a_report_shows_the_evaluation_once_there_is_one(tmp_path: Path, output: str) -> None:
    masks = made_images_masks(11)
    truth = write_truth(
        tmp_path / "truth.json",
        [{"id": 1, "file_name": "11.jpg", "height": SIZE[0], "width": SIZE[1]}],
        [{"image_id": 1, "category_id": 1, "mask": masks[0]}],
        {1: "cat", 2: "dog", 3: "<b>&'quoted\""},
    )
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    code, _, err = run("evaluate", "--truth", truth, "--output", str(copy))
    assert code == 0, err

    code, out, err = run("report", "--output", str(copy), "--to", str(tmp_path / "page.html"), "--json")

    assert code == 0, err
    assert json.loads(out)["report"] == str(tmp_path / "page.html")
    text = text_of((tmp_path / "page.html").read_text())
    assert "Against ground truth" in text
    assert "ranked by detector_score x predicted_iou" in text


def made_images_masks(n: int) -> list[np.ndarray]:
    return [blob(50 * n + k, SIZE) for k in range(n % 5)]


LOOKS = """({
  paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  wide: document.documentElement.scrollWidth > innerWidth,
  broken: [...document.images].filter((image) => image.complete && !image.naturalWidth).length,
})"""
REACHABLE = """[...document.querySelectorAll("a, button:enabled, summary, input, select")].filter(
  (one) => !one.closest("dialog, [hidden]") && (!one.closest("details") || one.matches("summary"))).length"""
FOCUSED = """(() => {
  const one = document.activeElement, box = one.getBoundingClientRect();
  const style = getComputedStyle(one);
  one.dataset.visited = (one.dataset.visited || 0) + 1;
  return { name: one.localName, visits: Number(one.dataset.visited),
    outline: `${style.outlineStyle} ${style.outlineWidth}`,
    words: one.getAttribute("aria-label") || (one.labels?.[0] ?? one).textContent.trim(),
    seen: box.bottom > 0 && box.top < innerHeight };
})()"""
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"
)


@needs_browser
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 420)])
def test_a_browser_shows_it_in_light_and_dark_wide_and_narrow_without_a_complaint(
    page: str, output: str, tmp_path: Path, dark: bool, width: int
) -> None:
    with browser(tmp_path) as shown:
        shown.open((Path(output) / "report" / "index.html").as_uri(), width=width, dark=dark)
        seen = shown.ask(LOOKS)
        shown.screenshot(tmp_path / "page.png")
        complaints = shown.complaints

    assert complaints == []
    assert seen["wide"] is False, "nothing sticks out of the window"
    assert seen["broken"] == 0
    paper, ink = (sum(int(v) for v in re.findall(r"\d+", seen[name])[:3]) / 3 for name in ("paper", "ink"))
    assert (ink > 180 > 60 > paper) if dark else (paper > 180 > 60 > ink)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 900)
        assert bool(np.asarray(picture.convert("L")).mean() < 90) is dark


@needs_browser
def test_all_of_it_is_reached_and_worked_by_the_keyboard_alone(
    page: str, output: str, tmp_path: Path
) -> None:
    with browser(tmp_path) as shown:
        shown.open((Path(output) / "report" / "index.html").as_uri(), width=1280, dark=False)
        expected = shown.ask(REACHABLE)
        stops = []
        for _ in range(expected):
            shown.press("Tab")
            stops.append(shown.ask(FOCUSED))

        assert expected > 100
        assert {stop["visits"] for stop in stops} == {1}, "Tab comes to each thing once, in their order"
        assert {stop["name"] for stop in stops} == {"a", "button", "summary", "input", "select"}
        assert all(stop["words"] for stop in stops)
        assert all(stop["seen"] for stop in stops), "what has the focus is in sight"
        assert {stop["outline"] for stop in stops} == {"solid 2px"}, "and shows that it has it"

        shown.ask("document.querySelector('#g1 .pair').focus()")
        shown.press("Enter")
        assert shown.ask("document.querySelector('dialog').open")
        assert shown.ask("document.querySelectorAll('dialog img[alt]').length") == 2
        assert shown.ask("document.activeElement.textContent") == "Close"
        shown.press("Escape")
        assert not shown.ask("document.querySelector('dialog').open")
        assert shown.ask("document.activeElement === document.querySelector('#g1 .pair')")

        shown.ask("document.querySelector('summary').focus()")
        shown.press("Enter")
        assert shown.ask("document.querySelector('details').open")
        shown.press("Tab")
        assert shown.ask("document.activeElement.matches('.copy')"), "the button in the opened SQL comes next"
        assert shown.complaints == []
