"""What the backends of object stores promise, request by request, with no store behind them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hqlabel.pipeline.errors import ImageError, UsageError
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage import cloud_buckets
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.cloud_buckets import FsspecBackend, S3Backend
from hqlabel.pipeline.storage.output_store import Store

SEEN = Entry(key="bucket/key", size=3, etag="tag")


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def s3(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    """A backend without a client, which notes what would be asked; S3 refuses to delete `kept`."""

    def call(method: str, path: str, **how: Any) -> dict[str, Any]:
        asked.append({"method": method, "path": path, **how})
        keys = [one["Key"] for one in how.get("Delete", {}).get("Objects", [])]
        return {"Errors": [{"Code": "AccessDenied", "Key": key} for key in keys if key == "kept"]}

    backend = S3Backend.__new__(S3Backend)
    monkeypatch.setattr(backend, "_call", call, raising=False)
    return backend


def test_every_write_under_a_condition_states_it(s3: S3Backend, asked: list[dict[str, Any]]) -> None:
    s3.create("bucket/key", b"new", timeout_s=1)
    s3.replace_if("bucket/key", b"new", SEEN, timeout_s=1)

    assert [one.get("IfNoneMatch") for one in asked] == ["*", None]
    assert [one.get("IfMatch") for one in asked] == [None, '"tag"']


def test_more_than_one_request_takes_is_refused_before_it_is_sent(
    s3: S3Backend, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_buckets, "_ONE_PUT", 10)
    s3.replace("bucket/key", b"x" * 10, timeout_s=1)
    assert len(asked) == 1
    for write in (
        lambda: s3.create("bucket/key", b"x" * 11, timeout_s=1),
        lambda: s3.replace("bucket/key", b"x" * 11, timeout_s=1),
        lambda: s3.replace_if("bucket/key", b"x" * 11, SEEN, timeout_s=1),
    ):
        with pytest.raises(UsageError, match="11 bytes do not fit in one S3 request"):
            write()
    assert len(asked) == 1


def test_an_object_that_is_not_deleted_is_no_success(s3: S3Backend, asked: list[dict[str, Any]]) -> None:
    paths = [f"bucket/{number}" for number in range(1000)]
    with pytest.raises(PermissionError, match="AccessDenied: not deleted"):
        s3.delete([*paths, "bucket/kept"], timeout_s=1)
    assert [len(one["Delete"]["Objects"]) for one in asked] == [1000, 1]


def test_a_driver_that_gives_more_than_a_range_is_not_believed() -> None:
    files = FsspecBackend(SimpleNamespace(cat_file=lambda path, start, end: b"x" * (end - start + 1)))
    with pytest.raises(ImageError, match="11 bytes came for a range of 10") as caught:
        files.get_range("bucket/key", 0, 10, timeout_s=1)
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "s3://b/../c", "s3://b//c", "memory://b/./c"])
def test_a_place_that_names_no_folder_or_leads_out_of_it_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="names no bucket and folder"):
        Store(Place(uri=uri))


def test_an_option_that_no_driver_takes_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"storage\.s3: .*an option of these.*endpoint_url:http://x"):
        cloud_buckets.backend_for("s3", {"endpoint_url:http://x": None})
