"""The original SAM-HQ (`segment-anything-hq`) with the weights of one of our models."""

from functools import partial

import numpy as np
import torch

from hqlabel.model.sam_config import DECODER_HEADS, PIXEL_MEAN, PIXEL_STD, SamHQConfig, TinyVisionConfig
from hqlabel.model.sam_hq import SamHQ
from tests.parity.stand_ins import import_original


def original_of(model: SamHQ) -> torch.nn.Module:
    """The original `Sam` with the same architecture and a copy of the same weights, in evaluation mode."""
    sam = build_original(model.config)
    result = sam.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(name.split(".")[1] in ("head", "norm_head") for name in result.missing_keys), (
        result.missing_keys
    )
    # Again, after loading: until then the original's TinyViT runs with attention biases of zero.
    return sam.eval()


def build_original(config: SamHQConfig) -> torch.nn.Module:
    m = import_original().modeling
    decoder, prompt = config.mask_decoder, config.prompt_encoder
    sam = m.Sam(
        image_encoder=original_encoder(config),
        prompt_encoder=m.PromptEncoder(
            embed_dim=prompt.hidden_size,
            image_embedding_size=(prompt.grid, prompt.grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=prompt.mask_input_channels,
        ),
        mask_decoder=m.MaskDecoderHQ(
            num_multimask_outputs=3,
            transformer=m.TwoWayTransformer(
                depth=decoder.num_hidden_layers,
                embedding_dim=decoder.hidden_size,
                mlp_dim=decoder.mlp_dim,
                num_heads=DECODER_HEADS,
            ),
            transformer_dim=decoder.hidden_size,
            iou_head_depth=3,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
            vit_dim=decoder.vit_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    return sam.eval()


def original_encoder(config: SamHQConfig) -> torch.nn.Module:
    m, vision = import_original().modeling, config.vision
    if isinstance(vision, TinyVisionConfig):
        return m.TinyViT(
            img_size=vision.image_size,
            embed_dims=list(vision.embed_dims),
            depths=list(vision.depths),
            num_heads=[2, *vision.num_heads],
            window_sizes=[7, *vision.window_sizes],
            drop_path_rate=0.0,
        )
    return m.ImageEncoderViT(
        depth=vision.num_hidden_layers,
        embed_dim=vision.hidden_size,
        img_size=vision.image_size,
        mlp_ratio=vision.mlp_dim / vision.hidden_size,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=vision.num_attention_heads,
        patch_size=16,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=vision.global_attn_indexes,
        window_size=vision.window_size,
        out_chans=vision.output_channels,
    )


def predictor_of(model: SamHQ):
    """The original's `SamPredictor` around `original_of(model)`."""
    return import_original().SamPredictor(original_of(model))


def predict_boxes(predictor, image_hwc: np.ndarray, boxes_xyxy: np.ndarray, **options):
    """Full-resolution logits (N, M, H, W), predicted IoU (N, M) and low-resolution logits of one image."""
    predictor.set_image(image_hwc)
    boxes = torch.as_tensor(
        predictor.transform.apply_boxes(boxes_xyxy, image_hwc.shape[:2]), dtype=torch.float
    )
    return predictor.predict_torch(
        None, None, boxes, return_logits=True, **{"multimask_output": False, **options}
    )
