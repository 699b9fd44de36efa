"""One table of what errors of the outside world mean, and the only loop that tries again.

Every storage call goes through `with_retries`, with one deadline for all of its tries together. The
backends below it have their own retries switched off: three nested loops of five tries turn one
broken object into minutes. The table goes by the store's error code, the HTTP status and errno
before the class, because one class means many things: a wrong clock, an expired token and a
forbidden object all arrive as `PermissionError`.
"""

from __future__ import annotations

import errno
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hqlabel.pipeline.errors import HqlabelError, clean_text

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an error means.

    `kind`: `retry` (may pass by itself), `image` (this object's own fault), `systemic` (everything
    will fail alike) or `bug` (nothing known: let it rise). `code`: of IMAGE_CODES for `image`, of
    SYSTEMIC_CODES for `systemic`, and for `retry` the systemic code to report when it never passes.
    `alone`: for `systemic`, the code of IMAGE_CODES where one image meets it and most others do not.
    """

    kind: Literal["retry", "image", "systemic", "bug"]
    code: str = ""
    alone: str = "unreachable"


class StorageFault(HqlabelError):
    """A storage call that is given up; the caller turns it into the error that it promises itself.

    `broken_body`: the store answered, but what it sent was never whole: that object's own trouble.
    """

    def __init__(
        self, verdict: Verdict, message: str, *, timed_out: bool = False, broken_body: bool = False
    ) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.message = message
        self.timed_out = timed_out
        self.broken_body = broken_body


class ShortBody(OSError):
    """Fewer bytes came than the store had announced."""


_RETRY = Verdict(kind="retry", code="store")
_NOT_FOUND = Verdict(kind="image", code="not_found")
_DENIED = Verdict(kind="systemic", code="denied", alone="denied")
_CREDENTIALS = Verdict(kind="systemic", code="credentials", alone="denied")
_CLOCK = Verdict(kind="systemic", code="clock", alone="denied")
_NO_BUCKET = Verdict(kind="systemic", code="store", alone="not_found")
_STORE = Verdict(kind="systemic", code="store")
_DISK = Verdict(kind="systemic", code="disk")
_BUG = Verdict(kind="bug")

_RETRY_CODES = (
    "SlowDown ServiceUnavailable InternalError RequestTimeout RequestTimeoutException Throttling "
    "ThrottlingException ThrottledException RequestThrottled TooManyRequests BandwidthLimitExceeded "
    "PriorRequestNotComplete OperationAborted ConditionalRequestConflict IncompleteBody BadDigest "
    "XAmzContentSHA256Mismatch"
)
_CREDENTIAL_CODES = (
    "ExpiredToken ExpiredTokenException TokenRefreshRequired InvalidToken InvalidAccessKeyId "
    "SignatureDoesNotMatch UnrecognizedClientException InvalidClientTokenId NotSignedUp AccountProblem"
)
# Error codes of the store itself: they are more precise than the status they come with.
_BY_CODE: dict[str, Verdict] = {
    **dict.fromkeys(_RETRY_CODES.split(), _RETRY),
    **dict.fromkeys(_CREDENTIAL_CODES.split(), _CREDENTIALS),
    **dict.fromkeys(["NoSuchKey", "NoSuchVersion", "KeyTooLongError"], _NOT_FOUND),
    **dict.fromkeys(["AccessDenied", "AllAccessDisabled", "InvalidObjectState"], _DENIED),
    **dict.fromkeys(["NoSuchBucket", "InvalidBucketName"], _NO_BUCKET),
    "PermanentRedirect": _STORE,
    **dict.fromkeys(["RequestTimeTooSkewed", "RequestExpired"], _CLOCK),
    **dict.fromkeys(["QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"], _DISK),
}
_BY_ERRNO: dict[int, Verdict] = {
    **dict.fromkeys([errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG], _NOT_FOUND),
    **dict.fromkeys([errno.EACCES, errno.EPERM, errno.EROFS], _DENIED),
    **dict.fromkeys([errno.ENOSPC, errno.EDQUOT, errno.EFBIG], _DISK),
    errno.EIO: Verdict(kind="retry", code="disk"),
    **dict.fromkeys(
        [
            *(errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.EPIPE, errno.ETIMEDOUT),
            *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH),
            *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.EMFILE, errno.ENFILE, errno.EREMOTEIO),
        ],
        _RETRY,
    ),
}
# Classes of libraries that are not imported here (s3fs is an extra), by name along the mro.
_RETRY_CLASSES = (
    "EndpointConnectionError ConnectionError ConnectTimeoutError ReadTimeoutError HTTPClientError "
    "IncompleteRead IncompleteReadError ResponseStreamingError ResponseParserError FlexibleChecksumError "
    "ChecksumError FSTimeoutError TimeoutError ClientPayloadError ClientConnectionError ShortBody "
    "TransportError"  # of httpx, through which the hub is asked: no connection, timeouts, broken answers
)
_BROKEN_BODIES = (
    "IncompleteRead IncompleteReadError ResponseStreamingError FlexibleChecksumError ChecksumError "
    "ClientPayloadError ShortBody"
)
_CREDENTIAL_CLASSES = (
    "NoCredentialsError PartialCredentialsError CredentialRetrievalError TokenRetrievalError "
    "SSOTokenLoadError UnauthorizedSSOTokenError ProfileNotFound NoAuthTokenError DefaultCredentialsError"
)
_BY_CLASS: dict[str, Verdict] = {
    **dict.fromkeys(_RETRY_CLASSES.split(), _RETRY),
    **dict.fromkeys(_CREDENTIAL_CLASSES.split(), _CREDENTIALS),
    "FileNotFoundError": _NOT_FOUND,
    "NotADirectoryError": _NOT_FOUND,
    "IsADirectoryError": _NOT_FOUND,
    "PermissionError": _DENIED,
}


def classify(error: BaseException) -> Verdict:
    """Return what `error` means: by the store's code, then HTTP status, TLS, errno and class, causes first.

    Causes come first because wrappers lose the code: s3fs gives `PermissionError` for a wrong clock.
    """
    chain = list(_causes(error))
    for read in (_by_store_code, _by_status, _by_tls, _by_errno, _by_class):
        for one in reversed(chain):
            verdict = read(one)
            if verdict is not None:
                return verdict
    return _BUG


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _response_error(error: BaseException) -> tuple[str, int | None]:
    """Return the store's own code and the HTTP status inside an error, "" and None where it has none."""
    response: Any = getattr(error, "response", None)
    if not isinstance(response, dict):
        # Not `code` alone: aiohttp gives every broken body the code 400. gcsfs has no other name for it.
        names = ("status", "status_code", *(["code"] if type(error).__name__ == "HttpError" else []))
        # Errors of httpx, and of the hub above it, have the status in their answer alone.
        statuses = (*(getattr(error, name, None) for name in names), getattr(response, "status_code", None))
        return "", next((s for s in statuses if isinstance(s, int) and 100 <= s < 600), None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return str(response.get("Error", {}).get("Code", "")), status


def is_silence(error: BaseException) -> bool:
    """Return whether an error came without any answer of a store: no connection, or nothing through it."""
    return all(_response_error(one) == ("", None) for one in _causes(error))


def _by_store_code(error: BaseException) -> Verdict | None:
    return _BY_CODE.get(_response_error(error)[0])


def _by_status(error: BaseException) -> Verdict | None:
    status = _response_error(error)[1]
    if status is None:
        return None
    if status in (408, 409, 425, 429) or status >= 500:
        return _RETRY
    known = {404: _NOT_FOUND, 410: _NOT_FOUND, 403: _DENIED, 401: _CREDENTIALS, 507: _DISK}
    return known.get(status, _STORE if status >= 400 else None)


def _by_tls(error: BaseException) -> Verdict | None:
    # Before the errno: OpenSSL's numbers are others, its 1 is no EPERM.
    return _RETRY if isinstance(error, ssl.SSLError) else None


def _by_errno(error: BaseException) -> Verdict | None:
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_ERRNO.get(error.errno)
    return None


def _by_class(error: BaseException) -> Verdict | None:
    for kind in type(error).__mro__:
        if kind.__name__ in _BY_CLASS:
            return _BY_CLASS[kind.__name__]
    return None


_QUERY = re.compile(r"(\w+://[^\s?\"']+)\?[^\s\"']*")
_LOGIN = re.compile(r"(\w+://)[^\s/@\"']+@")


def describe(error: BaseException) -> str:
    """Return one safe line about an error: class, store code and text; no query string, no login."""
    code = next((c for c in (_response_error(e)[0] for e in _causes(error)) if c), "")
    return clean_text(f"{type(error).__name__}{f' {code}' if code else ''}: {redacted(str(error))}")


_SHOWN_CHARS = 200


def shown_uri(uri: str) -> str:
    """Return a uri as messages name it: one line of about 200 characters, without query and login."""
    half = _SHOWN_CHARS // 2
    text = redacted(uri)
    return clean_text(text if len(text) <= _SHOWN_CHARS else f"{text[:half]}…{text[-half:]}")


def redacted(text: str) -> str:
    """Return a text without the queries and logins of the uris in it: they may be secrets."""
    return _LOGIN.sub(r"\1", _QUERY.sub(r"\1", text))


def class_names(error: BaseException) -> Iterator[str]:
    """Yield the names of the classes of an error and of its causes, bases included."""
    for one in _causes(error):
        yield from (kind.__name__ for kind in type(one).__mro__)


def with_retries(
    call: Callable[[float], T], *, deadline: float, what: str, max_tries: int | None = None
) -> T:
    """Return `call(seconds_left)`, tried again while its errors are of the kind that passes.

    `deadline`: on `time.monotonic()`, for all tries and pauses together; each try is passed how long it
    may still take. `max_tries`: a second bound, for objects that are broken for good. Pauses double
    from 0.1 s to 5 s, less a random part, so that a thousand workers do not come back at once.

    Raises:
        StorageFault: given up, with the verdict on the last error. Unknown errors rise as they are.
    """
    pause = FIRST_PAUSE_S
    errors: list[Exception] = []
    while True:
        try:
            return call(max(deadline - time.monotonic(), 0.001))
        except Exception as error:
            errors.append(error)
            wait = pause * random.uniform(0.5, 1.0)
            last = len(errors) == max_tries or time.monotonic() + wait >= deadline
            if _verdict_on(error).kind != "retry" or last:
                raise _fault(errors, what, deadline) from error
        time.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _verdict_on(error: Exception) -> Verdict:
    """Return `classify(error)`; re-raise our own errors and unknown ones."""
    verdict = _BUG if isinstance(error, HqlabelError) else classify(error)
    if verdict.kind == "bug":
        raise error
    return verdict


def _fault(errors: Sequence[Exception], what: str, deadline: float) -> StorageFault:
    """Return the fault of the last error; of one before it, when the last is only the deadline's own cut.

    `timed_out` is true only when there was nothing but the cut: a store too slow, not a broken one.
    """
    cut = isinstance(errors[-1], TimeoutError) and time.monotonic() >= deadline - 0.05
    broken = [error for error in errors if not isinstance(error, TimeoutError)]
    decisive = broken[-1] if cut and broken else errors[-1]
    verdict = _verdict_on(decisive)
    counted = f" (given up, tries: {len(errors)})" if verdict.kind == "retry" else ""
    return StorageFault(
        verdict,
        clean_text(f"{what}: {describe(decisive)}{counted}"),
        timed_out=cut and not broken,
        broken_body=any(
            kind.__name__ in _BROKEN_BODIES.split() for e in _causes(decisive) for kind in type(e).__mro__
        ),
    )
