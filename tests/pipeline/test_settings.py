"""The settings: which of them belong to a job's identity, and that workers get them unchanged."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.settings import (
    CHANGES_ROWS,
    IDENTITY,
    BoxSettings,
    ClusterSettings,
    CostSettings,
    DetectorSettings,
    FilterSettings,
    InputSettings,
    Limits,
    ModelSettings,
    Section,
)


@pytest.mark.parametrize("section", [ModelSettings, DetectorSettings, BoxSettings, BoxRules])
def test_every_setting_of_masks_and_boxes_belongs_to_the_identity(section: type[Section]) -> None:
    assert all(IDENTITY in info.metadata for info in section.model_fields.values())


@pytest.mark.parametrize("section", [FilterSettings, ClusterSettings, CostSettings])
def test_what_is_published_and_where_it_runs_changes_no_row(section: type[Section]) -> None:
    marks = [mark for info in section.model_fields.values() for mark in info.metadata]
    assert not {CHANGES_ROWS, IDENTITY} & {mark for mark in marks if isinstance(mark, str)}


def test_the_identity_of_a_section_is_its_marked_settings() -> None:
    changed = {name for name, info in Limits.model_fields.items() if CHANGES_ROWS in info.metadata}
    assert changed == set(Limits.model_fields) - {"max_failure_rate", "failure_rate_from_images"}
    assert Limits().identity() == {}
    inputs = InputSettings(images="a", columns={"image_uri": "path"}, allow_roots=["/b"])
    assert inputs.identity()["columns"] == {"image_uri": "path"}
    assert "allow_roots" not in inputs.identity()


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
