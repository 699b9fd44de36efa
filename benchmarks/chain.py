"""The chain of stages against bare loops that do the same to the same pictures, on the same cores.

    python -m benchmarks.chain [stub] [model] [--quick] [--checkpoint demo] [--actors N]

`stub` puts a stub in the model's place and compares with processes that only read, decode and resize;
`model` runs the model and compares with processes that read, decode and run the same model in a loop. Figures
of a machine that does other work at the same time are worth little; the two sides run one after the other.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.made_inputs import boxes_of, write_boxes, write_pictures
from hqlabel.jobs.cluster.ray_cluster import usable_cpus
from hqlabel.jobs.commands.estimate import Measured, measure
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.check_models import read_checkpoint
from hqlabel.jobs.job_setup.open_job import plan_inputs
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.model.records import Instances, PreparedImage, Prompts, target_size_hw
from hqlabel.pipeline.images.decode_upright import decode_image
from hqlabel.pipeline.job_context import Weights
from hqlabel.pipeline.settings import ModelSettings
from hqlabel.pipeline.stages.load_model import load_model, resolve_dtype

_ONE_MEGAPIXEL, _TWELVE_MEGAPIXELS = (864, 1152), (3000, 4000)
_STUB_SIDE = 1024
STUB_NAME = "tests.fakes:box_segmenter"
STUB = Weights(source="none", sha256="0" * 64, architecture="stub", input_side=_STUB_SIDE)
_HEAD = ("pictures", "Mpx", "a unit", "loop images/s", "chain images/s", "of the loop", "added ms an image")


def main() -> None:
    """Measure the parts asked for, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["stub", "model"], default=["stub", "model"])
    parser.add_argument("--quick", action="store_true", help="small sizes: each part about a minute")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--actors", type=int, help="model processes; default: as a job chooses")
    arguments = parser.parse_args()
    flags = {"model.checkpoint": arguments.checkpoint, "cluster.actors": arguments.actors}
    config = ConfigSources(flags=flags).load()
    for part in arguments.parts:
        measure_part = measure_stub if part == "stub" else measure_model
        with tempfile.TemporaryDirectory(prefix="hqlabel-bench-") as folder:
            print(measure_part(config, Path(folder), Interrupts(), quick=arguments.quick), flush=True)


def measure_stub(config: Config, folder: Path, interrupts: Interrupts, *, quick: bool) -> str:
    """Fetch, decode, hand-over and units, with no model, against processes of Pillow: `loop_of_pillow`."""
    counts = (96, 16) if quick else (2048, 128)
    figures = []
    for count, size_hw in zip(counts, (_ONE_MEGAPIXEL, _TWELVE_MEGAPIXELS), strict=True):
        place = folder / f"{size_hw[1]}"
        paths = write_pictures(place, count, size_hw)
        cores = config.cluster.cpus or usable_cpus()
        loop = partial(loop_rate, partial(loop_of_pillow, side=_STUB_SIDE), paths, processes=cores)
        before = loop()
        chain = run_chain(config, place, paths, size_hw, STUB, interrupts, segmenter=STUB_NAME)
        figures.append(_figures(size_hw, chain, [before, loop()], cores))
    title = f"a stub in place of the model; {cores} processes of Pillow (read, decode, resize) around it"
    return _table(title, figures)


def measure_model(config: Config, folder: Path, interrupts: Interrupts, *, quick: bool) -> str:
    """The whole chain, against processes that each read, decode and run the model: `loop_of_model`.

    As many of them as the chain has model processes, with as many threads each.
    """
    size_hw, count = _ONE_MEGAPIXEL, 24 if quick else 256
    paths = write_pictures(folder, count, size_hw)
    weights = read_checkpoint(config)
    chain = run_chain(config, folder, paths, size_hw, weights, interrupts)
    dtype = resolve_dtype(config.model.dtype, chain.gpus > 0)
    config = resolve_settings.with_boxes_per_call(config, resolve_settings.BOXES_PER_CALL[chain.device])
    asked = config.model.model_copy(update={"dtype": dtype})
    begin = partial(_load_model, weights, asked, chain.device)
    rate = loop_rate(loop_of_model, paths, processes=chain.actors, begin=begin)
    figures = [_figures(size_hw, chain, [rate], chain.actors)]
    processes = count(chain.actors, "process", "processes")
    return _table(f"{weights.architecture}, {dtype}, against {processes} of one bare loop each", figures)


def run_chain(
    config: Config,
    folder: Path,
    paths: Sequence[Path],
    size_hw: tuple[int, int],
    weights: Weights,
    interrupts: Interrupts,
    segmenter: str | None = None,
) -> Measured:
    """What the chain makes of these pictures: its rate once every model process has done its first unit."""
    boxes = write_boxes(folder, list(paths), size_hw)
    given = config.input.model_copy(update={"images": None, "boxes": str(boxes)})
    output = config.output.model_copy(update={"uri": str(folder / "out")})
    config = config.model_copy(update={"input": given, "output": output})
    plan = plan_inputs(config)
    found = measure(config, plan, weights, interrupts, sample=len(paths), segmenter=segmenter)
    assert not found.failed, f"{found.failed} of {found.images} pictures failed"
    return found


def _figures(
    size_hw: tuple[int, int], chain: Measured, loops: Sequence[float], cores: int
) -> dict[str, object]:
    loop = statistics.harmonic_mean(loops)
    return {
        "images": chain.images,
        "megapixels": size_hw[0] * size_hw[1] / 1e6,
        "images_per_unit": chain.images_per_unit,
        "loop_images_per_s": loop,
        "chain_images_per_s": chain.images_per_s,
        "share": chain.images_per_s / loop,
        "added_ms": 1e3 * cores * (1 / chain.images_per_s - 1 / loop),
        "start_s": chain.start_s,
    }


def _table(title: str, figures: Sequence[dict[str, object]]) -> str:
    rows = [
        (
            str(row["images"]),
            f"{row['megapixels']:.1f}",
            str(row["images_per_unit"]),
            f"{row['loop_images_per_s']:.2f}",
            f"{row['chain_images_per_s']:.2f}",
            f"{row['share']:.0%}",
            f"{row['added_ms']:.1f}",
        )
        for row in figures
    ]
    note = "added: milliseconds of one core; the chain's rate is taken after the first unit of every model"
    return f"{title}\n{console.table(_HEAD, rows)}\n  {note}\n"


def loop_rate(
    loop: Callable[[str], object],
    paths: Sequence[Path],
    *,
    processes: int,
    begin: Callable[[], None] | None = None,
) -> float:
    """Images a second of that many processes that call `loop` with one path after the other."""
    names = [str(path) for path in paths]
    with multiprocessing.get_context("spawn").Pool(processes, begin) as pool:
        pool.map(loop, names[: 2 * processes], chunksize=1)  # imports, and the model's first call
        began = time.perf_counter()
        for _ in pool.imap_unordered(loop, names, chunksize=2):
            pass
        return len(names) / (time.perf_counter() - began)


def loop_of_pillow(name: str, side: int) -> int:
    """The bytes of the picture, decoded and resized for the model, as Pillow alone does it."""
    with Image.open(io.BytesIO(Path(name).read_bytes())) as picture:
        height, width = target_size_hw((picture.height, picture.width), side)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).nbytes


def loop_of_model(name: str) -> int:
    """The bytes of all runs of the picture's masks, after `_load_model` in this process."""
    from hqlabel.model.segmenter import Segmenter

    segmenter = _MODELS[-1]
    assert isinstance(segmenter, Segmenter)
    decoded = decode_image(Path(name).read_bytes(), max_pixels=10**9, side=segmenter.input_side)
    boxes = boxes_of(int(Path(name).stem), decoded.size_hw)
    image = PreparedImage(
        pixels_hwc=decoded.pixels_hwc, size_hw=decoded.size_hw, prompts=Prompts(boxes_xyxy=boxes)
    )
    (answer,) = segmenter.segment_prepared([image])
    assert isinstance(answer, Instances), answer
    return sum(map(len, answer.counts))


_MODELS: list[object] = []
"""The model of this process, if it is one of a loop's."""


def _load_model(weights: Weights, asked: ModelSettings, device: str) -> None:
    from hqlabel.model.device import set_cpu_threads
    from hqlabel.model.segmenter import Segmenter

    set_cpu_threads(asked.cpu_threads)
    model = load_model(weights, device).model
    _MODELS.append(
        Segmenter(
            model,
            call_shape=asked.call_shape,
            dtype=asked.dtype,
            device=device,
            compiled=asked.compile,
        )
    )


if __name__ == "__main__":
    main()
