"""What goes from one stage to the next: one unit of images as one row of a table.

Pixels are written once, into one piece of memory for the unit, and read as views of the table: nothing
copies them but the object store. The plan's rows are a column of their own schema, which Arrow converts in a
third of JSON's time. Everything else of a unit is one JSON document, so that a new field of `ImageResult`
needs no line here.
"""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hqlabel.model.records import Instances
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.image_result import ImageResult, Pixels, UInt8Array
from hqlabel.pipeline.schema import PLAN

UNIT_COLUMN, PLANNED = "unit", "planned"
PIXEL_FIELDS = ("pixels_hwc", "detector_pixels_hwc")  # of ImageResult, and columns here
_PICTURES = pa.list_(pa.field("element", pa.large_binary()))  # null: an image without pixels
UNIT_ROW = pa.schema(
    [
        pa.field(UNIT_COLUMN, pa.large_binary(), nullable=False),
        pa.field(PLANNED, pa.list_(pa.struct(list(PLAN))), nullable=False),
        *[pa.field(name, _PICTURES, nullable=False) for name in PIXEL_FIELDS],
    ]
)


@dataclass(frozen=True, kw_only=True)
class UnitRow:
    """One unit between two stages.

    `redo_codes`: None for a whole unit. In a retry, the error codes whose images are done again (empty:
    all failed ones); `images` then holds those alone. `seconds`: what the stages so far have taken.
    `device`: the kind of device that the model ran on.
    `fault`: a systemic fault met on the way, as a value, because Ray rewrites exceptions; no images then.
    """

    unit_id: int
    generation: int = 0
    redo_codes: tuple[str, ...] | None = None
    seconds: float = 0.0
    device: str = ""
    fault: SystemicFault | None = None
    images: tuple[ImageResult, ...] = ()


# ---------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------

_REFERENCES_WHEN_FREE = 3


class PixelArena:
    """Memory for the pixels of one unit in one piece: up to `images` pictures of side x side x 3 bytes.

    Only the part that is used ever takes memory, and the next unit of this process gets the same memory when
    nothing refers to it any more: new pages cost as much as what is written to them (2 ms an image of
    1024 x 768, measured). `detector`: a second arena for the detector's pictures, where there is a detector.
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
            self._memory = last
        self._used = 0

    def keep(self, pixels_hwc: UInt8Array) -> UInt8Array:
        """Return a copy of the picture, in the arena and read-only."""
        kept = self._memory[self._used : self._used + pixels_hwc.size].reshape(pixels_hwc.shape)
        kept[...] = pixels_hwc
        kept.flags.writeable = False
        self._used += pixels_hwc.size
        return kept

    def keep_all(
        self, image: ImageResult, pixels_hwc: UInt8Array, detector_hwc: Pixels = None
    ) -> ImageResult:
        """Return the image with copies of its pictures; if one cannot be kept, none is, and it raises."""
        kept = self.keep(pixels_hwc)
        if self.detector is None or detector_hwc is None:
            return replace(image, pixels_hwc=kept)
        try:
            return replace(image, pixels_hwc=kept, detector_pixels_hwc=self.detector.keep(detector_hwc))
        except BaseException:
            self._used -= pixels_hwc.size
            raise

    def column(self, pixels: Sequence[Pixels]) -> pa.LargeBinaryArray:
        """Return the kept pictures as one column over the arena's own memory.

        `pixels`: everything that `keep` returned, in that order, with None between for images without.
        """
        ends = np.cumsum([0, *(0 if one is None else one.size for one in pixels)], dtype=np.int64)
        if ends[-1] != self._used:
            raise ValueError(f"pictures of {ends[-1]} bytes, but {self._used} are kept in the arena")
        present = np.packbits(np.array([one is not None for one in pixels], np.bool_), bitorder="little")
        buffers = [pa.py_buffer(one) for one in (present, ends, self._memory[: self._used])]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(pixels), buffers)


def _views(table: pa.Table, name: str, sizes_hw: Sequence[Sequence[int] | None]) -> list[Pixels]:
    """Return the pictures of one row as read-only views; an Arrow scalar's own buffer would be a copy."""
    views: list[Pixels] = [None] * len(sizes_hw)
    if not any(sizes_hw):
        return views
    column = table.column(name).chunk(0).flatten()
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int64)[column.offset :]
    for place, size_hw in enumerate(sizes_hw):
        if size_hw is not None:
            count = size_hw[0] * size_hw[1] * 3
            flat = np.frombuffer(data, np.uint8, count=count, offset=starts[place])
            views[place] = view = flat.reshape(*size_hw, 3)
            view.flags.writeable = False
    return views


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def pack(unit: UnitRow, arena: PixelArena | None = None) -> pa.Table:
    """Return the unit as a table of one row, schema UNIT_ROW; `arena` holds its pixels, if it has any."""
    offsets = pa.array([0, len(unit.images)], pa.int32())
    columns = {
        UNIT_COLUMN: pa.array([unit_to_json(unit)], pa.large_binary()),
        PLANNED: pa.array([[image.planned for image in unit.images]], UNIT_ROW.field(PLANNED).type),
    }
    for name, memory in zip(PIXEL_FIELDS, (arena, arena and arena.detector), strict=True):
        pixels = [getattr(image, name) for image in unit.images]
        values = pa.nulls(len(pixels), pa.large_binary()) if memory is None else memory.column(pixels)
        columns[name] = pa.ListArray.from_arrays(offsets, values, type=_PICTURES)
    return pa.Table.from_pydict(columns, schema=UNIT_ROW)


def unpack(table: pa.Table) -> UnitRow:
    """Return the unit in a table of one row; its pixels are views of the table's memory.

    At the start of the chain a unit has no images, and the table has no column but UNIT_COLUMN.
    """
    document = json.loads(table.column(UNIT_COLUMN)[0].as_py())
    images, fault, sizes_hw = (document.pop(name) for name in ("images", "fault", "sizes_hw"))
    planned = table.column(PLANNED)[0].as_py() if images else []
    pixels = [_views(table, name, sizes_hw[name]) for name in PIXEL_FIELDS]
    return UnitRow(
        **_with_tuples(document),
        fault=fault and SystemicFault(*fault),
        images=tuple(_image_of(*one) for one in zip(images, planned, *pixels, strict=True)),
    )


def unit_to_json(unit: UnitRow) -> bytes:
    """Return what UNIT_COLUMN holds: all of a unit but its planned rows and its pixels, of which the sizes.

    JSON as Python writes it: numbers come back to the last bit, NaN and infinity too. Unlike a pickle it
    cannot carry code.
    """
    document = {
        **vars(unit),
        "fault": unit.fault and [unit.fault.code, unit.fault.message],
        "images": [_document_of(image) for image in unit.images],
        "sizes_hw": {name: [_size_of(getattr(one, name)) for one in unit.images] for name in PIXEL_FIELDS},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _size_of(pixels: Pixels) -> tuple[int, ...] | None:
    return None if pixels is None else pixels.shape[:2]


def _document_of(image: ImageResult) -> dict[str, Any]:
    document = {name: value for name, value in vars(image).items() if name not in (PLANNED, *PIXEL_FIELDS)}
    document["boxes"] = None  # resolved anew where they are needed
    if image.instances is not None:
        document["instances"] = {
            name: values
            if isinstance(values, tuple)
            else base64.b64encode(np.ascontiguousarray(values, _NUMBERS[name]).data).decode("ascii")
            for name, values in vars(image.instances).items()
        }
    return document


def _image_of(
    document: dict[str, Any], planned: dict[str, Any], pixels_hwc: Pixels, detector_pixels_hwc: Pixels
) -> ImageResult:
    masks = document.pop("instances")
    return ImageResult(
        **_with_tuples(document),
        planned=planned,
        instances=masks and _instances_of(masks),
        pixels_hwc=pixels_hwc,
        detector_pixels_hwc=detector_pixels_hwc,
    )


_NUMBERS: dict[str, type[np.generic]] = {
    "area": np.int64,
    "bbox_xywh": np.float32,
    "predicted_iou": np.float32,
    "stability_score": np.float32,
}
"""The arrays of `Instances`, which travel as base64: as text their numbers took three times as long."""


def _instances_of(masks: dict[str, Any]) -> Instances:
    for name, kind in _NUMBERS.items():
        masks[name] = np.frombuffer(base64.b64decode(masks[name]), kind)
    masks["bbox_xywh"] = masks["bbox_xywh"].reshape(-1, 4)
    return Instances(**_with_tuples(masks))


def _with_tuples(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON's lists as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
