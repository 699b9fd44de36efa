"""Every given box becomes a usable prompt or keeps its place with a listed reason; nothing raises."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hqlabel.model.rle import compress_lengths
from hqlabel.pipeline.errors import BOX_CODES
from hqlabel.pipeline.image_result import ResolvedBoxes
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.planning.suspicious_boxes import suspicions
from hqlabel.pipeline.stages.box_prompts import MOST_POINTS, resolve_boxes

SIZE_HW = (480, 640)
WHOLE = compress_lengths([0, 480 * 640])


def box(given, **rest):
    return {"given": given, **rest}


def resolve(*given, rules=None, size_hw=SIZE_HW, **frame) -> ResolvedBoxes:
    boxes = [one if isinstance(one, dict) else box(one) for one in given]
    return resolve_boxes(boxes, rules or BoxRules(), upright_size_hw=size_hw, **frame)


@pytest.mark.parametrize(
    "given",
    [(1, 2, 3, 4), (0, 0, 640, 480), (639, 479, 640, 480), (-0.0, -0.0, 5, 5), (0.1, 0.1, 0.35, 0.35)],
)
def test_a_sound_box_is_used_as_it_is(given):
    found = resolve(given)

    np.testing.assert_array_equal(np.float32([given]), found.prompt_xyxy)
    assert ((None,), ((),), [True]) == (found.error, found.flags, found.usable.tolist())
    assert not np.signbit(found.prompt_xyxy).any()


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ((-5, -5, 10, 10), (0, 0, 10, 10)),
        ((10, 10, 640.4, 480.0001), (10, 10, 640, 480)),
        ((-1e30, -1e30, 1e30, 1e30), (0, 0, 640, 480)),
        ((639.5, 0, 700, 1), (639.5, 0, 640, 1)),
    ],
)
def test_a_box_over_the_edge_is_cut_and_says_so(given, prompt):
    found = resolve(given)

    np.testing.assert_array_equal(np.float32([prompt]), found.prompt_xyxy)
    assert (("box_clipped",),) == found.flags
    assert (None,) == found.error


def scored(given, score=None, category=1):
    return box(given, score=score, category_id=category, category_name=None)


OVERLAPPING = [
    scored((0, 0, 100, 100), 0.5),
    scored((0, 0, 100, 98), 0.9),
    scored((0, 0, 100, 99), 0.8, category=2),
    scored((300, 300, 400, 400), None),
    scored((300, 300, 400, 399), None),
]


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("none", (None,) * 5),
        ("class", ("nms:1", None, None, None, "nms:3")),
        ("all", ("nms:1", None, "nms:1", None, "nms:3")),
    ],
)
def test_of_overlapping_boxes_the_better_one_is_used_and_named(mode, error):
    found = resolve(*OVERLAPPING, rules=BoxRules(nms_mode=mode, nms_iou=0.9))

    assert found.error == error
    assert found.usable.tolist() == [reason is None for reason in error]
    assert np.isnan(found.prompt_xyxy[~found.usable]).all()


def test_the_overlap_must_be_over_the_bound():
    pair = [scored((0, 0, 10, 10), 0.5), scored((0, 0, 10, 5), 0.4)]

    assert resolve(*pair, rules=BoxRules(nms_mode="all", nms_iou=0.5)).error == (None, None)
    assert resolve(*pair, rules=BoxRules(nms_mode="all", nms_iou=0.49)).error == (None, "nms:0")


def test_rules_are_asked_in_order_and_each_looks_at_what_is_left():
    boxes = [
        scored((0, 0, 3, 100), 0.99),  # too small, so it takes no place among the best
        scored((0, 0, 100, 100), 0.1),
        scored((9, 9, 1, 1), 0.95),  # its own fault goes first
        scored((200, 0, 300, 100), 0.7),
        scored((200, 0, 300, 100), 0.6),
        scored((400, 0, 500, 100), None),
        scored((500, 0, 600, 100), math.nan),
    ]
    rules = BoxRules(min_side_px=4, min_score=0.2, top_k=3, nms_mode="all")

    assert resolve(*boxes, rules=rules).error == (
        "box_small", "box_score", "box_inverted", None, "nms:3", None, "box_rank",
    )  # fmt: skip


def test_a_prompt_without_a_box_has_no_size_and_no_overlap():
    point = {"given": None, "points_xy": [5.0, 5.0], "point_labels": [1], "score": 0.9, "category_id": 1}
    rules = BoxRules(min_side_px=50, nms_mode="all", expand=0.5)

    found = resolve(point, (0, 0, 10, 10), point, rules=rules)

    assert found.error == (None, "box_small", None)


def test_expanded_prompts_stay_in_the_picture_and_are_no_cut_boxes():
    found = resolve((100, 100, 200, 140), (0, 0, 64, 48), rules=BoxRules(expand=0.25))

    np.testing.assert_array_equal(np.float32([[75, 90, 225, 150], [0, 0, 80, 60]]), found.prompt_xyxy)
    assert found.flags == ((), ())


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (None, "box_malformed"),
        ([], "box_malformed"),
        ((1, 2, 3), "box_malformed"),
        ((1, 2, 3, 4, 5), "box_malformed"),
        ((1, 2, None, 4), "box_malformed"),
        ((math.nan, 2, 3, 4), "box_not_finite"),
        ((1, 2, 3, math.inf), "box_not_finite"),
        ((-math.inf, 2, 3, 4), "box_not_finite"),
        ((3, 2, 1, 4), "box_inverted"),
        ((1, 4, 3, 2), "box_inverted"),
        ((1, 2, 1, 4), "box_empty"),
        ((1, 2, 3, 2), "box_empty"),
        ((5, 5, 5, 5), "box_empty"),
        ((1e8, 0, 1e8 + 1, 1), "box_outside"),
        ((640, 0, 650, 10), "box_outside"),
        ((-10, 0, 0, 10), "box_outside"),
        ((0, 480, 10, 490), "box_outside"),
        ((0, -10, 10, 0), "box_outside"),
        ((600.00001, 0, 600.00002, 5), "box_empty"),  # one and the same float32
    ],
)
def test_an_unusable_box_keeps_its_place_with_the_reason(given, code):
    found = resolve((1, 2, 3, 4), given, (5, 6, 7, 8))

    assert (None, code, None) == found.error
    assert [True, False, True] == found.usable.tolist()
    np.testing.assert_array_equal(np.float32([[1, 2, 3, 4], [np.nan] * 4, [5, 6, 7, 8]]), found.prompt_xyxy)


def test_no_boxes_give_no_prompts():
    found = resolve()

    assert (0, 4) == found.prompt_xyxy.shape
    assert () == found.error == found.flags


@pytest.mark.parametrize(
    ("box_format", "given"),
    [
        ("xyxy", (64, 48, 320, 240)),
        ("xywh", (64, 48, 256, 192)),
        ("cxcywh", (192, 144, 256, 192)),
        ("xyxy-normalised", (0.1, 0.1, 0.5, 0.5)),
        ("xywh-normalised", (0.1, 0.1, 0.4, 0.4)),
        ("cxcywh-normalised", (0.3, 0.3, 0.4, 0.4)),
    ],
)
def test_each_format_says_the_same_box(box_format, given):
    found = resolve(given, rules=BoxRules(box_format=box_format))

    np.testing.assert_allclose(found.prompt_xyxy, [[64, 48, 320, 240]], rtol=1e-6)


def test_a_negative_width_is_inverted_not_swapped():
    found = resolve((10, 10, -5, 5), rules=BoxRules(box_format="xywh"))

    assert ("box_inverted",) == found.error


def stored_picture(orientation: int) -> Image.Image:
    """A stored picture, 7 wide and 5 high, with one red pixel rectangle at x 1..4, y 2..4."""
    picture = Image.new("RGB", (7, 5))
    picture.paste((255, 0, 0), (1, 2, 4, 4))
    picture.getexif()[0x0112] = orientation
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_in_the_stored_frame_lands_on_the_same_pixels_when_upright(orientation):
    upright = ImageOps.exif_transpose(stored_picture(orientation))
    red = np.argwhere(np.asarray(upright)[..., 0] == 255)
    (top, left), (bottom, right) = red.min(axis=0), red.max(axis=0) + 1

    found = resolve(
        (1, 2, 4, 4),
        rules=BoxRules(box_frame="stored"),
        size_hw=(upright.height, upright.width),
        stored_size_hw=(5, 7),
        orientation=orientation,
    )

    assert [left, top, right, bottom] == found.prompt_xyxy[0].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_and_normalised_boxes_turn_with_the_stored_frame(orientation):
    upright = ImageOps.exif_transpose(stored_picture(orientation))
    frame = {
        "size_hw": (upright.height, upright.width),
        "stored_size_hw": (5, 7),
        "orientation": orientation,
    }
    pixels = resolve((1, 2, 4, 4), rules=BoxRules(box_frame="stored"), **frame)
    shares = resolve(
        box((1 / 7, 2 / 5, 4 / 7, 4 / 5), points_xy=[2.5, 3.0], point_labels=[1]),
        rules=BoxRules(box_frame="stored", box_format="xyxy-normalised"),
        **frame,
    )

    np.testing.assert_allclose(shares.prompt_xyxy, pixels.prompt_xyxy, rtol=1e-6)
    x1, y1, x2, y2 = pixels.prompt_xyxy[0]
    np.testing.assert_allclose(shares.points_xy[0], [[(x1 + x2) / 2, (y1 + y2) / 2]])


@pytest.mark.parametrize("orientation", [0, 9, -1])
def test_an_orientation_that_does_not_exist_is_an_error(orientation):
    with pytest.raises(ValueError, match="does not exist"):
        resolve((1, 2, 3, 4), orientation=orientation)


def test_sizes_that_contradict_the_orientation_are_an_error():
    with pytest.raises(ValueError, match="stored as"):
        resolve((1, 2, 3, 4), rules=BoxRules(box_frame="stored"), orientation=6, stored_size_hw=(480, 640))


def test_points_and_masks_stand_beside_or_instead_of_a_box():
    mask = {"size": list(SIZE_HW), "counts": WHOLE}

    found = resolve(
        box((1, 2, 3, 4), points_xy=[5.0, 6.0, 7.0, 8.0], point_labels=[1, 0]),
        box(None, points_xy=[5.0, 6.0], point_labels=[1]),
        box(None, prompt_mask=mask),
    )

    assert (None, None, None) == found.error
    assert [[5, 6], [7, 8]] == found.points_xy[0].tolist()
    assert [1, 0] == found.point_labels[0].tolist()
    assert (None, None, WHOLE) == found.prompt_mask
    assert [False, True, True] == np.isnan(found.prompt_xyxy[:, 0]).tolist()


@pytest.mark.parametrize(
    "extra",
    [
        {"points_xy": [1.0, 2.0, 3.0], "point_labels": [1]},
        {"points_xy": [1.0, 2.0], "point_labels": [1, 0]},
        {"points_xy": [1.0, 2.0], "point_labels": None},
        {"points_xy": None, "point_labels": [1]},
        {"points_xy": [1.0, 2.0], "point_labels": [2]},
        {"points_xy": [1.0, 2.0], "point_labels": [None]},
        {"points_xy": [1.0, None], "point_labels": [1]},
        {"points_xy": [math.nan, 2.0], "point_labels": [1]},
        {"points_xy": [641.0, 2.0], "point_labels": [1]},
        {"prompt_mask": {"size": [640, 480], "counts": WHOLE}},
        {"prompt_mask": {"size": [], "counts": ""}},
        {"prompt_mask": {"size": [480, 640], "counts": compress_lengths([0, 480 * 639])}},
        {"prompt_mask": {"size": [480, 640], "counts": f"b'{WHOLE}'"}},
        {"prompt_mask": {"size": [480, 640], "counts": "\ud800"}},
        {"prompt_mask": {"size": [-480, -640], "counts": WHOLE}},
        {"points_xy": [5.0, 6.0] * (MOST_POINTS + 1), "point_labels": [1] * (MOST_POINTS + 1)},
    ],
)
def test_points_or_masks_that_do_not_fit_make_the_prompt_invalid(extra):
    found = resolve(box((1, 2, 3, 4), **extra), box((5, 6, 7, 8)))

    assert ("prompt_invalid", None) == found.error
    assert np.isnan(found.prompt_xyxy[0]).all()


@pytest.mark.parametrize("value", [1e308, -1e308, math.inf, -math.inf, math.nan, 1e300])
def test_points_far_out_make_the_prompt_invalid_in_every_frame(value):
    extra = {"points_xy": [5.0, value], "point_labels": [0]}
    for orientation in range(1, 9):
        found = resolve(box(None, **extra), orientation=orientation, rules=BoxRules(box_frame="stored"))
        assert found.error == ("prompt_invalid",)


def test_points_that_fill_up_may_lie_anywhere_and_masks_may_be_empty_or_full():
    many = {"points_xy": [5.0, 6.0] * MOST_POINTS, "point_labels": [0] * MOST_POINTS}
    masks = [{"size": list(SIZE_HW), "counts": text} for text in (WHOLE, compress_lengths([480 * 640]))]
    found = resolve(
        box(None, points_xy=[5.0, 6.0, math.nan, 1e300], point_labels=[1, -1]),
        box((1, 2, 3, 4), **many),
        *(box(None, prompt_mask=mask) for mask in masks),
    )
    assert found.error == (None, None, None, None)
    assert found.points_xy[0].tolist() == [[5, 6], [0, 0]]


def test_a_bad_box_is_not_excused_by_its_points():
    found = resolve(box((3, 3, 1, 1), points_xy=[1.0, 2.0], point_labels=[1]))

    assert ("box_inverted",) == found.error


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0, 640, 480, 1e-300, 1e308])
lists = st.none() | st.lists(st.none() | numbers, max_size=6) | st.tuples(*[numbers] * 4).map(list)
extras = st.fixed_dictionaries(
    {},
    optional={
        "points_xy": st.none() | st.lists(st.none() | numbers, max_size=5),
        "point_labels": st.none() | st.lists(st.none() | st.integers(-2, 2), max_size=3),
    },
)
formats = [f"{a}{b}" for a, b in itertools.product(("xyxy", "xywh", "cxcywh"), ("", "-normalised"))]


@settings(max_examples=500, deadline=None)
@given(
    boxes=st.lists(st.tuples(lists, extras), max_size=5),
    rules=st.builds(
        BoxRules, box_format=st.sampled_from(formats), box_frame=st.sampled_from(["upright", "stored"])
    ),
    size_hw=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    orientation=st.none() | st.integers(1, 8),
)
def test_any_numbers_give_a_prompt_inside_the_picture_or_a_listed_code(boxes, rules, size_hw, orientation):
    found = resolve(
        *[box(given, **extra) for given, extra in boxes],
        rules=rules,
        size_hw=size_hw,
        orientation=orientation,
    )

    assert len(boxes) == len(found.error) == len(found.flags) == len(found.usable) == len(found.prompt_xyxy)
    height, width = size_hw
    for (numbers_given, _), xyxy, usable, error in zip(
        boxes, found.prompt_xyxy.tolist(), found.usable, found.error, strict=True
    ):
        assert usable == (error is None)
        assert error is None or error in BOX_CODES
        if usable and numbers_given is not None:
            assert 0 <= xyxy[0] < xyxy[2] <= width
            assert 0 <= xyxy[1] < xyxy[3] <= height
        else:
            assert all(map(math.isnan, xyxy))


def test_each_box_is_judged_alone():
    odd = [(1, 2, 3, 4), None, (math.nan,) * 4, (5, 5, 900, 900), (9, 9, 1, 1)]
    together = resolve(*odd)

    for place, one in enumerate(odd):
        alone = resolve(one)
        np.testing.assert_array_equal(alone.prompt_xyxy[0], together.prompt_xyxy[place])
        assert (alone.error[0], alone.flags[0]) == (together.error[place], together.flags[place])


def rng_boxes(count=200):
    rng = np.random.default_rng(0)
    x1y1 = rng.uniform(0, [500, 380], (count, 2))
    return np.concatenate([x1y1, x1y1 + rng.uniform(5, 100, (count, 2))], axis=1)


def sizes(count=200):
    return np.tile(np.array([SIZE_HW]), (count, 1))


def test_sound_boxes_raise_no_suspicion():
    assert () == suspicions(rng_boxes(), BoxRules(), upright_size_hw=sizes(), stored_size_hw=sizes())
    assert () == suspicions(np.zeros((0, 4)), BoxRules())
    assert () == suspicions(np.full((3, 4), np.nan), BoxRules())


def test_shares_read_as_pixels_are_suspected_and_the_other_way_round():
    shares = rng_boxes() / [640, 480, 640, 480]

    assert "--box-format xyxy-normalised" in suspicions(shares, BoxRules())[0]
    assert () == suspicions(shares, BoxRules(box_format="xyxy-normalised"))
    assert "--box-format xyxy" in suspicions(rng_boxes(), BoxRules(box_format="xyxy-normalised"))[0]


def test_xywh_read_as_xyxy_is_suspected():
    boxes = rng_boxes()
    boxes[:, 2:] -= boxes[:, :2]

    assert "--box-format xywh" in suspicions(boxes, BoxRules())[0]
    assert () == suspicions(boxes, BoxRules(box_format="xywh"), upright_size_hw=sizes())


def test_xyxy_read_as_xywh_is_suspected_where_sizes_are_known():
    boxes = rng_boxes()

    assert () == suspicions(boxes, BoxRules(box_format="xywh"))
    found = suspicions(boxes, BoxRules(box_format="xywh"), upright_size_hw=sizes())
    assert "--box-format xyxy" in found[0]


def test_boxes_of_turned_photographs_in_the_stored_frame_are_suspected():
    upright = sizes()[:, ::-1]

    found = suspicions(rng_boxes(), BoxRules(), upright_size_hw=upright, stored_size_hw=sizes())

    assert "--box-frame stored" in found[0]
