"""Fixtures that more than one folder of tests needs: real stores, and places to put a job."""

from __future__ import annotations

import contextlib
import io
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage.output_store import Store
from tests.s3_proxy import FaultProxy, fault_proxy

# A busy machine is no finding: only tests that say so bound the time of an example.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let PyTorch compute with one thread: tensors of tests are small, and cores are shared with other tests.

    With two threads on two busy cores the same tests take ten times as long: each operation waits for both.
    A job's model has one too, and the last bits of float32 sums follow their number.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class MotoS3:
    """A real S3 stand-in over HTTP on loopback, with one bucket."""

    endpoint: str
    bucket: str

    @property
    def options(self) -> dict[str, object]:
        return {"endpoint_url": self.endpoint}

    def place(self, name: str = "") -> Place:
        """A prefix nobody else uses."""
        return Place(uri=f"s3://{self.bucket}/{name or uuid.uuid4().hex}", options=self.options)


@pytest.fixture(scope="session")
def aws_environment() -> Iterator[None]:
    """Credentials where they belong: in the environment, also of processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-access")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        yield


@pytest.fixture(scope="session")
def moto_s3(aws_environment: None) -> Iterator[MotoS3]:
    """One moto server for the whole session; tests keep apart by prefix (`moto_s3.place()`)."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):
        server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    fsspec.filesystem("s3", endpoint_url=endpoint, skip_instance_cache=True).mkdir("bucket")
    yield MotoS3(endpoint=endpoint, bucket="bucket")
    server.stop()


@pytest.fixture
def s3_faults(moto_s3: MotoS3) -> Iterator[FaultProxy]:
    """A proxy before moto that breaks what it is told to; see tests/s3_proxy.py."""
    with fault_proxy(moto_s3.endpoint) as proxy:
        yield proxy


def make_place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """A fresh, empty place of one kind: `local`, `s3` or `memory`."""
    if kind == "local":
        return Place(uri=str(tmp_path / "store"))
    if kind == "memory":
        return Place(uri=f"memory://{uuid.uuid4().hex}/store")
    moto: MotoS3 = request.getfixturevalue("moto_s3")
    return moto.place()


@pytest.fixture(params=["local", "s3", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind in turn: what passes here holds on every kind."""
    return Store(make_place(request.param, tmp_path, request))


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store(Place(uri=str(tmp_path / "store")))


@pytest.fixture
def memory_store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    return Store(make_place("memory", tmp_path, request))


@pytest.fixture
def s3_store(moto_s3: MotoS3) -> Store:
    return Store(moto_s3.place())


@pytest.fixture(scope="session")
def local_ray(aws_environment: None) -> Iterator[None]:
    """One private Ray of two cores for the whole session: it takes seconds to start."""
    import ray

    for tries_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=300 * 2**20,
                _system_config={"metrics_report_interval_ms": 2000},  # ten seconds otherwise
            )
            break
        except Exception:  # Ray gives its processes 30 s, which a busy machine may not keep
            ray.shutdown()
            if not tries_left:
                raise
    yield
    ray.shutdown()
