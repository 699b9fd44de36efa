"""What a new job chooses by the machine it begins on, and that it stays chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.job_setup.open_job import open_or_create
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import JobRefused, UsageError
from tests.e2e.scenes import DataSet

WITH_BFLOAT16 = {"avx512f", "avx512_bf16"}
WITHOUT = {"avx2", "avx512f"}


@pytest.fixture
def config(data_set: DataSet, checkpoint: Path, tmp_path: Path) -> Config:
    flags = {
        "input.images": str(data_set.images),
        "input.boxes": str(data_set.boxes),
        "model.checkpoint": str(checkpoint),
        "output.uri": str(tmp_path / "out"),
        "cluster.gpus_per_actor": 0,
    }
    return ConfigSources(flags=flags).load()


def begin(config: Config, cpu: set[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The masks' settings in job.json, after the job was opened on a machine with such a CPU."""
    monkeypatch.setattr("hqlabel.model.device._cpu_features", lambda: cpu)
    monkeypatch.setattr("hqlabel.model.device._bfloat16_gain", lambda: 2.0)
    monkeypatch.setattr(Machine, "begin", lambda self: None)  # no Ray is needed here
    with Machine(config, Interrupts()) as machine:
        open_or_create(config, check_inputs=False, dtype=machine.dtype, device=machine.device)
    stored = json.loads((Path(str(config.output.uri)) / "job.json").read_text())
    return dict(stored["identity"]["masks"])


@pytest.mark.parametrize(("cpu", "dtype"), [(WITH_BFLOAT16, "bfloat16"), (WITHOUT, "float32")])
def test_auto_is_what_the_cpu_multiplies_and_stays_so(config, cpu, dtype, monkeypatch) -> None:
    first = begin(config, cpu, monkeypatch)
    again = begin(config, WITHOUT if cpu == WITH_BFLOAT16 else WITH_BFLOAT16, monkeypatch)

    assert first["dtype"] == dtype
    assert again == first


def test_an_emulated_number_format_is_refused_before_anything_is_written(config, monkeypatch) -> None:
    asked = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})

    with pytest.raises(JobRefused, match=r"model\.dtype=bfloat16.*no instructions.*float32"):
        begin(asked, WITHOUT, monkeypatch)

    assert not Path(str(config.output.uri)).exists()
    assert begin(asked, WITH_BFLOAT16, monkeypatch)["dtype"] == "bfloat16"


def test_compiling_for_a_cpu_is_refused_before_anything_is_written(config, monkeypatch) -> None:
    compiling = config.model_copy(update={"model": config.model.model_copy(update={"compile": True})})

    with pytest.raises(UsageError, match=r"model\.compile=true.*CPU.*--ray-address"):
        begin(compiling, WITHOUT, monkeypatch)

    assert not Path(str(config.output.uri)).exists()


def test_a_cpu_decodes_few_boxes_a_call_unless_asked(config, tmp_path, monkeypatch) -> None:
    asked = config.model_copy(
        update={
            "model": config.model.model_copy(update={"boxes_per_call": 5}),
            "output": config.output.model_copy(update={"uri": str(tmp_path / "asked")}),
        }
    )

    assert begin(config, WITHOUT, monkeypatch)["call_shape"]["boxes_per_call"] == 2
    assert begin(asked, WITHOUT, monkeypatch)["call_shape"]["boxes_per_call"] == 5


def test_a_job_goes_on_with_the_boxes_a_call_it_began_with(config, monkeypatch) -> None:
    begin(config, WITHOUT, monkeypatch)
    monkeypatch.setattr("hqlabel.jobs.job_setup.resolve_settings.BOXES_PER_CALL", {"cpu": 7})

    assert begin(config, WITHOUT, monkeypatch)["call_shape"]["boxes_per_call"] == 2


def open_again(config: Config) -> None:
    with Machine(config, Interrupts()) as machine:
        open_or_create(config, check_inputs=False, dtype=machine.dtype, device=machine.device)


def of_the_version_before(config: Config, saved: str | None) -> None:
    """Make the job one that has its limits and rights outside of the identity."""
    place = Path(str(config.output.uri))
    content = json.loads((place / "job.json").read_text())
    del content["identity"]["limits"]
    for name in ("allow_roots", "allow_schemes", "boxes_from"):
        del content["identity"]["inputs"]["arguments"][name]
    (place / "job.json").write_text(json.dumps(content))
    if saved is not None:
        (place / "config.yaml").write_text(saved)


def test_a_job_of_the_version_before_has_its_rights_compared_by_its_saved_configuration(
    config, tmp_path, monkeypatch
) -> None:
    begin(config, WITHOUT, monkeypatch)
    of_the_version_before(config, f"input: {{allow_roots: [{tmp_path}], allow_schemes: []}}")
    with pytest.raises(JobRefused) as refused:
        open_again(config)
    assert f"(add --allow-root {tmp_path})" in str(refused.value)

    inputs = config.input.model_copy(update={"allow_roots": [str(tmp_path)]})
    open_again(config.model_copy(update={"input": inputs}))


def test_what_a_job_of_the_version_before_does_not_say_is_warned_of(config, monkeypatch, capsys) -> None:
    begin(config, WITHOUT, monkeypatch)
    of_the_version_before(config, None)

    open_again(config)

    said = capsys.readouterr().err
    assert "with which input.allow_roots this job began is not known" in said


@pytest.mark.parametrize(("section", "name", "value"), [
    ("limits", "max_image_pixels", 5), ("limits", "fetch_timeout_s", 1.5),
    ("limits", "decode_memory_bytes", 2**28),
    ("input", "allow_schemes", ["https"]), ("input", "allow_roots", ["/tmp"]), ("boxes", "min_score", 0.5),
    ("model", "stability_offset", 2.0), ("output", "images_per_unit", 7), ("input", "limit", 3),
])  # fmt: skip
def test_a_resume_with_another_value_of_what_changes_rows_is_refused(
    section, name, value, config, monkeypatch
) -> None:
    begin(config, WITHOUT, monkeypatch)
    changed = getattr(config, section).model_copy(update={name: value})

    with pytest.raises(JobRefused, match=name):
        open_again(config.model_copy(update={section: changed}))
