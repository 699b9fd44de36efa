"""Ray Data's own image reader next to the chain without a model, and next to plain processes of Pillow.

    python -m benchmarks.image_reader [--images 1024]

Generated JPEGs of 1 megapixel. `ray.data.read_images` decodes and resizes them (with its own filter, to the
same size) and does no more: no deadline, no memory limit, no orientation, no row for a picture that fails.
The chain fetches, decodes under supervision, hands over, and writes units; a stub stands for the model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import chain
from benchmarks.made_inputs import write_pictures
from hqlabel.jobs.cluster.ray_cluster import running_ray, usable_cpus
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.model.records import target_size_hw

SIZE_HW = (864, 1152)
SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1024)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory(prefix="hqlabel-reader-") as folder:
        paths = write_pictures(Path(folder), images, SIZE_HW)
        loop = partial(chain.loop_of_pillow, side=SIDE)
        rates = {
            f"{usable_cpus()} processes of Pillow": chain.loop_rate(loop, paths, processes=usable_cpus()),
            "ray.data.read_images": reader_rate(paths),
            "the chain, from its second unit on": chain.run_chain(
                Config(),
                Path(folder),
                paths,
                SIZE_HW,
                chain.STUB,
                Interrupts(),
                segmenter=chain.STUB_NAME,
            ).images_per_s,
        }
    print("| road | images/s |\n|---|--:|")
    for road, rate in rates.items():
        print(f"| {road} | {rate:.1f} |")


def reader_rate(paths: list[Path]) -> float:
    """Images a second of the reader, from the first block that it hands out to the last."""
    with running_ray(Config().cluster, os.environ):
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        resized = target_size_hw(SIZE_HW, SIDE)
        dataset = ray.data.read_images([str(path) for path in paths], size=resized, mode="RGB")
        times, rows = [], []
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            times.append(time.perf_counter())
            rows.append(len(batch["image"]))
    assert sum(rows) == len(paths)
    return sum(rows[1:]) / (times[-1] - times[0])


if __name__ == "__main__":
    main()
