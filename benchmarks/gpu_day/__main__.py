"""All that a GPU must show of hqlabel, most valuable first, in calls of a few minutes each.

    python -m benchmarks.gpu_day [--state build/gpu-day] [--minutes 9] [--only STEP ...]
    python -m benchmarks.gpu_day --list           (every part with the seconds it is expected to take)
    python -m benchmarks.gpu_day --rehearse       (the same code on this processor, with small models)

The same command again does what is left. The state folder holds `events.jsonl` (everything measured, one
event a line), `report.md` (the tables, written anew after every part) and `log.txt` (what the parts printed);
copied to another machine with the same kind of GPU, it is taken up there.

Each part runs in a process beside this one. One that fails is recorded with its error, and the next one gets
a new process, since a CUDA error spoils its own. One that outlasts its limit is killed and recorded. One that
was cut off by the end of a call is done again by the next call, three times at most.

Needs torch, numpy, pillow, pyarrow, safetensors and huggingface_hub. What else is missing (ray, pycocotools,
transformers) is said at once; the parts that need it are left out, and done by a later call that has it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_day.day_file import DayFile
from benchmarks.gpu_day.parts import Part, plan
from benchmarks.gpu_day.supervise import DayRefused, work_through
from benchmarks.gpu_day.tables import report
from benchmarks.record import commit


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 when a part has failed, or 2 when nothing can be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.gpu_day")
    parser.add_argument("--state", type=Path, help="default: build/gpu-day, or build/gpu-rehearsal")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call at most; default 9")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these alone: steps, or parts")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="STEP", help="do these anew: steps, or parts"
    )
    parser.add_argument("--commit", help="what the report names; for a copy without git")
    parser.add_argument("--list", action="store_true", help="print the parts, and do nothing")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small models")
    options = parser.parse_args(arguments)
    deadline = time.time() + 60 * options.minutes
    whole = plan(rehearse=options.rehearse)
    steps = list(dict.fromkeys(part.step for part in whole))
    known = {*steps, *(part.name for part in whole)}
    unknown = [name for name in [*(options.only or []), *options.again] if name not in known]
    if unknown:
        parser.error(f"there is no step {unknown[0]!r}; the steps are {', '.join(steps)}; --list has parts")
    parts = [part for part in whole if {part.step, part.name} & set(options.only or steps)]
    if options.list:
        print_plan(parts)
        return 0
    day = DayFile(options.state or Path("build", "gpu-rehearsal" if options.rehearse else "gpu-day"))
    for name in options.again:
        day.forget(name)

    def write_report() -> None:
        (day.folder / "report.md").write_text(report(day, whole), encoding="utf-8")

    try:
        work_through(
            day,
            parts,
            deadline=deadline,
            rehearse=options.rehearse,
            after_each=write_report,
            commit=options.commit or commit_here(),
        )
    except DayRefused as refused:
        print(f"gpu day: {refused}", file=sys.stderr)
        return 2
    write_report()
    return tell(day, parts)


def commit_here() -> str:
    """The commit of the working tree, where it is one."""
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_plan(parts: list[Part]) -> None:
    """Print each part and, at the end, all seconds."""
    for part in parts:
        print(f"{part.expected_s:6.0f} s  {part.name}")
    total = sum(part.expected_s for part in parts)
    print(f"{total:6.0f} s  {len(parts)} parts, {total / 60:.0f} minutes if the expectations hold")


def tell(day: DayFile, parts: list[Part]) -> int:
    """Print what failed and what is left. The exit status."""
    ended = day.ended()
    failed = [part.name for part in parts if ended.get(part.name, {}).get("error")]
    lacking = day.lacking()
    left = [part.name for part in parts if part.name not in ended and part.name not in lacking]
    done, without = (sum(part.name in known for part in parts) for known in (ended, lacking))
    for name in failed:
        print(f"FAILED {name}: {ended[name]['error'].splitlines()[0]}")
    waiting = f"; {len(left)} left, next {left[0]}: run the same command again" if left else ""
    lacked = f", {without} left out for want of modules" if without else ""
    print(f"gpu day: {done} of {len(parts)} parts done, {len(failed)} failed{lacked}{waiting}")
    print(f"the tables: {day.folder / 'report.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
