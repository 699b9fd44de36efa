"""Whether what images met is their own trouble or the surroundings': judged over a window of the whole plan.

No credentials, no bucket, no answer: one image that meets such a fault fails, and the job goes on. If most
images of the job met it, writing it into a million rows would help nobody, and the job stops. One unit cannot
tell: its neighbours in the plan are often neighbours in one bucket. So a unit in which at least half of the
images met faults tries some images from all over the plan. The job stops when at least half of it would fail,
by this estimate. Nothing is asked of the store while units are well.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqlabel.pipeline.errors import ImageError, SystemicFault, count
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.plan_files import count_images, read_unit
from hqlabel.pipeline.storage.archive_uris import container_of
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.request_retries import shown_uri
from hqlabel.pipeline.storage.uri_rules import split_scheme
from hqlabel.pipeline.worker import logs

SAMPLE = 16
"""Images tried from all over the plan."""
FAULTS_AT_LEAST = 3
WEB_AT_LEAST = 8
SPARED_S = 60.0
"""How long places that were found to be in trouble alone are not judged again, in one process."""
_AT_ONCE = frozenset(("credentials", "clock", "driver"))
"""Faults that no single object has: two images of a job of two are enough."""

_NEXT_STEP = {
    "denied": "Grant read access and start again (S3 also answers 403 for objects that do not exist when "
    "listing the bucket is not allowed)",
    "store": "Start again when the store is there and answers; if it is only slow, raise "
    "limits.fetch_timeout_s",
    "internal": "This is a bug in hqlabel; please report it",
}


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One image that was opened, and what it met."""

    uri: str
    error: ImageError | None

    @property
    def fault(self) -> SystemicFault | None:
        """What the error means when most images meet it."""
        return None if self.error is None else self.error.fault

    @property
    def is_web(self) -> bool:
        """Whether a web site has it: each is a store of its own, and many are gone for good."""
        return split_scheme(container_of(self.uri))[0] in ("http", "https")

    @property
    def place(self) -> str:
        """The store, bucket or host; all web sites are one place, and all local files."""
        scheme, rest = split_scheme(container_of(self.uri))
        return scheme if self.is_web or scheme == "file" else f"{scheme}://{rest.partition('/')[0]}"


def stop_if_most_images_fail(
    tried: Sequence[Tried],
    unit_id: int,
    context: JobContext,
    store: Store,
    attempt: Callable[[Sequence[Mapping[str, Any]]], Sequence[Tried]],
) -> None:
    """Stop the job when most of its images would meet the faults that this unit's met.

    `tried`: what was opened of the unit; `attempt`: opens images by their rows of the plan.

    Raises:
        SystemicFault: the commonest fault, when at least half of the plan's images meet one.
    """
    if not _is_striking(tried) or all(_is_spared(context, one) for one in tried if one.fault):
        return
    known = {one.uri for one in tried}
    rows, images = _sample(context, store, unit_id, known)
    others = attempt(rows)
    window = (*tried, *others)
    here, elsewhere = _counted(tried, window), _counted(others, window)
    rest = max(images - len(tried), len(others)) if others else 0
    failing = len(here) + rest * len(elsewhere) / max(len(others), 1)
    if here and 2 * failing >= len(tried) + rest:
        raise _verdict(here, tried, elsewhere, others)
    _spare(context, unit_id, tried)


def _is_striking(tried: Sequence[Tried]) -> bool:
    """Return whether a unit's faults are so many, by themselves, that the rest of the plan is asked."""
    faults = [one for one in tried if one.fault is not None]
    if len(faults) >= FAULTS_AT_LEAST and 2 * len(faults) >= len(tried):
        return True
    return bool(tried) and len(faults) == len(tried) and all(map(_is_no_objects, tried))


def _is_no_objects(one: Tried) -> bool:
    """Return whether the fault cannot be that of one object alone."""
    assert one.error is not None, "the caller has counted faults"
    assert one.fault is not None, "the caller has counted faults"
    # A store's error on an object that is not there says `not_found` only for a missing bucket.
    return one.fault.code in _AT_ONCE or (one.fault.code, one.error.code) == ("store", "not_found")


def _counted(some: Sequence[Tried], window: Sequence[Tried]) -> list[Tried]:
    """Return those of `some` whose fault counts against the job.

    Of web sites none does while any answers: lists of old links are full of sites that are gone.
    """
    web = [one for one in window if one.is_web]
    web_is_gone = len(web) >= WEB_AT_LEAST and all(one.fault is not None for one in web)
    return [one for one in some if one.fault is not None and (web_is_gone or not one.is_web)]


def _verdict(
    faults: Sequence[Tried], tried: Sequence[Tried], elsewhere: Sequence[Tried], others: Sequence[Tried]
) -> SystemicFault:
    """Return the commonest fault as the job's, with figures and an example."""
    code = Counter(one.fault.code for one in faults if one.fault).most_common(1)[0][0]
    first = next(one for one in faults if one.fault and one.fault.code == code)
    assert first.error is not None
    asked = f" and {len(elsewhere)} of {len(others)} from the rest of the plan" if others else ""
    message = (
        f"{len(faults)} of {count(len(tried), 'image')} of a unit{asked} cannot be read, for example "
        f"{first.error.message}"
    )
    step = _NEXT_STEP.get(code)
    return SystemicFault(code, f"{message}. {step}" if step else message)


# ---------------------------------------------------------------------------------------------
# The rest of the plan
# ---------------------------------------------------------------------------------------------


def _sample(
    context: JobContext, store: Store, unit_id: int, known: set[str]
) -> tuple[list[dict[str, Any]], int]:
    """Return rows from all over the plan but those whose uris are known, and the number of its images.

    Units one from each of SAMPLE stretches, and images in them, are drawn: every second one may be alike.
    """
    images = count_images(store, context.plan_sha256)
    units = -(-images // context.images_per_unit)
    draw = np.random.default_rng(unit_id)
    edges = np.linspace(0, units, SAMPLE + 1)
    chosen = np.unique((edges[:-1] + draw.random(SAMPLE) * np.diff(edges)).astype(np.int64)).tolist()
    each = -(-SAMPLE // len(chosen))
    rows: list[dict[str, Any]] = []
    for unit in chosen:
        fresh = [
            row
            for row in read_unit(store, context.plan_sha256, unit).to_pylist()
            if row["error_code"] is None
            and row["image_uri"] not in known
            and (context.detector is not None or row["boxes"])
        ]
        rows += [fresh[place] for place in draw.permutation(len(fresh))[:each]]
    return rows, images


_spared: dict[tuple[str, str, str], float] = {}


def _key(context: JobContext, one: Tried) -> tuple[str, str, str]:
    return (context.plan_sha256, one.fault.code if one.fault else "", one.place)


def _is_spared(context: JobContext, one: Tried) -> bool:
    return _spared.get(_key(context, one), 0.0) > time.monotonic()


def _spare(context: JobContext, unit_id: int, tried: Sequence[Tried]) -> None:
    """Note that the places are in trouble alone: their images fail, and the job goes on."""
    for one in tried:
        if one.error is None or one.fault is None:
            continue
        if not _is_spared(context, one):
            logs.event(
                "place_fails_alone",
                level=logging.WARNING,
                run_id=context.run_id,
                unit_id=unit_id,
                code=one.fault.code,
                place=shown_uri(one.place),
                message=one.error.message,
            )
        _spared[_key(context, one)] = time.monotonic() + SPARED_S
