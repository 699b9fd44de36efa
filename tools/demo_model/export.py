"""Turns a training state into the checkpoint: averaged weights, half precision, transformers layout.

python -m tools.demo_model.export --state DIR/after-hq-final.pt --side 384 \\
    --out model/weights/hqlabel-demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hqlabel.model.checkpoints import save_transformers
from hqlabel.model.sam_hq import SamHQ
from tools.demo_model.network import DemoNetwork, demo_config


def averaged_model(state: Path, side: int) -> SamHQ:
    """The model of the average in a training state, moved to `side` where the stage had another."""
    saved = torch.load(state, weights_only=True, map_location="cpu")
    average = saved["average"]
    grid = average["image_encoder.pos_embed"].shape[1]
    network = DemoNetwork()
    network.set_side(16 * grid)
    network.load_state_dict(average)
    if 16 * grid != side:
        network.set_side(side)
    model = SamHQ(demo_config(side)).eval()
    model.load_state_dict(network.checkpoint_state())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    weights = save_transformers(
        averaged_model(options.state, options.side), options.out, half=True, license="Apache-2.0"
    )
    print(weights)


if __name__ == "__main__":
    main()
