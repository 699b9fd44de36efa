"""Saves a small random `SamHQModel` with whatever transformers Python finds, as its users would.

    python save_with_transformers.py FOLDER

Run as a script, so that another release than the installed one can come first on `PYTHONPATH`.
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import SamHQConfig, SamHQModel


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    side = {"image_size": 128}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "global_attn_indexes": [1]}
    config = SamHQConfig(
        vision_config={**vision, "window_size": 5, **side},
        prompt_encoder_config=side,
        mask_decoder_config={"vit_dim": 64},
    )
    model = SamHQModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="6MB")
    if int(transformers.__version__.split(".")[0]) < 5:
        model.save_pretrained(folder / "bin", safe_serialization=False)
        model.save_pretrained(folder / "bin-shards", safe_serialization=False, max_shard_size="6MB")
    torch.save(model.state_dict(), folder / "state.pth")
    sys.stdout.write(transformers.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
