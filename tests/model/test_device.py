"""Number formats of devices, and the thread for the host's part."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from hqlabel.model import device
from hqlabel.model.device import MAX_PENDING, HostThread
from hqlabel.model.records import CallShape
from hqlabel.model.sam_config import vit_config
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.segmenter import Segmenter

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
    monkeypatch.setattr(device, "_bfloat16_gain", lambda: 2.0)
    assert device.probe_dtype("cpu") == dtype
    assert device.multiplies_bfloat16("cpu") == (dtype == "bfloat16")


def test_without_cpuinfo_nothing_is_assumed(tmp_path: Path) -> None:
    assert device._cpu_features(tmp_path / "nowhere") == set()


@pytest.mark.parametrize(
    ("features", "gain", "dtype"),
    [
        ({"avx512_bf16"}, 0.6, "float32"),
        ({"avx512_bf16"}, 1.05, "float32"),
        ({"avx512_bf16"}, 2.3, "bfloat16"),
        ({"amx_bf16"}, 0.6, "bfloat16"),  # not timed
        (set(), 2.3, "float32"),
    ],
)
def test_auto_is_bfloat16_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, features: set[str], gain: float, dtype: str
) -> None:
    monkeypatch.setattr(device, "_cpu_features", lambda: features)
    monkeypatch.setattr(device, "_bfloat16_gain", lambda: gain)
    assert device.probe_dtype("cpu") == dtype


def test_the_gain_is_that_of_larger_products_on_this_machine() -> None:
    device._bfloat16_gain.cache_clear()
    gain = device._bfloat16_gain()
    a, b = torch.ones(1024, 768), torch.ones(768, 768)
    times_s = []
    for dtype in (torch.float32, torch.bfloat16):
        x, y = a.to(dtype), b.to(dtype)
        linear(x, y)
        began_s = time.process_time()
        for _ in range(5):
            linear(x, y)  # with weights as a layer has them: emulated, `x @ y` is ten times slower
        times_s.append(time.process_time() - began_s)
    larger = times_s[0] / times_s[1]
    assert larger / 2.5 < gain < larger * 2.5  # Zen 4: 2.3, a Xeon without AMX: 0.6, emulated: 0.13


def test_this_machine_has_the_instructions_that_torch_sees() -> None:
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert device.multiplies_bfloat16("cpu") == native


def test_a_segmenter_warns_of_an_emulated_number_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_features", lambda: set())
    model = SamHQ(vit_config(embed_dim=32, depth=1, num_heads=2, global_attn_indexes=(0,), image_size=64))
    with pytest.warns(UserWarning, match="80 times slower than float32"):
        Segmenter(model, call_shape=CallShape(images_per_call=1, boxes_per_call=1), dtype="bfloat16")


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
