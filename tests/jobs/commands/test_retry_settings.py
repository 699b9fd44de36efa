"""What a retry takes from its call, and what has to be as the job began; no image is done for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hqlabel.jobs.commands import retry
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import read_manifest
from tests.jobs.cli.test_cli import run
from tests.pipeline.made_units import MadeJob, make_job

CALL = ("--checkpoint", "w", "--code", "denied", "--set", "limits.max_failure_rate=1")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeJob:
    """A finished job of whose images none was denied, and its weights, found by any name."""
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit(failing=("img-00007.jpg",))
    monkeypatch.setattr(retry, "read_checkpoint", lambda _: made.context.weights)
    return made


def test_it_says_which_limits_hold_for_the_images_done_again(made: MadeJob) -> None:
    output, limit = made.store.place.uri, Limits().max_image_pixels

    code, _, said = run("retry", "--output", output, *CALL, "--set", "limits.max_image_pixels=50000")
    same, _, nothing = run("retry", "--output", output, *CALL)

    assert (code, same) == (0, 0), said
    assert f"limits.max_image_pixels: 50000 for the images done again, {limit} for all others" in said
    assert "limits." not in nothing


def test_other_weights_than_the_job_began_with_are_refused(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(made.context.weights, sha256="6" * 64)
    monkeypatch.setattr(retry, "read_checkpoint", lambda _: other)

    code, _, said = run("retry", "--output", made.store.place.uri, *CALL)

    assert code == 4
    assert f"sha256 {'6' * 64}, the job began with {'5' * 64}" in said
    assert read_manifest(made.store) is None
