"""Makes the demo checkpoint from synthetic scenes, in the two steps of HQ-SAM.

python -m tools.demo_model.train --out DIR --caches DIR256 DIR512 --minutes 90 [--resume]

The decoder first learns, without pictures, to fill a box; without this it answers "nothing" for a long time.
Step one trains the SAM part (encoder, prompt encoder, decoder, IoU head) at side 128, 256, and the final one.
Step two freezes it and trains the HQ token, its MLP and the fusion convolutions, with a loss heavy on edges.
This is no fine-tuning tool: it knows only its own scenes and its own small network.

Prompts are boxes, boxes with clicks, and clicks alone. `--teacher FILE` adds a loss towards a classifier's
features (`teacher.py`). `--device cuda` trains on a GPU, in bfloat16, while `--workers` processes draw the
batches.

`--init CHECKPOINT` goes on from a finished demo checkpoint: the first two stages are left out, and both steps
run again from its weights; with `--hq-only` step two alone, at the final side. The matrix work runs in
bfloat16 where the processor multiplies it natively.

The stages' lengths are shares of the time given, in processor time a thread (on a GPU: on the clock): a
process that is paused or outranked loses nothing, and a slow processor makes a weaker checkpoint.
DIR/state.pt is written every two minutes and on SIGTERM; `--resume` goes on from it. Batches are drawn from
(seed, stage, step), so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from tools.demo_model import losses
from tools.demo_model.batches import PATCH, Batch, make_batch, random_boxes
from tools.demo_model.cache import SceneCache
from tools.demo_model.network import DemoNetwork
from tools.demo_model.optimiser import Muon, native_bf16, split_parameters
from tools.demo_model.teacher import Teacher, cosine_loss

NOTICE = "This makes hqlabel's demo checkpoint from synthetic scenes. It is no fine-tuning tool."
MUON_RATE, ADAM_RATE, HQ_RATE = 0.005, 1e-3, 2e-3
WARM_FACTOR = 0.5  # of the first two rates, when the run begins with a finished checkpoint
WARM_UP_STEPS, LAST_RATE = 60, 0.02
EMA_STEPS = 150  # the exported weights average about this many steps
SAVE_EVERY_S, REPORT_EVERY_S = 120, 30
GRADIENT_LIMIT = 1.0
AFFINITY_WEIGHT, FINE_AFFINITY_WEIGHT, TEACHER_WEIGHT = 0.5, 0.3, 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training: `images` pictures a step, `boxes` prompts each, `share` of the time."""

    name: str
    side: int
    images: int
    boxes: int
    share: float
    kind: str = "sam"

    @property
    def hq(self) -> bool:
        return self.kind == "hq"


def stages_for(final_side: int, *, warm: bool, hq_only: bool = False) -> tuple[Stage, ...]:
    """The stages for a checkpoint of this side; above 256, both steps are finished there.

    `warm`: from a checkpoint that already fills boxes and finds objects. `hq_only`: its SAM part stays.
    """
    if hq_only:
        return (Stage(name="hq-final", side=final_side, images=3, boxes=5, share=1.0, kind="hq"),)
    if warm:
        return (
            Stage(name="sam-256", side=256, images=8, boxes=6, share=0.42),
            Stage(name="sam-final", side=final_side, images=3, boxes=6, share=0.22),
            Stage(name="hq-256", side=256, images=8, boxes=4, share=0.08, kind="hq"),
            Stage(name="hq-final", side=final_side, images=3, boxes=5, share=0.28, kind="hq"),
        )
    sam, hq = 0.50, 0.27
    sam_finish, hq_finish = (0.3, 0.45) if final_side > 256 else (0.0, 0.0)
    stages = (
        Stage(name="boxes-128", side=128, images=0, boxes=48, share=0.03, kind="boxes"),
        Stage(name="sam-128", side=128, images=16, boxes=4, share=0.20),
        Stage(name="sam-256", side=256, images=8, boxes=6, share=sam * (1 - sam_finish)),
        Stage(name="sam-final", side=final_side, images=3, boxes=6, share=sam * sam_finish),
        Stage(name="hq-256", side=256, images=8, boxes=4, share=hq * (1 - hq_finish), kind="hq"),
        Stage(name="hq-final", side=final_side, images=4, boxes=4, share=hq * hq_finish, kind="hq"),
    )
    return tuple(stage for stage in stages if stage.share)


class Drawn(Dataset[Batch]):
    """The batches of a stage; each is a function of (seed, stage, step) and of the caches."""

    def __init__(self, caches: list[SceneCache], stage: Stage, key: tuple[int, int]) -> None:
        self.caches, self.stage, self.key = caches, stage, key

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([*self.key, step])
        filled = [cache for cache in self.caches if len(cache)]
        fine = min(self.stage.side, max(cache.side for cache in filled))
        usable = [cache for cache in filled if cache.side >= fine]  # none is enlarged where it need not be
        return make_batch(
            usable[int(rng.integers(len(usable)))],
            rng,
            side=self.stage.side,
            images=self.stage.images,
            boxes=self.stage.boxes,
            cell=2 if self.stage.hq else 4,
        )


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a run trains with. `workers`: processes that draw batches, 0 draws them between the steps."""

    device: str = "cpu"
    workers: int = 0
    teacher: Path | None = None
    compiled: bool = True


class Training:
    """One run: the network, its average, its optimisers, and where in the stages it stands."""

    def __init__(
        self,
        caches: list[SceneCache],
        *,
        stages: tuple[Stage, ...],
        minutes: float,
        seed: int,
        init: Path | None = None,
        means: Means | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.means = means or Means()
        self.device = torch.device(self.means.device)
        self.teacher = Teacher.load(self.means.teacher).to(self.device) if self.means.teacher else None
        self.caches, self.stages, self.minutes, self.seed = caches, stages, minutes, seed
        self.network = DemoNetwork()
        self.sam_factor = 1.0 if init is None else WARM_FACTOR
        if init is None:
            self.network.whiten_patches(caches[0])
        else:
            self.network.load_checkpoint(init)
        self.stage_index, self.step, self.spent_s = 0, 0, 0.0
        self._enter_stage()

    @property
    def stage(self) -> Stage:
        return self.stages[self.stage_index]

    def _enter_stage(self) -> None:
        """Sets the side, what trains, and fresh optimisers and average for the current stage."""
        torch.compiler.reset()
        self.network.set_side(self.stage.side)
        self.network.to(self.device)
        self._batches: Iterator[Batch] | None = None
        if self.stage.hq:
            self.network.freeze_sam_part()
        matrices, others = split_parameters(self.network)
        rate = HQ_RATE if self.stage.hq else self.sam_factor * ADAM_RATE
        adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [(adam, rate)]
        if matrices:  # the HQ part has none that Muon takes
            rate = self.sam_factor * MUON_RATE
            self.optimisers.append((Muon(matrices, lr=rate), rate))
        # Compiled anew for every stage's shapes: two minutes, and a third of the time a step from then on.
        self.sam_forward, self.hq_forward = self.network.sam_forward, self.network.hq_forward
        if self.means.compiled:
            self.sam_forward = torch.compile(self.sam_forward, dynamic=False)
            self.hq_forward = torch.compile(self.hq_forward, dynamic=False)
        self.trained = [weight for group in (matrices, others) for weight in group]
        self.average = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def next_stage(self) -> bool:
        """Moves on with the averaged weights; False after the last stage."""
        self.network.load_state_dict(self.average)
        if self.stage_index + 1 == len(self.stages):
            return False
        self.stage_index, self.step, self.spent_s = self.stage_index + 1, 0, 0.0
        self._enter_stage()
        return True

    @property
    def progress(self) -> float:
        """Share of the current stage's time that is spent, 0..1."""
        return min(self.spent_s / (60 * self.minutes * self.stage.share), 1.0)

    def _rate_factor(self) -> float:
        """Warm-up in every stage, and one cosine over each of the two steps."""
        group = [stage for stage in self.stages if stage.hq == self.stage.hq]
        before = sum(stage.share for stage in group[: group.index(self.stage)])
        through = (before + self.progress * self.stage.share) / sum(stage.share for stage in group)
        cosine = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * through)) / 2
        return min(1.0, (self.step + 1) / WARM_UP_STEPS) * cosine

    def draw(self) -> Batch:
        """The batch of this step, on the device."""
        if self.stage.kind == "boxes":
            raise ValueError("the stage of empty pictures draws no scenes")
        if self._batches is None:
            drawn = Drawn(self.caches, self.stage, (self.seed, self.stage_index))
            steps = range(self.step, sys.maxsize)
            loader = DataLoader(drawn, batch_size=None, sampler=steps, num_workers=self.means.workers)
            self._batches = iter(loader)
        return next(self._batches).to(self.device)

    def _clock(self) -> float:
        """Seconds of work: of the processor, a thread; with a GPU, on the clock."""
        if self.device.type == "cpu":
            return time.process_time() / torch.get_num_threads()
        return time.monotonic()

    def run_step(self) -> dict[str, float]:
        started = self._clock()
        makers = {"boxes": self._box_loss, "sam": self._sam_loss, "hq": self._hq_loss}
        loss, figures = makers[self.stage.kind]()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, GRADIENT_LIMIT)
        factor = self._rate_factor()
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        weight = max(1 / EMA_STEPS, 1 / (self.step + 1))
        current = self.network.state_dict()
        for name, value in self.average.items():
            value.lerp_(current[name], weight)
        self.step += 1
        if self.step == 1:
            return {"loss": loss.item(), "norm": norm.item(), **figures}  # its time is the compiler's
        self.spent_s += self._clock() - started
        return {"loss": loss.item(), "norm": norm.item(), **figures}

    def _box_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The decoder alone learns to fill the box it is given: an empty picture, no encoder."""
        rng = np.random.default_rng([self.seed, self.stage_index, self.step])
        drawn = random_boxes(rng, side=self.stage.side, boxes=self.stage.boxes)
        boxes, targets = (values.to(self.device) for values in drawn)
        grid = self.stage.side // PATCH
        empty = torch.zeros(1, 256, grid, grid, device=self.device)
        with fast_matrices(self.device):
            logits, predicted_iou = self.network.sam_decode(
                empty,
                self.network.prompt_encoder.embed_boxes(boxes),
                torch.zeros(len(boxes), dtype=torch.int64, device=self.device),
            )
        logits, predicted_iou = logits.float(), predicted_iou.float()
        near = losses.near_box(boxes, cells=logits.shape[-1], side=self.stage.side)
        loss, true_iou = losses.step_one(logits, predicted_iou, targets, near)
        return loss, {"iou_m0": true_iou.mean().item()}

    def _sam_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        batch = self.draw()
        with fast_matrices(self.device):
            found = self.sam_forward(batch)
        near = losses.near_box(batch.boxes_N4, cells=found.logits_NMHW.shape[-1], side=self.stage.side)
        loss, true_iou = losses.step_one(found.logits_NMHW, found.predicted_iou_NM, batch.targets_NHW, near)
        alike = losses.affinity(found.affinity_BLC, batch.labels_BL)
        fine = losses.fine_affinity(found.fine_affinity_BFHW, batch.labels_BHW)
        loss = loss + AFFINITY_WEIGHT * alike + FINE_AFFINITY_WEIGHT * fine
        figures = {
            "iou_boxed": masked_mean(true_iou, ~batch.boxless_N),
            "iou_clicked": masked_mean(true_iou, batch.boxless_N),
            "affinity": alike.item(),
            "fine_affinity": fine.item(),
            "score_mse": (found.predicted_iou_NM[:, 0].detach() - true_iou).square().mean().item(),
        }
        if self.teacher:
            with fast_matrices(self.device):
                wanted = self.teacher(batch.pixels_B3SS)
            apart = cosine_loss(found.teacher_BLC, wanted.float())
            loss, figures = loss + TEACHER_WEIGHT * apart, figures | {"teacher": apart.item()}
        return loss, figures

    def _hq_loss(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of m_0 + m_hq, as inference sums them, at twice the low resolution."""
        batch = self.draw()
        with fast_matrices(self.device):
            found = self.hq_forward(batch)
        sam, hq, _ = (value.float() for value in found)
        fine = {
            name: F.interpolate(logits[:, None], scale_factor=2, mode="bilinear")[:, 0]
            for name, logits in (("m0", sam), ("sum", sam.detach() + hq), ("hq", hq))
        }
        near = losses.near_box(batch.boxes_N4, cells=fine["hq"].shape[-1], side=self.stage.side)
        loss = losses.step_two(fine["sum"], batch.targets_NHW, near)
        loss = loss + losses.step_two(fine["hq"], batch.targets_NHW, near)
        ious = {
            f"iou_{name}": losses.iou(logits, batch.targets_NHW).mean().item()
            for name, logits in fine.items()
        }
        return loss, ious

    def state(self) -> dict[str, Any]:
        return {
            "stage_index": self.stage_index,
            "step": self.step,
            "spent_s": self.spent_s,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.stage_index = state["stage_index"]
        self._enter_stage()
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.spent_s = state["step"], state["spent_s"]


def masked_mean(values: torch.Tensor, chosen: torch.Tensor) -> float:
    """The mean of the chosen values; NaN, which the journal leaves out, when there are none."""
    return values[chosen].mean().item()


@contextlib.contextmanager
def fast_matrices(device: torch.device) -> Iterator[None]:
    """bfloat16 where the device multiplies it natively, and on a CPU attention that the compiler can fuse.

    The flash kernel's backward on a CPU took a fifth of a step, for nine tokens a prompt.
    """
    on_cpu = device.type == "cpu"
    attention = sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=not on_cpu or native_bf16()), attention:
        yield


def write_atomically(value: Any, path: Path) -> None:
    fresh = path.with_suffix(".tmp")
    torch.save(value, fresh)
    os.replace(fresh, path)


class Journal:
    """Progress for people on stdout, and every report as a line of DIR/log.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "log.jsonl").open("a")
        self.sums: dict[str, list[float]] = {}
        self.count, self.last = 0, time.monotonic()

    def add(self, training: Training, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if not math.isnan(value):
                self.sums.setdefault(name, []).append(value)
        self.count += 1
        if time.monotonic() - self.last > REPORT_EVERY_S:
            self.report(training)

    def report(self, training: Training) -> None:
        if not self.count:
            return
        means = {name: round(sum(values) / len(values), 4) for name, values in self.sums.items()}
        rate = round((time.monotonic() - self.last) / self.count, 2)
        line = {
            "stage": training.stage.name,
            "step": training.step,
            "progress": round(training.progress, 3),
            "s_per_step": rate,
            **means,
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        self.sums, self.count, self.last = {}, 0, time.monotonic()


def run(training: Training, folder: Path) -> bool:
    """Trains to the end (True) or to a SIGTERM (False)."""
    journal, stop = Journal(folder), []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    saved = time.monotonic()
    while not stop:
        journal.add(training, training.run_step())
        if training.progress >= 1:
            journal.report(training)
            write_atomically({"average": training.average}, folder / f"after-{training.stage.name}.pt")
            if not training.next_stage():
                return True
            write_atomically(training.state(), folder / "state.pt")
        elif time.monotonic() - saved > SAVE_EVERY_S:
            write_atomically(training.state(), folder / "state.pt")
            saved = time.monotonic()
    write_atomically(training.state(), folder / "state.pt")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=NOTICE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--caches", type=Path, nargs="+", required=True, help="folders of tools.demo_model.cache"
    )
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--final-side", type=int, default=512)
    parser.add_argument("--init", type=Path, help="a demo checkpoint to go on from")
    parser.add_argument(
        "--hq-only", action="store_true", help="train the HQ part of --init, at the final side"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches, for a GPU")
    parser.add_argument(
        "--larger", type=int, default=1, help="so many times the pictures a step, which a GPU has room for"
    )
    parser.add_argument("--teacher", type=Path, help="efficientnet-lite0-*.pth of the PyPI package")
    parser.add_argument(
        "--eager", action="store_true", help="compile nothing: slower steps, no minutes before the first"
    )
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.hq_only and options.init is None:
        parser.error("--hq-only needs --init: there is no SAM part to leave as it is")
    print(NOTICE, flush=True)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    stages = stages_for(options.final_side, warm=options.init is not None, hq_only=options.hq_only)
    training = Training(
        [SceneCache(folder) for folder in options.caches],
        stages=tuple(replace(stage, images=stage.images * options.larger) for stage in stages),
        minutes=options.minutes,
        seed=options.seed,
        init=options.init,
        means=Means(
            device=options.device,
            workers=options.workers,
            teacher=options.teacher,
            compiled=not options.eager,
        ),
    )
    if options.resume:
        state = torch.load(options.out / "state.pt", weights_only=True, map_location=options.device)
        training.restore(state)
    finished = run(training, options.out)
    print("finished" if finished else "stopped; go on with --resume", flush=True)


if __name__ == "__main__":
    main()
