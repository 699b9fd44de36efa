"""When faults of the surroundings are the images' own, and when they stop the job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hqlabel.pipeline.arrow_lists import table_sha256
from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.planning.make_plan import Plan, write_plan
from hqlabel.pipeline.stages import fault_window
from hqlabel.pipeline.stages.fault_window import Tried, stop_if_most_images_fail
from hqlabel.pipeline.storage.output_store import Store
from tests.pipeline.made_units import make_context, plan_table, planned_box, planned_image

IMAGES_PER_UNIT = 4


@pytest.fixture(autouse=True)
def nothing_is_spared(monkeypatch):
    monkeypatch.setattr(fault_window, "_spared", {})


def meeting(code: str, systemic: str | None = None) -> ImageError:
    fault = SystemicFault(systemic, f"{code} there") if systemic else None
    return ImageError(code, f"{code} there", fault=fault)


DENIED = meeting("denied", "denied")
SILENT = meeting("unreachable", "store")
NO_BUCKET = meeting("not_found", "store")
NO_CREDENTIALS = meeting("denied", "credentials")
NO_DRIVER = meeting("unreachable", "driver")
BUG = meeting("internal", "internal")
MISSING = meeting("not_found")
BROKEN = meeting("corrupt")


class Window:
    """A plan of these uris, what each would meet, and how many were tried for a unit."""

    def __init__(self, store: Store, met: dict[str, ImageError | None]) -> None:
        rows = [
            planned_image(f"{at:06}", [planned_box()], at // IMAGES_PER_UNIT, image_uri=uri)
            for at, uri in enumerate(met)
        ]
        table = plan_table(rows)
        plan = Plan(table=table, summary=None, categories=(), sha256=table_sha256(table),
                    images_per_unit=IMAGES_PER_UNIT, access=None)  # fmt: skip
        write_plan(store, plan)
        self.context = replace(
            make_context(images_per_unit=IMAGES_PER_UNIT), output=store.place, plan_sha256=plan.sha256
        )
        self.store, self.met, self.uris = store, met, list(met)
        self.asked: list[str] = []

    def judge(self, unit_id: int = 0, uris: list[str] | None = None) -> None:
        mine = uris or self.uris[unit_id * IMAGES_PER_UNIT :][:IMAGES_PER_UNIT]
        stop_if_most_images_fail(self._tried(mine), unit_id, self.context, self.store, self._attempt)

    def stops(self, unit_id: int = 0) -> SystemicFault:
        with pytest.raises(SystemicFault) as caught:
            self.judge(unit_id)
        return caught.value

    def _tried(self, uris: list[str]) -> list[Tried]:
        return [Tried(uri=uri, error=self.met[uri]) for uri in uris]

    def _attempt(self, rows) -> list[Tried]:
        self.asked += [row["image_uri"] for row in rows]
        return self._tried([row["image_uri"] for row in rows])


def buckets(*errors: ImageError | None, images: int = 4) -> dict[str, ImageError | None]:
    """Some images of a bucket each, in order, which meet these errors."""
    return {
        f"s3://b{at:02}/{number}.jpg": error for at, error in enumerate(errors) for number in range(images)
    }


EVERY = [DENIED, SILENT, NO_BUCKET, NO_CREDENTIALS, NO_DRIVER, BUG]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: f"{error.code}-{error.fault.code}")
def test_what_every_image_meets_stops_the_job_with_one_sentence(local_store, error):
    found = Window(local_store, buckets(*[error] * 51)).stops(7)

    assert found.code == error.fault.code
    assert "4 of 4 images of a unit and 16 of 16 from the rest of the plan cannot be read" in found.message
    assert error.message in found.message
    assert "\n" not in str(found)


@pytest.mark.parametrize("error", EVERY, ids=lambda error: f"{error.code}-{error.fault.code}")
def test_a_job_of_one_unit_of_it_stops_too(local_store, error):
    assert Window(local_store, buckets(error)).stops().code == error.fault.code


@pytest.mark.parametrize("error", EVERY, ids=lambda error: f"{error.code}-{error.fault.code}")
def test_one_bucket_of_51_costs_its_own_rows_also_as_the_first_unit(local_store, error):
    first = Window(local_store, buckets(error, *[None] * 50))
    first.judge(0)
    assert len(first.asked) >= fault_window.SAMPLE - 1
    assert len({uri.split("/")[2] for uri in first.asked}) >= fault_window.SAMPLE - 1

    Window(local_store, buckets(*[None] * 50, error)).judge(50)


@pytest.mark.parametrize("error", EVERY, ids=lambda error: f"{error.code}-{error.fault.code}")
def test_one_image_of_many_asks_nobody(local_store, error):
    window = Window(local_store, buckets(None, images=200) | {"gs://b/a.jpg": error})
    window.judge(0, [*window.uris[:3], "gs://b/a.jpg"])
    window.judge(0, [*window.uris[:4], "gs://b/a.jpg", *window.uris[4:60]])
    assert window.asked == []


@pytest.mark.parametrize("error", [NO_BUCKET, NO_CREDENTIALS, NO_DRIVER])
def test_one_image_alone_in_its_unit_or_retry_costs_itself_and_a_job_of_one_stops(local_store, error):
    window = Window(local_store, buckets(None, images=8) | {"gs://b/a.jpg": error})
    window.judge(2)
    assert window.asked
    assert Window(local_store, {"gs://b/a.jpg": error}).stops().code == error.fault.code


@pytest.mark.parametrize("error", [DENIED, SILENT, BUG])
def test_what_one_object_may_have_alone_never_stops_a_job_of_two(local_store, error):
    Window(local_store, buckets(error, images=2)).judge()


def test_a_quarter_of_the_plan_fails(local_store):
    Window(local_store, buckets(DENIED, *[DENIED, None, None, None] * 16)).judge()


def test_three_quarters_of_the_plan_stop_the_job(local_store):
    mixed = buckets(DENIED, *[DENIED, DENIED, DENIED, None] * 16)
    assert Window(local_store, mixed).stops().code == "denied"


def test_what_is_wrong_with_objects_is_no_fault_of_the_surroundings(local_store):
    Window(local_store, buckets(*[MISSING] * 8, *[BROKEN] * 8)).judge(3)


def test_a_bucket_without_a_region_among_local_files_costs_its_rows(local_store):
    local = {f"/photos/{number}.jpg": None for number in range(60)}
    window = Window(local_store, local | buckets(NO_CREDENTIALS, images=4))
    window.judge(15)


def test_dead_web_sites_cost_their_rows_while_any_answers_and_a_dead_network_stops(local_store):
    sites = {f"http://s{number}/a.jpg": SILENT for number in range(60)}
    Window(local_store, sites | {"http://t/a.jpg": MISSING, "http://t/b.jpg": None}).judge(3)
    Window(local_store, {f"http://s{number}/a.jpg": SILENT for number in range(4)}).judge()
    assert Window(local_store, sites).stops().code == "store"


def test_a_place_found_to_fail_alone_is_not_asked_about_again_for_a_while(local_store, monkeypatch):
    window = Window(local_store, buckets(*[NO_BUCKET] * 2, *[None] * 20, images=8))
    window.judge(0)
    asked = len(window.asked)
    window.judge(1)
    assert len(window.asked) == asked
    window.judge(2)  # another bucket
    assert len(window.asked) > asked
    asked = len(window.asked)
    monkeypatch.setattr(fault_window.time, "monotonic", lambda: 1e9)
    window.judge(1)
    assert len(window.asked) > asked


def test_a_place_that_fails_alone_is_named_in_the_log(local_store, monkeypatch):
    lines = []
    monkeypatch.setattr(fault_window.logs, "event", lambda name, **fields: lines.append((name, fields)))

    Window(local_store, buckets(NO_BUCKET, *[None] * 20)).judge(0)

    [(name, fields)] = lines
    assert name == "place_fails_alone"
    assert (fields["place"], fields["code"], fields["message"]) == ("s3://b00", "store", "not_found there")
