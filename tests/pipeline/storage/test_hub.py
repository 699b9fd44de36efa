"""`hf://` uris: a data set of the hub is listed, planned and read like any store; a stand-in serves it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError

from hqlabel.pipeline.errors import ImageError, JobRefused
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.storage import read_objects as objects
from hqlabel.pipeline.storage.read_objects import fingerprint, head_object, open_input
from hqlabel.pipeline.storage.request_retries import classify
from tests.hub_server import Hub, hub_server
from tests.pipeline.made_formats import PICTURES, hf_rows, sample, tar_of
from tests.s3_proxy import Fault, fault_proxy

LIMITS = Limits(fetch_timeout_s=10)


@pytest.fixture(scope="module")
def hub():
    rows = io.BytesIO()
    pq.write_table(hf_rows(), rows, row_group_size=2)
    files = {f"photos/{name}.png": data for name, data in PICTURES.items()}
    files |= {"data/train-0.parquet": rows.getvalue(), "shards/0.tar": tar_of(sample("a/1"))}
    files |= {"boxes.jsonl": b'{"image_id": "a/1.png", "boxes": [[1, 2, 3, 4]]}\n'}
    with hub_server(files) as serving:
        yield serving


def planned(hub: Hub, **inputs: str) -> Plan:
    places = {name: f"{hub.uri}/{place}" for name, place in inputs.items()}
    return make_plan(InputSettings(**places), AccessRules(options={"hf": hub.options}))


def test_a_folder_of_pictures_and_a_table_are_planned_and_read(hub):
    plan = planned(hub, images="photos", boxes="boxes.jsonl")

    uris = plan.table["image_uri"].to_pylist()
    assert uris == [f"{hub.uri}/photos/{name}.png" for name in sorted(PICTURES)]
    assert [fetch_object(uri, plan.access, LIMITS).data for uri in uris] == list(PICTURES.values())
    assert plan.summary.boxes == 1
    assert plan.summary.input_files[0]["uri"] == f"{hub.uri}/boxes.jsonl"


@pytest.mark.parametrize("place", ["data", "data/*.parquet", "shards"])
def test_data_sets_and_tars_of_the_hub_are_read_by_place(hub, place):
    plan = planned(hub, boxes=place)

    found = [fetch_object(uri, plan.access, LIMITS).data for uri in plan.table["image_uri"].to_pylist()]
    assert found == ([PICTURES["a/1"]] if place == "shards" else list(PICTURES.values()))
    assert plan.summary.boxes == (2 if place == "shards" else 5)


def test_what_is_not_there_is_said_as_of_any_store(hub):
    access = AccessRules(options={"hf": hub.options})

    assert head_object(f"{hub.uri}/gone.parquet", hub.options) is None
    with pytest.raises(ImageError) as caught:
        fetch_object(f"{hub.uri}/photos/gone.png", access, LIMITS)
    assert caught.value.code == "not_found"
    with pytest.raises(JobRefused, match="repository not found"):
        make_plan(InputSettings(images="hf://datasets/no/where/data"), access)


def test_the_hubs_own_version_of_a_file_is_its_fingerprint(hub):
    found = fingerprint(f"{hub.uri}/boxes.jsonl", hub.options)

    assert found["etag"] == head_object(f"{hub.uri}/boxes.jsonl", hub.options).etag


def test_a_hub_that_does_not_answer_refuses_the_job(hub, monkeypatch):
    monkeypatch.setattr(objects, "INPUT_BUDGET_S", 0.2)
    options = {**hub.options, "endpoint": "http://127.0.0.1:9"}

    with pytest.raises(JobRefused, match=r"look up hf://lkeab/hq-sam/sam_hq_vit_b\.pth"):
        open_input("hf://lkeab/hq-sam/sam_hq_vit_b.pth", options)


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, "systemic", "credentials"),
        (403, "systemic", "denied"),
        (404, "image", "not_found"),
        (429, "retry", "store"),
        (503, "retry", "store"),
    ],
)
def test_what_the_hub_answers_is_told_by_its_status(status, kind, code):
    answer = SimpleNamespace(status_code=status, headers={}, request=None)

    verdict = classify(HfHubHTTPError("refused", response=answer))

    assert (verdict.kind, verdict.code) == (kind, code)


def test_a_fault_of_the_hub_costs_a_listing_one_page(hub, monkeypatch):
    with hub_server(hub.files, page_size=2) as small_pages, fault_proxy(small_pages.endpoint) as proxy:
        reset = proxy.add(Fault(match="GET .*/tree/.*cursor=2", do="reset", times=3))
        broken = proxy.add(Fault(match="GET .*/tree/.*cursor=4", do="status", status=500, times=1))
        found = objects.list_objects(f"{hub.uri}/photos", {"endpoint": proxy.endpoint})
    assert [entry.key for entry in found] == [f"{hub.uri}/photos/{name}.png" for name in sorted(PICTURES)]
    assert (reset.landed, broken.landed) == (3, 1)
    assert proxy.requests("/tree/.*cursor=2") == 4
    assert proxy.requests("/tree/") - proxy.requests("/tree/.*cursor=") == 1
