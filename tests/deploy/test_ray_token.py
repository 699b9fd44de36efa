"""A node fetches the Ray token with its own rights and keeps it private."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fsspec
import pytest
from botocore.session import Session
from moto.server import ThreadedMotoServer

from tests.conftest import MotoS3

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "ray_token.py"


@pytest.fixture
def ray_token() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_token", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parameters(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A real parameter store over HTTP, holding one good and one short token."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    values = {"/hqlabel/ray-token": "0123456789abcdef" * 4, "/hqlabel/short": "secret"}
    client = Session().create_client("ssm", region_name="us-west-2")
    for name, value in values.items():
        client.put_parameter(Name=name, Value=value, Type="SecureString", Overwrite=True)
    yield values
    server.stop()


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, home: Path, name: str) -> Path:
    path = home / ".ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setattr(sys, "argv", ["ray_token.py", name])
    module.main()
    return path


def test_the_token_lands_in_a_file_that_only_the_owner_can_read(
    ray_token: ModuleType, parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    umask = os.umask(0)
    try:
        path = run(ray_token, monkeypatch, tmp_path, "/hqlabel/ray-token")
        again = run(ray_token, monkeypatch, tmp_path, "/hqlabel/ray-token")
    finally:
        os.umask(umask)

    assert path == again
    assert path.read_text() == parameters["/hqlabel/ray-token"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_token_may_stand_in_an_object_of_a_private_bucket(
    ray_token: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moto_s3: MotoS3
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_s3.endpoint)
    store = fsspec.filesystem("s3", endpoint_url=moto_s3.endpoint)
    store.pipe(f"{moto_s3.bucket}/ray-token", b"ab" * 32 + b"\n")

    path = run(ray_token, monkeypatch, tmp_path, f"s3://{moto_s3.bucket}/ray-token")

    assert path.read_text() == "ab" * 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_short_token_is_refused_and_not_shown(
    ray_token: ModuleType, parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="/hqlabel/short: 6 characters are too few") as refusal:
        run(ray_token, monkeypatch, tmp_path, "/hqlabel/short")

    assert parameters["/hqlabel/short"] not in str(refusal.value)
    assert not (tmp_path / ".ray").exists()
