"""`make demo`: labels the photographs of examples/photos as anybody would label theirs, and shows the result.

The same three commands a person types: `hqlabel label`, `hqlabel inspect`, and a query of the tables.
Without the shipped checkpoint (a checkout without model/weights/hqlabel-demo) a small random one is made on
the spot, and the demo says so before and after: its masks mean nothing, everything else is the real thing.

    python examples/demo.py [FOLDER]     FOLDER is demo-out unless given
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch

from hqlabel.model.checkpoints import DEMO_FOLDER, save_transformers
from hqlabel.model.sam_config import vit_config
from hqlabel.model.sam_hq import SamHQ

PHOTOS = Path(os.path.relpath(Path(__file__).resolve().parent / "photos"))
SHOWN = ("flower.jpg", "astronaut.jpg", "coins.png")
REFUSED = 4
RANDOM = (
    "NOTE: this checkout has no demo checkpoint. These masks come from RANDOM weights: they show the way of\n"
    "      the data, and nothing about quality."
)


def hqlabel(*arguments: str) -> int:
    """The exit code of `hqlabel` with these arguments, its output on this terminal."""
    print(f"\n$ hqlabel {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "hqlabel", *arguments], check=False).returncode


def checkpoint(place: Path) -> str:
    """`demo`, or the folder of a random checkpoint made on the spot when none is shipped."""
    if (DEMO_FOLDER / "model.safetensors").is_file():
        return "demo"
    print(RANDOM)
    folder = place / "random-checkpoint"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        config = vit_config(embed_dim=96, depth=2, num_heads=3, global_attn_indexes=(1,), image_size=256)
        save_transformers(SamHQ(config).eval(), folder)
    return str(folder)


def print_table(output: Path) -> None:
    """One line a photograph, read from the published Parquet as any reader would."""
    images = pq.read_table(output / "images").sort_by("image_id").to_pylist()
    instances = pq.read_table(output / "instances", columns=["image_id", "area", "predicted_iou"]).to_pylist()
    print(f"\n{'image_id':<15}{'status':<10}{'size':>10}{'boxes':>7}{'masks':>7}{'mean IoU':>10}{'ms':>8}")
    for image in images:
        ious = [
            r["predicted_iou"]
            for r in instances
            if r["image_id"] == image["image_id"] and r["area"] is not None
        ]
        mean = f"{sum(ious) / len(ious):.3f}" if ious else "-"
        size = f"{image['width']}x{image['height']}"
        print(
            f"{image['image_id']:<15}{image['status']:<10}{size:>10}{image['num_boxes']:>7}"
            f"{image['num_instances']:>7}{mean:>10}{image['segment_ms'] or 0:>8.0f}"
        )
    print(
        "mean IoU: the model's own estimate of its masks, averaged; ms: this photograph's share of the model"
    )


def print_places(place: Path) -> None:
    """Where the tables and the pictures lie."""
    print(f"\ntables:   {place}/labels/instances/*.parquet   one row a box")
    print(f"          {place}/labels/images/*.parquet      one row an image")
    for picture in sorted(path for path in place.rglob("*") if path.suffix in (".png", ".jpg", ".html")):
        print(f"picture:  {picture}")
    print("\nA page to look at, and the masks for other tools:")
    print(f"  .venv/bin/hqlabel report --output {place}/labels --allow-root {PHOTOS}")
    print(f"  .venv/bin/hqlabel export coco --output {place}/labels --to {place}/coco")
    print("\nYour own data, in one command:")
    print("  .venv/bin/hqlabel label --images photos/ --boxes boxes.json --checkpoint demo --output out")


def main() -> int:
    """Runs the demo; the exit code is the one of `hqlabel label`."""
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    began = time.monotonic()
    labels = place / "labels"
    weights = checkpoint(place)
    code = hqlabel(
        *("label", "--images", str(PHOTOS), "--boxes", str(PHOTOS / "boxes.jsonl")),
        *("--checkpoint", weights, "--output", str(labels)),
    )
    if code == REFUSED:
        print(f"Does {place} hold the demo of another version? Then remove it (rm -r {place}) and try again.")
    if code != 0:
        return code
    (place / "overlays").mkdir(exist_ok=True)
    for name in SHOWN:
        picture = place / "overlays" / f"{Path(name).stem}.png"
        places = ("--output", str(labels), "--allow-root", str(PHOTOS), "--picture", str(picture))
        hqlabel("inspect", name, *places)
    print_table(labels)
    print_places(place)
    if weights != "demo":
        print(f"\n{RANDOM}")
    print(f"\ndone in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
