"""One JSON object a line for what workers do, so that a log store can be searched for a run, unit or image.

    {"time": "2026-11-25T17:03:12.482+00:00", "level": "WARNING", "event": "image_failed",
     "run_id": "…", "unit_id": 1234, "image_id": "street/0001.jpg", "code": "truncated", "message": "…"}

Workers write to their stderr, which Ray keeps as `worker-*.err` in the log folder of its session; nothing
comes to the driver's terminal. A line holds what the tables hold, without credentials that a uri may carry.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import logging
import sys
from typing import Any

from hqlabel.pipeline.storage.uri_rules import without_credentials

_LOGGER = logging.getLogger("hqlabel.pipeline")
_LOGGER.addHandler(logging.NullHandler())  # without it, Python prints warnings of a process with no handler
_events = logging.getLogger("hqlabel.pipeline.events")
_FIELDS = "hqlabel_fields"


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log the event `name` with its fields, if this process keeps a log."""
    if _events.isEnabledFor(level):
        _events.log(level, name, extra={_FIELDS: fields})


def image_failed(run_id: str, unit_id: int, image_id: str, code: str, message: str) -> None:
    """Log an image that ends as `failed`."""
    event(
        "image_failed",
        level=logging.WARNING,
        run_id=run_id,
        unit_id=unit_id,
        image_id=without_credentials(image_id),
        code=code,
        message=message,
    )


class JsonLines(logging.Formatter):
    """A log record as one line of JSON; texts of any library become escaped strings."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        when = dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname, "event": record.getMessage()}
        line |= getattr(record, _FIELDS, {"logger": record.name})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@functools.cache
def keep_in_this_process() -> None:
    """Write this process's events, and what `pipeline` logs, to its stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
