"""Where a model's time goes on the device, kernel by kernel: launches, waits and copies of an image.

By PyTorch's profiler, over some calls after those that warm up. A rehearsal reads operations of the CPU in
the place of kernels, by the same code.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_day.setting import Setting
from benchmarks.gpu_day.subjects import instances, prepared, segmenter_of

Row = dict[str, Any]
_TOP = 30
_KINDS = (
    ("copy between host and device", r"memcpy (htod|dtoh)|pageable|pinned"),
    ("attention", r"flash|fmha|attention|sdpa|mha"),
    ("matrix product", r"gemm|cutlass|cublas|xmma|nvjet|addmm|::mm|::bmm|splitk"),
    ("convolution", r"conv|implicit|winograd|dgrad|wgrad"),
    ("norm", r"norm|welford"),
    ("copy on the device", r"memcpy|memset|copy|cat|fill|zero_|clone|contiguous"),
    ("sort, scan, index", r"sort|scan|index|gather|scatter|nonzero|unique|where|select|radix|search"),
    ("softmax", r"softmax"),
    ("reduction", r"reduce|sum|any|all|max|min"),
    ("element by element", r"elementwise|vectorized|unrolled|triton|aten::"),
)
"""Kinds of kernels, the first whose pattern is found in the name."""
_LAUNCH = re.compile(r"^(cuda|cu)(LaunchKernel|GraphLaunch|LaunchCooperative)")
_WAIT = re.compile(r"^cuda(Stream|Device|Event)Synchronize")
_COPY = re.compile(r"^cuda(Memcpy|Memset)")


def kernel_times(
    setting: Setting, *, variant: str, images_per_call: int, boxes_per_call: int, boxes: int = 10
) -> list[Row]:
    """A row of sums, one a kind of kernel, and one for each of the longest kernels, per image."""
    segmenter = segmenter_of(setting, variant, images_per_call=images_per_call, boxes_per_call=boxes_per_call)
    calls = setting.fewer(4, 1)
    images = [prepared(setting, segmenter, n, boxes) for n in range(calls * images_per_call)]
    for _ in range(setting.fewer(3, 1)):
        instances(segmenter.segment_prepared(images))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    plain = setting.now()
    instances(segmenter.segment_prepared(images))
    plain = setting.now() - plain
    with profile(activities=activities) as found:
        began = setting.now()
        instances(segmenter.segment_prepared(images))
        wall = setting.now() - began
    told = {"variant": variant, "images_per_call": images_per_call, "boxes_per_call": boxes_per_call}
    events = list(found.events() or ())
    kernels = [event for event in events if _is_kernel(event, setting.on_gpu)]
    rows = _rows(kernels, wall, len(images))
    # What the profiler saw of the calls of CUDA by the host.
    names = [event.name for event in events if event.device_type == DeviceType.CPU]
    rows[0] |= {
        "plain_ms": 1e3 * plain / len(images),
        "launches": _matching(names, _LAUNCH) / len(images),
        "waits": _matching(names, _WAIT) / len(images),
        "copies": _matching(names, _COPY) / len(images),
    }
    return [{**told, **row} for row in rows]


def _is_kernel(event: Any, on_gpu: bool) -> bool:
    if on_gpu:
        marked = getattr(event, "is_user_annotation", False) or event.name.endswith("Sync")
        return bool(event.device_type == DeviceType.CUDA and not marked)
    return bool(event.name.startswith("aten::") and not event.cpu_children)


def _matching(names: Iterable[str], pattern: re.Pattern[str]) -> int:
    return sum(pattern.match(name) is not None for name in names)


def _rows(kernels: list[Any], wall_s: float, images: int) -> list[Row]:
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    by_name: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for event, (start, end) in zip(kernels, spans, strict=True):
        by_name[event.name].append(end - start)
        by_kind[kind_of(event.name)].append(end - start)
    total = sum(end - start for start, end in spans) or 1.0
    busy_us = covered(spans)
    sums = {
        "table": "sums", "wall_ms": 1e3 * wall_s / images, "busy_ms": busy_us / 1e3 / images,
        "busy_share": busy_us / 1e6 / wall_s, "kernels": len(kernels) / images,
        "idle_ms": 1e3 * wall_s / images - busy_us / 1e3 / images,
    }  # fmt: skip
    rows: list[Row] = [sums]
    for table, groups, top in (("kinds", by_kind, len(by_kind)), ("kernels", by_name, _TOP)):
        order = sorted(groups.items(), key=lambda item: -sum(item[1]))
        for name, spent in order[:top]:
            rows.append(
                {"table": table, "name": name[:110], "kind": kind_of(name) if table == "kernels" else "",
                 "calls": len(spent) / images, "us": sum(spent) / images, "share": sum(spent) / total}
            )  # fmt: skip
    return rows


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    lower = kernel.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), "other")


def covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the spans was under way."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
