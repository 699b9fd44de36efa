"""The environment of a worker: what loosens a library is refused; torch is prepared before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hqlabel.pipeline.errors import JobRefused, SystemicFault
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed
from hqlabel.pipeline.worker import process_env
from hqlabel.pipeline.worker.process_env import prepare_for_torch
from tests.faults.chain import DirectDecoder
from tests.pipeline.made_jobs import make_job, noise, png

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def openmp_says(before: str) -> str:
    """What GNU's OpenMP read of its environment, in a process that runs `before` and then loads torch."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nimport torch"],
        env={**environ, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch brings GNU's OpenMP on Linux alone")
def test_idle_threads_of_torch_sleep() -> None:
    says = openmp_says(
        "import os\nfrom hqlabel.pipeline.worker.process_env import prepare_for_torch\n"
        "prepare_for_torch(os.environ)"
    )

    assert "OMP_WAIT_POLICY = 'PASSIVE'" in says
    assert "GOMP_SPINCOUNT = '0'" in says


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_a_person_has_set_holds(name: str) -> None:
    given = {name: "infinite", "THP_MEM_ALLOC_ENABLE": "0"}
    environ = dict(given)

    prepare_for_torch(environ)

    assert environ == given


LARGE_TENSORS = """
import os, resource
{before}
import torch
torch.empty(1)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="this kernel gives nobody huge pages"
)
def test_a_large_tensor_comes_in_large_pages() -> None:
    before = (
        "from hqlabel.pipeline.worker.process_env import prepare_for_torch\nprepare_for_torch(os.environ)"
    )
    done = subprocess.run(
        [sys.executable, "-c", LARGE_TENSORS.format(before=before)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip

    small_pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) < small_pages / 4


def test_a_model_process_is_told_before_its_model_is_made(tmp_path, monkeypatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    seen = {}

    def factory(context, use_gpu):
        seen.update(os.environ)

    monkeypatch.setattr("hqlabel.pipeline.stages.segment.load_by_name", lambda name: factory)
    SegmentWorker(job.context, epoch=1, use_gpu=False)

    assert (seen["OMP_WAIT_POLICY"], seen["THP_MEM_ALLOC_ENABLE"]) == ("passive", "1")


def test_the_command_line_and_the_chain_load_no_torch_of_their_own() -> None:
    # Too late is as bad as never: torch reads the environment while it is imported.
    for modules in (
        "hqlabel.jobs.cli.main",
        "hqlabel.pipeline.ray_execution.chain, hqlabel.pipeline.stages.segment",
    ):
        code = f"import sys\nimport {modules}\nassert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", sorted(process_env.LOOSENING))
def test_every_stage_refuses_each_switch(tmp_path, monkeypatch, name):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    context, store = job.context, Store(job.context.output)
    unit, _ = prepare_unit(UnitRow(unit_id=0), context, store, DirectDecoder(context.limits, 64))
    done = SegmentWorker(context, epoch=1, use_gpu=False).run(unit)
    monkeypatch.setenv(name, "1")

    prepared, arena = prepare_unit(UnitRow(unit_id=0), context, store, None)
    segmented = SegmentWorker(context, epoch=1, use_gpu=False).run(unit)

    assert arena is None
    for fault in (prepared.fault, segmented.fault):
        assert fault.code == "environment"
        assert name in fault.message
        assert process_env.LOOSENING[name] in fault.message
    with pytest.raises(SystemicFault, match=name):
        read_outcome(commit_unit(done, context, store))
    assert list_committed(store) == {}


def test_a_switch_that_is_off_is_no_reason(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")

    process_env.refuse_unsafe_env()


@pytest.mark.parametrize("name", sorted(process_env.REFUSED))
def test_each_dangerous_switch_is_refused_by_name_and_reason(name: str) -> None:
    with pytest.raises(JobRefused) as caught:
        process_env.refuse_to_start({name: "1", "PATH": "/bin"})
    assert name in str(caught.value)
    assert process_env.REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("value", ["", "0", "false", " No "])
def test_a_command_starts_with_a_switch_that_is_off(value: str) -> None:
    assert process_env.loosening_in({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": value}) == {}


def test_what_a_test_or_an_attacker_would_set_is_on_the_list() -> None:
    assert {"HQLABEL_FAILPOINT", "PYTHONSTARTUP", *process_env.LOOSENING} <= set(process_env.REFUSED)


@pytest.mark.parametrize("kept", [True, False])
def test_a_model_process_takes_memory_from_the_system_once(kept):
    """A block of 45 MiB, as the tokens of ViT-B's windows take, made and freed twenty times."""
    program = (
        "import resource\n"
        "from hqlabel.pipeline.worker.process_env import keep_freed_memory\n"
        f"assert {not kept} or keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "del_me = bytearray(45 << 20); del del_me\n"
        "before = faults()\n"
        "for _ in range(20):\n"
        "    block = bytearray(45 << 20)\n"
        "    del block\n"
        "print(faults() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert (int(done.stdout) < 2_000) is kept  # 230,400 pages of 4 KiB
