"""The architecture of HQ-SAM 2's image encoder, Hiera, as typed values, and how a file's tensors tell it.

Widths and depths follow from shapes. Heads, windows and global blocks do not: they are those of the published
size with this width and these blocks per stage, or what a `config.json` next to the weights states, in the
words of the original's own configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from hqlabel.model.records import Fit
from hqlabel.model.sam_config import (
    ConfigError,
    EncoderConfig,
    SamHQConfig,
)
from hqlabel.model.weight_names import Shapes, count_of, side_of, with_decoder

TRUNK = "image_encoder.trunk"
MODEL_TYPE = "hq_sam2"


@dataclass(frozen=True, kw_only=True)
class HieraConfig(EncoderConfig):
    """A Hiera image encoder of four stages, each of twice the width and heads and half the grid of the last.

    `embed_dim`, `num_heads`: of the first stage. `stages`: blocks of each. `global_att_blocks`: those that
    attend over the whole grid (0-based). `window_spec`: tokens along a window of the other blocks, by stage.
    `background_side`: side of the coarse position table.
    """

    fit: ClassVar[Fit] = "stretch"

    embed_dim: int = 144
    num_heads: int = 2
    stages: tuple[int, ...] = (2, 6, 36, 4)
    global_att_blocks: tuple[int, ...] = (23, 33, 43)
    window_spec: tuple[int, ...] = (8, 4, 16, 8)
    background_side: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.stages) != 4 or len(self.window_spec) != 4 or min(*self.stages, *self.window_spec) < 1:
            raise ConfigError(
                f"stages {self.stages} and window_spec {self.window_spec} must be four numbers from 1 each"
            )
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} must be a multiple of {self.num_heads} heads")
        if self.image_size % 32 or (self.image_size // 4) % self.window_spec[0]:
            raise ConfigError(
                f"image_size {self.image_size} must be a multiple of 32, and a quarter of it a multiple of "
                f"the first window, {self.window_spec[0]}"
            )
        if any(window % 2 for window in self.window_spec[:3]):
            raise ConfigError(f"window_spec {self.window_spec}: the first three are halved, so must be even")
        blocks = self.global_att_blocks
        if list(blocks) != sorted(set(blocks)) or not all(0 <= i < sum(self.stages) for i in blocks):
            raise ConfigError(
                f"global_att_blocks {blocks} must name, in rising order, blocks of the {sum(self.stages)}"
            )

    @property
    def name(self) -> str:
        """`hiera_t`, `hiera_s`, `hiera_b+`, `hiera_l`, or width and blocks per stage for others."""
        for name, size in HIERA_SIZES.items():
            if (size.embed_dim, size.stages) == (self.embed_dim, self.stages):
                return name
        return f"hiera_{self.embed_dim}x" + "-".join(map(str, self.stages))

    def blocks(self) -> list[tuple[int, int, bool]]:
        """Return stage, window (0: the whole grid) and whether it pools, of each block.

        A block that pools, the first of a stage but the first stage's, still sees the grid of the stage
        before, and has its window.
        """
        found: list[tuple[int, int, bool]] = []
        for stage, depth in enumerate(self.stages):
            for place in range(depth):
                pools = stage > 0 and place == 0
                window = self.window_spec[stage - 1 if pools else stage]
                found.append((stage, 0 if len(found) in self.global_att_blocks else window, pools))
        return found


HIERA_SIZES: Mapping[str, HieraConfig] = {
    "hiera_t": HieraConfig(
        embed_dim=96, num_heads=1, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9), window_spec=(8, 4, 14, 7)
    ),
    "hiera_s": HieraConfig(
        embed_dim=96, num_heads=1, stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13),
        window_spec=(8, 4, 14, 7),
    ),
    "hiera_b+": HieraConfig(
        embed_dim=112, num_heads=2, stages=(2, 3, 16, 3), global_att_blocks=(12, 16, 20),
        window_spec=(8, 4, 14, 7), background_side=14,
    ),
    "hiera_l": HieraConfig(),
}  # fmt: skip
"""The sizes of SAM 2.1, by the original's names. With HQ weights only `hiera_l` is published."""


def hq_sam2_config(vision: HieraConfig) -> SamHQConfig:
    """Return the configuration of an HQ-SAM 2 with this encoder and the usual prompt encoder and decoder."""
    return SamHQConfig.around(vision)


# From a file

STATED = {
    "image_size": "image_size",
    "num_heads": "num_heads",
    "global_att_blocks": "global_att_blocks",
    "window_spec": "window_spec",
}
"""Keys of a `config.json` that state what does not follow from shapes, and the fields they are."""

CHECKED = {
    "embed_dim": "embed_dim",
    "stages": "stages",
    "d_model": "output_channels",
    "window_pos_embed_bkg_spatial_size": "background_side",
}
"""Keys that shapes tell too: they must agree."""


def hiera_from_shapes(shapes: Shapes, values: Mapping[str, Any]) -> SamHQConfig:
    """Return the architecture of tensors of these shapes, under the model's names.

    `values`: a parsed `config.json` next to them; empty without one.

    Raises:
        ConfigError: a tensor that the architecture is read from is missing or has an impossible shape, the
            size is none of the published ones and not stated, or `values` contradicts the tensors.
    """
    embed_dim, stages = side_of(shapes, f"{TRUNK}.patch_embed.proj.weight", 0, of=4), stages_of(shapes)
    published = next(
        (one for one in HIERA_SIZES.values() if (one.embed_dim, one.stages) == (embed_dim, stages)), None
    )
    stated = {field: _plain(values[key], key) for key, field in STATED.items() if values.get(key) is not None}
    missing = [key for key in STATED if key != "image_size" and STATED[key] not in stated]
    if published is None and missing:
        known = ", ".join(f"{x.embed_dim} with {x.stages} ({name})" for name, x in HIERA_SIZES.items())
        raise ConfigError(
            f"a Hiera of embed_dim {embed_dim} with {stages} blocks per stage is none of the published "
            f"sizes, {known}: heads, windows and global blocks do not follow from its tensors; put a "
            f"config.json with {', '.join(missing)} next to the weights, in a folder"
        )
    vision = replace(
        published or HieraConfig(),
        embed_dim=embed_dim,
        stages=stages,
        background_side=side_of(shapes, f"{TRUNK}.pos_embed", 2, of=4),
        output_channels=side_of(shapes, "image_encoder.neck.convs.0.conv.weight", 0, of=4),
        **stated,
    )
    for key, field in CHECKED.items():
        found, value = getattr(vision, field), values.get(key)
        if value is not None and _plain(value, key) not in (found, (found, found)):
            raise ConfigError(f"config.json: {key} is {value!r}, but {found!r} by the tensors")
    return with_decoder(vision, shapes, vit_dim=0)


def stages_of(shapes: Shapes) -> tuple[int, ...]:
    """Return the blocks per stage: a stage begins where a block projects to a new width."""
    depth = count_of(shapes, f"{TRUNK}.blocks")
    starts = [0, *(i for i in range(depth) if f"{TRUNK}.blocks.{i}.proj.weight" in shapes), depth]
    return tuple(end - start for start, end in pairwise(starts))


def unknown_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a parsed `config.json` that are not known here.

    Raises:
        ConfigError: it is another model's.
    """
    if values.get("model_type") not in (None, MODEL_TYPE):
        raise ConfigError(f"config.json: model_type {values['model_type']!r}; wanted {MODEL_TYPE!r}")
    return tuple(sorted(set(values) - {"model_type", *STATED, *CHECKED}))


def _plain(value: Any, key: str) -> Any:
    """Return a whole number, or whole numbers as a tuple."""
    numbers = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise ConfigError(f"config.json: {key} is {value!r}; wanted whole numbers")
    return numbers if isinstance(value, list) else value
