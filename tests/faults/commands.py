"""The real command with the stub of a model, over a folder of pictures: what tests start and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.pipeline.made_jobs import BOXES, noise, png
from tests.table_digest import mask_columns_digest

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 48


@dataclass(frozen=True, kw_only=True)
class Command:
    """`hqlabel label` with the stub of a model, over pictures in a folder, 4 images a unit."""

    folder: Path
    out: Path

    @property
    def trace(self) -> Path:
        return self.out.parent / f"{self.out.name}-trace"

    def start(self, *extra: str, sleep_s: float = 0.05, **environment: str) -> subprocess.Popen[str]:
        self.trace.mkdir(exist_ok=True)
        command = [
            *(sys.executable, "-m", "tests.faults.stub_cli", "label", "--no-progress"),
            *("--images", str(self.folder / "images"), "--boxes", str(self.folder / "boxes.parquet")),
            *("--output", str(self.out), "--set", "output.images_per_unit=4"),
            *("--set", "model.dtype=float32", "--set", "cluster.actors=1", *extra),
        ]
        steering = {"STUB_TRACE": str(self.trace), "STUB_SLEEP_S": str(sleep_s), "RAY_worker_niceness": "0"}
        return subprocess.Popen(
            command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **steering, **environment},
        )  # fmt: skip

    def run(self, *extra: str, code: int = 0, **environment: str) -> str:
        process = self.start(*extra, sleep_s=0, **environment)
        out, err = process.communicate(timeout=400)
        assert process.returncode == code, out + err
        return err

    def units(self) -> int:
        return len(list((self.out / "units").glob("*.parquet")))

    def calls(self) -> int:
        """How many images the stub was given."""
        return sum(len(file.read_text().splitlines()) for file in self.trace.glob("*.txt"))

    def digests(self) -> list[str]:
        tables = (self.table(name) for name in ("images", "instances"))
        return [mask_columns_digest(table) for table in tables]

    def table(self, name: str) -> pa.Table:
        return pa.concat_tables(pq.read_table(part) for part in sorted((self.out / name).glob("*.parquet")))

    def lost_and_doubled(self) -> dict[str, int]:
        ids = self.table("images")["image_id"].to_pylist()
        return {"lost": IMAGES - len(set(ids)), "doubled": len(ids) - len(set(ids))}


def make_folder(place: Path) -> Path:
    """Pictures and a table of their boxes."""
    made = place / "data"
    if (made / "boxes.parquet").exists():
        return made
    (made / "images").mkdir(parents=True)
    ids = [f"{number:03}.png" for number in range(IMAGES)]
    for number, name in enumerate(ids):
        (made / "images" / name).write_bytes(png(noise(number)))
    pq.write_table(pa.table({"image_id": ids, "boxes": [BOXES] * IMAGES}), made / "boxes.parquet")
    return made


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 240) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
