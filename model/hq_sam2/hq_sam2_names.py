"""The names of HQ-SAM 2's tensors: the published file's, the model's, and those of the video part.

The model's names are the file's but for the prefixes of prompt encoder and mask decoder, which are those of
`SamHQ` here, and for the two-way transformer's MLP. `no_mem_embed` reads like a part of the video's memory
and is not one: the embedding of every image has it.
"""

from __future__ import annotations

import re

NAMES = (
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("sam_mask_decoder.", "mask_decoder."),
    ("image_encoder.", "image_encoder."),
)
"""Beginnings of names, the file's and the model's."""

MEMORY = ("no_mem_embed", "image_encoder.no_mem_embed")
MLP_OF_FILE = re.compile(r"(mask_decoder\.transformer\.layers\.\d+\.mlp)\.layers\.([01])\.(weight|bias)")
MLP_OF_MODEL = re.compile(r"(mask_decoder\.transformer\.layers\.\d+\.mlp)\.lin([12])\.(weight|bias)")

VIDEO = re.compile(
    r"memory_attention\.norm\.(?:weight|bias)"
    r"|memory_attention\.layers\.\d+\.(?:linear[12]|norm[123]"
    r"|(?:self_attn|cross_attn_image)\.(?:q|k|v|out)_proj)\.(?:weight|bias)"
    r"|memory_encoder\.(?:pix_feat_proj|out_proj|mask_downsampler\.encoder\.\d+)\.(?:weight|bias)"
    r"|memory_encoder\.fuser\.layers\.\d+\.(?:gamma|(?:dwconv|norm|pwconv[12])\.(?:weight|bias))"
    r"|maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"
    r"|(?:mask_downsample|obj_ptr_tpos_proj|obj_ptr_proj\.layers\.\d+)\.(?:weight|bias)"
)
"""Tensors that only a video needs."""


def name_in_model(name: str) -> str | None:
    """Return the model's name of a file's tensor; None: it is of no part of the model."""
    if name == MEMORY[0]:
        return MEMORY[1]
    theirs, ours = next((pair for pair in NAMES if name.startswith(pair[0])), ("", ""))
    own = ours + name.removeprefix(theirs)
    own = MLP_OF_FILE.sub(lambda m: f"{m[1]}.lin{int(m[2]) + 1}.{m[3]}", own)
    # A file's name that reads like one of the model's own must not be taken for it.
    return own if ours and name_in_file(own) == name else None


def name_in_file(name: str) -> str:
    """Return the file's name of a model's tensor, or of a part of one."""
    if name == MEMORY[1]:
        return MEMORY[0]
    name = MLP_OF_MODEL.sub(lambda m: f"{m[1]}.layers.{int(m[2]) - 1}.{m[3]}", name)
    theirs, ours = next((pair for pair in NAMES if name.startswith(pair[1])), ("", ""))
    return theirs + name.removeprefix(ours)
