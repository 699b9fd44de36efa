"""Writes docs/dev/dependencies.md: every pinned package with the licence that it states of itself.

    make setup LOCK=constraints.txt && .venv/bin/python tools/write_dependencies_docs.py

Reads the metadata of what is installed in this environment, so all extras must be; a pinned package that is
not installed is listed as such, never left out.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "dev" / "dependencies.md"


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: str) -> dict[str, str]:
    """Name to version of every pin in a file of the root."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", (ROOT / path).read_text(), flags=re.MULTILINE)
    return {normal(name): version for name, version in found}


def licence(name: str) -> str:
    """What an installed package states: expression, else classifiers, else its short field, else its file."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed where this page was written"
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    prefix = "License :: "
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith(prefix)]
    if classifiers:
        return "; ".join(sorted(c.rsplit(" :: ", 1)[-1] for c in classifiers))
    first = (about.get("License") or "").strip().splitlines()
    return first[0][:60] if first else heading_of_licence_file(name)


def heading_of_licence_file(name: str) -> str:
    """The first two lines of the licence file that a package ships."""
    for file in metadata.files(name) or []:
        if "licen" in file.name.lower():
            lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
            return ", ".join(lines[:2])
    return "none stated"


def roots() -> dict[str, str]:
    """Packages that pyproject.toml asks for by name, with the extra that does (`core` for none)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}
    for extra, lines in {"core": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            name = re.match(r"[A-Za-z0-9._-]+", line)
            assert name is not None
            found.setdefault(normal(name.group()), extra)
    return found


def page() -> str:
    """The whole page."""
    asked, runtime = roots(), pins("deploy/requirements.lock")
    lines = [
        "# Dependencies and their licences",
        "",
        "Every pinned package, with the licence that its own metadata state.",
        "Written by `tools/write_dependencies_docs.py`; do not edit.",
        "",
        "`asked by`: the part of pyproject.toml that names it; empty: it came with another package.",
        "`in the image`: installed by deploy/Dockerfile, so part of what runs on a cluster.",
        "On a machine with CUDA, torch brings NVIDIA's libraries besides, under NVIDIA's own terms.",
        "",
        "| package | version | licence | asked by | in the image |",
        "|---|---|---|---|---|",
    ]
    for name, version in sorted(pins("constraints.txt").items()):
        inside = "yes" if name in runtime or name == "torch" else ""
        lines.append(f"| {name} | {version} | {licence(name)} | {asked.get(name, '')} | {inside} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
