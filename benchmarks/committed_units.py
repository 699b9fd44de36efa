"""Seconds and memory of `status` over a listing of committed units that are made up page by page.

python -m benchmarks.committed_units 1000000
"""

from __future__ import annotations

import argparse
import resource
import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.tables import job_status
from hqlabel.pipeline.tables.unit_files import list_committed, unit_key


class Listed:
    """A store that lists so many units, 1,000 a page, and holds nothing else."""

    lists_by_prefix = False

    def __init__(self, units: int) -> None:
        self._units = units

    def pages(self, _prefix: str) -> Iterator[list[Entry]]:
        for start in range(0, self._units, 1000):
            stop = min(start + 1000, self._units)
            yield [Entry(key=unit_key(n, 0), size=40_000, etag=f"{n:032x}") for n in range(start, stop)]


def main() -> None:
    """Print what `status` takes, without reading any unit, and what a committed unit takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("units", type=int)
    units = parser.parse_args().units
    store: Any = Listed(units)
    context = SimpleNamespace(first_generation=0, images_per_unit=64)
    job: Any = SimpleNamespace(units=units + 1, plan={"images": 64 * (units + 1)}, context=context)
    nothing: Any = lambda _: None  # noqa: E731
    job_status.read_manifest = job_status.current_holder = nothing
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = job_status.status(store, job, read_at_most=0)
    cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"status of {found.units_done:,} committed units: {cpu:.1f} s of CPU, {peak / 2**10:.0f} MiB more")
    tracemalloc.start()
    committed = list_committed(store)
    held, most = tracemalloc.get_traced_memory()
    print(f"bytes a unit: {held / len(committed):.0f} held, {most / len(committed):.0f} at most")


if __name__ == "__main__":
    main()
