"""The picture of a report in the README: its head in a light browser, below it its masks in a dark one.

python -m tools.report_picture PAGE.html docs/images/report.jpg     needs Chromium
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.jobs.browser import browser

WIDTH, SHOWN_WIDTH = 1280, 1000
LIGHT_PX, DARK_PX = 845, 1045
_TOP = "document.querySelector({!r}).getBoundingClientRect().top + scrollY"


def part_of(page: Path, selector: str, height: int, *, dark: bool) -> Image.Image:
    """So much of the page, from the element on."""
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as shown:
        shown.open(page.resolve().as_uri(), width=WIDTH, dark=dark)
        shown.call("Emulation.setScrollbarsHidden", hidden=True)  # or the page is wider in the picture
        shown.ask("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
        shown.ask("Promise.all([...document.images].map((image) => image.decode()))")
        shown.ask("document.querySelectorAll('nav, #filter').forEach((bar) => bar.style.position = 'static')")
        clip = {
            "x": 0,
            "y": max(0, shown.ask(_TOP.format(selector)) - 24),
            "width": WIDTH,
            "height": height,
            "scale": 1,
        }
        said = shown.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return Image.open(io.BytesIO(base64.b64decode(said["data"]))).convert("RGB")


def main() -> None:
    """None; writes the picture that the command line names."""
    page, to = Path(sys.argv[1]), Path(sys.argv[2])
    parts = [part_of(page, "body", LIGHT_PX, dark=False), part_of(page, "#boxes", DARK_PX, dark=True)]
    sheet = Image.new("RGB", (WIDTH, LIGHT_PX + DARK_PX))
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (0, LIGHT_PX))
    shown = sheet.resize((SHOWN_WIDTH, sheet.height * SHOWN_WIDTH // WIDTH), Image.Resampling.LANCZOS)
    shown.save(to, quality=85, optimize=True)


if __name__ == "__main__":
    main()
