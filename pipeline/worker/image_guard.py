"""The one rule on what is raised while a stage works on one image: it costs that image, whatever it is.

A library may raise anything: its own classes, `SystemExit`, a panic of native code (no `Exception`). What is
not an image's own is let through: faults of the surroundings, an interrupt, the end that Ray asks for.
"""

from __future__ import annotations

import logging
import traceback

from hqlabel.pipeline.errors import ImageError, SystemicFault, clean_text, text_of
from hqlabel.pipeline.failpoints import FailPointReached
from hqlabel.pipeline.storage.request_retries import redacted, shown_uri
from hqlabel.pipeline.worker import logs

_NO_IMAGES = (SystemicFault, KeyboardInterrupt, FailPointReached)


def is_an_images(error: BaseException) -> bool:
    """Return whether what was raised in the work on one image is to be charged to it."""
    if isinstance(error, BaseExceptionGroup) and error.subgroup(_NO_IMAGES) is not None:
        return False
    # Ray ends a worker by a SystemExit that carries its reason.
    return not isinstance(error, _NO_IMAGES) and not hasattr(error, "ray_terminate_msg")


def charge(error: BaseException, *, uri: str, step: str) -> ImageError:
    """Return what `error`, raised by `step` on the image at `uri`, means for the image.

    An error without a code of its own becomes `internal`, and the log has its trace.

    Raises:
        BaseException: `error` itself, when it is no image's (`is_an_images`).
    """
    if isinstance(error, ImageError):
        return error
    if not is_an_images(error):
        raise error
    reason = describe_raised(error)
    if isinstance(error, MemoryError):
        return ImageError("out_of_memory", f"{step}: {reason}")
    log_trace(error, uri=uri, step=step)
    return ImageError(
        "internal",
        f"{step}: {reason}",
        fault=SystemicFault("internal", f"{step}: {reason}; the log of the workers has its trace"),
    )


def log_trace(error: BaseException, *, uri: str, step: str) -> None:
    """Log what was raised by `step` on the image at `uri`, with its trace."""
    trace = redacted("".join(traceback.format_exception(error)))
    logs.event("image_raised", level=logging.ERROR, uri=shown_uri(uri), step=step, trace=trace)


def describe_raised(error: BaseException) -> str:
    """Return the class and the text of an error in one line, without queries and logins of uris."""
    return clean_text(redacted(" ".join(f"{type(error).__name__}: {text_of(error)}".split())))
