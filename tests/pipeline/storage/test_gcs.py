"""Google Cloud Storage through gcsfs, against an emulator of its JSON interface; both must be installed.

pip install gcsfs==2026.10.1 gcp-storage-emulator==2026.7.19

The emulator does not look at `ifGenerationMatch`, by which gcsfs creates an object once. So reading is shown
here, and that such a store is refused for a job's output; commits on the real one are not.
"""

from __future__ import annotations

import contextlib
import io
import os

import pytest

from hqlabel.pipeline.errors import ImageError, JobRefused
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.job_state.job_file import open_job
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.storage.read_objects import fingerprint
from tests.pipeline.job_state.test_job_file import make_job
from tests.pipeline.made_formats import PICTURES, sample, tar_of

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks over gRPC, which this is not
pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")


@pytest.fixture(scope="module")
def options():
    """The fsspec options that lead to the emulator."""
    with contextlib.redirect_stderr(io.StringIO()):
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
        host, port = server._api._httpd.server_address[:2]
        yield {"endpoint_url": f"http://{host}:{port}", "token": "anon", "project": "test"}
        server.stop()


def test_objects_are_written_read_listed_and_deleted(options):
    store = Store(Place(uri="gs://bucket/job", options=options))
    large = b"x" * 12_000_000

    store.put("units/a", b"one")
    store.put("units/b", b"two")
    store.put("units/b", b"TWO")
    store.put("large", large)

    assert store.read("units/b") == b"TWO"
    assert store.read_range("units/a", 1, 3) == b"ne"
    assert store.read("large") == large
    assert [(one.key, one.size) for one in store.list("units/")] == [("units/a", 3), ("units/b", 3)]
    assert store.head("units/c") is None
    with pytest.raises(NotFound):
        store.read("units/c")
    store.delete(["units/a", "units/gone"])
    assert [one.key for one in store.list("units/")] == ["units/b"]


def test_a_store_that_does_not_create_once_is_refused_for_an_output(options):
    store = Store(Place(uri="gs://bucket/out", options=options))

    with pytest.raises(JobRefused, match="replaces objects that were to be created only if absent"):
        open_job(store, make_job())


def test_inputs_are_planned_and_read(options):
    store = Store(Place(uri="gs://bucket/in", options=options))
    for name, data in PICTURES.items():
        store.put(f"photos/{name}.png", data)
    store.put("boxes.jsonl", b'{"image_id": "a/1.png", "boxes": [[1, 2, 3, 4]]}\n')
    store.put("shards/0.tar", tar_of(sample("b/3")))
    access = AccessRules(options={"gs": options})

    plan = make_plan(
        InputSettings(images="gs://bucket/in/photos", boxes="gs://bucket/in/boxes.jsonl"), access
    )
    tars = make_plan(InputSettings(boxes="gs://bucket/in/shards"), access)

    found = [fetch_object(uri, access, Limits()).data for uri in plan.table["image_uri"].to_pylist()]
    assert found == list(PICTURES.values())
    assert plan.summary.boxes == 1
    assert fetch_object(tars.table["image_uri"][0].as_py(), access, Limits()).data == PICTURES["b/3"]
    assert fingerprint("gs://bucket/in/boxes.jsonl", options)["etag"]
    with pytest.raises(ImageError) as caught:
        fetch_object("gs://bucket/in/photos/gone.png", access, Limits())
    assert caught.value.code == "not_found"
