"""Puts the results of `make faults` into a page: one line a fault, between two marks.

    python tools/fault_table.py build/faults.jsonl docs/dev/fault-tests.md

A fault that was recorded more than once stands there once, as it was last. Prints the rows of the fault
matrix that the results have nothing of.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results of make faults -->", "<!-- end of results -->"
WANTED = [
    *range(1, 9),
    11,
    *range(14, 18),
    *range(19, 25),
    *range(27, 30),
    *range(31, 46),
    48,
    49,
    50,
    57,
    58,
]
HEAD = (
    "| row | fault | landed | rows lost | rows doubled | images repeated | seconds to recover | exit code |\n"
    "|--:|---|--:|--:|--:|--:|--:|---|\n"
)


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, in order of their rows."""
    last = {(tuple(one["rows"]), re.sub(r"\d+\.\d", "", one["fault"])): one for one in results}
    return HEAD + "".join(_line(one) for _, one in sorted(last.items()))


def _line(one: dict[str, Any]) -> str:
    repeated = "-" if one["repeated"] is None else str(one["repeated"])
    seconds = "-" if one["recover_s"] is None else f"{one['recover_s']:.1f}"
    rows = ", ".join(map(str, one["rows"]))
    cells = [rows, one["fault"], one["landed"], one["lost"], one["doubled"], repeated, seconds, one["code"]]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def main() -> None:
    """Replace what stands between the marks of the page."""
    results_path, page_path = Path(sys.argv[1]), Path(sys.argv[2])
    results = [json.loads(line) for line in results_path.read_text(encoding="utf-8").splitlines()]
    page = page_path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    landed = sum(one["landed"] for one in results)
    note = f"\nMade {dt.date.today()} on {where}; {landed:,} faults landed in {len(results)} tests.\n\n"
    page_path.write_text(before + BEGIN + note + table(results) + END + after, encoding="utf-8")
    missing = [row for row in WANTED if not any(row in one["rows"] for one in results)]
    print(f"{page_path}: {landed:,} faults landed; rows without a result: {missing or 'none'}")


if __name__ == "__main__":
    main()
