"""Every published size against the classes that published it: names, shapes, counts, and the round trip."""

import pytest
import torch
from transformers import SamHQConfig as TheirConfig
from transformers import SamHQModel

from hqlabel.model.checkpoints import load, save_original, save_transformers
from hqlabel.model.sam_config import PUBLISHED, check_config_json, config_to_json
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.weight_names import IGNORED, config_from_shapes, rename
from tests.parity.lively import SMALL_TINY, SMALL_VITS, lively
from tests.parity.oracle import build_original, original_of

VITS = ["vit_b", "vit_l", "vit_h"]

# encoder, prompt encoder, decoder, of which HQ, and the number of tensors in a published file
COUNTS = {
    "vit_b": (89_670_912, 6_220, 5_129_444, 1_071_104, 339),
    "vit_l": (308_278_272, 6_220, 5_391_588, 1_333_248, 507),
    "vit_h": (637_026_048, 6_220, 5_653_732, 1_595_392, 619),
    "vit_tiny": (6_065_532 - 321_640, 6_220, 4_506_852, 448_512, 464),
}
CLASSIFIER_TENSORS = 4  # of TinyViT; nothing reads them


def on_meta(make):
    with torch.device("meta"):
        return make()


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_parameter_counts_are_the_published_ones(size):
    model = on_meta(lambda: SamHQ(PUBLISHED[size]))
    encoder, prompt, decoder, _, tensors = COUNTS[size]

    assert encoder == parameters(model.image_encoder)
    assert prompt == parameters(model.prompt_encoder)
    assert decoder == parameters(model.mask_decoder)
    assert tensors == len(model.state_dict()) + (CLASSIFIER_TENSORS if size == "vit_tiny" else 0)


@pytest.mark.parametrize(
    ("size", "percent"), [("vit_b", 1.2), ("vit_l", 0.45), ("vit_h", 0.25), ("vit_tiny", 4.6)]
)
def test_hq_adds_little_to_sam(size, percent):
    """About half a percent, as the paper says of the large sizes."""
    model = on_meta(lambda: SamHQ(PUBLISHED[size]))
    decoder = model.mask_decoder
    names = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")
    added = sum(parameters(getattr(decoder, name)) for name in names)

    assert added == COUNTS[size][3]
    assert 100 * added / (parameters(model) - added) == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_names_and_shapes_are_the_originals(size):
    ours = on_meta(lambda: SamHQ(PUBLISHED[size])).state_dict()
    # The original's TinyViT reads numbers back while it is built, which a tensor without memory cannot give.
    build = build_original if size == "vit_tiny" else lambda config: on_meta(lambda: build_original(config))
    original = build(PUBLISHED[size]).state_dict()
    read = {name: shape for name, shape in shapes(original).items() if not IGNORED.fullmatch(name)}

    assert shapes(ours) == read
    assert {rename(name, "original", "original") for name in read} == set(ours)


@pytest.mark.parametrize("size", VITS)
def test_names_and_shapes_are_transformers(size):
    config = PUBLISHED[size]
    ours = on_meta(lambda: SamHQ(config)).state_dict()
    theirs = on_meta(lambda: SamHQModel(TheirConfig.from_dict(config_to_json(config)))).state_dict()
    tied = theirs.pop("prompt_encoder.shared_embedding.positional_embedding")
    renamed = {rename(name, "original", "transformers"): shape for name, shape in shapes(ours).items()}

    assert renamed == shapes(theirs)
    assert tied.shape == theirs["shared_image_embedding.positional_embedding"].shape
    assert {rename(name, "transformers", "original") for name in theirs} == set(ours)


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_the_architecture_is_read_from_the_shapes_alone(size):
    config = PUBLISHED[size]

    assert config_from_shapes(shapes(on_meta(lambda: SamHQ(config)).state_dict())) == config


@pytest.mark.parametrize("size", VITS)
def test_their_own_config_file_of_each_size_is_read(size):
    config = PUBLISHED[size]
    vision = config.vision
    theirs = TheirConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "global_attn_indexes": list(vision.global_attn_indexes),
        },
        mask_decoder_config={"vit_dim": vision.hidden_size},
    )

    check_config_json(theirs.to_dict(), config)


@pytest.mark.parametrize("config", SMALL_VITS.values(), ids=SMALL_VITS)
def test_original_to_ours_to_transformers_and_back_keeps_every_bit(config, tmp_path):
    state = original_of(lively(config)).state_dict()
    torch.save(state, tmp_path / "original.pth")
    first = load(tmp_path / "original.pth")
    save_transformers(first.model, tmp_path / "folder")
    second = load(tmp_path / "folder")
    save_original(second.model, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)

    assert set(state) - set(back) == set(first.weights.ignored_keys)
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_light_hq_sam_comes_back_without_its_classifier(tmp_path):
    state = original_of(lively(SMALL_TINY)).state_dict()
    torch.save({"model": state}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 256}}')
    loaded = load(tmp_path)
    save_original(loaded.model, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)

    assert set(state) - set(back) == set(loaded.weights.ignored_keys)
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
