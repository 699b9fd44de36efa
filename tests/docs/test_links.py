"""Every link and every make target that the pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.markdown import blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "photos" / "ATTRIBUTION.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", prose)

    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_are_headings(page: Path) -> None:
    missing = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        if anchor not in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]:
            missing.append(f"{target}#{anchor}")

    assert missing == []


def test_the_make_targets_of_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)\b(?= *[`#\n])", page.read_text())
    }

    assert {"demo", "test"} <= named
    assert not [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)]


def test_the_commands_of_the_pages_are_commands_of_the_program() -> None:
    from hqlabel.jobs.cli.main import app

    known = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    named = {
        name
        for page in PAGES
        for text in [*blocks(page.read_text(), ""), *re.findall(r"`([^`\n]+)`", page.read_text())]
        for name in re.findall(r"\bhqlabel ([a-z]+)\b", text)
    }

    assert named - known == set()
