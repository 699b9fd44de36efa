"""The settings: which of them belong to a job's identity, and that workers get them unchanged."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from hqlabel.jobs.load_config import Config
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.settings import (
    GIVEN,
    IDENTITY,
    KEEPS_ROWS,
    MARKS,
    REDO,
    ClusterSettings,
    Limits,
    ModelSettings,
    Section,
)

SECTIONS = [
    info.annotation
    for info in Config.model_fields.values()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
]
FIELDS = [
    pytest.param(section, name, id=f"{section.__name__}.{name}")
    for section in [*SECTIONS, BoxRules]
    for name in section.model_fields
]


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_setting_declares_whether_it_changes_rows(section: type[Section], name: str) -> None:
    marks = [mark for mark in (IDENTITY, MARKS, KEEPS_ROWS) if name in section.marked(mark)]
    assert len(marks) == 1, f"{name}: mark it Identity, Redo, Marks or KeepsRows"
    assert section.marked(REDO) <= section.marked(IDENTITY)


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_a_setting_that_changes_rows_is_in_the_identity_of_its_section(section, name) -> None:
    assert (name in section().identity()) == (name in section.marked(IDENTITY))


def test_what_names_a_place_a_right_or_a_machine_is_never_taken_from_an_output() -> None:
    places = {f"{one.__name__}.{name}" for one in SECTIONS for name in one.marked(GIVEN)}
    assert places >= {
        *(f"InputSettings.{name}" for name in ("images", "boxes", "image_root", "allow_roots")),
        *("InputSettings.allow_schemes", "ModelSettings.checkpoint", "DetectorSettings.name"),
        *("OutputSettings.uri", *(f"ClusterSettings.{name}" for name in ClusterSettings.model_fields)),
    }  # fmt: skip
    assert GIVEN in Config.model_fields["storage"].metadata


def test_the_call_shape_needs_the_number_of_boxes() -> None:
    resolved = ModelSettings(images_per_call=2, boxes_per_call=3)
    assert (resolved.call_shape.images_per_call, resolved.call_shape.boxes_per_call) == (2, 3)
    with pytest.raises(ValueError, match="not resolved"):
        assert ModelSettings().call_shape


def test_settings_are_frozen_strict_and_pickle() -> None:
    limits = Limits(fetch_timeout_s=5, max_image_bytes=9)
    assert pickle.loads(pickle.dumps(limits)) == limits
    assert limits.fetch_timeout_s == 5.0
    with pytest.raises(ValidationError, match="frozen"):
        limits.max_image_bytes = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="valid integer"):
        Limits(max_image_bytes="9")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Limits(max_bytes=9)  # type: ignore[call-arg]
