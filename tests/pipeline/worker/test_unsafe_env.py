"""A worker with an environment that loosens a library does nothing, and says where and why."""

from __future__ import annotations

import pytest

from pipeline.errors import SystemicFault
from pipeline.stages.commit import commit_unit, read_outcome
from pipeline.stages.hand_over import UnitRow
from pipeline.stages.prepare import prepare_unit
from pipeline.stages.segment import SegmentWorker
from pipeline.storage.store import open_store
from pipeline.tables.unit_files import list_committed
from pipeline.worker import unsafe_env as switches
from tests.faults.chain import DirectDecoder
from tests.pipeline.made_jobs import make_job, noise, png


@pytest.mark.parametrize("name", sorted(switches.LOOSENING))
def test_every_stage_refuses_each_switch(tmp_path, monkeypatch, name):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    context, store = job.context, open_store(job.context.output)
    unit, _ = prepare_unit(UnitRow(unit_id=0), context, store, DirectDecoder(context.limits, 64))
    done = SegmentWorker(context, epoch=1, use_gpu=False).run(unit)
    monkeypatch.setenv(name, "1")

    prepared, arena = prepare_unit(UnitRow(unit_id=0), context, store, None)
    segmented = SegmentWorker(context, epoch=1, use_gpu=False).run(unit)

    assert arena is None
    for fault in (prepared.fault, segmented.fault):
        assert fault.code == "environment"
        assert name in fault.message
        assert switches.LOOSENING[name] in fault.message
    with pytest.raises(SystemicFault, match=name):
        read_outcome(commit_unit(done, context, store))
    assert list_committed(store) == {}


def test_a_switch_that_is_off_is_no_reason(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")

    switches.refuse_here()
