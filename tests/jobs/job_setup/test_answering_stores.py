"""A store or hub that is silent, or not there, is named within seconds, before any work."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from hqlabel.jobs.job_setup import answering_stores
from hqlabel.jobs.job_setup.answering_stores import look_in_the_cache_of_a_silent_hub, require_answers
from hqlabel.jobs.load_config import Config
from hqlabel.pipeline.errors import JobRefused
from tests.conftest import MotoS3


@pytest.fixture(params=["accepts and says nothing", "closed"])
def silent(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address at which nobody answers: the kernel accepts connections, or refuses them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "closed":
            server.close()
        else:
            server.listen()
        yield address


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering_stores, "FIRST_ANSWER_S", 1.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that what is set in the environment is undone
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("setting", ["output.uri", "input.images", "input.boxes", "model.checkpoint"])
def test_a_silent_store_is_named_with_its_address(silent: str, setting: str) -> None:
    section, name = setting.split(".")
    tree = {section: {name: "s3://bucket"}, "storage": {"s3": {"endpoint_url": silent}}}
    began = time.monotonic()
    with pytest.raises(JobRefused, match=rf"s3://bucket: the store at {silent} does not answer within 1 s"):
        require_answers(Config.model_validate(tree))
    assert time.monotonic() - began < 10


def test_a_silent_web_server_is_named(silent: str) -> None:
    config = Config.model_validate({"input": {"boxes": f"{silent}/boxes.csv"}})
    with pytest.raises(JobRefused, match=rf"{silent}/boxes\.csv: the store does not answer within 1 s"):
        require_answers(config)


def test_a_silent_hub_is_said_once_and_its_cache_used(
    silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", silent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)

    look_in_the_cache_of_a_silent_hub(["org/name", "demo", None, "s3://bucket/a.pth", "module:Class"])
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    look_in_the_cache_of_a_silent_hub(["hf:org/other", "some/model"])
    look_in_the_cache_of_a_silent_hub(["some/model"])
    said = capsys.readouterr().err
    assert said == f"the hub at {silent} does not answer within 1 s: its cache alone counts\n"
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_an_answer_of_any_kind_is_one(moto_s3: MotoS3) -> None:
    place = {
        "output": {"uri": "s3://no-such-bucket/out"},
        "storage": {"s3": {"endpoint_url": moto_s3.endpoint}},
    }
    require_answers(Config.model_validate(place))
