"""What travels between the stages: one unit of images as one row of one Arrow schema.

Fetching and decoding fill the pixels, segmenting replaces them by masks, committing reads the rest.
The schema is stated and never inferred: Arrow types guessed from a unit without boxes or without
masks differ from those of its neighbours. Pixels are written once, into one piece of memory for the
unit, and read as views of the table: nothing copies them but the object store.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.records import Instances
from pipeline.errors import SystemicFault
from pipeline.schema import PLAN
from pipeline.unit import ImageResult

UInt8Array = npt.NDArray[np.uint8]
Pixels = UInt8Array | None

_FLOATS = pa.list_(pa.field("element", pa.float32(), nullable=False))
_LONGS = pa.list_(pa.field("element", pa.int64(), nullable=False))
_STRINGS = pa.list_(pa.field("element", pa.string(), nullable=False))
_PAIR = pa.list_(pa.field("element", pa.int32(), nullable=False))

MASKS = pa.struct(
    [
        pa.field("size_hw", _PAIR),
        pa.field("counts", _STRINGS),
        pa.field("area", _LONGS),
        pa.field("bbox_xywh", _FLOATS),  # 4 numbers a mask, one after the other
        pa.field("predicted_iou", _FLOATS),
        pa.field("stability_score", _FLOATS),
        pa.field("flags", _STRINGS),
    ]
)
_PLAIN = (
    ("exif_orientation", pa.int32()),
    ("source_bytes", pa.int64()),
    ("source_etag", pa.string()),
    ("error_code", pa.string()),
    ("error_message", pa.string()),
    ("attempts", pa.int32()),
    ("fetch_ms", pa.float32()),
    ("decode_ms", pa.float32()),
    ("detect_ms", pa.float32()),
    ("segment_ms", pa.float32()),
)
IMAGE = pa.struct(
    [
        pa.field("planned", pa.struct(list(PLAN)), nullable=False),
        pa.field("size_hw", _PAIR),
        pa.field("stored_size_hw", _PAIR),
        *[pa.field(name, kind) for name, kind in _PLAIN],
        pa.field("masks", MASKS),
        pa.field("pixels_hw", _PAIR),
        pa.field("pixels", pa.large_binary()),
        pa.field("detector_pixels_hw", _PAIR),
        pa.field("detector_pixels", pa.large_binary()),
    ]
)
TRAVEL = pa.schema(
    [
        pa.field("unit_id", pa.int32(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("redo_codes", _STRINGS),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("fault_code", pa.string()),
        pa.field("fault_message", pa.string()),
        pa.field("images", pa.list_(pa.field("element", IMAGE, nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class UnitRow:
    """One unit between two stages.

    `redo_codes`: None for a whole unit. In a retry, the error codes whose images are done again (empty:
    all failed ones); `images` then holds those alone. `seconds`: what the stages so far have taken.
    `fault`: a systemic fault met on the way, as a value, because Ray rewrites exceptions; no images then.
    `pixels`: for each image uint8 RGB (h, w, 3) at the model's side, read-only, or None. `detector_pixels`:
    the same for the detector, None also where it is shown the model's own.
    """

    unit_id: int
    generation: int = 0
    redo_codes: tuple[str, ...] | None = None
    seconds: float = 0.0
    fault: SystemicFault | None = None
    images: tuple[ImageResult, ...] = ()
    pixels: tuple[Pixels, ...] = ()
    detector_pixels: tuple[Pixels, ...] = ()


_REFERENCES_WHEN_FREE = 3


class PixelArena:
    """Room for the pixels of one unit in one piece: up to `images` pictures of side x side x 3 bytes.

    Only the part that is used ever takes memory, and the next unit of this process gets the same memory when
    nothing refers to it any more: new pages cost as much as what is written to them (2 ms an image of
    1024 x 768, measured). `detector`: a second one for the pictures that the detector is shown, where there
    is a detector.
    """

    _last: ClassVar[UInt8Array] = np.empty(0, np.uint8)
    _choosing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, images: int, side: int, detector_side: int | None = None) -> None:
        self.detector = None if detector_side is None else PixelArena(images, detector_side)
        size = images * side * side * 3
        with PixelArena._choosing:
            last = PixelArena._last
            # The class, the name here and the call refer to it; an arena, a view or a buffer would, too.
            if last.size < size or sys.getrefcount(last) > _REFERENCES_WHEN_FREE:
                last = PixelArena._last = np.empty(size, np.uint8)
            self._room = last
        self._used = 0

    def keep(self, pixels_hwc: UInt8Array) -> UInt8Array:
        """A copy of the picture, in the arena and read-only."""
        kept = self._room[self._used : self._used + pixels_hwc.size].reshape(pixels_hwc.shape)
        kept[...] = pixels_hwc
        kept.flags.writeable = False
        self._used += pixels_hwc.size
        return kept

    def column(self, pixels: Sequence[Pixels]) -> pa.LargeBinaryArray:
        """The kept pictures as one column over the arena's own memory.

        `pixels`: everything that `keep` gave, in that order, with None between for images without.
        """
        ends = np.cumsum([0, *(0 if one is None else one.size for one in pixels)], dtype=np.int64)
        if ends[-1] != self._used:
            raise ValueError(f"pictures of {ends[-1]} bytes, but {self._used} are kept in the arena")
        present = np.packbits([one is not None for one in pixels], bitorder="little")
        buffers = [pa.py_buffer(one) for one in (present, ends, self._room[: self._used])]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pixels), buffers)


def pack(unit: UnitRow, arena: PixelArena | None = None) -> pa.Table:
    """The unit as a table of one row, schema TRAVEL; `arena` holds its pixels, if it has any."""
    count = len(unit.images)
    columns = [pa.array([one[f.name] for one in map(_plain, unit.images)], f.type) for f in list(IMAGE)[:-4]]
    columns += _pixel_columns(unit.pixels, arena, count)
    columns += _pixel_columns(unit.detector_pixels, arena and arena.detector, count)
    images = pa.StructArray.from_arrays(columns, fields=list(IMAGE))
    head = {
        "unit_id": unit.unit_id,
        "generation": unit.generation,
        "redo_codes": unit.redo_codes,
        "seconds": unit.seconds,
        "fault_code": unit.fault and unit.fault.code,
        "fault_message": unit.fault and unit.fault.message,
    }
    arrays = [pa.array([value], TRAVEL.field(name).type) for name, value in head.items()]
    offsets = pa.array([0, count], pa.int32())
    nested = pa.ListArray.from_arrays(offsets, images, type=TRAVEL.field("images").type)
    return pa.Table.from_arrays([*arrays, nested], schema=TRAVEL)


def _pixel_columns(pixels: tuple[Pixels, ...], arena: PixelArena | None, count: int) -> list[pa.Array]:
    if arena is None:
        return [pa.nulls(count, _PAIR), pa.nulls(count, pa.large_binary())]
    sizes = [None if one is None else one.shape[:2] for one in pixels]
    return [pa.array(sizes, _PAIR), arena.column(pixels)]


def unpack(table: pa.Table) -> UnitRow:
    """The unit in a table of one row; its pixels are views of the table's memory."""
    head = table.drop_columns(["images"]).to_pylist()[0]
    nested = table.column("images")
    images = dict(zip(IMAGE.names, nested.chunk(0).flatten().flatten(), strict=True))
    pixels = _views(images.pop("pixels"), images.pop("pixels_hw").to_pylist())
    shown = _views(images.pop("detector_pixels"), images.pop("detector_pixels_hw").to_pylist())
    lists = {name: column.to_pylist() for name, column in images.items()}
    rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    fault = head["fault_code"] and SystemicFault(head["fault_code"], head["fault_message"])
    codes = head["redo_codes"]
    return UnitRow(
        unit_id=head["unit_id"],
        generation=head["generation"],
        redo_codes=None if codes is None else tuple(codes),
        seconds=head["seconds"],
        fault=fault,
        images=tuple(_result(row) for row in rows),
        pixels=pixels,
        detector_pixels=shown,
    )


def _plain(image: ImageResult) -> dict[str, Any]:
    """One image's values by column of IMAGE, without pixels."""
    return {
        "planned": image.planned,
        "size_hw": image.size_hw,
        "stored_size_hw": image.stored_size_hw,
        **{name: getattr(image, name) for name, _ in _PLAIN},
        "masks": None if image.instances is None else _masks(image.instances),
    }


def _masks(instances: Instances) -> dict[str, Any]:
    return {
        "size_hw": instances.size_hw,
        "counts": instances.counts,
        "area": instances.area,
        "bbox_xywh": np.asarray(instances.bbox_xywh).reshape(-1),
        "predicted_iou": instances.predicted_iou,
        "stability_score": instances.stability_score,
        "flags": instances.flags,
    }


def _result(row: Mapping[str, Any]) -> ImageResult:
    return ImageResult(
        planned=row["planned"],
        size_hw=_pair(row["size_hw"]),
        stored_size_hw=_pair(row["stored_size_hw"]),
        instances=None if row["masks"] is None else _instances(row["masks"]),
        **{name: row[name] for name, _ in _PLAIN},
    )


def _instances(masks: Mapping[str, Any]) -> Instances:
    height, width = masks["size_hw"]
    return Instances(
        size_hw=(height, width),
        counts=tuple(masks["counts"]),
        area=np.array(masks["area"], np.int64),
        bbox_xywh=np.array(masks["bbox_xywh"], np.float32).reshape(-1, 4),
        predicted_iou=np.array(masks["predicted_iou"], np.float32),
        stability_score=np.array(masks["stability_score"], np.float32),
        flags=tuple(masks["flags"]),
    )


def _pair(values: Sequence[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])


def _views(column: pa.LargeBinaryArray, pixels_hw: Sequence[Sequence[int] | None]) -> tuple[Pixels, ...]:
    """The pictures of a column as read-only views; an Arrow scalar's own buffer would be a copy."""
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int64)[column.offset :]
    views: list[Pixels] = []
    for start, size_hw in zip(starts, pixels_hw, strict=False):
        view = None
        if size_hw is not None:
            count = size_hw[0] * size_hw[1] * 3
            view = np.frombuffer(data, np.uint8, count=count, offset=start).reshape(*size_hw, 3)
            view.flags.writeable = False
        views.append(view)
    return tuple(views)
