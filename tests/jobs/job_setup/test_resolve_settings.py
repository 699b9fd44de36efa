"""From what people write to what the pipeline is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from hqlabel.jobs.job_setup import resolve_settings as settings
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.pipeline.errors import UsageError


def config(*sets: str) -> Config:
    return ConfigSources(sets=list(sets)).load()


def test_local_places_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"")
    given = config(
        "input.images=photos", "input.boxes=s3://b/boxes.parquet", "model.checkpoint=w.pth", "output.uri=out",
        "input.allow_roots=[extra]", "input.image_root=file:///root",
    )  # fmt: skip
    found = settings.resolved(given)
    assert found.input.images == str(tmp_path / "photos")
    assert found.input.boxes == "s3://b/boxes.parquet"
    assert found.input.image_root == "/root"
    assert found.input.allow_roots == [str(tmp_path / "extra")]
    assert found.model.checkpoint == str(tmp_path / "w.pth")
    assert found.output.uri == str(tmp_path / "out")
    assert settings.resolved(found) == found


@pytest.mark.parametrize("name", ["demo", "org/name", "org/name/file.pth", "s3://b/w.pth"])
def test_a_checkpoint_that_is_no_path_stays_as_it_is(name: str) -> None:
    assert settings.resolved(config(f"model.checkpoint={name}")).model.checkpoint == name


def test_the_checkpoint_demo_is_never_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()

    assert settings.resolved(config("model.checkpoint=demo")).model.checkpoint == "demo"


def test_storage_options_go_by_scheme() -> None:
    given = config("storage.s3={endpoint_url: 'http://x'}", "output.uri=s3://b/out")
    place = settings.output_place(given)
    assert (place.uri, place.options) == ("s3://b/out", {"endpoint_url": "http://x"})
    assert settings.storage_options(given, "gs://b/out") == {}
    assert settings.storage_options(given, "/tmp/out") == {}


@pytest.mark.parametrize("name", ["secret", "aws_secret_access_key", "token", "client_kwargs"])
def test_a_secret_in_the_configuration_is_refused_and_not_shown(name: str) -> None:
    value = "{aws_secret_access_key: hunter2}" if name == "client_kwargs" else "hunter2"
    given = config(f"storage.s3={{{name}: {value}}}", "output.uri=/out", "input.images=/in")
    for make in (settings.output_place, settings.check_inputs):
        with pytest.raises(UsageError, match=r"storage\.s3") as caught:
            make(given)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("input.images", "--images"), ("input.boxes", "--boxes"), ("input.image_root", "input.image_root"),
        ("model.checkpoint", "--checkpoint"), ("output.uri", "--output"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["s3", "https"])
def test_a_place_with_a_password_is_refused_and_not_shown(name: str, flag: str, scheme: str) -> None:
    given = config("output.uri=/out", "input.images=/in", f"{name}={scheme}://user:hunter2@host/x.csv")
    for make in (settings.output_place, settings.check_inputs):
        with pytest.raises(UsageError, match=f"^{flag}: .*job.json") as caught:
            make(given)
        assert "hunter2" not in str(caught.value)


def test_what_is_missing_is_named_with_its_flag() -> None:
    with pytest.raises(UsageError, match="--output is missing"):
        settings.output_place(config())
    with pytest.raises(UsageError, match="--images and --boxes are missing"):
        settings.check_inputs(config())
    with pytest.raises(UsageError, match="--allow-root /no/such: there is no such folder"):
        settings.check_inputs(config("input.images=/in", "input.allow_roots=[/no/such]"))


def test_access_has_the_folders_schemes_and_options_of_the_configuration(tmp_path: Path) -> None:
    given = config(
        "input.boxes=/b.csv", f"input.allow_roots=[{tmp_path}]", "input.allow_schemes=[https]",
        "storage.s3={endpoint_url: 'http://x'}",
    )  # fmt: skip
    access = settings.check_inputs(given)
    assert access.roots == (str(tmp_path.resolve()),)
    assert {"s3", "https"} <= set(access.schemes)
    assert access.options == {"s3": {"endpoint_url": "http://x"}}
