"""Scenes on disk, so that a training step does not wait for the painter.

python -m tools.demo_model.cache --out DIR --side 256 --count 20000 --first-seed 0

Three plain .npy files (pixels, label maps, sizes), padded to `side` x `side`, filled from the front;
`ready.txt` holds the number of scenes that are whole, so that training may begin while painting goes on,
and painting resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from tools.demo_model.scenes import make_scene

HELD_OUT_FIRST_SEED = 1_000_000_000  # training seeds stay below; evaluation seeds start here
ROUND = 50


class SceneCache:
    """Read access to a folder of painted scenes; `len()` is the number that is ready now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")
        self._sizes = np.load(folder / "sizes.npy", mmap_mode="r")

    def __len__(self) -> int:
        return _ready(self.folder)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (h, w, 3) and label map uint8 (h, w) of one scene, without padding."""
        height, width = (int(value) for value in self._sizes[index])
        return self._pixels[index, :height, :width], self._labels[index, :height, :width]


def _ready(folder: Path) -> int:
    note = folder / "ready.txt"
    return int(note.read_text() or 0) if note.exists() else 0


def fill(folder: Path, *, side: int, count: int, first_seed: int) -> None:
    """Paints the scenes first_seed .. first_seed + count - 1 that are not there yet."""
    if first_seed + count > HELD_OUT_FIRST_SEED:
        raise ValueError(
            f"seeds up to {first_seed + count} reach the held-out ones; stay below {HELD_OUT_FIRST_SEED}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"pixels": (count, side, side, 3), "labels": (count, side, side), "sizes": (count, 2)}
    arrays = {}
    for name, shape in shapes.items():
        path = folder / f"{name}.npy"
        dtype = np.uint8 if name != "sizes" else np.int32
        mode = {"mode": "r+"} if path.exists() else {"mode": "w+", "dtype": dtype, "shape": shape}
        arrays[name] = np.lib.format.open_memmap(path, **mode)
    started = time.monotonic()
    for index in range(_ready(folder), count):
        scene = make_scene(first_seed + index, side)
        height, width = scene.label_map_hw.shape
        arrays["pixels"][index, :height, :width] = scene.pixels_hwc
        arrays["labels"][index, :height, :width] = scene.label_map_hw
        arrays["sizes"][index] = height, width
        if (index + 1) % ROUND == 0 or index + 1 == count:
            _note_ready(folder, index + 1)
        if (index + 1) % 1000 == 0:
            print(f"{index + 1} of {count} scenes, {time.monotonic() - started:.0f} s", flush=True)


def _note_ready(folder: Path, number: int) -> None:
    fresh = folder / "ready.tmp"
    fresh.write_text(str(number))
    fresh.replace(folder / "ready.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    fill(options.out, side=options.side, count=options.count, first_seed=options.first_seed)


if __name__ == "__main__":
    main()
