"""A unit goes through a table and comes out as it went in, and its pixels are not copied on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from hqlabel.model.records import Instances
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.stages.rows_between_stages import (
    PIXEL_FIELDS,
    UNIT_COLUMN,
    UNIT_ROW,
    PixelArena,
    UnitRow,
    pack,
    unit_to_json,
    unpack,
)


def planned(image_id="a", boxes=()):
    return {
        "unit_id": 3,
        "image_id": image_id,
        "image_uri": f"/x/{image_id}",
        "boxes": None if boxes is None else list(boxes),
        "error_code": None,
        "error_message": None,
        "source_version": None,
    }


def box(*given, score=0.5):
    return {
        "given": list(given),
        "box_id": None,
        "category_id": 1,
        "category_name": None,
        "score": score,
        "points_xy": None,
        "point_labels": None,
        "prompt_mask": None,
        "iscrowd": True if len(given) == 3 else None,
    }


def masks(n):
    return Instances(
        size_hw=(40, 60),
        counts=tuple(f"mask{i}" for i in range(n)),
        area=np.arange(n, dtype=np.int64) + 2**40,
        bbox_xywh=np.arange(4 * n, dtype=np.float32).reshape(n, 4),
        predicted_iou=np.linspace(0, 1, n, dtype=np.float32),
        stability_score=np.linspace(1, 0, n, dtype=np.float32),
        flags=("reduced_call_shape",) if n == 2 else (),
    )


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(found, wanted):
    for name in ImageResult.__dataclass_fields__:
        if name in PIXEL_FIELDS:
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        elif name != "instances":
            assert getattr(found, name) == getattr(wanted, name), name
    if wanted.instances is None:
        assert found.instances is None
    else:
        for name in Instances.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(found.instances, name), getattr(wanted.instances, name))


def test_a_decoded_unit_comes_back_as_it_was():
    arena = PixelArena(4, 64, 43)
    images = (
        ImageResult(
            planned=planned("a", [box(1.0, float("inf"), None), box(score=None)]),
            size_hw=(30, 64),
            stored_size_hw=(64, 30),
            exif_orientation=6,
            source_bytes=2**33,
            source_etag="e",
            fetch_ms=1.1,
            decode_ms=2.5,
            pixels_hwc=arena.keep(picture(30, 64, 1)),
            detector_pixels_hwc=arena.detector.keep(picture(20, 43, 3)),
        ),
        ImageResult(planned=planned("b"), error_code="corrupt", error_message="damaged"),
        ImageResult(planned=planned("c", None), attempts=3),
        ImageResult(planned=planned("ü\n'"), size_hw=(1, 1), pixels_hwc=arena.keep(picture(64, 64, 2))),
    )
    unit = UnitRow(unit_id=7, generation=2, redo_codes=(), seconds=1.25, images=images)

    table = pack(unit, arena)
    found = unpack(table)

    assert table.schema.equals(UNIT_ROW)
    table.validate(full=True)
    assert (found.unit_id, found.generation, found.redo_codes, found.seconds) == (7, 2, (), 1.25)
    for one, wanted in zip(found.images, images, strict=True):
        same(one, wanted)
    assert not found.images[0].pixels_hwc.flags.writeable


def test_pixels_are_read_where_they_were_written():
    arena = PixelArena(2, 64)
    kept = arena.keep(picture(64, 50, 1))

    table = pack(UnitRow(unit_id=0, images=(ImageResult(planned=planned(), pixels_hwc=kept),)), arena)

    assert np.shares_memory(unpack(table).images[0].pixels_hwc, kept)


def test_a_unit_with_another_before_it_in_a_table_reads_its_own_rows():
    tables = []
    for number in range(3):
        arena = PixelArena(1, 8)
        kept = arena.keep(np.full((8, 8, 3), number, np.uint8))
        images = (ImageResult(planned=planned(str(number)), pixels_hwc=kept),)
        tables.append(pack(UnitRow(unit_id=number, images=images), arena))
    together = pa.concat_tables(tables).combine_chunks()

    found = unpack(together.slice(1, 1))

    assert found.unit_id == 1
    assert found.images[0].planned["image_id"] == "1"
    assert found.images[0].pixels_hwc.max() == 1


@pytest.mark.parametrize("counts", [[], [0], [3], [2, 0, 1]])
def test_masks_of_any_number_have_one_schema(counts):
    images = tuple(ImageResult(planned=planned(str(n)), instances=masks(n), segment_ms=4.0) for n in counts)

    table = pack(UnitRow(unit_id=1, images=images))

    assert table.schema.equals(UNIT_ROW)
    for one, wanted in zip(unpack(table).images, images, strict=True):
        same(one, wanted)


def test_masks_keep_their_types_and_every_bit():
    numbers = np.array([np.nan, 0.1, np.float32(1) / 3, np.inf], np.float32)
    one = replace(masks(4), predicted_iou=numbers, stability_score=numbers[::-1].copy())

    images = (ImageResult(planned=planned(), instances=one),)
    found = unpack(pack(UnitRow(unit_id=1, images=images))).images[0].instances

    for name, values in vars(one).items():
        if isinstance(values, np.ndarray):
            assert getattr(found, name).dtype == values.dtype, name
            assert getattr(found, name).tobytes() == values.tobytes(), name


def test_a_unit_that_is_only_named_is_read_without_columns_of_pixels():
    unit = UnitRow(unit_id=5, generation=1, redo_codes=("empty",))

    assert unpack(pa.table({UNIT_COLUMN: [unit_to_json(unit)]})) == unit


def test_a_fault_travels_as_a_value():
    found = unpack(pack(UnitRow(unit_id=4, fault=SystemicFault("clock", "an hour off"))))

    assert (found.fault.code, found.fault.message, found.images) == ("clock", "an hour off", ())


def test_pictures_that_are_not_in_the_arena_are_noticed():
    arena = PixelArena(2, 8)
    arena.keep(picture(8, 8, 1))

    with pytest.raises(ValueError, match="kept in the arena"):
        arena.column([None])


def test_the_next_unit_gets_the_memory_of_the_last_one_when_nothing_refers_to_it():
    first = PixelArena(2, 16)
    kept = first.keep(np.full((16, 16, 3), 7, np.uint8))
    column = first.column([kept])
    place = kept.__array_interface__["data"][0]
    del first, kept

    beside = PixelArena(2, 16).keep(np.zeros((16, 16, 3), np.uint8))

    assert beside.__array_interface__["data"][0] != place
    assert bytes(column[0].as_py()) == bytes([7]) * 768

    del column, beside
    second = PixelArena(1, 16)
    third = PixelArena(1, 16)
    one, other = (arena.keep(np.zeros((16, 16, 3), np.uint8)) for arena in (second, third))
    assert one.__array_interface__["data"][0] != other.__array_interface__["data"][0]


def test_memory_that_is_free_is_used_again():
    arena = PixelArena(2, 16)
    place = arena.keep(np.zeros((16, 16, 3), np.uint8)).__array_interface__["data"][0]
    del arena

    assert PixelArena(1, 16).keep(np.zeros((16, 16, 3), np.uint8)).__array_interface__["data"][0] == place


def test_a_unit_of_which_every_row_is_kept_has_no_images_and_passes_all_the_same() -> None:
    unit = UnitRow(unit_id=3, generation=2)

    assert unpack(pack(unit, PixelArena(0, 64, 100))) == unit


def test_of_an_image_whose_second_picture_cannot_be_kept_nothing_is_kept():
    arena = PixelArena(2, 8, 4)
    good, too_large = np.ones((8, 8, 3), np.uint8), np.ones((40, 40, 3), np.uint8)

    with pytest.raises(ValueError, match="reshape"):
        arena.keep_all(ImageResult(planned={}), good, too_large)
    kept = arena.keep_all(ImageResult(planned={}), good, good[:4, :4])

    assert arena.column([None, kept.pixels_hwc]).null_count == 1
    assert arena.detector.column([None, kept.detector_pixels_hwc]).null_count == 1
