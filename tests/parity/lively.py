"""Models with random weights that are large enough for every part of the network to matter."""

import numpy as np
import torch
from torch import nn

from hqlabel.model.hq_sam2.hq_sam2 import family_of
from hqlabel.model.records import resize_longest_side
from hqlabel.model.sam_config import SamHQConfig, TinyVisionConfig, vit_config
from hqlabel.model.sam_hq import SamHQ

TABLES = ("rel_pos_h", "rel_pos_w", "attention_biases")

# Grid 16 in windows of 5 (padded to 20), grid 14 in windows of 7 (no padding, other widths in the
# decoder), grid 20 in windows of 14 (padded to 28; heads of 80 as in ViT-H, global blocks first and last).
SMALL_VITS = {
    "grid16-window5": vit_config(
        embed_dim=64, depth=4, num_heads=2, global_attn_indexes=(1, 3), window_size=5, image_size=256
    ),
    "grid14-window7": vit_config(
        embed_dim=96, depth=3, num_heads=3, global_attn_indexes=(1, 2), window_size=7, image_size=224,
        out_channels=128, mlp_dim=512,
    ),
    "grid20-window14": vit_config(
        embed_dim=160, depth=4, num_heads=2, global_attn_indexes=(0, 3), window_size=14, image_size=320
    ),
}  # fmt: skip

TINY = SamHQConfig.around(TinyVisionConfig())
SMALL_TINY = SamHQConfig.around(TinyVisionConfig(image_size=256))


def lively(config: SamHQConfig, seed: int = 0) -> SamHQ:
    """A model whose logits spread over several units, with uneven tables, norms and statistics."""
    return enliven(family_of(config).from_config(config, seed), seed)


def enliven(model: SamHQ, seed: int) -> SamHQ:
    """The model with such weights, drawn on its device."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        tensor.copy_(drawn * std + mean)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                normal(module.weight, 0.3, mean=1.0)
                normal(module.bias, 0.3)
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                fan_in = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose2d):
                    fan_in = module.in_channels
                normal(module.weight, fan_in**-0.5)
                if module.bias is not None:
                    normal(module.bias, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                normal(module.running_mean, 0.3)
                spread = torch.rand(module.running_var.shape, generator=generator, device=model.device)
                module.running_var.copy_(spread + 0.5)
        for name, parameter in model.named_parameters():
            if name.endswith((*TABLES, "pos_embed", "pos_embed_window", "no_mem_embed")):
                normal(parameter, 0.5)
    return model


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with structure at every scale, uint8 RGB (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / a + c) * np.cos(y / b - c) for a, b, c in rng.uniform(3, 60, (9, 3))]
    smooth = np.stack([sum(waves[i::3]) for i in range(3)], axis=-1)
    noisy = 128 + 40 * smooth + rng.normal(0, 12, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def pixels_of(model: SamHQ, images: list[np.ndarray]) -> torch.Tensor:
    """The encoder's input (B, 3, S, S) of upright pictures of any sizes."""
    return model.preprocess([resize_longest_side(image, model.config.image_size) for image in images])


def boxes_in(height: int, width: int, count: int, seed: int = 0) -> np.ndarray:
    """Boxes (count, 4) xyxy with fractional corners, from specks to nearly the whole picture."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * [width, height]
    return corners.reshape(count, 4)
