"""A GPU day: what it did is never lost or done twice, what fails stops nothing, and a CPU rehearses it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_day.__main__ import main
from benchmarks.gpu_day.day_file import DayFile
from benchmarks.gpu_day.kernel_times import covered, kind_of
from benchmarks.gpu_day.parts import Part, plan
from benchmarks.gpu_day.supervise import ATTEMPTS, DayRefused, work_through
from benchmarks.gpu_day.tables import report
from tests.benchmarks.made_parts import made

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys, time
from pathlib import Path
from benchmarks.gpu_day.day_file import DayFile
from benchmarks.gpu_day.parts import Part
from benchmarks.gpu_day.supervise import work_through
parts = [Part(**values) for values in json.loads(sys.argv[2])]
work_through(DayFile(Path(sys.argv[1])), parts, deadline=time.time() + 60, rehearse=True)
"""


def do(folder: Path, parts: list[Part], seconds: float = 60.0) -> DayFile:
    """One call, as a rehearsal; what the state says when it is read again."""
    work_through(DayFile(folder), parts, deadline=time.time() + seconds, rehearse=True)
    return DayFile(folder)


def until(true: Any, what: str) -> None:
    for _ in range(1500):
        if true():
            return
        time.sleep(0.02)
    pytest.fail(f"never: {what}")


def test_what_fails_dies_or_hangs_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    parts = [
        made("a/begins"),
        made("a/fails", "fail"),
        made("machine/differs", "differ"),
        made("a/dies", "die"),
        made("a/hangs", "wait", arguments={"folder": str(tmp_path)}, limit_s=0.5),
        made("a/works"),
    ]

    day = do(tmp_path / "day", parts)

    found = day.ended()
    assert found["a/fails"]["error"].startswith("ValueError: the logits are off by 3\n")
    assert "status -9" in found["a/dies"]["error"]
    assert "it had not ended after 0 s" in found["a/hangs"]["error"]
    assert found["a/works"]["error"] is None
    assert found["a/works"]["rows"][0]["what"] == "noted on cpu"
    text = report(day, parts)
    assert "6 of 6 parts" in text
    assert "4 failed" in text
    assert "| equal images | 3.00 |" in text, "what shows that something is wrong is kept"
    assert "- `machine/differs`: **failed**: Wrong: other bytes" in text
    assert "- `a/fails`: **failed**: ValueError: the logits are off by 3" in text
    assert not do(tmp_path / "day", parts).unfinished(), "done: nothing is begun again"


def test_after_a_failure_the_next_part_has_another_process(tmp_path: Path) -> None:
    """A CUDA error stays with its process."""
    parts = [made("a/one"), made("a/two"), made("a/fails", "fail"), made("a/three")]

    found = do(tmp_path, parts).ended()

    one, two, three = (found[f"a/{name}"]["rows"][0]["value"] for name in ("one", "two", "three"))
    assert one == two != three


def test_a_killed_call_is_taken_up_where_it_was(tmp_path: Path) -> None:
    folder = {"folder": str(tmp_path)}
    parts = [made("a/first", arguments=folder), made("a/second", "wait", arguments=folder)]
    order = json.dumps([asdict(part) for part in parts])
    call = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "day"), order], cwd=ROOT)
    written, pid = tmp_path / "day" / "events.jsonl", tmp_path / "pid"
    begun = '"begun", "at": '
    until(lambda: written.exists() and written.read_text().count(begun) == 2, "the second part is begun")
    until(lambda: pid.exists() and pid.read_text(), "its process says who it is")
    worker = int(pid.read_text())

    call.kill()
    call.wait()
    until(lambda: not Path(f"/proc/{worker}").exists(), "the process of the parts ends with its parent")
    with written.open("a") as file:
        file.write('{"event": "ended", "part": "a/sec')  # as a kill in the middle of a write leaves it
    (tmp_path / "go").touch()
    day = do(tmp_path / "day", parts)

    assert day.ended()["a/second"]["rows"] == [{"what": "waited", "value": 1.0}]
    assert (tmp_path / "noted").read_text() == "once\n", "the first part was not done again"
    assert [event["event"] for event in day.events].count("call") == 2


def test_a_part_that_no_call_is_long_enough_for_is_given_up(tmp_path: Path) -> None:
    endless = [made("a/endless", "wait", arguments={"folder": str(tmp_path)})]
    for _ in range(ATTEMPTS):
        day = do(tmp_path / "day", endless, seconds=1.5)
        assert "a/endless" not in day.ended()

    assert "begun 3 times and never ended" in do(tmp_path / "day", endless).ended()["a/endless"]["error"]
    day.forget("a/endless")
    assert not DayFile(tmp_path / "day").unfinished(), "done anew when asked for"


def test_nothing_is_begun_that_the_time_left_does_not_hold(tmp_path: Path) -> None:
    day = do(tmp_path, [made("a/long", expected_s=1000), made("a/short")])

    assert set(day.ended()) == {"a/short"}
    assert not day.unfinished()


def test_what_lacks_a_module_is_left_out_until_a_call_has_it(tmp_path: Path) -> None:
    without = [made("a/needy", needs=("no_such_module",)), made("a/works")]
    text = report(do(tmp_path, without), without)
    assert "- `a/needy`: left out, for want of no_such_module" in text

    assert set(do(tmp_path, [made("a/needy")]).ended()) == {"a/needy", "a/works"}


def test_figures_of_two_devices_are_not_mixed(tmp_path: Path) -> None:
    DayFile(tmp_path).append("device", name="another GPU", torch="2.0", missing={})

    with pytest.raises(DayRefused, match=r"holds figures of another GPU with torch 2\.0, and here is CPU"):
        do(tmp_path, [made("a/works")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--state", str(tmp_path), "--only", "machine"]) == 2

    assert "no CUDA device here; --rehearse runs every part" in capsys.readouterr().err
    assert not DayFile(tmp_path).ended()


def test_the_cheap_parts_are_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["machine", "parity/hiera_l-bfloat16", "attention/vit_b-windows", "profile/vit_l-1x16"]

    assert main(["--rehearse", "--state", str(tmp_path), "--commit", "abc1234", "--only", *names]) == 0

    told = capsys.readouterr().out
    assert "5 of 5 parts done, 0 failed" in told
    text = (tmp_path / "report.md").read_text()
    assert "commit abc1234; 1 call, 5 of" in text
    assert "**A rehearsal: small models on a CPU" in text
    for cell in (
        "| float32 product of side 256 |",
        "| hiera_l | bfloat16 | cpu |",
        "| folded, v to 128 | flash |",
    ):
        assert cell in text, cell
    assert "- `rate/vit_b-1x16`: not done yet" in text


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_one_part_of_each_function_is_rehearsed(tmp_path: Path) -> None:
    first = {part.function: part.name for part in reversed(plan(rehearse=True))}

    status = main(["--rehearse", "--state", str(tmp_path), "--minutes", "23", "--only", *first.values()])

    day = DayFile(tmp_path)
    assert {name: event["error"] for name, event in day.ended().items() if event["error"]} == {}
    assert set(day.ended()) == set(first.values())
    assert status == 0


def test_the_plan_begins_with_what_is_worth_most_and_fits_calls_of_nine_minutes() -> None:
    parts = plan(rehearse=False)

    assert len({part.name for part in parts}) == len(parts)
    steps = list(dict.fromkeys(part.step for part in parts))
    assert steps[:4] == ["machine", "tests", "parity", "company"]
    assert max(part.limit_s for part in parts) < 9 * 60 - 60
    assert [part.name for part in plan(rehearse=True)] == [part.name for part in parts]
    assert all(part.function.startswith("benchmarks.gpu_day.") for part in parts)


def test_time_is_counted_once_where_kernels_overlap() -> None:
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 5.0
    assert covered([]) == 0.0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "copy between host and device"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix product"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<...>", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "element by element"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, func_wrapper_t>>", "reduction"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
