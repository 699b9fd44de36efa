"""From JPEG files to RLE strings with all cores of the machine beside the device: who waits for whom?

`chain` has no Ray: processes read, decode and resize, and this one runs the model on what they send. It is
what a machine can do at best. `ray_chain` is the product's own, as a job runs it.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.decode_processes import STEP, Decoded, Decoder
from benchmarks.gpu_day.setting import Setting
from benchmarks.gpu_day.subjects import fresh_model, instances, segmenter_of
from benchmarks.made_inputs import boxes_of, write_pictures
from hqlabel.model.checkpoints import save_transformers
from hqlabel.model.records import PreparedImage, Prompts
from hqlabel.model.segmenter import Segmenter

Row = dict[str, Any]
_BOXES = 10
_DIFFERENT = 8


def chain(setting: Setting, *, variant: str, megapixels: int, draft_jpeg: bool) -> list[Row]:
    """One row: images a second of decoding alone, of the model alone, and of both at once."""
    segmenter = segmenter_of(setting, variant, images_per_call=4, boxes_per_call=40)
    processes = max(1, setting.fewer(len(os.sched_getaffinity(0)), 2) - 1)
    count = setting.fewer(1024 if megapixels < 10 else 512, 24)
    size_hw = setting.size_hw(megapixels)
    paths = _pictures(size_hw)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
        names = [str(paths[n % _DIFFERENT]) for n in range(count)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            how = {"side": segmenter.input_side, "fit": segmenter.fit, "draft_jpeg": draft_jpeg}
            decoder = Decoder(pool, Path(folder, "pixels"), processes, how)
            list(decoder.decoded(names[: 2 * processes]))  # imports
            began = time.perf_counter()
            part = [(pixels.copy(), size_hw) for pixels, size_hw in decoder.decoded(names[: count // 2])]
            decoding = len(part) / (time.perf_counter() - began)
            alone = _rate(setting, segmenter, iter(part))
            together = _rate(setting, segmenter, decoder.decoded(names))
    return [
        {
            "variant": variant, "megapixels": megapixels, "draft_jpeg": draft_jpeg, "processes": processes,
            "images": count, "kilobytes": kilobytes, "decoding_images_per_s": decoding,
            "model_images_per_s": alone, "chain_images_per_s": together,
            "of_the_slower": together / min(decoding, alone),
            "decoding_images_per_s_a_core": decoding / processes,
            "cores_for_the_model": alone * processes / decoding,
        }
    ]  # fmt: skip


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _pictures(size_hw: tuple[int, int]) -> list[Path]:
    """Files for all parts of this process: 12 megapixels take seconds each to make."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    return write_pictures(Path(_FOLDERS[-1].name), _DIFFERENT, size_hw)


def _rate(setting: Setting, segmenter: Segmenter, pictures: Iterator[Decoded]) -> float:
    """Images a second, from the end of the first `STEP` images on; what does not fill a step is left."""
    done, began = 0, 0.0
    for waiting in iter(lambda: list(islice(pictures, STEP)), []):
        images = [
            PreparedImage(
                pixels_hwc=pixels_hwc, size_hw=size_hw,
                prompts=Prompts(boxes_xyxy=boxes_of(number, size_hw, _BOXES)),
            )
            for number, (pixels_hwc, size_hw) in enumerate(waiting)
        ]  # fmt: skip
        instances(segmenter.segment_prepared(images))
        done += len(images) if began else 0
        began = began or setting.now()
    return done / (setting.now() - began)


def ray_chain(setting: Setting, *, variant: str, megapixels: int) -> list[Row]:
    """One row: the chain of a job, its rate after each model process has done its first unit."""
    from benchmarks.chain import run_chain
    from hqlabel.jobs.job_setup.check_models import read_checkpoint
    from hqlabel.jobs.load_config import ConfigSources
    from hqlabel.jobs.terminal.signals import Interrupts

    size_hw = setting.size_hw(megapixels)
    with tempfile.TemporaryDirectory(prefix="hqlabel-gpu-day-") as folder:
        place = Path(folder)
        save_transformers(fresh_model(setting, variant, device="cpu"), place / "weights")
        flags = {"model.checkpoint": str(place / "weights"), "cluster.actors": 1}
        config = ConfigSources(flags=flags).load()
        paths = write_pictures(
            place / "pictures", setting.fewer(2048 if megapixels < 10 else 1024, 12), size_hw
        )
        found = run_chain(config, place / "pictures", paths, size_hw, read_checkpoint(config), Interrupts())
    if setting.on_gpu and found.device != "cuda":
        raise RuntimeError(f"the job's model ran on {found.device}")
    return [
        {
            "variant": variant, "megapixels": megapixels, "images": found.images, "actors": found.actors,
            "device": found.device, "images_per_unit": found.images_per_unit,
            "images_per_s": found.images_per_s, "start_s": found.start_s,
        }
    ]  # fmt: skip
