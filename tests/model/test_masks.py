"""Masks from logits: the plain way against the arithmetic written out, the traced one against it."""

from __future__ import annotations

import math
import resource
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hqlabel.model import masks, rle
from hqlabel.model.records import target_size_hw
from tests.model import plain_masks

LOW_SIDE = 256
SIZES_HW = [
    (97, 140),
    (427, 640),
    (333, 500),
    (61, 1000),
    (700, 233),
    (333, 2000),
    (2000, 333),
    (1536, 2048),
    (1024, 1024),
]
SMALL_SIZES_HW = [(1, 512), (512, 1), (3, 3), (15, 16), (16, 15), (32, 32), (31, 33)]


def blobs(size_hw: tuple[int, int], number: int, low_side: int = LOW_SIDE) -> torch.Tensor:
    """Wobbly objects with noise, many of them over the border of the image or of its padding."""
    generator = torch.Generator().manual_seed(number + sum(size_hw))
    height, width = (side / 4 for side in target_size_hw(size_hw, 4 * low_side))
    y, x = torch.meshgrid(torch.arange(low_side) + 0.5, torch.arange(low_side) + 0.5, indexing="ij")
    logits = []
    for i in range(number):
        centre_y, centre_x, size = torch.rand(3, generator=generator).tolist()
        dy, dx = y - centre_y * height, x - centre_x * width
        radius = (0.05 + 0.4 * size) * max(height, width) * (1 + 0.2 * torch.sin(5 * torch.atan2(dy, dx) + i))
        logit = 10 * torch.tanh((radius - torch.hypot(dy, dx)) / 7)
        logits.append(logit + 0.5 * torch.randn(low_side, low_side, generator=generator))
    return torch.stack(logits)


def difficult_logits(size_hw: tuple[int, int], low_side: int = LOW_SIDE) -> dict[str, torch.Tensor]:
    """Single masks (L, L) that a shortcut could get wrong."""
    generator = torch.Generator().manual_seed(7)
    height, width = target_size_hw(size_hw, 4 * low_side)
    low = {
        "empty": torch.full((low_side, low_side), -8.0),
        "full": torch.full((low_side, low_side), 8.0),
        "unsure": torch.full((low_side, low_side), 0.5),
        "barely outside": torch.full((low_side, low_side), -0.5),
        "noise": 3 * torch.randn(low_side, low_side, generator=generator),
        "only in the padding": torch.full((low_side, low_side), -8.0),
        "touches the padding": torch.full((low_side, low_side), -8.0),
        "one low-resolution pixel": torch.full((low_side, low_side), -8.0),
        "corners": torch.full((low_side, low_side), -8.0),
    }
    # Two samples past the image's edge: nearer ones are taps of its last pixels.
    low["only in the padding"][height // 4 + 2 :] = 8
    low["only in the padding"][:, width // 4 + 2 :] = 8
    low["touches the padding"][height // 8 :, width // 8 :] = 8
    low["one low-resolution pixel"][height // 8, width // 8] = 12
    low["corners"][0, 0] = low["corners"][(height - 1) // 4, (width - 1) // 4] = 30
    return low


def bilinear_matrix(num_in: int, num_out: int) -> np.ndarray:
    """(num_out, num_in): bilinear resampling with half-pixel centres and held edges, in float64."""
    source = np.clip((np.arange(num_out) + 0.5) * num_in / num_out - 0.5, 0, num_in - 1)
    distance = np.abs(source[:, None] - np.arange(num_in))
    return np.clip(1 - distance, 0, None)


def two_step_in_float64(low: torch.Tensor, size_hw: tuple[int, int]) -> np.ndarray:
    """The original's postprocess_masks for one mask, as two matrix products an axis."""
    model_side = 4 * low.shape[0]
    resized_hw = target_size_hw(size_hw, model_side)
    axes = [
        bilinear_matrix(resized, full) @ bilinear_matrix(low.shape[0], model_side)[:resized]
        for resized, full in zip(resized_hw, size_hw, strict=True)
    ]
    return axes[0] @ low.double().numpy() @ axes[1].T


def trace(low: torch.Tensor, size_hw: tuple[int, int], **settings: float) -> masks.TracedMasks:
    resized_hw = target_size_hw(size_hw, 4 * low.shape[-1])
    return masks.trace_masks(low, resized_hw=resized_hw, size_hw=size_hw, **settings)


def plain(low: torch.Tensor, size_hw: tuple[int, int], **settings: float) -> plain_masks.PlainMasks:
    resized_hw = target_size_hw(size_hw, 4 * low.shape[-1])
    return plain_masks.plain_masks(low, resized_hw=resized_hw, size_hw=size_hw, **settings)


def traced_bytes(traced: masks.TracedMasks) -> list[tuple[str, float]]:
    return list(zip(traced.runs().counts(), traced.stability_score.tolist(), strict=True))


def assert_traced_is_plain(low: torch.Tensor, size_hw: tuple[int, int]) -> None:
    """Pixels may differ only where the logit is within 1e-4 of 0; scores by as many counts."""
    traced = trace(low, size_hw)
    runs = traced.runs()
    counts = runs.counts()
    assert len(counts) == len(low)
    for i, text in enumerate(counts):
        reference = plain(low[i : i + 1], size_hw)
        logits = masks.upsample_logits(low[i : i + 1], target_size_hw(size_hw, 4 * low.shape[-1]), size_hw)[0]
        mask = torch.from_numpy(rle.rle_to_mask(text, size_hw))
        unlike = mask != reference.masks_NHW[0]
        assert not (unlike & (logits.abs() > 1e-4)).any()
        if not unlike.any():
            assert runs.areas()[i] == reference.area_N[0]
            np.testing.assert_array_equal(runs.bboxes_xywh()[i], reference.bbox_xywh_N4[0])
        unsure = int(((logits.abs() - 1).abs() < 1e-4).sum())
        below = max(1, int((logits > -1).sum()))
        difference = abs(float(traced.stability_score[i]) - float(reference.stability_score_N[0]))
        assert difference <= 2 * unsure / below + 1e-7


@pytest.mark.parametrize("size_hw", [*SIZES_HW, *SMALL_SIZES_HW])
def test_upsampling_is_the_two_bilinear_steps(size_hw: tuple[int, int]) -> None:
    low = blobs(size_hw, 2)
    logits = masks.upsample_logits(low, target_size_hw(size_hw, 1024), size_hw)
    reference = plain(low, size_hw)
    for i in range(2):
        expected = two_step_in_float64(low[i], size_hw)
        # float32 source positions near 1000 are good to 3e-5 of a pixel; logits rise by some 3 a pixel.
        np.testing.assert_allclose(logits[i].numpy(), expected, atol=3e-4)
        sure = np.abs(expected) > 3e-4
        np.testing.assert_array_equal(reference.masks_NHW[i].numpy()[sure], (expected > 0)[sure])


@pytest.mark.parametrize("size_hw", [*SIZES_HW, *SMALL_SIZES_HW])
def test_traced_blobs_are_the_plain_ones(size_hw: tuple[int, int]) -> None:
    assert_traced_is_plain(blobs(size_hw, 5), size_hw)


@pytest.mark.parametrize("size_hw", [(97, 140), (333, 500), (2000, 333), (768, 1024), *SMALL_SIZES_HW])
def test_traced_difficult_masks_are_the_plain_ones(size_hw: tuple[int, int]) -> None:
    assert_traced_is_plain(torch.stack(list(difficult_logits(size_hw).values())), size_hw)


@pytest.mark.parametrize("low_side", [16, 40])
def test_other_input_sides(low_side: int) -> None:
    size_hw = (150, 210)
    assert_traced_is_plain(blobs(size_hw, 4, low_side), size_hw)


def test_a_stability_offset_moves_both_counts() -> None:
    size_hw = (150, 210)
    low = blobs(size_hw, 3)
    for offset in (0.25, 4.0):
        traced, reference = (way(low, size_hw, stability_offset=offset) for way in (trace, plain))
        logits = masks.upsample_logits(low, target_size_hw(size_hw, 1024), size_hw)
        expected = (logits > offset).sum((1, 2)) / (logits > -offset).sum((1, 2))
        np.testing.assert_allclose(traced.stability_score, expected, atol=1e-4)
        np.testing.assert_allclose(reference.stability_score_N, expected, atol=1e-6)


def test_an_empty_and_a_full_mask() -> None:
    low = difficult_logits((333, 500))
    traced = trace(torch.stack([low["empty"], low["full"]]), (333, 500))
    assert traced.runs().areas().tolist() == [0, 333 * 500]
    assert traced.runs().bboxes_xywh().tolist() == [[0, 0, 0, 0], [0, 0, 500, 333]]
    assert traced.stability_score.tolist() == [0.0, 1.0]


def test_what_is_positive_in_the_padding_alone_is_not_in_the_mask() -> None:
    low = difficult_logits((333, 500))["only in the padding"][None]
    assert trace(low, (333, 500)).runs().areas().tolist() == [0]
    assert int(plain(low, (333, 500)).area_N) == 0


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_logit_of_zero_is_outside(zero: float) -> None:
    low = torch.full((1, 64, 64), zero)
    assert int(plain(low, (50, 80)).area_N) == 0
    assert trace(low, (50, 80)).runs().areas().tolist() == [0]


def test_a_mask_on_the_contour_of_an_exact_zero() -> None:
    # Columns of -1 and 1 meet at x = 32; at four times the size, no pixel centre lies on the contour.
    # With an odd number of columns between, one does, exactly.
    low = torch.full((1, 64, 64), -1.0)
    low[:, :, 32:] = 0.0
    low[:, :, 33:] = 1.0
    assert_traced_is_plain(low, (64, 64))
    assert int(trace(low, (64, 64)).runs().areas()[0]) == int(plain(low, (64, 64)).area_N)


def test_stability_is_never_nan() -> None:
    low = difficult_logits((97, 140))
    stability = trace(
        torch.stack([low["empty"], low["unsure"], low["barely outside"]]), (97, 140)
    ).stability_score
    assert stability.tolist() == [0.0, 0.0, 0.0]
    assert stability.dtype == np.float32


def test_no_masks() -> None:
    low = torch.zeros((0, 256, 256))
    traced = trace(low, (427, 640))
    assert len(traced.runs()) == 0
    assert traced.stability_score.shape == (0,)
    assert plain(low, (427, 640)).masks_NHW.shape == (0, 427, 640)


def test_a_mask_has_the_same_bytes_whatever_else_is_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    size_hw = (427, 640)
    low = torch.cat([blobs(size_hw, 6), torch.stack(list(difficult_logits(size_hw).values()))])
    together = traced_bytes(trace(low, size_hw))
    assert together == [traced_bytes(trace(one[None], size_hw))[0] for one in low]
    order = torch.randperm(len(low), generator=torch.Generator().manual_seed(0))
    assert traced_bytes(trace(low[order], size_hw)) == [together[i] for i in order.tolist()]
    monkeypatch.setattr(masks, "MASKS_PER_STEP", 2)
    monkeypatch.setattr(masks, "SLAB_PIXELS_CPU", 7 * 16 * 16)
    assert traced_bytes(trace(low, size_hw)) == together


@pytest.mark.parametrize("size_hw", [(97, 140), (333, 2000), (768, 1024), *SMALL_SIZES_HW])
def test_whole_frames_have_the_bytes_of_tiles(
    size_hw: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = torch.cat([blobs(size_hw, 4), torch.stack(list(difficult_logits(size_hw).values()))])
    monkeypatch.setattr(masks, "WHOLE_FRAME_SHARE", 1.0)
    of_tiles = traced_bytes(trace(low - 0.25, size_hw))
    monkeypatch.setattr(masks, "WHOLE_FRAME_SHARE", -1.0)
    for strip_pixels in (masks.STRIP_PIXELS, 3 * size_hw[0]):
        monkeypatch.setattr(masks, "STRIP_PIXELS", strip_pixels)
        assert traced_bytes(trace(low - 0.25, size_hw)) == of_tiles


def test_noise_is_traced_as_a_whole_frame_and_objects_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    size_hw = (768, 1024)
    traced_whole = []
    trace_frame = masks.trace_frame

    def watched(low_LL: torch.Tensor, *settings: Any) -> masks.FrameTrace:
        traced_whole.append(low_LL)
        return trace_frame(low_LL, *settings)

    monkeypatch.setattr(masks, "trace_frame", watched)
    noise = difficult_logits(size_hw)["noise"]
    trace(torch.cat([blobs(size_hw, 4), noise[None]]), size_hw)
    (one,) = traced_whole
    assert torch.equal(one, noise)


def test_the_size_of_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    size_hw = (333, 500)
    low = torch.cat([blobs(size_hw, 4), torch.stack(list(difficult_logits(size_hw).values()))])
    usual = traced_bytes(trace(low, size_hw))
    for tiles_per_axis in (4, 12, 16):
        monkeypatch.setattr(masks, "TILES_PER_AXIS", tiles_per_axis)
        masks.tile_grid.cache_clear()
        assert traced_bytes(trace(low, size_hw)) == usual
    masks.tile_grid.cache_clear()


@pytest.mark.parametrize(
    ("num_in", "num_out"),
    [(256, 1024), (683, 427), (1024, 640), (170, 333), (576, 1080), (1024, 3), (1, 7), (5, 5)],
)
def test_taps_are_those_of_interpolate(num_in: int, num_out: int) -> None:
    first, weights = masks._bilinear_taps(num_in, num_out)
    taps = np.zeros((num_out, num_in + 1), dtype=np.float32)
    taps[np.arange(num_out), first] = weights[:, 0]
    taps[np.arange(num_out), first + 1] += weights[:, 1]
    impulses = F.interpolate(torch.eye(num_in)[None], size=num_out, mode="linear", align_corners=False)[0]
    np.testing.assert_array_equal(taps[:, :num_in].T, impulses.numpy())


def test_memory_is_bounded_in_masks_and_pixels() -> None:
    size_hw = (4000, 6000)
    low = blobs(size_hw, 2).repeat(40, 1, 1)
    trace(low[:2], size_hw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traced = trace(low, size_hw)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(traced.runs()) == 80
    # Dense masks alone would take 1.8 GiB, their logits 7.2 GiB.
    assert grown_mib < 300


def test_what_is_not_low_resolution_logits_is_refused() -> None:
    for low in (torch.zeros(2, 64, 32), torch.zeros(64, 64), torch.zeros(1, 64, 64, dtype=torch.bfloat16)):
        for way in (masks.trace_masks, plain_masks.plain_masks):
            with pytest.raises(ValueError, match=r"wanted float32 \(N, 4G, 4G\)"):
                way(low, resized_hw=(256, 256), size_hw=(10, 10))
    with pytest.raises(ValueError, match="wanted sides from 1 to 256"):
        masks.trace_masks(torch.zeros(1, 64, 64), resized_hw=(256, 300), size_hw=(10, 10))
    with pytest.raises(ValueError, match="greater than 0"):
        masks.trace_masks(torch.zeros(1, 64, 64), resized_hw=(256, 256), size_hw=(9, 9), stability_offset=0)
    for way in (masks.trace_masks, plain_masks.plain_masks):
        with pytest.raises(ValueError, match=r"size_hw is \(0, 9\)"):
            way(torch.zeros(1, 64, 64), resized_hw=(256, 256), size_hw=(0, 9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size_hw", [(97, 140), (427, 640), (1536, 2048)])
def test_cuda_traces_what_the_cpu_does(size_hw: tuple[int, int]) -> None:
    low = torch.cat([blobs(size_hw, 6), torch.stack(list(difficult_logits(size_hw).values()))])
    on_cpu, on_gpu = trace(low, size_hw), trace(low.cuda(), size_hw)
    assert on_gpu.runs().counts() == on_cpu.runs().counts()
    np.testing.assert_array_equal(on_gpu.stability_score, on_cpu.stability_score)
    assert math.isfinite(float(on_gpu.stability_score.sum()))
