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
from urllib.parse import urlsplit

from hqlabel.pipeline.errors import ImageError, SystemicFault, UsageError
from hqlabel.pipeline.failpoints import FailPointReached
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.archive_uris import parse_archive_uri
from hqlabel.pipeline.storage.backend import FetchedObject
from hqlabel.pipeline.storage.read_archives import read_archived
from hqlabel.pipeline.storage.read_objects import read_object
from hqlabel.pipeline.storage.request_retries import StorageFault, class_names, describe, shown_uri
from hqlabel.pipeline.storage.uri_rules import check_uri, options_for
from hqlabel.pipeline.worker.image_guard import charge

FETCH_THREADS = 8
"""Requests in flight for one unit: at 50 ms each they feed 160 images/s, and hold 8 objects at most."""

# What clients raise for a uri that they cannot take, by the names of their classes.
_MALFORMED = (
    *("ParamValidationError", "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError", "HfUriError"),
    *("HFValidationError", "UnsupportedProtocol", "LocationParseError", "UnicodeError"),
    "NotImplementedError",
)


@dataclass(frozen=True, kw_only=True)
class FetchOutcome:
    """What became of one uri: its bytes, or why there are none."""

    fetched: FetchedObject | None
    error: ImageError | None
    fetch_ms: float


def fetch_object(uri: str, access: AccessRules, limits: Limits, version: str | None = None) -> FetchedObject:
    """Return the bytes of one image with their size and etag, within `limits.fetch_timeout_s` in all.

    `version`: the tag that the tar or Parquet file around the image must have; None for any.

    Raises:
        ImageError: uri_refused, not_found, denied, too_many_bytes, changed, unreachable, fetch_timeout.
        SystemicFault: credentials, clock, store or disk: what every image would meet.
    """
    check_uri(uri, access)
    options, deadline = options_for(uri, access), time.monotonic() + limits.fetch_timeout_s
    member = parse_archive_uri(uri)
    if member is not None:
        return read_archived(
            member,
            options,
            version=version,
            max_bytes=limits.max_image_bytes,
            deadline_monotonic=deadline,
        )
    return read_object(uri, options, max_bytes=limits.max_image_bytes, deadline_monotonic=deadline)


def fetch_ahead(
    uris: Sequence[str],
    access: AccessRules,
    limits: Limits,
    *,
    versions: Sequence[str | None] | None = None,
    threads: int = FETCH_THREADS,
) -> Iterator[FetchOutcome]:
    """Yield one outcome for every uri, in their order; hold at most `threads` objects ahead of the caller.

    `versions`: of each uri, as in `fetch_object`.

    A slow object costs its unit its own time, while the next ones arrive behind it. Nothing is raised for a
    uri: `FetchOutcome.error` has what it met, and its `fault` where most images may meet the same.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="fetch")
    waiting = iter(zip(uris, versions or [None] * len(uris), strict=True))
    ahead: deque[Future[FetchOutcome]] = deque()
    try:
        ahead.extend(pool.submit(_fetch_one, *one, access, limits) for one in islice(waiting, threads))
        while ahead:
            outcome = ahead.popleft().result()
            ahead.extend(pool.submit(_fetch_one, *one, access, limits) for one in islice(waiting, 1))
            yield outcome
    finally:
        # No waiting: after a fault, or when the caller stops early, the rest is not needed.
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch_one(uri: str, version: str | None, access: AccessRules, limits: Limits) -> FetchOutcome:
    """Return what became of one uri; whatever is raised becomes this image's error, which names the uri."""
    start = time.monotonic()
    fetched: FetchedObject | None = None
    problem: ImageError | None = None
    try:
        fetched = fetch_object(uri, access, limits, version)
    except (KeyboardInterrupt, FailPointReached):
        raise
    except BaseException as error:  # in a thread of our own, so even SystemExit is no wish to end the process
        problem = _naming(uri, _error_of(uri, error))
    return FetchOutcome(fetched=fetched, error=problem, fetch_ms=1000 * (time.monotonic() - start))


def _error_of(uri: str, error: BaseException) -> ImageError:
    """Return what was raised as the image's error, with what it means when most images meet the same."""
    if isinstance(error, SystemicFault):
        cause = error.__cause__
        alone = cause.verdict.alone if isinstance(cause, StorageFault) else "unreachable"
        return ImageError(alone, error.message, fault=error)
    if isinstance(error, UsageError):  # from the making of the client
        return ImageError("unreachable", str(error), fault=SystemicFault("driver", str(error)))
    if not isinstance(error, ImageError) and _is_malformed(uri, error):
        return ImageError("uri_refused", f"the uri cannot be used: {describe(error)}")
    found = charge(error, uri=uri, step="fetch")
    if found.fault is None and found.code in _OF_STORES and not _is_broken_body(found):
        found.fault = SystemicFault(_OF_STORES[found.code], found.message)
    return found


def _is_malformed(uri: str, error: BaseException) -> bool:
    """Return whether an error is a client's word on the form of the uri."""
    if not set(class_names(error)).isdisjoint(_MALFORMED):
        return True
    if not isinstance(error, ValueError) or not uri.startswith(("http:", "https:")):
        return False
    try:  # clients of http raise no class of their own for a host or a port
        _ = urlsplit(uri).port
    except ValueError:
        return True
    return False


_OF_STORES = {"denied": "denied", "unreachable": "store", "fetch_timeout": "store"}
"""Codes of one image -> the systemic code where a store answers so for most images."""


def _is_broken_body(error: ImageError) -> bool:
    """Return whether the store sent the object broken: that object's trouble, however many there are."""
    return isinstance(error.__cause__, StorageFault) and error.__cause__.broken_body


def _naming(uri: str, error: ImageError) -> ImageError:
    shown = shown_uri(uri)
    if shown in error.message:
        return error
    return ImageError(error.code, f"{shown}: {error.message}", fault=error.fault)
