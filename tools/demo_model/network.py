"""The demo checkpoint's network: size, first weights, change of the input side, the two forward passes.

The parts are those of `model/`; only the training's way through them is here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model.checkpoints import load
from hqlabel.model.image_encoder import ImageEncoderViT
from hqlabel.model.mask_decoder import MaskDecoder
from hqlabel.model.prompt_encoder import PromptEncoder
from hqlabel.model.sam_config import SamHQConfig, vit_config
from tools.demo_model.batches import FINE, PATCH, PIXEL_MEAN, PIXEL_STD, Batch
from tools.demo_model.cache import SceneCache

AFFINITY_WIDTH, FINE_AFFINITY_WIDTH = 64, 16
TEACHER_WIDTH = 112  # channels of the teacher's features, `teacher.py`
FOR_TRAINING_ALONE = ("affinity", "teacher")  # in the names of weights that a checkpoint does not have
HQ_PARTS = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")


def demo_config(side: int) -> SamHQConfig:
    """The demo checkpoint's configuration at an input side of `side` pixels."""
    return vit_config(
        embed_dim=192, depth=8, num_heads=6, global_attn_indexes=(2, 5), window_size=8, image_size=side
    )


def position_frequencies() -> torch.Tensor:
    """The positional matrix (2, 128): 48 frequencies along x, 48 along y, 32 in random directions.

    SAM draws all of it from a Gaussian. With low frequencies along the axes "right of this corner" is a
    nearly linear function of the encoding, and the decoder learns to fill a box sooner.
    """
    along = torch.logspace(math.log10(0.06), math.log10(2.0), 48)
    nothing = torch.zeros(48)
    axes = [torch.stack([along, nothing]), torch.stack([nothing, along])]
    return torch.cat([*axes, 0.7 * torch.randn(2, 32)], dim=1)


@dataclass(frozen=True, kw_only=True)
class SamOutput:
    """What the SAM part's losses read, float32.

    `logits_NMHW`: four masks, (N, 4, 4G, 4G). `predicted_iou_NM`. Vectors of the patches (B, G * G, C) for
    the affinity and for the teacher; those of cells of 4 pixels (B, 16, 4G, 4G) come from the early feature.
    """

    logits_NMHW: torch.Tensor
    predicted_iou_NM: torch.Tensor
    affinity_BLC: torch.Tensor
    fine_affinity_BFHW: torch.Tensor
    teacher_BLC: torch.Tensor


class DemoNetwork(nn.Module):
    """The three parts of a SAM-HQ, trainable at any side that is a multiple of 128."""

    def __init__(self, side: int = 256) -> None:
        super().__init__()
        config = demo_config(side)
        self.image_encoder = ImageEncoderViT(config.vision)
        self.prompt_encoder = PromptEncoder(config.prompt_encoder)
        self.mask_decoder = MaskDecoder(config.mask_decoder)
        self.affinity = nn.Linear(config.mask_decoder.hidden_size, AFFINITY_WIDTH)  # for training alone
        cells = (PATCH // FINE) ** 2
        self.fine_affinity = nn.Linear(config.vision.hidden_size, cells * FINE_AFFINITY_WIDTH)  # likewise
        self.teacher_head = nn.Linear(config.mask_decoder.hidden_size, TEACHER_WIDTH)  # likewise
        self._first_weights()

    def _first_weights(self) -> None:
        for module in self.image_encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.image_encoder.pos_embed, std=0.02)
        # Learned tokens and the picture start quiet beside the positions: "where is the box" comes first.
        prompts, decoder = self.prompt_encoder, self.mask_decoder
        with torch.no_grad():
            for token in (
                *prompts.point_embeddings,
                prompts.no_mask_embed,
                decoder.iou_token,
                decoder.mask_tokens,
                decoder.hf_token,
            ):
                token.weight.mul_(0.2)
            self.image_encoder.neck[3].weight.fill_(0.2)
            prompts.pe_matrix.copy_(position_frequencies())

    def load_checkpoint(self, folder: Path) -> None:
        """Takes over a finished demo checkpoint's weights, at its side; heads for training stay."""
        trained = load(folder).model
        self.set_side(trained.config.image_size)
        state = trained.state_dict()
        state |= {name: value for name, value in self.state_dict().items() if name not in state}
        self.load_state_dict(state)

    def checkpoint_state(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint has."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not any(part in name for part in FOR_TRAINING_ALONE)
        }

    @torch.no_grad()
    def whiten_patches(self, cache: SceneCache, *, pictures: int = 300) -> None:
        """Sets the patch embedding to the whitened main components of real patches.

        A random projection sees little but each patch's mean colour; this one gives every direction the
        same weight from the first step on.
        """
        rng = np.random.default_rng(0)
        patches = []
        for index in range(min(pictures, len(cache))):
            pixels, _ = cache[index]
            height, width = (size // PATCH * PATCH for size in pixels.shape[:2])
            cut = (pixels[:height, :width].astype(np.float32) - PIXEL_MEAN) / PIXEL_STD
            cut = cut.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(0, 2, 4, 1, 3)
            patches.append(
                cut.reshape(-1, 3 * PATCH * PATCH)[rng.permutation(cut.shape[0] * cut.shape[1])[:100]]
            )
        sample = torch.from_numpy(np.concatenate(patches)).double()
        spread = torch.cov(sample.T)
        strength, direction = torch.linalg.eigh(spread)
        projection = self.image_encoder.patch_embed.proj
        width = projection.weight.shape[0]
        kept = (direction[:, -width:] / (strength[-width:] + 0.05).sqrt()).T.float()
        projection.weight.copy_(kept.reshape(projection.weight.shape))
        projection.bias.copy_(-(kept @ sample.mean(0).float()))

    @torch.no_grad()
    def set_side(self, side: int) -> None:
        """Moves the network to another input side: positional tables of the whole grid are interpolated."""
        grid = side // PATCH
        encoder = self.image_encoder
        table = F.interpolate(
            encoder.pos_embed.permute(0, 3, 1, 2), (grid, grid), mode="bicubic", antialias=True
        )
        encoder.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1).contiguous())
        for block in encoder.blocks:
            if block.window == 0:
                for name in ("rel_pos_h", "rel_pos_w"):
                    old = getattr(block.attn, name)
                    new = F.interpolate(old.T[None], 2 * grid - 1, mode="linear", align_corners=True)[0].T
                    setattr(block.attn, name, nn.Parameter(new.contiguous()))
        self.prompt_encoder.side, self.prompt_encoder.grid = side, grid

    def freeze_sam_part(self) -> None:
        """Leaves only the HQ token, its MLP and the fusion convolutions to train: the paper's second step."""
        for name, weight in self.named_parameters():
            weight.requires_grad = name.split(".")[1] in HQ_PARTS and name.startswith("mask_decoder")

    def sam_forward(self, batch: Batch) -> SamOutput:
        """The SAM part's answers, and what the auxiliary losses look at."""
        features = self.image_encoder(batch.pixels_B3SS)
        embedding = features.embedding_BCGG
        logits, predicted_iou = self.sam_decode(embedding, self.tokens(batch), batch.image_index_N)
        cells = embedding.flatten(2).transpose(1, 2)
        fine = self.fine_affinity(features.early_BGGC).permute(0, 3, 1, 2)
        return SamOutput(
            logits_NMHW=logits.float(),
            predicted_iou_NM=predicted_iou.float(),
            affinity_BLC=self.affinity(cells).float(),
            fine_affinity_BFHW=F.pixel_shuffle(fine, PATCH // FINE).float(),
            teacher_BLC=self.teacher_head(cells).float(),
        )

    def tokens(self, batch: Batch) -> torch.Tensor:
        """Prompt tokens (N, T, C): a box and T - 2 clicks, or T - 1 clicks and the padding point."""
        encoder = self.prompt_encoder
        clicks = encoder.embed_points(batch.points_NP2, batch.point_labels_NP, pad=True)
        few = encoder.embed_points(batch.points_NP2[:, :-1], batch.point_labels_NP[:, :-1], pad=False)
        boxed = torch.cat([few, encoder.embed_boxes(batch.boxes_N4)], dim=1)
        return torch.where(batch.boxless_N[:, None, None], clicks, boxed)

    def sam_decode(
        self, embedding: torch.Tensor, sparse: torch.Tensor, image_index_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the SAM masks (N, 4, 4G, 4G) and predicted IoUs (N, 4); no HQ branch.

        The HQ token already sits among the tokens, at its first value, so that adding its training later
        moves the SAM masks little.
        """
        decoder = self.mask_decoder
        shared = decoder.share(
            embedding_BCGG=embedding,
            features=(embedding,),  # not looked at on this road
            dense_BCGG=self.prompt_encoder.no_mask(),
            image_pe_1CGG=self.prompt_encoder.image_pe(),
        )
        tokens = torch.cat([decoder.output_tokens().expand(len(sparse), -1, -1), sparse], dim=1)
        out, keys = decoder.transformer(tokens, shared.first_layer.select(image_index_N), shared.terms)
        grid = embedding.shape[-1]
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).unflatten(2, (grid, grid)))
        vectors = torch.stack(
            [mlp(out[:, 1 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
        )
        logits = (vectors @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        return logits, decoder.iou_prediction_head(out[:, 0])

    def hq_forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (N, 4G, 4G) of mask 0 and of the HQ token, and the predicted IoU (N,) of mask 0."""
        with torch.no_grad():
            features = self.image_encoder(batch.pixels_B3SS)
            sparse = self.tokens(batch)
        masks = self.mask_decoder(
            embedding_BCGG=features.embedding_BCGG,
            features=(self.mask_decoder.hq_features(features),),
            image_index_N=batch.image_index_N,
            sparse_NTC=sparse,
            dense_BCGG=self.prompt_encoder.no_mask(),
            image_pe_1CGG=self.prompt_encoder.image_pe(),
            mask_tokens=(0,),
        )
        return masks.sam_NKHW[:, 0], masks.hq_NHW, masks.predicted_iou_N4[:, 0]
