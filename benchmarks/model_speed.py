"""The whole way from a uint8 picture to RLE strings: `Segmenter` beside its peers, and where its time goes.

    python -m benchmarks.model_speed [--variant vit_b] [--boxes 10] [--rounds 3] [--only NAME ...]
    python -m benchmarks.model_speed --times FILE       (again and again: every call adds its rounds)
    python -m benchmarks.model_speed --operations 24

Random weights, the same ones for all, one picture of 1536 x 2048. Each contender has a process of its own,
with the environment that its users get (ours asks for huge pages, as a job does), and they take turns; a
figure is the median over the rounds, in wall seconds, with the CPU seconds of all threads beside it, which
other work on the machine disturbs less. Half a minute a peer and turn on one core, so `--times` keeps every
turn in a file of JSON lines, and a run that was cut short, or has few rounds, is taken up by the next one.

`segment-anything-hq` is run as its own README does, `transformers` as its documentation does but for the
processor, whose resize it gets for nothing; the masks of both are encoded by pycocotools. Agreement is with
the masks of `segment-anything-hq` in float32 (transformers' masks are wrong as shipped, so it is timed only).
Neither has HQ-SAM 2 (`--variant hiera_l`), which is timed alone.

`--operations` prints another table instead: of one run under PyTorch's profiler each operation with its share
and its rate, against the rate of a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch.profiler import ProfilerActivity, profile

from hqlabel.model.checkpoints import save_transformers
from hqlabel.model.device import Dtype
from hqlabel.model.hq_sam2.hiera_config import HIERA_SIZES, hq_sam2_config
from hqlabel.model.records import CallShape, Instances, scale_boxes, target_size_hw
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.sam_config import PUBLISHED, SamHQConfig
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.segmenter import Segmenter
from tests.parity.lively import boxes_in, lively, photo, pixels_of
from tests.parity.oracle import predictor_of

SIZE_HW = (1536, 2048)
VARIANTS: dict[str, SamHQConfig] = {
    **PUBLISHED,
    **{name: hq_sam2_config(vision) for name, vision in HIERA_SIZES.items()},
}
ROADS = ("hqlabel bf16", "hqlabel fp32", "segment-anything-hq fp32", "transformers fp32", "transformers bf16")
Road = Callable[[], list[str]]

PRODUCTS = {"aten::addmm": 1, "aten::baddbmm_": 1, "aten::mm": 0, "aten::bmm": 0}
"""Matrix products, with the place of their left factor among the arguments."""


def hqlabel(model: SamHQ, dtype: Dtype, boxes_per_call: int, image: np.ndarray, boxes: np.ndarray) -> Road:
    shape = CallShape(images_per_call=1, boxes_per_call=boxes_per_call)
    segmenter = Segmenter(model, call_shape=shape, dtype=dtype)

    def road() -> list[str]:
        (result,) = segmenter.segment([image], [boxes])
        assert isinstance(result, Instances), result
        return list(result.counts)

    return road


def original(model: SamHQ, image: np.ndarray, boxes: np.ndarray) -> Road:
    predictor = predictor_of(model)

    def road() -> list[str]:
        predictor.set_image(image)
        scaled = torch.as_tensor(predictor.transform.apply_boxes(boxes, SIZE_HW), dtype=torch.float)
        masks, _, _ = predictor.predict_torch(None, None, scaled, multimask_output=False)
        return encode(masks[:, 0])

    return road


def transformers(model: SamHQ, dtype: torch.dtype, image: np.ndarray, boxes: np.ndarray) -> Road:
    from transformers import SamHQModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        save_transformers(model, Path(folder))
        theirs = SamHQModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval()
    resized_hw = target_size_hw(SIZE_HW, model.config.image_size)
    scaled = torch.from_numpy(scale_boxes(boxes, SIZE_HW, resized_hw))[None].to(dtype)

    @torch.no_grad()
    def road() -> list[str]:
        pixels = pixels_of(model, [image]).to(dtype)
        low = theirs(pixel_values=pixels, input_boxes=scaled, multimask_output=False).pred_masks[0].float()
        padded = F.interpolate(low, (1024, 1024), mode="bilinear", align_corners=False)
        fitted = padded[..., : resized_hw[0], : resized_hw[1]]
        return encode(F.interpolate(fitted, SIZE_HW, mode="bilinear", align_corners=False)[:, 0] > 0)

    return road


def encode(masks_NHW: torch.Tensor) -> list[str]:
    columns = np.asfortranarray(masks_NHW.numpy().view(np.uint8).transpose(1, 2, 0))
    return [mask["counts"].decode("ascii") for mask in coco_mask.encode(columns)]


def agreement(counts: list[str], reference: list[str]) -> str:
    """Mean IoU of the masks, and the share of pixels that differ."""
    pairs = [
        (rle_to_mask(a, SIZE_HW), rle_to_mask(b, SIZE_HW)) for a, b in zip(counts, reference, strict=True)
    ]
    ious = [(a & b).sum() / max(1, (a | b).sum()) for a, b in pairs]
    flipped = [np.mean(a != b) for a, b in pairs]
    return f"IoU {np.mean(ious):.4f}, {100 * np.mean(flipped):.3f} % of pixels differ"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One timed call of a road: seconds, and the masks that came back."""

    road: str
    wall: float
    cpu: float
    counts: list[str]


def kept_turns(file: Path | None, setting: str) -> list[Turn]:
    """The turns that earlier runs at this setting have left in the file."""
    if file is None or not file.exists():
        return []
    records = map(json.loads, file.read_text().splitlines())
    return [Turn(**record["turn"]) for record in records if record["setting"] == setting]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every contender is given."""

    variant: str
    threads: int
    boxes: int
    boxes_per_call: int

    def __str__(self) -> str:
        return (
            f"torch {torch.__version__}, {self.threads} threads, {self.variant}, "
            f"{SIZE_HW[0]}x{SIZE_HW[1]}, {self.boxes} boxes, {self.boxes_per_call} a call here"
        )


def make_road(name: str, setting: Setting) -> Road:
    """One contender, in this process."""
    torch.set_num_threads(setting.threads)
    model = lively(VARIANTS[setting.variant])
    image, boxes = photo(*SIZE_HW), boxes_in(*SIZE_HW, setting.boxes)
    makers: dict[str, Callable[[], Road]] = {
        "hqlabel bf16": lambda: hqlabel(model, "bfloat16", setting.boxes_per_call, image, boxes),
        "hqlabel fp32": lambda: hqlabel(model, "float32", setting.boxes_per_call, image, boxes),
        "segment-anything-hq fp32": lambda: original(model, image, boxes),
        "transformers fp32": lambda: transformers(model, torch.float32, image, boxes),
        "transformers bf16": lambda: transformers(model, torch.bfloat16, image, boxes),
    }
    return makers[name]()


def serve(pipe: Connection, name: str, setting: Setting) -> None:
    """A contender's process: a turn for every word, until the other end is closed."""
    road = make_road(name, setting)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            counts = road()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            pipe.send(Turn(road=name, wall=wall, cpu=cpu, counts=counts))


def start(name: str, target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    """A process of its own for a contender, in its environment: what torch reads when it is imported."""
    before = dict(os.environ)
    if name.startswith("hqlabel"):
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # see pipeline/worker/process_env.py
    try:
        process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


@contextlib.contextmanager
def contender(name: str, setting: Setting) -> Iterator[Callable[[], Turn]]:
    """What takes one turn of a contender, in the contender's own process."""
    mine, its = multiprocessing.get_context("spawn").Pipe()
    process = start(name, serve, its, name, setting)
    its.close()

    def turn() -> Turn:
        mine.send(True)
        done: Turn = mine.recv()
        return done

    try:
        yield turn
    finally:
        mine.close()
        process.join()


def take_turns(
    contenders: dict[str, Callable[[], Turn]], rounds: int, warm_up: int, keep: Callable[[Turn], None]
) -> None:
    """Run all in turn, the first `warm_up` rounds uncounted."""
    for number in range(warm_up + rounds):
        for name, take in contenders.items():
            turn = take()
            told = "warm-up" if number < warm_up else f"round {number - warm_up + 1}"
            print(f"{told:>8} {name:<26} wall {turn.wall:6.2f} s, CPU {turn.cpu:6.2f} s", flush=True)
            if number >= warm_up:
                keep(turn)


def print_comparison(turns: list[Turn]) -> None:
    """The first table."""
    by_road = {name: [turn for turn in turns if turn.road == name] for name in {turn.road for turn in turns}}
    wall, cpu = (
        {name: statistics.median(getattr(turn, kind) for turn in mine) for name, mine in by_road.items()}
        for kind in ("wall", "cpu")
    )
    order = sorted(by_road, key=wall.__getitem__)
    best, reference = order[0], by_road.get("segment-anything-hq fp32")
    print(f"\n| road | turns | wall s | least | CPU s | ratio to {best}, wall | CPU | agreement |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for name in order:
        told = "timed only"
        if "hqlabel" in name and reference:
            told = agreement(by_road[name][0].counts, reference[0].counts)
        print(
            f"| {name} | {len(by_road[name])} | {wall[name]:.2f} | "
            f"{min(turn.wall for turn in by_road[name]):.2f} | {cpu[name]:.2f} | "
            f"{wall[name] / wall[best]:.2f} | {cpu[name] / cpu[best]:.2f} | {told} |"
        )


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a 4096 x 768 by 768 x 3072 product, the encoder's largest: the best of ten."""
    a, b, best = torch.randn(4096, 768).to(dtype), torch.randn(768, 3072).to(dtype), 0.0
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = max(best, 2e-9 * 4096 * 768 * 3072 / (time.perf_counter() - start))
    return best


def gflop(name: str, shapes: list[list[int]]) -> float:
    """Of one call, products and convolutions only."""
    if name in PRODUCTS:
        left, right = shapes[PRODUCTS[name] : PRODUCTS[name] + 2]
        return 2e-9 * float(np.prod(left)) * right[-1]
    if name == "aten::mkldnn_convolution":
        pixels, weight = shapes[:2]
        # Every convolution here is 1x1, 3x3 with padding, or as wide as its stride (the patches).
        across = 1 if weight[-1] <= 3 else weight[-1]
        return 2e-9 * float(np.prod(weight)) * pixels[0] * pixels[2] * pixels[3] / across**2
    return 0.0


def break_down(name: str, setting: Setting, rows: int) -> None:
    """Print the table of operations."""
    road = make_road(name, setting)
    peak = product_rate(torch.bfloat16 if "bf16" in name else torch.float32)
    road()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        start = time.perf_counter()
        road()
        total = time.perf_counter() - start
    events = sorted(found.key_averages(group_by_input_shape=True), key=lambda e: -e.self_cpu_time_total)
    print(f"\n{total:.2f} s under the profiler; the large product reaches {peak:.0f} GFLOP/s\n")
    print("| operation | arguments | calls | ms | share | GFLOP | GFLOP/s | of the large product |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for event in events[:rows]:
        seconds = 1e-6 * event.self_cpu_time_total
        work = event.count * gflop(event.key, event.input_shapes)
        rate = f"{work:.1f} | {work / seconds:.0f} | {work / seconds / peak:.0%}" if work else "| | "
        shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
        name = event.key.removeprefix("aten::")
        print(f"| {name} | {shapes} | {event.count} | {1e3 * seconds:.0f} | {seconds / total:.1%} | {rate} |")
    rest = total - 1e-6 * sum(event.self_cpu_time_total for event in events[:rows])
    print(f"| everything else | | | {1e3 * rest:.0f} | {rest / total:.1%} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="vit_b")
    parser.add_argument("--boxes", type=int, default=10)
    parser.add_argument("--boxes-per-call", type=int, default=2, help="of our calls, the last one filled up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--operations", type=int, metavar="ROWS", help="print the table of operations")
    parser.add_argument("--only", nargs="+", choices=ROADS, default=ROADS, metavar="ROAD")
    parser.add_argument("--times", type=Path, help="a file of turns to go on with")
    options = parser.parse_args()
    setting = Setting(
        variant=options.variant,
        threads=options.threads,
        boxes=options.boxes,
        boxes_per_call=options.boxes_per_call,
    )
    if options.variant in HIERA_SIZES:
        options.only = [name for name in options.only if name.startswith("hqlabel")]
    print(setting, flush=True)
    if options.operations:
        for name in (name for name in options.only if name.startswith("hqlabel")):
            print(f"\n{name}", flush=True)
            start(name, break_down, name, setting, options.operations).join()
        return
    compare(options.only, setting, options)


def compare(names: Sequence[str], setting: Setting, options: argparse.Namespace) -> None:
    """Let the contenders take turns, and print the first table."""
    turns = kept_turns(options.times, str(setting))

    def keep(turn: Turn) -> None:
        turns.append(turn)
        if options.times:
            with options.times.open("a") as file:
                file.write(json.dumps({"setting": str(setting), "turn": asdict(turn)}) + "\n")

    with contextlib.ExitStack() as stack:
        contenders = {name: stack.enter_context(contender(name, setting)) for name in names}
        take_turns(contenders, options.rounds, options.warm_up, keep)
    print_comparison(turns)


if __name__ == "__main__":
    main()
