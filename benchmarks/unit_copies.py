"""What handing a decoded unit from one pool of processes to another costs: the price of a stage more.

    python -m benchmarks.unit_copies [--images 64] [--side 1024] [--rounds 5]

A unit's table, as the stages pass it on, is put into Ray's object store by one process and read by another.
Prints the seconds and the MiB of each round and the least of them, a unit and a picture.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.stages.rows_between_stages import PixelArena, UnitRow, pack, unpack


def main() -> None:
    """Start a private Ray, hand a unit on, print."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=2**30,
    )
    table = made_unit(given.images, given.side)

    @ray.remote(num_cpus=0.5)
    def read(block):  # type: ignore[no-untyped-def]
        return sum(int(image.pixels_hwc[::64, ::64].sum()) for image in unpack(block).images)

    ray.get(read.remote(made_unit(1, 64)))  # the worker has started and imported
    size = table.nbytes / 2**20
    took = []
    for _ in range(given.rounds):
        began = time.monotonic()
        handed = ray.put(table)
        put_s = time.monotonic() - began
        ray.get(read.remote(handed))
        took.append((put_s, time.monotonic() - began))
        print(f"put {put_s:.3f} s, read by another process after {took[-1][1]:.3f} s, {size:.0f} MiB")
        del handed
    put_s, whole_s = min(took)
    each = 1000 / given.images
    print(f"least: {each * put_s:.2f} ms a picture to put, {each * whole_s:.2f} ms in all")
    ray.shutdown()


def made_unit(images: int, side: int):  # type: ignore[no-untyped-def]
    """The table of a decoded unit: square pictures of noise, no boxes."""
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    planned = {"unit_id": 0, "image_id": "a", "image_uri": "a", "boxes": []}
    planned |= {"error_code": None, "error_message": None}
    arena = PixelArena(images, side)
    unit = UnitRow(
        unit_id=0,
        images=tuple(
            ImageResult(planned=planned, size_hw=(side, side), pixels_hwc=arena.keep(picture))
            for _ in range(images)
        ),
    )
    return pack(unit, arena)


if __name__ == "__main__":
    main()
