"""Number formats of devices, and the thread for the host's part."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from hqlabel.model import device
from hqlabel.model.device import MAX_PENDING, HostThread

CPUINFO = "processor\t: {core}\nvendor_id\t: X\n{name}\t\t: fpu sse2 {features}\nbugs\t\t: amx_bf16_bug\n\n"


@pytest.mark.parametrize(
    ("name", "features", "dtype"),
    [
        ("flags", ["avx2 avx512f amx_bf16 amx_tile"] * 2, "bfloat16"),
        ("flags", ["avx512f avx512_bf16"] * 2, "bfloat16"),
        ("Features", ["asimd bf16 i8mm"] * 2, "bfloat16"),
        ("flags", ["avx2 avx512f avx512_vnni"] * 2, "float32"),
        ("flags", ["avx512_bf16", "avx2"], "float32"),
        ("flags", [], "float32"),
    ],
)
def test_a_cpu_multiplies_bfloat16_if_all_its_cores_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, features: list[str], dtype: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "".join(CPUINFO.format(core=i, name=name, features=each) for i, each in enumerate(features))
    )
    features_of_cpu = device._cpu_features(cpuinfo)
    monkeypatch.setattr(device, "_cpu_features", lambda: features_of_cpu)
    assert device.probe_dtype("cpu") == dtype


def test_without_cpuinfo_nothing_is_assumed(tmp_path: Path) -> None:
    assert device._cpu_features(tmp_path / "nowhere") == set()


def test_probe_of_this_machine_agrees_with_torch() -> None:
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert device.probe_dtype("cpu") == ("bfloat16" if native else "float32")


def test_host_work_is_bounded_in_order_and_raises_where_its_result_is_asked_for() -> None:
    gate, done = threading.Event(), []

    def piece(number: int) -> int:
        gate.wait(10)
        done.append(number)
        if number == 3:
            raise MemoryError("of the third")
        return number

    host = HostThread(own_thread=True)
    results = [host.submit(piece, number) for number in range(MAX_PENDING)]
    threading.Timer(0.2, gate.set).start()
    results.append(host.submit(piece, MAX_PENDING))

    assert done[:1] == [0], "one more had to wait until the first was done"
    with pytest.raises(MemoryError, match="of the third"):
        results.pop(3).result()
    assert [result.result() for result in results] == [n for n in range(MAX_PENDING + 1) if n != 3]
    assert done == list(range(MAX_PENDING + 1))


def test_without_a_thread_a_task_is_done_at_once_and_raises_at_once() -> None:
    host = HostThread(own_thread=False)
    assert host.submit(max, 3, 5).result() == 5
    with pytest.raises(ZeroDivisionError):
        host.submit(divmod, 1, 0)
