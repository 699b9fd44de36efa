"""Writes the pins: constraints.txt (every version) and two hashed locks, the root one and the one of deploy/.

pip resolves, nothing is installed: `pip install --dry-run --report` once for each set of extras, then once
for each machine of TARGETS with the versions fixed, for the sha256 of the wheel which pip would take there.
Only names, versions and hashes are kept, so the files say nothing about the index that served them.

torch stands outside: its wheel differs by accelerator, so it has a version here and no hash.
segment-anything-hq (an oracle of tests/parity) is pinned without its dependencies: torchvision and timm
would bring a torch of their own, and the tests stand in for the two functions it takes from them.

    .venv/bin/python tools/lock_requirements.py             keeps the versions of constraints.txt, adds new
    .venv/bin/python tools/lock_requirements.py --upgrade   takes the newest that pyproject.toml allows

Takes about eight minutes: pip reads the index once for every machine of TARGETS.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
TORCH = "torch==2.13.0"
SETUPTOOLS = "setuptools==84.2.1"  # builds the editable install, and torch imports it
WITHOUT_DEPENDENCIES = "segment-anything-hq==0.3"
LOCKS = {
    "requirements.lock": ("s3", "detect", "eval", "dev"),  # what `make setup` installs
    "deploy/requirements.lock": ("s3", "gcs", "detect", "cluster"),  # what deploy/Dockerfile installs
}
PYTHONS = ("3.11", "3.12")


def manylinux(arch: str, newest: int) -> list[str]:
    """The platform tags of a Linux with glibc 2.`newest`, as pip would list them."""
    return [f"manylinux_2_{minor}_{arch}" for minor in range(newest, 4, -1)] + [f"manylinux2014_{arch}"]


# One entry a machine. An old and a new glibc each: pip takes the newest tag that fits.
TARGETS = (
    manylinux("x86_64", 28),
    manylinux("x86_64", 39),
    manylinux("aarch64", 28),
    manylinux("aarch64", 39),
    ["macosx_14_0_arm64"],
)


def pip_report(arguments: list[str]) -> list[dict[str, object]]:
    """What pip would install for `arguments`, as its report's list; raises with pip's own words."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"pip could not resolve {arguments}:\n{done.stderr}")
    return list(json.loads(done.stdout)["install"])


def version_of(item: dict[str, object]) -> tuple[str, str]:
    """Normalised name and version of one entry of a report."""
    metadata = item["metadata"]
    assert isinstance(metadata, dict)
    return str(metadata["name"]).lower().replace("_", "-").replace(".", "-"), str(metadata["version"])


def sha256_of(item: dict[str, object]) -> str:
    """The sha256 of the file that pip would fetch."""
    info = item["download_info"]
    assert isinstance(info, dict)
    return str(info["archive_info"]["hashes"]["sha256"])


def requirements(extras: tuple[str, ...]) -> list[str]:
    """The requirement lines of pyproject.toml for the core and `extras`, and what is always there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [*[line for line in lines if not line.startswith("torch")], TORCH, SETUPTOOLS]


def resolve(extras: tuple[str, ...], keep: bool) -> dict[str, str]:
    """Name to version of everything that the core and `extras` need, without torch and its CUDA parts."""
    constraint = ["-c", str(CONSTRAINTS)] if keep and CONSTRAINTS.exists() else []
    found = dict(version_of(item) for item in pip_report([*constraint, *requirements(extras)]))
    return {n: v for n, v in found.items() if n not in ("torch", "triton") and not n.startswith("nvidia-")}


def hashes(pins: dict[str, str]) -> dict[str, set[str]]:
    """Name to the sha256 of its wheels over TARGETS and PYTHONS."""
    found: dict[str, set[str]] = {name: set() for name in pins}
    lines = [f"{name}=={version}" for name, version in pins.items()]
    for python in PYTHONS:
        for tags in TARGETS:
            print(f"wheels for Python {python} on {tags[0]}", file=sys.stderr)
            platforms = [part for tag in tags for part in ("--platform", tag)]
            with tempfile.TemporaryDirectory() as target:
                fixed = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--target", target]
                for item in pip_report([*fixed, *platforms, *lines]):
                    found[version_of(item)[0]].add(sha256_of(item))
    return found


def write(path: Path, title: str, lines: list[str]) -> None:
    """Writes a pin file with its heading."""
    header = f"# {title}\n# Written by tools/lock_requirements.py; do not edit.\n"
    path.write_text(header + "\n".join(lines) + "\n")


def main() -> None:
    """Resolves, then writes the three files."""
    keep = "--upgrade" not in sys.argv[1:]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = resolve(tuple(extras), keep)
    oracle, oracle_version = WITHOUT_DEPENDENCIES.split("==")
    pins[oracle] = oracle_version
    ordered = [f"{name}=={version}" for name, version in sorted(pins.items())]
    write(CONSTRAINTS, "Every version, all extras; torch comes first and by itself.", [*ordered, TORCH])
    known = hashes(pins)
    for name, wanted in LOCKS.items():
        names = set(resolve(wanted, keep=True)) | ({oracle} if "dev" in wanted else set())
        lines = [
            f"{pin}=={pins[pin]} \\\n    "
            + " \\\n    ".join(f"--hash=sha256:{digest}" for digest in sorted(known[pin]))
            for pin in sorted(names)
        ]
        write(ROOT / name, f"Core and extras {', '.join(wanted)}, with the hash of each wheel.", lines)


if __name__ == "__main__":
    main()
