"""What `validate` finds by one comparison each: the manifest, the parts and the units against one another."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pytest

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage.checksummed_parquet import read_body, write_body
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import MANIFEST_KEY, look_for_manifest, write_manifest
from hqlabel.pipeline.tables.unit_files import footer, unit_key
from hqlabel.pipeline.tables.verify_output import verify
from tests.pipeline.made_units import MadeJob, build_unit, make_job
from tests.pipeline.tables.test_publish_tables import run

KEY = "images/part-00000.parquet"


@pytest.fixture
def made(local_store: Store) -> MadeJob:
    """Four units in two parts, published; `validate` finds nothing."""
    made = make_job(local_store, 16)
    made.commit()
    run(made)
    assert findings(made) == []
    return made


def findings(made: MadeJob) -> list[str]:
    return [str(one) for one in verify(made.store, made.job).findings]


def edit_part(store: Store, **changes: object) -> None:
    """The manifest says these counts of its first part."""
    content = json.loads(store.read(MANIFEST_KEY))
    content["parts"][0]["counts"].update(changes)
    store.put(MANIFEST_KEY, json.dumps(content).encode())


def test_counts_that_the_rows_do_not_have_are_found(made: MadeJob) -> None:
    counts = look_for_manifest(made.store).manifest.parts[0].counts
    edit_part(made.store, accepted=counts.accepted + 1, status={"labelled": 99})

    found = findings(made)

    for key in ("images/part-00000.parquet", "instances/part-00000.parquet"):
        assert f"{key}: {counts.accepted} accepted masks, the manifest states {counts.accepted + 1}" in found
        assert any(one.startswith(f"{key}: its footer states counts ") for one in found)
    assert any(" statuses {" in one and one.endswith("the manifest states {'labelled': 99}") for one in found)


def test_a_unit_that_is_newer_than_the_tables_is_found(made: MadeJob) -> None:
    made.commit([1], generation=1)

    [found] = findings(made)

    assert found.startswith("units/00000001.g1.parquet (unit 1): the tables have generation 0 of this unit")


def test_a_unit_whose_rows_are_not_the_published_ones_is_found(made: MadeJob) -> None:
    other = build_unit(made.plan, 1, made.context, failing={"img-00005.jpg"})
    made.store.put(unit_key(1, 0), write_body(other, footer(made.context)))

    assert findings(made) == [
        "images/part-00000.parquet: its rows of unit 1 are not those of the committed file; publish again"
    ]


class Overtaken(Store):
    """A store in which another command publishes while this one reads its plan."""

    def list(self, prefix: str = "", *, limit: int | None = None) -> list:
        if prefix.startswith("plan/"):
            found = look_for_manifest(Store(self.place))
            write_manifest(Store(self.place), dataclasses.replace(found.manifest, revision=99), found.entry)
        return super().list(prefix, limit=limit)


def test_what_was_published_anew_meanwhile_is_not_called_damage(made: MadeJob) -> None:
    body = made.store.read(unit_key(0, 0))
    made.store.put(unit_key(0, 0), body[:-50])
    place: Place = made.store.place

    with pytest.raises(JobRefused, match="another command published or cleaned here while this one read"):
        verify(Overtaken(place), made.job)
    assert len(findings(made)) > 0


def test_a_row_that_stands_twice_in_a_sealed_file_is_found(made: MadeJob) -> None:
    rows = read_body(made.store.read(KEY), schema.IMAGES, KEY)
    lineage = {"part": json.dumps({})}
    made.store.put(KEY, write_body(pa.concat_tables([rows.slice(0, 1), rows]), lineage))

    image_id = rows["image_id"][0].as_py().encode()
    assert f"{KEY}: image {image_id!r}, instance 0 is there twice or out of order" in findings(made)
