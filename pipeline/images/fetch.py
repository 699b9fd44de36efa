"""Image uris -> their bytes: one object under one deadline, or the objects of a unit, several at a time.

The rules on uris are checked here again, right before anything is opened: a plan file may be older
than the job's rules, and a link may have moved. What is tried again is `storage.request_retries`'.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.archive_uris import parse_archive_uri
from hqlabel.pipeline.storage.backend import FetchedObject
from hqlabel.pipeline.storage.read_archives import read_archived
from hqlabel.pipeline.storage.read_objects import read_object
from hqlabel.pipeline.storage.request_retries import StorageFault
from hqlabel.pipeline.storage.uri_rules import check_uri, options_for

FETCH_THREADS = 8
"""Requests in flight for one unit: at 50 ms each they feed 160 images/s, and hold 8 objects at most."""

DENIED_AT_LEAST = 3
_NO_ANSWER = ("unreachable", "fetch_timeout")


@dataclass(frozen=True, kw_only=True)
class FetchOutcome:
    """What became of one uri: its bytes, or why there are none."""

    fetched: FetchedObject | None
    error: ImageError | None
    fetch_ms: float


def fetch_object(uri: str, access: AccessRules, limits: Limits) -> FetchedObject:
    """Return the bytes of one image with their size and etag, within `limits.fetch_timeout_s` in all.

    Raises:
        ImageError: uri_refused, not_found, denied, too_many_bytes, changed, unreachable, fetch_timeout.
        SystemicFault: credentials, clock, store or disk: what every image would meet.
    """
    check_uri(uri, access)
    options, deadline = options_for(uri, access), time.monotonic() + limits.fetch_timeout_s
    member = parse_archive_uri(uri)
    if member is not None:
        return read_archived(member, options, max_bytes=limits.max_image_bytes, deadline_monotonic=deadline)
    return read_object(uri, options, max_bytes=limits.max_image_bytes, deadline_monotonic=deadline)


def fetch_ahead(
    uris: Sequence[str], access: AccessRules, limits: Limits, *, threads: int = FETCH_THREADS
) -> Iterator[FetchOutcome]:
    """Yield one outcome for every uri, in their order; hold at most `threads` objects ahead of the caller.

    A slow object costs its unit its own time, while the next ones arrive behind it. Raises SystemicFault
    when a request meets one.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="fetch")
    waiting = iter(uris)
    ahead: deque[Future[FetchOutcome]] = deque()
    try:
        ahead.extend(pool.submit(_fetch_one, uri, access, limits) for uri in islice(waiting, threads))
        while ahead:
            outcome = ahead.popleft().result()
            ahead.extend(pool.submit(_fetch_one, uri, access, limits) for uri in islice(waiting, 1))
            yield outcome
    finally:
        # No waiting: after a fault, or when the caller stops early, the rest is not needed.
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch_one(uri: str, access: AccessRules, limits: Limits) -> FetchOutcome:
    start = time.monotonic()
    fetched: FetchedObject | None = None
    problem: ImageError | None = None
    try:
        fetched = fetch_object(uri, access, limits)
    except ImageError as error:
        problem = error
    return FetchOutcome(fetched=fetched, error=problem, fetch_ms=1000 * (time.monotonic() - start))


def stop_if_denied(errors: Sequence[ImageError | None]) -> None:
    """Stop the job when the store refuses a whole unit: at least 3 objects and half of those requested.

    One forbidden object is that image's failure. A unit of them means a missing right, which must not
    be written into a million rows.

    Raises:
        SystemicFault: `denied`.
    """
    denied = [error for error in errors if error is not None and error.code == "denied"]
    if _is_most_of_a_unit(denied, errors):
        raise SystemicFault(
            "denied",
            f"the store refused {len(denied)} of {len(errors)} images of a unit, for example: "
            f"{denied[0].message}. Grant read access and start again (S3 also answers 403 for objects "
            "that do not exist when listing the bucket is not allowed)",
        )


def stop_if_unreachable(uris: Sequence[str], errors: Sequence[ImageError | None]) -> None:
    """Stop the job when a store gives no answer for a whole unit: at least 3 objects, half of its own.

    Images from web sites (http) do not count: one site that is down is no sign for the others. Nor do
    objects that the store sends in a broken state: they would stop the job for ever.

    Raises:
        SystemicFault: `store`.
    """
    pairs = zip(uris, errors, strict=True)
    of_stores = [error for uri, error in pairs if not uri.startswith(("http:", "https:"))]
    silent = [e for e in of_stores if e is not None and e.code in _NO_ANSWER and not _is_broken_body(e)]
    if _is_most_of_a_unit(silent, of_stores):
        raise SystemicFault(
            "store",
            f"{len(silent)} of {len(of_stores)} images of a unit could not be read, for example: "
            f"{silent[0].message}. Start again when the store answers; if it is only slow, raise "
            "limits.fetch_timeout_s",
        )


def _is_most_of_a_unit(faults: Sequence[ImageError], errors: Sequence[ImageError | None]) -> bool:
    return len(faults) >= DENIED_AT_LEAST and 2 * len(faults) >= len(errors)


def _is_broken_body(error: ImageError) -> bool:
    return isinstance(error.__cause__, StorageFault) and error.__cause__.broken_body
