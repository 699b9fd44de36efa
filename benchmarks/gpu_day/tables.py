"""The report of a GPU day: one table a step, of whatever has been measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_day.day_file import DayFile, Event
from benchmarks.gpu_day.parts import Part
from hqlabel.pipeline.errors import count

Row = dict[str, Any]
Column = tuple[str, str, str]
"""A row's key, its heading, and how its value is written: a format, `%` for a share, or `` for text."""

_RATE: tuple[Column, ...] = (
    ("variant", "model", ""), ("dtype", "dtype", ""), ("images_per_call", "images a call", "d"),
    ("boxes_per_call", "boxes a call", "d"), ("boxes", "boxes an image", "d"),
    ("megapixels", "Mpx", "d"), ("images_per_s", "images/s", ".1f"), ("ms", "ms an image", ".2f"),
    ("spread", "spread", "%"), ("tflop_per_s", "TFLOP/s", ".1f"), ("of_peak", "of the product's rate", "%"),
    ("peak_mb", "peak MB", ",.0f"), ("reserved_mb", "reserved MB", ",.0f"),
    ("first_s", "first round s", ".1f"), ("runs_a_mask", "runs a mask", ",.0f"),
)  # fmt: skip
_SHAPE: tuple[Column, ...] = (
    ("variant", "model", ""), ("images_per_call", "images a call", "d"),
    ("boxes_per_call", "boxes a call", "d"),
)  # fmt: skip

_TABLES: dict[str, tuple[str, dict[str, tuple[Column, ...]]]] = {
    "machine": (
        "The machine and its ceilings",
        {"": (("what", "", ""), ("value", "", ",.2f"), ("unit", "unit", ""))},
    ),
    "tests": (
        "Tests marked gpu",
        {"": (("test", "test", ""), ("result", "result", ""), ("seconds", "s", ".1f"), ("message", "", ""))},
    ),
    "parity": (
        "Against a CPU's float32, equal weights: errors are norms of differences over norms",
        {"": (
            ("variant", "model", ""), ("dtype", "dtype", ""), ("where", "on", ""),
            ("embedding_error", "embedding", ".1e"), ("logits_error", "logits", ".1e"),
            ("iou_off", "predicted IoU off by", ".1e"), ("mask_iou", "IoU of masks", ".4f"),
            ("least_mask_iou", "least", ".4f"), ("pixels_differ", "pixels that differ", ".2%"),
            ("cpu_s", "s on the CPU", ".1f"),
        )},
    ),
    "company": (
        "The same bytes in any company",
        {"": (
            ("variant", "model", ""), ("dtype", "dtype", ""), ("way", "done", ""),
            ("equal", "equal images", "d"), ("images", "of", "d"),
        )},
    ),
    "rate": ("The model alone, from resized pictures to RLE strings", {"": _RATE}),
    "sweep": ("The same over images and boxes a call", {"": _RATE}),
    "rate-float32": ("The same in float32", {"": _RATE}),
    "rate-noise": ("The same with masks of noise, the most work that tracing can have", {"": _RATE}),
    "memory": ("Peak memory by pictures and boxes", {"": _RATE}),
    "compiled": (
        "Compiled, as CUDA graphs, against plain calls",
        {"": (
            *_SHAPE, ("compiled", "compiled", ""), ("images_per_s", "images/s", ".1f"),
            ("gain", "gain", ".2f"),
            ("of_peak", "of the product's rate", "%"), ("peak_mb", "peak MB", ",.0f"),
            ("compiling_s", "s to the first masks", ".1f"), ("equal_masks", "equal masks", ""),
            ("mask_iou", "IoU of masks", ".4f"),
        )},
    ),
    "profile": (
        "Where the time goes, per image",
        {
            "sums": (
                *_SHAPE, ("plain_ms", "ms", ".2f"), ("wall_ms", "ms under the profiler", ".2f"),
                ("busy_ms", "device busy ms", ".2f"), ("busy_share", "of the profiled time", "%"),
                ("idle_ms", "device idle ms", ".2f"), ("kernels", "kernels", ".0f"),
                ("launches", "launches", ".0f"), ("waits", "waits", ".1f"), ("copies", "copies", ".1f"),
            ),
            "kinds": (
                *_SHAPE, ("name", "kind", ""), ("calls", "kernels", ".1f"), ("us", "µs", ",.0f"),
                ("share", "of kernel time", "%"),
            ),
            "kernels": (
                *_SHAPE, ("name", "kernel", ""), ("kind", "kind", ""), ("calls", "calls", ".1f"),
                ("us", "µs", ",.0f"), ("share", "of kernel time", "%"),
            ),
        },
    ),
    "attention": (
        "Attention with relative position, bfloat16, by kernel",
        {"": (
            ("variant", "model", ""), ("block", "block", ""), ("images", "images", "d"), ("road", "road", ""),
            ("backend", "backend", ""), ("ms", "ms", ".3f"),
            ("tflop_per_s", "TFLOP/s of the definition", ".0f"),
            ("error", "error", ".1e"), ("repeats", "equal again", ""), ("refused", "refused", ""),
        )},
    ),
    "chain": (
        "From JPEG files, processes of this machine beside the device, without Ray",
        {"": (
            ("variant", "model", ""), ("megapixels", "Mpx", "d"), ("kilobytes", "kB", ",.0f"),
            ("draft_jpeg", "drafts", ""), ("processes", "processes", "d"),
            ("decoding_images_per_s", "decoding images/s", ".1f"),
            ("model_images_per_s", "model images/s", ".1f"),
            ("chain_images_per_s", "both images/s", ".1f"), ("of_the_slower", "of the slower", "%"),
            ("decoding_images_per_s_a_core", "decoding a core", ".1f"),
            ("cores_for_the_model", "cores that the model needs", ".1f"),
        )},
    ),
    "chain-ray": (
        "From JPEG files, the chain of a job",
        {"": (
            ("variant", "model", ""), ("megapixels", "Mpx", "d"), ("images", "images", "d"),
            ("actors", "model processes", "d"), ("device", "on", ""), ("images_per_unit", "a unit", "d"),
            ("images_per_s", "images/s", ".1f"), ("start_s", "s to start", ".1f"),
        )},
    ),
    "peers": (
        "Beside transformers, equal weights, in turns",
        {"": (
            ("variant", "model", ""), ("contender", "contender", ""), ("ms", "ms an image", ".1f"),
            ("images_per_s", "images/s", ".1f"), ("ratio", "times the best of hqlabel", ".2f"),
        )},
    ),
}  # fmt: skip


def report(day: DayFile, parts: Sequence[Part]) -> str:
    """The Markdown of all that the state holds, in the order of the plan."""
    ended, lacking = day.ended(), day.lacking()
    texts = ["# GPU day\n", _head(day, parts, ended)]
    for step in dict.fromkeys(part.step for part in parts):
        mine = [part for part in parts if part.step == step]
        title, tables = _TABLES.get(step, (step, {}))
        texts.append(f"## {title}\n\n`{step}`\n")
        rows = [row for part in mine for row in ended.get(part.name, {}).get("rows", [])]
        for name, columns in tables.items():
            of_table = [row for row in rows if row.get("table", "") == name]
            if of_table:
                texts.append(table(columns, of_table))
        texts.extend(_exceptions(mine, ended, lacking))
    return "\n".join(texts)


def _head(day: DayFile, parts: Sequence[Part], ended: dict[str, Event]) -> str:
    device = day.device()
    calls = [event for event in day.events if event["event"] == "call"]
    commits = ", ".join(dict.fromkeys(call["commit"] for call in calls))
    where = "not begun" if device is None else f"{device['name']}, torch {device['torch']}"
    failed = sum(bool(ended[part.name].get("error")) for part in parts if part.name in ended)
    done = sum(part.name in ended for part in parts)
    seconds = sum(event["seconds"] for event in ended.values())
    rehearsed = any(call["rehearse"] for call in calls)
    note = (
        "\n\n**A rehearsal: small models on a CPU. No figure here says anything of a GPU.**"
        if rehearsed
        else ""
    )
    return (
        f"{where}; commit {commits or 'none'}; {count(len(calls), 'call')}, {done} of {len(parts)} parts in "
        f"{seconds / 60:.1f} minutes, {failed} failed.{note}\n"
    )


def _exceptions(parts: Sequence[Part], ended: dict[str, Event], lacking: dict[str, str]) -> list[str]:
    """A line for each part that failed, lacked something or is not done, after the table."""
    lines = []
    for part in parts:
        event = ended.get(part.name)
        if event is None and part.name in lacking:
            lines.append(f"- `{part.name}`: left out, for want of {lacking[part.name]}")
        elif event is None:
            lines.append(f"- `{part.name}`: not done yet")
        elif event.get("error"):
            lines.append(f"- `{part.name}`: **failed**: {event['error'].splitlines()[0][:2000]}")
    return ["\n".join(lines) + "\n"] if lines else []


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A Markdown table; columns that no row has are left out."""
    shown = [column for column in columns if any(row.get(column[0]) not in (None, "") for row in rows)]
    lines = [
        "| " + " | ".join(heading for _, heading, _ in shown) + " |",
        "|" + "|".join("--:" if form else "---" for _, _, form in shown) + "|",
        *("| " + " | ".join(_cell(row.get(key), form) for key, _, form in shown) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or not form:
        return str(value).replace("|", "\\|").replace("\n", " ")
    try:
        return f"{value:.0%}" if form == "%" else f"{value:{form}}"
    except (TypeError, ValueError):  # rather a plain cell than no report
        return str(value)
