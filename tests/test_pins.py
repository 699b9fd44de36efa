"""The pins are whole: what the project asks for is in them, at a version that it allows."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK_EXTRAS = {
    "constraints.txt": ("s3", "gcs", "detect", "eval", "cluster", "dev"),
    "requirements.lock": ("s3", "detect", "eval", "dev"),
    "deploy/requirements.lock": ("s3", "gcs", "detect", "cluster"),
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", (ROOT / path).read_text(), flags=re.MULTILINE)
    return {normal(name): version for name, version in found}


def asked_for(extras: tuple[str, ...]) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("path", LOCK_EXTRAS)
def test_every_requirement_of_the_project_is_pinned_at_an_allowed_version(path: str) -> None:
    pinned = pins(path) | {"torch": pins("constraints.txt")["torch"]}

    wrong = [
        f"{r} (pinned: {pinned.get(normal(r.name))})"
        for r in asked_for(LOCK_EXTRAS[path])
        if normal(r.name) not in pinned or not r.specifier.contains(pinned[normal(r.name)])
    ]

    assert wrong == [], f"run `make lock`: {wrong}"


@pytest.mark.parametrize("path", ["requirements.lock", "deploy/requirements.lock"])
def test_a_lock_has_the_versions_of_the_constraints_and_a_hash_for_each(path: str) -> None:
    versions = pins("constraints.txt")
    blocks = (ROOT / path).read_text().split("\n", 2)[2]

    assert {n: v for n, v in pins(path).items() if versions.get(n) != v} == {}
    for block in re.split(r"\n(?=[a-z])", blocks.strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), f"no hash: {block.splitlines()[0]}"


def test_nothing_but_the_constraints_names_torch_so_that_no_gigabytes_come_unasked() -> None:
    for path in ("requirements.lock", "deploy/requirements.lock"):
        heavy = {"torch", "torchvision", "timm", "triton"} | {
            n for n in pins(path) if n.startswith("nvidia-")
        }

        assert heavy & set(pins(path)) == set()


def test_the_inventory_lists_every_pin_with_its_version_and_a_licence() -> None:
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| ([^|]*) \|", (ROOT / "docs" / "dev" / "dependencies.md").read_text(), re.M
    )
    listed = {name: version for name, version, _ in rows[1:]}

    assert listed == pins("constraints.txt"), "run tools/write_dependencies_docs.py"
    assert not [
        name for name, _, licence in rows[1:] if licence in ("", "none stated") or "not inst" in licence
    ]


MACHINES = [
    default_environment()
    | {"python_version": python, "python_full_version": f"{python}.7", "extra": ""}
    | {"sys_platform": system.lower(), "platform_system": system, "platform_machine": machine}
    for python in ("3.11", "3.12")
    for system, machine in (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
]
EXTRAS_IN_USE = {"ray": ("data", "default"), "moto": ("server",), "google-api-core": ("grpc",)}


def needed(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate(machine | {"extra": chosen}) for machine in MACHINES for chosen in ("", *extras)
    )


def test_nothing_that_a_pinned_package_needs_is_missing_on_any_machine() -> None:
    pinned = pins("constraints.txt")
    missing = []
    for name in set(pinned) - {"segment-anything-hq"}:  # pinned without its dependencies, on purpose
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an extra that this environment has not
        wanted = [r for r in map(Requirement, lines) if needed(r, EXTRAS_IN_USE.get(name, ()))]
        missing += [f"{name} needs {r.name}" for r in wanted if normal(r.name) not in pinned]

    assert missing == []
