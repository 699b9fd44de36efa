"""Scenes on disk, so that a training step does not wait for the painter.

python -m tools.demo_model.cache --out DIR --side 256 --count 20000 --first-seed 0 [--rich] [--material DIR]

`--rich` paints three scenes of four with objects of several surfaces, on the material's photographs where
a folder is given. In a label map, UNKNOWN marks a photograph: things that nobody named.

Three plain .npy files (pixels, label maps, sizes), padded to `side` x `side`, filled from the front;
`ready.txt` holds the number of scenes that are whole, so that training may begin while painting goes on,
and painting resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from tools.demo_model.photographs import Material
from tools.demo_model.scenes import Scene, make_rich_scene, make_scene

HELD_OUT_FIRST_SEED = 1_000_000_000  # training seeds stay below; evaluation seeds start here
ROUND = 50
UNKNOWN = 255  # in a label map: neither an object nor the one background
PLAIN_EVERY = 4  # of rich scenes one in so many is plain, so that what is measured stays known


class SceneCache:
    """Read access to a folder of painted scenes; `len()` is the number that is ready now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")
        self._sizes = np.load(folder / "sizes.npy", mmap_mode="r")
        self.side = int(self._pixels.shape[1])

    def __len__(self) -> int:
        return _ready(self.folder)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (h, w, 3) and label map uint8 (h, w) of one scene, without padding."""
        height, width = (int(value) for value in self._sizes[index])
        return self._pixels[index, :height, :width], self._labels[index, :height, :width]


def _ready(folder: Path) -> int:
    note = folder / "ready.txt"
    return int(note.read_text() or 0) if note.exists() else 0


def paint(seed: int, side: int, *, rich: bool, material: Material | None) -> Scene:
    """The scene of a cache's seed."""
    if rich and seed % PLAIN_EVERY:
        return make_rich_scene(seed, side, material)
    return make_scene(seed, side)


def fill(
    folder: Path,
    *,
    side: int,
    count: int,
    first_seed: int,
    rich: bool = False,
    material: Material | None = None,
) -> None:
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
        scene = paint(first_seed + index, side, rich=rich, material=material)
        height, width = scene.label_map_hw.shape
        labels = scene.label_map_hw
        if not scene.known_ground:
            labels = np.where(labels == 0, np.uint8(UNKNOWN), labels)
        arrays["pixels"][index, :height, :width] = scene.pixels_hwc
        arrays["labels"][index, :height, :width] = labels
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
    parser.add_argument("--rich", action="store_true", help="objects of several surfaces in most scenes")
    parser.add_argument("--material", type=Path, help="a folder with photographs/ and cutouts/")
    options = parser.parse_args()
    fill(
        options.out,
        side=options.side,
        count=options.count,
        first_seed=options.first_seed,
        rich=options.rich,
        material=Material(options.material) if options.material else None,
    )


if __name__ == "__main__":
    main()
