"""The soak's judgement: a round counts as sound only when its tables are those of the undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.soak import Soak, Totals, Wanted, _read_out
from hqlabel.pipeline.job_context import Place
from tests.faults import chain


@pytest.fixture
def soak(tmp_path: Path) -> Soak:
    """A soak at the end of its first round, which went well."""
    made = Soak(tmp_path / "state", images=chain.IMAGES)
    job = chain.make_small_job(tmp_path / "job").at(Place(uri=str(made.out)))
    chain.run_job(job, until="retry")
    pq.write_table(job.plan.table.select(["image_id"]), made.state / "inputs" / "boxes.parquet")
    (made.state / "reference.json").write_text(json.dumps(_read_out(made.out)[1]))
    made.trace.mkdir()
    (made.trace / "1.txt").write_text("one\n" * 13)
    return made


def test_a_round_like_the_undisturbed_one_is_sound_and_is_forgotten(soak: Soak) -> None:
    soak._close_round()

    totals = soak.totals
    assert (totals.rounds, totals.images_done, totals.calls) == (1, chain.IMAGES, 13)
    assert totals.sound
    assert not soak.out.exists()


@pytest.mark.parametrize("harm", ["lost", "doubled", "changed", "flipped"])
def test_a_round_that_lost_doubled_or_changed_a_row_is_not(harm: str, soak: Soak) -> None:
    part = soak.out / "images" / "part-00000.parquet"
    table = pq.read_table(part)
    if harm == "lost":
        table = table.slice(1)
    if harm == "doubled":
        table = pa.concat_tables([table, table.slice(2, 1)])
    if harm == "changed":
        width = pa.array([1] * table.num_rows, pa.int32())
        table = table.set_column(table.schema.get_field_index("width"), table.schema.field("width"), width)
    if harm == "flipped":
        body = bytearray((soak.out / "units" / "00000002.g0.parquet").read_bytes())
        body[100] ^= 1
        (soak.out / "units" / "00000002.g0.parquet").write_bytes(bytes(body))
    else:
        pq.write_table(table, part)

    soak._close_round()

    totals = soak.totals
    assert not totals.sound
    assert totals.lost == (harm == "lost")
    assert totals.doubled == (harm == "doubled")
    assert totals.different_rounds == (harm != "flipped")
    assert any("units/00000002" in one for one in totals.bad_ends) == (harm == "flipped")


def test_totals_survive_the_process_and_belong_to_one_size(soak: Soak) -> None:
    soak.totals.driver_kills, soak.totals.actor_kills = 60, 60
    soak._save()
    again = Soak(soak.state, images=chain.IMAGES).totals
    assert again == soak.totals
    assert not Wanted().reached(again)
    assert Wanted(nodes=0).reached(again)
    assert not Wanted().reached(Totals())
    with pytest.raises(SystemExit, match="choose another folder"):
        Soak(soak.state, images=5)
