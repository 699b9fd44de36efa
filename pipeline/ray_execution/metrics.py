"""What a running job counts and measures: the list of metrics, and what each finished stage adds to them.

Ray's agents offer them to Prometheus with `ray_` before each name. docs/cluster.md explains the list; a test
holds the two together. Whatever a killed worker or a repeated unit had done is counted again where it was
done again: these are rates to watch, the tables are the record.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ray.util import metrics as ray_metrics

from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import UnitOutcome
from hqlabel.pipeline.stages.rows_between_stages import UnitRow

Kind = Literal["counter", "gauge", "histogram"]
RUN = "run"
"""The tag that every metric has: the job's run_id."""

_UNIT_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_IMAGE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Metric:
    """One metric. `tags`: beyond `run`; `boundaries`: upper ends of a histogram's buckets."""

    kind: Kind
    name: str
    meaning: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A number for the metric `name`: added to a counter, set in a gauge, sorted into a histogram."""

    name: str
    value: float
    tags: Mapping[str, str] = field(default_factory=dict)


_OF_STAGE = "Seconds of one unit in a stage: prepare, segment, commit."
_OF_STEP = "Seconds of one image in a step: fetch, decode, segment."
_PROCESSES = "Model processes by state: running, pending, restarting."
_ALL = (
    Metric("counter", "hqlabel_images", "Images in committed units, by status.", ("status",)),
    Metric("counter", "hqlabel_failed_images", "Failed images in committed units, by error code.", ("code",)),
    Metric("counter", "hqlabel_masks", "Masks of at least one pixel in committed units."),
    Metric("counter", "hqlabel_units", "Units committed."),
    Metric("counter", "hqlabel_repeated_units", "Units that were done although they were committed already."),
    Metric("counter", "hqlabel_faults", "Units that met a systemic fault, by code.", ("code",)),
    Metric("counter", "hqlabel_read_bytes", "Bytes of the images that were fetched."),
    Metric("counter", "hqlabel_written_bytes", "Bytes of committed units."),
    Metric("histogram", "hqlabel_stage_seconds", _OF_STAGE, ("stage",), _UNIT_SECONDS),
    Metric("histogram", "hqlabel_image_seconds", _OF_STEP, ("step",), _IMAGE_SECONDS),
    Metric(
        "counter", "hqlabel_device_busy_seconds", "Seconds that model processes spent in calls of the model."
    ),
    Metric(
        "gauge", "hqlabel_queue_units", "Units that wait for a stage: prepare, segment, commit.", ("stage",)
    ),
    Metric("gauge", "hqlabel_model_processes", _PROCESSES, ("state",)),
    Metric("gauge", "hqlabel_units_left", "Units of this driver that are not committed."),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def record(run_id: str, samples: Iterable[Sample]) -> None:
    """Pass the samples to Ray, whose agent on this node offers them to Prometheus."""
    for sample in samples:
        meter, tags = _meter(sample.name), {**sample.tags, RUN: run_id}
        if isinstance(meter, ray_metrics.Counter):
            meter.inc(sample.value, tags)
        elif isinstance(meter, ray_metrics.Gauge):
            meter.set(sample.value, tags)
        else:
            meter.observe(sample.value, tags)


@functools.cache
def _meter(name: str) -> ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram:
    metric = METRICS[name]
    tags = (*metric.tags, RUN)
    if metric.kind == "counter":
        return ray_metrics.Counter(name, metric.meaning, tag_keys=tags)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(name, metric.meaning, tag_keys=tags)
    return ray_metrics.Histogram(name, metric.meaning, boundaries=list(metric.boundaries), tag_keys=tags)


def of_prepared(unit: UnitRow, seconds: float) -> Iterator[Sample]:
    """Yield what a unit adds after it was fetched and decoded in that many seconds."""
    yield _stage("prepare", seconds)
    if read := sum(image.source_bytes or 0 for image in unit.images):
        yield Sample("hqlabel_read_bytes", read)
    for image in unit.images:
        yield from _step("fetch", image.fetch_ms)
        yield from _step("decode", image.decode_ms)


def of_segmented(unit: UnitRow, seconds: float) -> Iterator[Sample]:
    """Yield what a unit adds after it left the model."""
    yield _stage("segment", seconds)
    if busy := sum(image.segment_ms or 0.0 for image in unit.images):
        yield Sample("hqlabel_device_busy_seconds", busy / 1000)
    for image in unit.images:
        yield from _step("segment", image.segment_ms)


def of_committed(unit: UnitRow, outcome: UnitOutcome, seconds: float) -> Iterator[Sample]:
    """Yield what a unit adds after its commit; one that was there before adds no images."""
    yield _stage("commit", seconds)
    if outcome.repeated:
        yield Sample("hqlabel_repeated_units", 1)
        return
    counted = {
        "hqlabel_units": 1,
        "hqlabel_masks": sum(_masks(image) for image in unit.images),
        "hqlabel_written_bytes": outcome.bytes,
    }
    yield from (Sample(name, value) for name, value in counted.items() if value)
    for status in ("labelled", "no_boxes", "failed"):
        if images := getattr(outcome, status):
            yield Sample("hqlabel_images", images, {"status": status})
    for code, images in outcome.failed_by_code.items():
        yield Sample("hqlabel_failed_images", images, {"code": code})


def of_fault(code: str) -> Iterator[Sample]:
    """Yield what a unit adds that met a systemic fault."""
    yield Sample("hqlabel_faults", 1, {"code": code})


def of_queues(waiting: Mapping[str, int], processes: Mapping[str, int]) -> Iterator[Sample]:
    """Yield what the driver sees: units before each stage, model processes in each state."""
    for stage, units in waiting.items():
        yield Sample("hqlabel_queue_units", units, {"stage": stage})
    for state, number in processes.items():
        yield Sample("hqlabel_model_processes", number, {"state": state})


def of_progress(units_left: int) -> Iterator[Sample]:
    """Yield what the driver sees after each commit."""
    yield Sample("hqlabel_units_left", units_left)


def _stage(stage: str, seconds: float) -> Sample:
    return Sample("hqlabel_stage_seconds", seconds, {"stage": stage})


def _step(step: str, milliseconds: float | None) -> Iterator[Sample]:
    if milliseconds is not None:
        yield Sample("hqlabel_image_seconds", milliseconds / 1000, {"step": step})


def _masks(image: ImageResult) -> int:
    return 0 if image.instances is None else int((image.instances.area > 0).sum())
