"""Kill the processes of a private Ray, and its driver, at many moments of a job: what ends how.

    python -m tests.faults.ray_kills STATE --kills 20

Each kill is a job of its own with a stub of a model: the same command is then started once more, and its
tables are compared with those of an undisturbed job. STATE holds what was done, so that another call goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from tests.faults.commands import IMAGES, Command, alive, make_folder

TARGETS = {
    "raylet": "raylet/raylet ",
    "gcs": "gcs/gcs_server ",
    "driver": "",
    "process in an agent's place": "-I -S -c import sys; sys.stdin.read() ",
}
"""What the command line of each process has in it."""
MOMENTS = ("start", "work", "end")
LEFT_AFTER_S = 10.0
_STUCK_S = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strike:
    """One kill. `at`: units committed then. `code`: of the driver, `again`: of a second start.

    `said`: what users read. `left`: processes of the job that lived 10 s later.
    """

    target: str
    moment: str
    landed: bool
    at: int
    code: int | None
    ended_s: float
    left: list[str]
    said: str
    again: int | None
    lost: int
    doubled: int
    same: bool

    @property
    def sound(self) -> bool:
        """Whether this is what docs/dev/fault-tests.md promises."""
        wanted = (-9,) if self.target == "driver" else (0, 5)
        told = self.code != 5 or (self.said.count("hqlabel: ") == 2 and "Traceback" not in self.said)
        whole = not self.lost and not self.doubled and self.same and self.again in (0, None)
        return self.code in wanted and told and whole and not self.left


def strike(command: Command, wanted: Sequence[str], target: str, moment: str, seed: int) -> Strike:
    """Start a job, kill `target` at `moment`, and start the job again where it did not complete."""
    chance = random.Random(f"{target} {moment} {seed}")
    process = command.start(sleep_s=0.05)
    family: dict[int, psutil.Process] = {}

    def found() -> psutil.Process | None:
        family.update((one.pid, one) for one in children(process.pid))
        if target == "driver":
            return psutil.Process(process.pid) if any(map(is_raylet, family.values())) else None
        return next((one for one in family.values() if TARGETS[target] in title(one)), None)

    units = {"start": 0, "work": chance.randrange(1, 10), "end": IMAGES // 4}[moment]
    wait(lambda: process.poll() is not None or (command.units() >= units and found() is not None))
    time.sleep(chance.uniform(0, {"start": 4.0, "work": 0.5, "end": 2.5}[moment]))
    victim = found() if process.poll() is None else None
    at, struck = command.units(), time.monotonic()
    landed = victim is not None and alive(victim)
    if victim is not None and landed:
        victim.kill()
    _, err = process.communicate(timeout=_STUCK_S)
    ended = time.monotonic()
    wait(lambda: not any(map(alive, family.values())), LEFT_AFTER_S)
    left = [title(one)[:80] for one in family.values() if alive(one)]
    again = None
    if process.returncode != 0:
        second = command.start(sleep_s=0)
        second.communicate(timeout=_STUCK_S)
        again = second.returncode
    whole = (process.returncode if again is None else again) == 0
    counts = command.lost_and_doubled() if whole else {"lost": 0, "doubled": 0}
    return Strike(
        target=target, moment=moment, landed=landed, at=at, code=process.returncode, ended_s=ended - struck,
        left=left, said=err[err.rfind("nothing done yet") :], again=again,
        same=whole and command.digests() == list(wanted), **counts,
    )  # fmt: skip


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) + " "
    except psutil.Error:
        return ""


def is_raylet(process: psutil.Process) -> bool:
    return TARGETS["raylet"] in title(process)


def wait(condition: Callable[[], bool], most_s: float = _STUCK_S) -> None:
    deadline = time.monotonic() + most_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.03)


def table(strikes: Iterable[Strike]) -> str:
    """One line for each process: how often it was killed and what was seen, as Markdown."""
    found = list(strikes)
    lines = [
        "| killed | moments | kills landed | exit codes | seconds until the end, most "
        "| processes left after 10 s | second start | rows lost | doubled | same bytes |",
        "|---|---|--:|---|--:|--:|---|--:|--:|--:|",
    ]  # fmt: skip
    for target in TARGETS:
        mine = [one for one in found if one.target == target and one.landed]
        if mine:
            lines.append(
                f"| {target} | {counted(one.moment for one in mine)} | {len(mine)} "
                f"| {counted(one.code for one in mine)} | {max(one.ended_s for one in mine):.1f} "
                f"| {sum(len(one.left) for one in mine)} | {counted(one.again for one in mine)} "
                f"| {sum(one.lost for one in mine)} | {sum(one.doubled for one in mine)} "
                f"| {sum(one.same for one in mine)} of {len(mine)} |"
            )
    return "\n".join(lines)


def counted(values: Iterable[object]) -> str:
    texts = ["none" if value is None else str(value) for value in values]
    return ", ".join(f"{text} ({texts.count(text)})" for text in dict.fromkeys(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of each process")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["raylet", "gcs", "driver"])
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    results = given.state / "strikes.jsonl"
    folder = make_folder(given.state)
    undisturbed = Command(folder=folder, out=given.state / "undisturbed")
    undisturbed.run()
    wanted = undisturbed.digests()
    strikes = [Strike(**json.loads(line)) for line in results.open()] if results.exists() else []
    for number in range(3 * given.kills * len(given.targets)):
        target = given.targets[number % len(given.targets)]
        if sum(one.landed for one in strikes if one.target == target) >= given.kills:
            continue
        moment = MOMENTS[number // len(given.targets) % len(MOMENTS)]
        out = given.state / "out"
        command = Command(folder=folder, out=out)
        strikes.append(strike(command, wanted, target, moment, number))
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(command.trace, ignore_errors=True)
        with results.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(strikes[-1])) + "\n")
        if not strikes[-1].sound:
            sys.stderr.write(f"not sound: {strikes[-1]}\n")
    sys.stdout.write(table(strikes) + "\n")


if __name__ == "__main__":
    main()
