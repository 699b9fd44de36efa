"""Every file and module that the pages name exists, and docs/dev/architecture.md lists every package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.markdown import blocks, section
from tests.docs.test_links import PAGES, ROOT

PATH = re.compile(
    r"(?<![\w./:-])(?:pipeline|jobs|model|tests|benchmarks|tools|deploy|examples|docs)/[\w./*-]*[\w*/]"
)
MODULE = re.compile(r"(?<![\w./-])(?:pipeline|jobs|benchmarks|tools)(?:\.(?!md\b|py\b)[a-z_]\w*)+")
IMPORT = re.compile(r"^from ((?:model|pipeline|jobs)[\w.]*) import", flags=re.MULTILINE)
PRODUCT = ("jobs", "pipeline", "model")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_page_exists(page: Path) -> None:
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), flags=re.DOTALL))

    assert [path for path in PATH.findall(code) if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_of_the_page_exists(page: Path) -> None:
    text = page.read_text()

    assert [name for name in [*MODULE.findall(text), *IMPORT.findall(text)] if not is_module(name)] == []


def is_module(name: str) -> bool:
    """Whether `name` is a module or a package, or a name that a module defines."""
    path, (parent, _, last) = ROOT / name.replace(".", "/"), name.rpartition(".")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    source = (ROOT / parent.replace(".", "/")).with_suffix(".py")
    return source.is_file() and re.search(rf"\b{last}\b", source.read_text()) is not None


def tree() -> Iterator[tuple[Path, str]]:
    """Each entry of the source tree in docs/dev/architecture.md, and its description."""
    page = (ROOT / "docs" / "dev" / "architecture.md").read_text()
    folder = ROOT
    for line in blocks(section(page, "Source tree"), "")[0].splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+) +(.+)", line).groups()
        folder = folder if indent else ROOT / name
        yield (folder / name if indent else folder), description


def test_every_file_of_the_source_tree_exists() -> None:
    missing = []
    for entry, description in tree():
        near = entry if entry.is_dir() else entry.parent
        named = [near / name for name in re.findall(r"(?<![\w/])\w+\.py\b", description)]
        missing += [path for path in [entry, *named] if not path.exists()]

    assert missing == []


def test_the_source_tree_lists_every_package_and_every_file_next_to_one() -> None:
    listed = [entry for entry, _ in tree()]
    packages = {init.parent for top in PRODUCT for init in (ROOT / top).rglob("__init__.py")}
    files = {path for top in ("jobs", "pipeline") for path in (ROOT / top).glob("[!_]*.py")}

    assert (packages | files) - set(listed) == set()
    assert len(listed) == len(set(listed))
