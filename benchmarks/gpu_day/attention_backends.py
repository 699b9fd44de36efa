"""Attention with relative position by every kernel that PyTorch has for it, on this device.

The roads of `benchmarks/attention_roads.py`, each with the backend named instead of chosen; and v padded to
the widths that fast kernels may want. Refusals are results too.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_roads import Road, biased, flex, folded_narrow, made, no_terms
from benchmarks.gpu_day.setting import Setting, Wrong
from benchmarks.gpu_day.subjects import config_of
from hqlabel.model.kernels import fold_offsets, folded_attention, offset_tables, plain_attention
from hqlabel.model.sam_config import VisionConfig

Row = dict[str, Any]
BACKENDS = {
    "chosen by PyTorch": None,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
LARGEST_ERROR = 0.05
"""Of a road in bfloat16 against the definition in float32, over the largest value."""


def folded_128(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """`folded_attention` with v widened to 128 only, where q and k are 192 or 208 wide."""
    squares, heads, length, width = q.shape
    wide = fold_offsets(q.flatten(0, 1), k.flatten(0, 1), offset_tables(*tables))
    q_nhLD, k_nhLD = (x.view(squares, heads, length, -1) for x in wide)
    v_nhLD = F.pad(v, (0, max(0, 128 - width)))
    return F.scaled_dot_product_attention(q_nhLD, k_nhLD, v_nhLD, scale=1.0)[..., :width]


ROADS: dict[str, Road] = {
    "folded (as shipped)": folded_attention,
    "folded, v to 128": folded_128,
    "folded, v as it is": folded_narrow,
    "terms as a mask": biased,
    "no terms (another function)": no_terms,
}


def compare(setting: Setting, *, variant: str, block: str, images: int) -> list[Row]:
    """One row a road and backend; a refused one says why.

    Raises:
        Wrong: a road is further from the definition than bfloat16 explains.
    """
    vision = config_of(setting, variant).vision
    assert isinstance(vision, VisionConfig)
    side, squares = vision.grid, images
    if block == "windows":
        side, squares = vision.window_size, images * (-(-vision.grid // vision.window_size)) ** 2
    tensors = made(vision, side, squares, setting.device)
    wanted = _definition(tensors)
    heads, length, width = tensors[0].shape[1:]
    work = 4.0 * squares * heads * length**2 * width
    told = {"variant": variant, "block": block, "images": images}
    rows = [
        {**told, "road": name, "backend": called, **_measured(setting, road, backend, tensors, wanted, work)}
        for name, road in ROADS.items()
        for called, backend in BACKENDS.items()
    ]
    if setting.on_gpu:
        others: dict[str, Road] = {"flex, compiled": flex}
        if block == "windows":
            others["the definition"] = plain_attention
        for name, road in others.items():
            rows.append({**told, "road": name, "backend": "-", **_measured(
                setting, road, None, tensors, wanted, work)})  # fmt: skip
    wrong = [
        row
        for row in rows
        if not row["road"].startswith("no terms") and not row.get("error", 0) <= LARGEST_ERROR
    ]
    if wrong:
        roads = {f"{row['road']}, {row['backend']}" for row in wrong}
        raise Wrong(f"these give other numbers: {'; '.join(sorted(roads))}", rows)
    return rows


@torch.no_grad()
def _definition(tensors: list[torch.Tensor]) -> torch.Tensor:
    """In float32, square by square: the logits of all would be tens of gigabytes."""
    q, k, v, *tables = (x.float() for x in tensors)
    parts = [plain_attention(*(x[n : n + 1] for x in (q, k, v)), *tables) for n in range(len(q))]
    return torch.cat(parts)


@torch.no_grad()
def _measured(
    setting: Setting,
    road: Road,
    backend: SDPBackend | None,
    tensors: list[torch.Tensor],
    wanted: torch.Tensor,
    work: float,
) -> Row:
    with sdpa_kernel([backend]) if backend is not None else contextlib.nullcontext():
        try:
            found = road(*tensors)
        except Exception as refusal:  # whatever a backend raises when it does not take these shapes
            if setting.on_gpu:
                torch.cuda.synchronize()  # a CUDA error, unlike a refusal, is raised here too
            return {"refused": f"{type(refusal).__name__}: {refusal}".splitlines()[0][:150]}
        error = float((found.float() - wanted).abs().max() / wanted.abs().max())
        again = torch.equal(found, road(*tensors))
        seconds = _seconds(setting, road, tensors)
    return {"ms": 1e3 * seconds, "tflop_per_s": work / seconds / 1e12, "error": error, "repeats": again}


def _seconds(setting: Setting, road: Road, tensors: list[torch.Tensor]) -> float:
    """The median of some batches of calls, each waited for once."""
    times = []
    for _ in range(setting.fewer(7, 2)):
        calls = setting.fewer(5, 1)
        began = setting.now()
        for _ in range(calls):
            road(*tensors)
        times.append((setting.now() - began) / calls)
    return statistics.median(times[1:])
