"""Tiny detectors of several families with random weights and the library's own processors: no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ("a", "cat", "dog", "red", "car", "person", "blank", "picture")
LABELS = {0: "cat", 1: "dog", 2: "car"}
SIDE = 64
PROMPTS = {"a cat": "cat", "red car": "vehicle", "person": "person"}


def small_rt_detr(folder: Path, *, version: int = 2, seed: int = 0) -> Path:
    """RT-DETR or RT-DETRv2."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    shared: dict[str, Any] = {
        "backbone_config": backbone, "d_model": 32, "encoder_hidden_dim": 32,
        "encoder_in_channels": [8, 16, 16],
        "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 32, "decoder_attention_heads": 2, "decoder_layers": 2, "num_queries": 12,
        "num_denoising": 0, "id2label": LABELS,
    }  # fmt: skip
    torch.manual_seed(seed)
    if version == 2:
        model = transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**shared))
    else:
        model = transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**shared))
    return _saved(folder, model, transformers.RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE}))


def small_d_fine(folder: Path, *, seed: int = 0) -> Path:
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True], stage_light_block=[False, False, False, False],
        stage_kernel_size=[3, 3, 3, 3], hidden_sizes=[8, 16, 16, 16], embedding_size=8, depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DFineConfig(
        backbone_config=backbone, d_model=32, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=32, encoder_attention_heads=2, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32,
        decoder_attention_heads=2, decoder_layers=2, num_queries=12, num_denoising=0, id2label=LABELS,
        hidden_expansion=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.DFineForObjectDetection(config)
    return _saved(folder, model, transformers.RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE}))


def small_detr(folder: Path, *, seed: int = 0) -> Path:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12,
        id2label=LABELS,
    )  # fmt: skip
    torch.manual_seed(seed)
    processor = transformers.DetrImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    return _saved(folder, transformers.DetrForObjectDetection(config), processor)


def small_grounding_dino(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = _bert_tokenizer()
    text = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    backbone = transformers.SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        num_queries=12, max_text_len=32, disable_custom_kernels=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    # Large enough that the coarsest of its levels has more than one pixel.
    image = transformers.GroundingDinoImageProcessorPil(
        size={"shortest_edge": 2 * SIDE, "longest_edge": 4 * SIDE}
    )
    processor = transformers.GroundingDinoProcessor(image, tokenizer)
    return _saved(folder, transformers.GroundingDinoForObjectDetection(config), processor)


def small_owl_vit(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = _clip_tokenizer()
    shared: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = transformers.OwlViTConfig(
        text_config={**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**shared, "image_size": SIDE, "patch_size": 16},
        projection_dim=32,
    )
    torch.manual_seed(seed)
    image = transformers.OwlViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.OwlViTProcessor(image, tokenizer)
    return _saved(folder, transformers.OwlViTForObjectDetection(config), processor)


def small_owlv2(folder: Path, *, seed: int = 0) -> Path:
    """Opened by anybody; to be used it wants scipy."""
    tokenizer = _clip_tokenizer()
    shared: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = transformers.Owlv2Config(
        text_config={**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**shared, "image_size": SIDE, "patch_size": 16},
        projection_dim=32,
    )
    torch.manual_seed(seed)
    image = transformers.Owlv2ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.Owlv2Processor(image, tokenizer)
    return _saved(folder, transformers.Owlv2ForObjectDetection(config), processor)


def small_rf_detr(folder: Path, *, seed: int = 0) -> Path:
    """Made by anybody; to be opened it wants torchvision, as its processor is written in it alone."""
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=SIDE,
        patch_size=16, num_windows=2, out_indices=[1, 2],
    )  # fmt: skip
    config = transformers.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_n_points=2,
        decoder_self_attention_heads=2, decoder_cross_attention_heads=2, num_queries=12, group_detr=2,
        id2label=LABELS,
    )  # fmt: skip
    torch.manual_seed(seed)
    size = {"height": SIDE, "width": SIDE}
    processor = {"preprocessor_config.json": {"image_processor_type": "RfDetrImageProcessor", "size": size}}
    return _saved(folder, transformers.RfDetrForObjectDetection(config), processor)


def small_omdet_turbo(folder: Path, *, seed: int = 0) -> Path:
    """Made by anybody; to be opened it wants torchvision, as its processor is written in it alone."""
    tokenizer = _clip_tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=48,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    backbone = transformers.SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_indices=[2, 3, 4],
    )  # fmt: skip
    config = transformers.OmDetTurboConfig(
        text_config=text, backbone_config=backbone, image_size=SIDE, text_projection_in_dim=48,
        text_projection_out_dim=48, class_embed_dim=48, task_encoder_hidden_dim=64, num_queries=12,
        encoder_hidden_dim=32, encoder_in_channels=[16, 32, 64], vision_features_channels=[32, 32, 32],
        encoder_attention_heads=2, encoder_dim_feedforward=32, decoder_hidden_dim=32, decoder_num_heads=2,
        decoder_num_layers=2, decoder_dim_feedforward=32, disable_custom_kernels=True,
        apply_layernorm_after_vision_backbone=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.OmDetTurboForObjectDetection(config)
    folder = _saved(folder, model, {"processor_config.json": {"processor_class": "OmDetTurboProcessor"}})
    tokenizer.save_pretrained(folder)
    transformers.DetrImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def _saved(folder: Path, model: Any, processor: Any) -> Path:
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    if isinstance(processor, dict):  # the files of one that cannot be made here
        for name, content in processor.items():
            (folder / name).write_text(json.dumps(content))
    else:
        processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: [tiny]\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


def _bert_tokenizer() -> Any:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *WORDS]
    tokenizer = Tokenizer(
        models.WordPiece({word: at for at, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip


def _clip_tokenizer() -> Any:
    vocabulary = ["!", "<|startoftext|>", "<|endoftext|>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<|endoftext|>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<|endoftext|>", pad_token="!", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", model_max_length=16,
    )  # fmt: skip
