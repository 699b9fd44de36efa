"""`make demo`: labels three photographs as anybody would label theirs, and makes the page that shows them.

The same commands that a person types: `hqlabel label`, `hqlabel report`, and a query of the tables.
Without the shipped checkpoint (a checkout without model/weights/hqlabel-demo) a small random one is made on
the spot, and the demo says so: its masks mean nothing, everything else is the real thing.

    python examples/demo.py [FOLDER]     FOLDER is demo-out unless given
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "model" / "weights" / "hqlabel-demo" / "model.safetensors"
PHOTOS = Path(os.path.relpath(ROOT / "examples" / "photos"))
LEAST_IOU = 0.5
REFUSED = 4
RANDOM = (
    "NOTE: this checkout has no demo checkpoint. These masks come from RANDOM weights: they show the data\n"
    "      flow, and nothing about quality."
)


def hqlabel(*arguments: str) -> int:
    """The exit code of `hqlabel` with these arguments, its output on this terminal."""
    print(f"$ hqlabel {shlex.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "hqlabel", *arguments], check=False).returncode


def checkpoint(place: Path) -> str:
    """`demo`, or the folder of a random checkpoint made on the spot when none is shipped."""
    if WEIGHTS.is_file():
        return "demo"
    import torch

    from hqlabel.model.checkpoints import save_transformers
    from hqlabel.model.sam_config import vit_config
    from hqlabel.model.sam_hq import SamHQ

    print(RANDOM)
    folder = place / "random-checkpoint"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        config = vit_config(embed_dim=96, depth=2, num_heads=3, global_attn_indexes=(1,), image_size=256)
        save_transformers(SamHQ(config).eval(), folder)
    return str(folder)


def print_table(labels: Path) -> None:
    """One line a photograph, read from the published Parquet as any reader would."""
    columns = ["image_id", "area", "predicted_iou", "accepted", "category_name"]
    boxes = pq.read_table(labels / "instances", columns=columns)
    head = f"{'image':<12}{'boxes':>6}{'masks':>6}{'mean of predicted_iou':>23}"
    print(f"{head}  under {LEAST_IOU}, so accepted=false")
    for image in sorted(set(boxes["image_id"].to_pylist())):
        own = boxes.filter(pc.equal(boxes["image_id"], image))
        masks = own.filter(pc.is_valid(own["area"]))
        mean = pc.mean(masks["predicted_iou"]).as_py()
        marked = masks.filter(pc.invert(masks["accepted"]))["category_name"].to_pylist()
        print(f"{image:<12}{len(own):>6}{len(masks):>6}{mean or 0:>23.3f}  {', '.join(marked) or '-'}")


def main() -> int:
    """Runs the demo; the exit code is the one of `hqlabel label`."""
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    labels = place / "labels"
    weights = checkpoint(place)
    code = hqlabel(
        *("label", "--boxes", str(PHOTOS / "demo.jsonl"), "--checkpoint", weights, "--output", str(labels)),
        *("--set", f"filter.min_predicted_iou={LEAST_IOU}"),
    )
    if code == REFUSED:
        print(f"Does {place} hold the demo of another version? Then remove it (rm -r {place}) and try again.")
    if code != 0:
        return code
    page = labels / "report" / "index.html"
    if not page.is_file():
        hqlabel("report", "--output", str(labels), "--allow-root", str(PHOTOS))
    print_table(labels)
    print(f"Look at {page}. Your own images:")
    print("  .venv/bin/hqlabel label --images photos/ --boxes boxes.json --checkpoint demo --output out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
