"""What is tracked speaks of the product alone: no path of a machine, no package registry, no secret."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Written in two halves, so that this file does not hold them.
REGISTRY_HOSTS = ("pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.org", "download" + r"\.pytorch")
SECRETS = ("AKIA" + "[0-9A-Z]{16}", "-----BEGIN [A-Z ]*PRIVATE" + " KEY-----", "hf_" + "[A-Za-z]{30,}")


def tracked_texts() -> list[tuple[str, str]]:
    """Path and text of every tracked file that is UTF-8."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    found = []
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        try:
            found.append((name, path.read_bytes().decode("utf-8")))
        except UnicodeDecodeError:
            continue
    assert len(found) > 20, "the listing of tracked files is too short to prove anything"
    return found


def hits(patterns: tuple[str, ...]) -> list[str]:
    expression = re.compile("|".join(patterns))
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if expression.search(line)
    ]


def test_no_file_names_a_package_registry() -> None:
    assert hits(REGISTRY_HOSTS) == []


def test_no_file_names_a_path_of_this_machine() -> None:
    places = [
        re.escape(f"{place}/")
        for place in (ROOT, Path.home(), "/opt/" + "pypi", "/opt/" + "wheels", "/" + "work")
    ]

    assert hits(tuple(rf"(?<![\w.}}]){place}" for place in places)) == []


def test_no_file_holds_a_secret() -> None:
    assert hits(SECRETS) == []


def test_nothing_large_is_tracked() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    sizes = {
        n: (ROOT / n).stat().st_size
        for n in listing.stdout.decode().split("\0")
        if n and (ROOT / n).is_file()
    }

    assert {n: s for n, s in sizes.items() if s > 1_000_000 and not n.startswith("model/weights/")} == {}
    assert sum(s for n, s in sizes.items() if n.startswith("examples/photos/")) < 2_000_000
