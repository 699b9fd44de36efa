"""Detectors of transformers give what a plain loop over the library gives; nothing else is opened."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hqlabel.model.detectors import ClosedSetDetector, DetectorError, ZeroShotDetector
from tests.model import made_detectors
from tests.model.made_detectors import PROMPTS

# Three families want packages that are no dependency; where those are installed, they are tried too.
with_scipy = pytest.mark.skipif(find_spec("scipy") is None, reason="OWLv2's processor wants scipy")
with_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="the processor wants torchvision"
)
CLOSED = {
    "rt_detr": lambda folder: made_detectors.small_rt_detr(folder, version=1),
    "rt_detr_v2": made_detectors.small_rt_detr,
    "d_fine": made_detectors.small_d_fine,
    "detr": made_detectors.small_detr,
    "rf_detr": made_detectors.small_rf_detr,
}
ZERO_SHOT = {
    "grounding-dino": made_detectors.small_grounding_dino,
    "owlvit": made_detectors.small_owl_vit,
    "owlv2": made_detectors.small_owlv2,
    "omdet-turbo": made_detectors.small_omdet_turbo,
}
LACKING = {"owlv2": with_scipy, "rf_detr": with_torchvision, "omdet-turbo": with_torchvision}
PICTURES = [
    np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    for seed, size in enumerate([(50, 80), (90, 40), (3, 64)])
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("detectors")
    return {name: make(root / name) for name, make in {**CLOSED, **ZERO_SHOT}.items()}


def plain(folder: Path, picture: np.ndarray, text: list[str] | None = None, *, threshold: float):
    """What the library's own classes give for one picture, as its documentation calls them."""
    size = [picture.shape[:2]]
    if text is None:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
        inputs = processor(images=Image.fromarray(picture), return_tensors="pt")
        post_process = processor.post_process_object_detection
    else:
        processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
        inputs = processor(images=Image.fromarray(picture), text=[text], return_tensors="pt")
        post_process = processor.post_process_grounded_object_detection
    with torch.no_grad():
        outputs = model(**inputs)
    [found] = post_process(outputs, threshold=threshold, target_sizes=size)
    return found


def families(names):
    return [pytest.param(name, marks=LACKING.get(name, ())) for name in names]


@pytest.mark.parametrize("family", families(CLOSED))
def test_a_closed_set_detector_gives_what_a_plain_loop_gives(folders, family):
    threshold = 0.0 if family == "rf_detr" else 0.2  # its random weights are sure of nothing
    detector = ClosedSetDetector(str(folders[family]), threshold=threshold)

    for picture in PICTURES:
        [found] = detector.detect([picture])
        wanted = plain(folders[family], picture, threshold=threshold)
        assert len(found.boxes_xyxy) > 0
        assert np.array_equal(found.boxes_xyxy, wanted["boxes"].numpy())
        assert np.array_equal(found.scores, wanted["scores"].numpy())
        assert found.category_ids.tolist() == wanted["labels"].tolist()
    assert [(one.id, one.name) for one in detector.categories] == [(0, "cat"), (1, "dog"), (2, "car")]
    assert detector.license == "apache-2.0"
    assert detector.name == family


@pytest.mark.parametrize("family", families(ZERO_SHOT))
def test_a_zero_shot_detector_gives_what_a_plain_loop_gives_with_our_categories(folders, family):
    detector = ZeroShotDetector(str(folders[family]), PROMPTS, threshold=0.0)

    assert [(one.id, one.name) for one in detector.categories] == [(1, "cat"), (2, "person"), (3, "vehicle")]
    for picture in PICTURES:
        [found] = detector.detect([picture])
        wanted = plain(folders[family], picture, list(PROMPTS), threshold=0.0)
        assert len(found.boxes_xyxy) > 0
        assert np.array_equal(found.boxes_xyxy, wanted["boxes"].numpy())
        assert np.array_equal(found.scores, wanted["scores"].numpy())
        assert set(found.category_ids.tolist()) <= {1, 2, 3}
        if family != "grounding-dino":
            assert found.category_ids.tolist() == [[1, 3, 2][at] for at in wanted["labels"].tolist()]


def test_a_box_of_grounding_dino_has_the_prompt_of_its_best_word(folders):
    from hqlabel.model.detectors import _prompt_of_each_query

    words = torch.tensor([[2, 7, 8, 5, 10, 11, 5, 12, 5, 3]])  # [CLS] a cat . red car . person . [SEP]
    logits = torch.full((1, 3, 12), float("-inf"))
    logits[0, 0, 2], logits[0, 0, 5] = 1.0, 0.5  # cat before car
    logits[0, 1, 4], logits[0, 1, 3] = 0.1, 9.0  # red; the period counts for nothing
    logits[0, 2, 7] = -3.0

    assert _prompt_of_each_query(logits, words, 5).tolist() == [[0, 1, 2]]


def test_several_pictures_in_one_call_have_their_answers_in_order(folders):
    detector = ClosedSetDetector(str(folders["rt_detr_v2"]), threshold=0.0)

    together = detector.detect(PICTURES)

    for picture, found in zip(PICTURES, together, strict=True):
        [alone] = detector.detect([picture])
        np.testing.assert_allclose(found.boxes_xyxy, alone.boxes_xyxy, atol=1e-3)


def test_the_fingerprint_is_of_the_files_and_the_prompts(folders, tmp_path):
    first = ClosedSetDetector(str(folders["rt_detr_v2"]), threshold=0.5)
    other = made_detectors.small_rt_detr(tmp_path / "other", seed=1)
    zero = str(folders["owlvit"])
    prompts = ZeroShotDetector(zero, {"a cat": "cat"}, threshold=0.5).fingerprint()

    assert first.fingerprint() == ClosedSetDetector(str(folders["rt_detr_v2"]), threshold=0.1).fingerprint()
    assert first.fingerprint() != ClosedSetDetector(str(other), threshold=0.5).fingerprint()
    assert prompts != ZeroShotDetector(zero, {"a cat": "dog"}, threshold=0.5).fingerprint()
    (other / "README.md").write_text("no licence here")
    again = ClosedSetDetector(str(other), threshold=0.5)
    assert again.license is None


def spoil_pickled(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(folder / "ran"))))
    return r"no \*\.safetensors; found pytorch_model\.bin"


def spoil_own_code(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForObjectDetection": "modeling.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    return "auto_map"


def spoil_tensors(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "1 missing keys"


def spoil_kind(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return "no detector that transformers can load"


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("spoil", [spoil_pickled, spoil_own_code, spoil_tensors, spoil_kind])
def test_what_would_run_code_or_be_half_random_is_refused(tmp_path, spoil):
    folder = made_detectors.small_rt_detr(tmp_path / "model")
    why = spoil(folder)

    with pytest.raises(DetectorError, match=why):
        ClosedSetDetector(str(folder), threshold=0.5)

    assert not (folder / "ran").exists()


def test_a_detector_of_the_other_kind_is_sent_to_its_own_name(folders):
    with pytest.raises(
        DetectorError, match=r"the classes of grounding-dino are text .* hf-zero-shot:.* with --prompts"
    ):
        ClosedSetDetector(str(folders["grounding-dino"]), threshold=0.5)
    with pytest.raises(DetectorError, match=r"d_fine has its own classes; wanted --detector hf:"):
        ZeroShotDetector(str(folders["d_fine"]), PROMPTS, threshold=0.5)


def test_a_place_without_a_detector_is_named(tmp_path):
    with pytest.raises(DetectorError, match="no such folder, nor a hub id"):
        ClosedSetDetector(str(tmp_path / "nothing"), threshold=0.5)
    with pytest.raises(DetectorError, match=r"no config\.json"):
        ClosedSetDetector(str(tmp_path), threshold=0.5)
    with pytest.raises(DetectorError, match="needs prompts"):
        ZeroShotDetector(str(tmp_path), {}, threshold=0.5)
