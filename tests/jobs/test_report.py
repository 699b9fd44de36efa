"""hqlabel report: the page says what the tables hold, shows the rows its SQL finds, and stands alone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image

from jobs.report_data import gather
from jobs.report_sections import sections
from jobs.tables import require_published
from pipeline.quality import FilterSettings
from pipeline.records import Place
from pipeline.storage import open_store
from tests.jobs.made_outputs import MadeImage, blob, make_output, write_truth
from tests.jobs.test_cli import run

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
    code, _, err = run("report", "--output", output)
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
        f"""SELECT category_name, count(DISTINCT image_id), count(*), count(area), median(predicted_iou)
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
    store = open_store(Place(uri=output))
    manifest = require_published(store)
    chosen = sections(manifest.filters, manifest.counts.rejected, masks=manifest.counts.masks)
    data = gather(store, manifest, chosen)

    assert len(chosen) >= 14
    empty = []
    for section in chosen:
        rows = duckdb.sql(section.sql(output)).fetchall()
        ours = [(row["image_id"], row["instance_index"]) for row in data.chosen[section.key]]
        assert ours == [row[:2] for row in rows], section.key
        empty += [] if ours else [section.key]
    assert empty == [], "every section has something to show in this output"


def test_the_other_queries_of_the_page_run_and_agree(page: str, output: str) -> None:
    queries = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page, flags=re.S)]

    answers = {query: duckdb.sql(query).fetchall() for query in queries}

    [failures] = [rows for query, rows in answers.items() if "status = 'failed'" in query]
    assert failures[0][:3] == ("fetch", "not_found", 2)
    assert all(answers.values())


def test_masks_of_unlike_classes_that_are_one_are_shown_as_a_disagreement(page: str) -> None:
    section = page.split('id="pairs"')[1].split("</section>")[0]

    assert {"08.jpg #0", "08.jpg #1"} <= set(re.findall(r"08\.jpg #\d", section))


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


NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
PROBE = """<script>
addEventListener("load", () => {
  const button = document.querySelector("figure .pair");
  button.focus();
  const focused = document.activeElement === button;
  button.click();
  const shown = document.querySelector("dialog").open && document.querySelectorAll("dialog img").length;
  const wide = document.documentElement.scrollWidth > innerWidth;
  const broken = [...document.querySelectorAll("dialog img")].filter((i) => i.complete && !i.naturalWidth);
  document.title = JSON.stringify({ focused, shown, wide, broken: broken.length,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color });
});
</script></body>"""


def browse(page: Path, folder: Path, *arguments: str) -> tuple[dict, str]:
    """(what PROBE saw, what the console said) of the page in headless Chromium."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=4000", *arguments, "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1))), console


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
@pytest.mark.parametrize(("dark", "window"), [(False, "1280,900"), (True, "420,900")])
def test_a_browser_shows_it_in_light_and_dark_wide_and_narrow_without_a_complaint(
    page: str, output: str, tmp_path: Path, dark: bool, window: str
) -> None:
    arguments = [f"--window-size={window}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]

    seen, console = browse(Path(output) / "report" / "index.html", tmp_path, *arguments)

    assert console == ""
    assert seen["focused"]
    assert seen["shown"] == 2
    assert seen["wide"] is False, "nothing sticks out of the window"
    assert seen["broken"] == 0
    paper, ink = (sum(int(v) for v in re.findall(r"\d+", seen[name])[:3]) / 3 for name in ("paper", "ink"))
    assert (ink > 180 > 60 > paper) if dark else (paper > 180 > 60 > ink)
