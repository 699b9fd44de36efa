"""The Dockerfile: base by digest, no root, the locked versions, nothing fetched and run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def test_the_base_is_given_and_must_be_a_digest() -> None:
    assert instructions("FROM") == ["${BASE_IMAGE}"]
    assert "ARG BASE_IMAGE=" not in TEXT
    [guard] = [line for line in instructions("RUN") if "@sha256:" in line]
    assert guard.count("?") == 64
    assert "exit 1" in guard


def test_it_runs_as_nobody_special() -> None:
    [user] = instructions("USER")

    assert user not in ("root", "0")
    assert LINES.index(f"USER {user}") < next(i for i, line in enumerate(LINES) if "pip install" in line)


def test_the_versions_are_the_locked_ones() -> None:
    installs = [
        part.strip() for line in instructions("RUN") for part in line.split("&&") if "pip install" in part
    ]

    assert len(installs) == 3
    assert "-c constraints.txt" in installs[0]
    assert "--require-hashes" in installs[1]
    assert all("--no-deps" in install for install in installs[1:])


def test_the_image_holds_what_rays_dashboard_launcher_and_metrics_need() -> None:
    lock = (ROOT / "deploy" / "requirements.lock").read_text()
    needed = ("aiohttp-cors", "boto3", "opentelemetry-exporter-prometheus", "prometheus-client", "virtualenv")

    assert [name for name in needed if not re.search(rf"^{name}==", lock, re.MULTILINE)] == []


def test_nothing_is_fetched_and_run_and_no_secret_is_baked_in() -> None:
    assert not re.search(r"curl|wget|ADD http|\| *(ba)?sh\b", TEXT)
    assert not re.search(r"TOKEN=|SECRET|PASSWORD|ACCESS_KEY", TEXT)
    assert "RAY_AUTH_MODE=token" in TEXT


def test_what_is_copied_is_there() -> None:
    for line in instructions("COPY"):
        for source in [word for word in line.split()[:-1] if not word.startswith("--")]:
            assert (ROOT / source).exists(), source
