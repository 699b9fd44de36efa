"""The training's own parts: prompts, auxiliary losses, the teacher, devices, and going on after a stop."""

import json

import numpy as np
import pytest
import torch

from hqlabel.model.sam_hq import SamHQ
from tools.demo_model import losses
from tools.demo_model.batches import Batch, make_batch
from tools.demo_model.cache import UNKNOWN, SceneCache, fill
from tools.demo_model.network import DemoNetwork, demo_config
from tools.demo_model.teacher import Teacher, cosine_loss
from tools.demo_model.train import Drawn, Journal, Means, Stage, Training

SIDE = 128
STAGE = Stage(name="sam", side=SIDE, images=1, boxes=2, share=1.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> SceneCache:
    folder = tmp_path_factory.mktemp("scenes")
    fill(folder, side=SIDE, count=8, first_seed=0, rich=True)
    return SceneCache(folder)


def batches(cache: SceneCache, count: int = 12) -> list[Batch]:
    return [
        make_batch(cache, np.random.default_rng(seed), side=SIDE, images=2, boxes=3, cell=4)
        for seed in range(count)
    ]


def test_clicks_lie_on_their_object_or_beside_it_as_their_labels_say(cache) -> None:
    labels, lengths = [], set()
    for batch in batches(cache):
        lengths.add(batch.points_NP2.shape[1])
        for points, on, target in zip(
            batch.points_NP2, batch.point_labels_NP, batch.targets_NHW, strict=True
        ):
            assert on[0] == 1
            labels += on.tolist()
            for (x, y), wanted in zip(points.long() // 4, on, strict=True):
                share = target[y, x]  # of the cell of 4 pixels: it may hold an edge
                assert share > 0 if wanted else share < 1
    assert lengths == {1, 2, 3}
    assert set(labels) == {0, 1}


def test_some_prompts_of_most_batches_have_no_box(cache) -> None:
    boxless = torch.cat([batch.boxless_N for batch in batches(cache)]).float().mean()
    assert 0.1 < boxless < 0.6


def test_prompt_tokens_are_those_of_the_product(cache) -> None:
    network = DemoNetwork()
    for batch in batches(cache, 6):
        tokens, encoder = network.tokens(batch), network.prompt_encoder
        for row in range(len(tokens)):
            points, on = batch.points_NP2[row : row + 1], batch.point_labels_NP[row : row + 1]
            if batch.boxless_N[row]:
                wanted, _ = encoder(points_NP2=points, labels_NP=on)
            else:
                box = batch.boxes_N4[row : row + 1]
                wanted, _ = encoder(boxes_N4=box, points_NP2=points[:, :-1], labels_NP=on[:, :-1])
            assert torch.equal(tokens[row], wanted[0])


def test_two_places_of_a_photograph_teach_nothing_about_each_other() -> None:
    vectors = torch.randn(1, 4, 8, requires_grad=True)
    losses.affinity(vectors, torch.full((1, 4), UNKNOWN, dtype=torch.uint8)).backward()
    assert not vectors.grad.any()
    vectors.grad = None
    losses.affinity(vectors, torch.tensor([[1, 1, UNKNOWN, UNKNOWN]], dtype=torch.uint8)).backward()
    assert vectors.grad.any()


def test_the_teacher_has_the_necks_grid_and_refuses_another_networks_file(tmp_path) -> None:
    teacher = Teacher()
    found = teacher(torch.randn(1, 3, SIDE, SIDE))
    assert found.shape == (1, (SIDE // 16) ** 2, 112)
    assert cosine_loss(found, 3 * found) == pytest.approx(0, abs=1e-5)
    stored = teacher.state_dict()
    torch.save(stored | {"_fc.weight": torch.zeros(2)}, tmp_path / "whole.pth")
    assert torch.equal(Teacher.load(tmp_path / "whole.pth")._conv_stem.weight, stored["_conv_stem.weight"])
    del stored["_blocks.3._bn1.weight"]
    torch.save(stored, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"_blocks\.3\._bn1\.weight"):
        Teacher.load(tmp_path / "other.pth")


def test_a_checkpoint_has_nothing_that_only_training_needs() -> None:
    with torch.device("meta"):
        network, model = DemoNetwork(), SamHQ(demo_config(256))
    assert network.checkpoint_state().keys() == model.state_dict().keys()


def test_all_tensors_of_a_step_live_on_the_one_device(cache) -> None:
    """Where there is no GPU: on the device without memory, whose tensors refuse to meet those of the CPU."""
    meta = torch.device("meta")
    batch = make_batch(cache, np.random.default_rng(0), side=256, images=2, boxes=2, cell=4).to(meta)
    with meta:
        network, teacher = DemoNetwork(), Teacher().to(meta)
    found = network.sam_forward(batch)
    near = losses.near_box(batch.boxes_N4, cells=64, side=256)
    loss, _ = losses.step_one(found.logits_NMHW, found.predicted_iou_NM, batch.targets_NHW, near)
    loss = loss + losses.affinity(found.affinity_BLC, batch.labels_BL)
    loss = loss + losses.fine_affinity(found.fine_affinity_BFHW, batch.labels_BHW)
    loss = loss + cosine_loss(found.teacher_BLC, teacher(batch.pixels_B3SS))
    assert loss.device == meta
    with pytest.raises(RuntimeError, match="device"):
        losses.near_box(batch.boxes_N4, cells=64, side=256) + torch.zeros(64, 64)


def begin(cache: SceneCache, teacher) -> Training:
    means = Means(teacher=teacher, compiled=False)
    return Training([cache], stages=(STAGE,), minutes=5, seed=3, means=means)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(cache, tmp_path) -> None:
    torch.set_num_threads(1)
    torch.save(Teacher().state_dict(), tmp_path / "teacher.pth")
    whole = begin(cache, tmp_path / "teacher.pth")
    for _ in range(2):
        whole.run_step()
    torch.save(whole.state(), tmp_path / "state.pt")
    resumed = begin(cache, tmp_path / "teacher.pth")
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.step == 2
    wanted, found = whole.run_step(), resumed.run_step()
    assert wanted.keys() == found.keys()
    assert "teacher" in found
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=2e-3)


def test_a_stage_draws_from_scenes_that_need_no_enlarging(cache, tmp_path) -> None:
    fill(tmp_path / "small", side=64, count=2, first_seed=0)
    small = SceneCache(tmp_path / "small")
    drawn = Drawn([small, cache], STAGE, (0, 0))
    alone = Drawn([cache], STAGE, (0, 0))
    for step in range(3):
        assert torch.equal(drawn[step].pixels_B3SS, alone[step].pixels_B3SS)
    large = Drawn([small], STAGE, (0, 0))  # nothing finer: enlarged after all
    assert large[0].pixels_B3SS.shape == (1, 3, SIDE, SIDE)


def test_a_batch_without_clicked_prompts_leaves_their_mean_alone(cache, tmp_path) -> None:
    training = begin(cache, None)
    journal = Journal(tmp_path)
    for value in (0.4, float("nan"), 0.6):
        journal.add(training, {"iou_clicked": value})
    journal.report(training)
    assert json.loads((tmp_path / "log.jsonl").read_text())["iou_clicked"] == 0.5
