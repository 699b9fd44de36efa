"""The shipped checkpoint through the original code: the same masks on trained weights too."""

import pytest
import torch

from hqlabel.model.checkpoints import DEMO_FOLDER, load, save_original
from hqlabel.model.masks import upsample_logits
from tests.parity.oracle import build_original, predict_boxes
from tests.parity.stand_ins import import_original
from tools.demo_model.evaluate import held_out_scene

LOGITS = 2e-5  # of the largest reference logit
NEAR_ZERO = 1e-4


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model, and the original's predictor after a strict load of the same weights as a .pth file."""
    model = load(DEMO_FOLDER).model
    path = tmp_path_factory.mktemp("demo") / "sam_hq_demo.pth"
    save_original(model, path)
    original = build_original(model.config)
    original.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return model, import_original().SamPredictor(original.eval())


@pytest.mark.parametrize("index", range(4))
def test_the_original_code_gives_the_same_masks_with_the_demo_checkpoint(both, index):
    model, predictor = both
    scene, boxes = held_out_scene(index, model.config.image_size + 100 * index)
    predictor.transform.target_length = model.config.image_size
    full, iou, low = predict_boxes(predictor, scene.pixels_hwc, boxes)

    embedding = model.encode_images([scene.pixels_hwc])
    ours = model.decode_boxes(embedding, [boxes])
    ours_full = upsample_logits(ours.low_res_NMHW[:, 0], embedding.resized_hw[0], embedding.sizes_hw[0])

    assert (ours.low_res_NMHW - low).abs().max() <= LOGITS * low.abs().max()
    assert (ours.predicted_iou_NM - iou).abs().max() <= 1e-5
    differing = ((ours_full > 0) != (full[:, 0] > 0)) & (full[:, 0].abs() > NEAR_ZERO)
    assert int(differing.sum()) == 0
    assert 0 < int((full > 0).sum()) < full.numel()
