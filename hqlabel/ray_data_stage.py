"""SAM-HQ as a stage of other people's Ray Data pipelines.

    ds = ray.data.read_parquet("s3://bucket/images_and_boxes/")
    ds = ds.map_batches(
        hqlabel.SegmentImages,
        fn_constructor_kwargs={"checkpoint": "demo", "image": "bytes", "boxes": "boxes"},
        num_gpus=1, batch_size=16, compute=ray.data.ActorPoolStrategy(size=2),
    )

One row in, one row out, in the same order; a row that cannot be labelled says why and costs no other. For
millions of images that must survive kills and restarts, run a job instead: `hqlabel.label`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
from PIL import Image

from hqlabel.model.records import Instances, PreparedImage, Prompts, SegmentFailure, fit_image
from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.image_result import ResolvedBoxes
from hqlabel.pipeline.images.decode_upright import decode_image
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import AccessRules, BoxRules
from hqlabel.pipeline.settings import DEMO, BoxFormat, Limits
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from hqlabel.predict import SamHQ, as_pixels

Batch = TypeVar("Batch", dict[str, np.ndarray], pa.Table)

_RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
COLUMNS: dict[str, pa.DataType] = {
    "masks": pa.list_(_RLE),
    "mask_scores": pa.list_(pa.float32()),
    "box_errors": pa.list_(pa.string()),
    "error": pa.string(),
}
"""What a row gets. `masks` (COCO RLE, `{"size": [h, w], "counts": ...}`) and `mask_scores` (the model's own
estimate of the IoU) have one entry a box, null where the box cannot be used; `box_errors` then says why
(`box_outside`, `box_empty`, ...). `error`: why the whole image has no masks, `code: reason`; else null."""

_log = logging.getLogger(__name__)


class SegmentImages:
    """Masks for the images and boxes of a batch; a class for `map_batches` with a process of its own."""

    def __init__(
        self,
        checkpoint: str = DEMO,
        *,
        image: str = "image",
        boxes: str = "boxes",
        box_format: BoxFormat = "xyxy",
        device: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        boxes_per_call: int | None = None,
        allow_roots: Sequence[str] = (),
        storage: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Load the model once for the process.

        Args:
            checkpoint: as for `SamHQ.from_pretrained`.
            image: the column of images: the bytes of picture files, uint8 RGB arrays (H, W, 3), uris, or
                structs with `bytes` (as Hugging Face datasets have them).
            boxes: the column of boxes, a list of four numbers each, in pixels of the upright image unless
                `box_format` is normalised.
            box_format: `xyxy`, `xywh` or `cxcywh`, each also with `-normalised` (0 to 1).
            device: None is a GPU if Ray gave this process one, else the CPU.
            dtype: `auto` is the faster of the two on this device.
            boxes_per_call: prompts in one call of the decoder; None: as in a job.
            allow_roots: local folders that uris may point into. Uris are data; without it none is opened.
            storage: fsspec options by scheme, such as `{"s3": {"endpoint_url": ...}}`.

        Raises:
            ValueError: an unknown box format.
            CheckpointError: no SAM-HQ checkpoint.
        """
        if box_format not in get_args(BoxFormat):
            raise ValueError(f"box_format is {box_format!r}; wanted one of {', '.join(get_args(BoxFormat))}")
        self._image, self._boxes = image, boxes
        self._rules, self._limits = BoxRules(box_format=box_format), Limits()
        roots = tuple(str(Path(root).resolve()) for root in allow_roots)
        self._access = AccessRules(roots=roots, options=storage or {})
        self._model = SamHQ.from_pretrained(
            checkpoint, device=device, dtype=dtype, boxes_per_call=boxes_per_call
        )

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the columns of `COLUMNS`; one of that name is replaced.

        Raises:
            ValueError: a column is missing; the message names those that are there.
        """
        names = batch.column_names if isinstance(batch, pa.Table) else list(batch)
        missing = [name for name in (self._image, self._boxes) if name not in names]
        if missing:
            raise ValueError(f"no column {missing[0]!r}; the batch has {', '.join(names)}")
        images, boxes = (_values(batch, name) for name in (self._image, self._boxes))
        rows = [self._prepare(*pair) for pair in zip(images, boxes, strict=True)]
        self._segment([row for row in rows if row.prepared is not None])
        answers = [_answer(row) for row in rows]
        columns = {name: [answer[name] for answer in answers] for name in COLUMNS}
        answer: Batch = _with_columns(batch, columns)
        return answer

    def _prepare(self, image: Any, boxes: Any) -> _Row:
        """Return one row at the model's input side; whatever is wrong with it is in `error`."""
        row = _Row()
        try:
            given = _given_boxes(boxes)
            pixels, size_hw = self._decode(image)
            row.boxes = resolve_boxes([{"given": box} for box in given], self._rules, upright_size_hw=size_hw)
            prompts = Prompts(boxes_xyxy=row.boxes.prompt_xyxy[row.boxes.usable])
            row.prepared = PreparedImage(pixels_hwc=pixels, size_hw=size_hw, prompts=prompts)
        except ImageError as error:
            row.error = str(error)
        except Exception as error:
            _log.exception("an image could not be prepared")
            row.error = f"internal: {type(error).__name__}: {error}"
        return row

    def _decode(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image's pixels at the model's input side, and its upright (height, width)."""
        if isinstance(image, Mapping):  # a struct of Hugging Face datasets
            image = image.get("bytes") or image.get("path")
        if image is None:
            raise ImageError("not_an_image", "the image is null")
        if isinstance(image, str):
            image = fetch_object(image, self._access, self._limits).data
        if isinstance(image, bytes | bytearray | memoryview):
            decoded = decode_image(
                bytes(image),
                max_pixels=self._limits.max_image_pixels,
                side=self._model.input_side,
                fit=self._model.fit,
            )
            return decoded.pixels_hwc, decoded.size_hw
        try:
            pixels = as_pixels(image if isinstance(image, Image.Image) else _stacked(image))
            return fit_image(pixels, self._model.input_side, self._model.fit), pixels.shape[:2]
        except ValueError as error:
            raise ImageError("not_an_image", str(error)) from error

    def _segment(self, rows: Sequence[_Row]) -> None:
        """Give every row its masks; where one row makes a call raise, each is tried by itself."""
        try:
            answers = self._model.segment_prepared([row.prepared for row in rows if row.prepared])
        except Exception as error:
            if len(rows) > 1:
                for row in rows:
                    self._segment([row])
                return
            _log.exception("an image could not be segmented")
            rows[0].error = f"internal: {type(error).__name__}: {error}"
            return
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, SegmentFailure):
                row.error = f"{answer.code}: {answer.message}"
            else:
                row.instances = answer


@dataclass(kw_only=True)
class _Row:
    """One row on its way. `error`: why it has no masks."""

    boxes: ResolvedBoxes | None = None
    prepared: PreparedImage | None = None
    instances: Instances | None = None
    error: str | None = None


def _answer(row: _Row) -> dict[str, Any]:
    """Return the new columns of a row."""
    if row.boxes is None or row.instances is None:
        return {"masks": None, "mask_scores": None, "box_errors": None, "error": row.error}
    size = list(row.instances.size_hw)
    found = zip(row.instances.counts, row.instances.predicted_iou.tolist(), strict=True)
    pairs: list[tuple[dict[str, Any] | None, float | None]] = [
        (None, None) if not usable else ({"size": size, "counts": mask[0]}, mask[1])
        for usable, mask in ((usable, next(found) if usable else ("", 0.0)) for usable in row.boxes.usable)
    ]
    return {
        "masks": [mask for mask, _ in pairs],
        "mask_scores": [score for _, score in pairs],
        "box_errors": list(row.boxes.error),
        "error": None,
    }


def _given_boxes(boxes: Any) -> list[list[float | None]]:
    """Return the boxes of a row as lists of numbers, whichever way Ray hands them over.

    Raises:
        ImageError: `boxes_missing` for null.
    """
    if boxes is None:
        raise ImageError("boxes_missing", "the list of boxes is null")
    return [[None if number is None else float(number) for number in box] for box in boxes]


def _with_columns(batch: Any, columns: Mapping[str, Sequence[Any]]) -> Any:
    """Return a dict of arrays or an Arrow table with these columns added or replaced."""
    if not isinstance(batch, pa.Table):
        return {**batch, **{name: _object_array(values) for name, values in columns.items()}}
    batch = batch.drop_columns([name for name in columns if name in batch.column_names])
    for name, values in columns.items():
        batch = batch.append_column(name, pa.array(values, COLUMNS[name]))
    return batch


def _values(batch: Any, name: str) -> list[Any]:
    return batch[name].to_pylist() if isinstance(batch, pa.Table) else list(batch[name])


def _stacked(image: Any) -> Any:
    """Return nested lists, as Arrow gives arrays back, as one array."""
    return image if isinstance(image, np.ndarray) else np.array(image, np.uint8)


def _object_array(values: Sequence[Any]) -> np.ndarray:
    """Return values as a column of objects; NumPy itself would stack lists of equal length."""
    column = np.empty(len(values), dtype=object)
    column[:] = list(values)
    return column
