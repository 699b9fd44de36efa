"""Pictures beside their labels: linked or copied, with the call's own rights to read.

The uris come from the tables, which are another's data: each is checked, as for `report`, before anything
is opened or linked. A picture that cannot be had costs its own image, which the caller counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from hqlabel.jobs.export.export_names import shared_file
from hqlabel.jobs.export.export_source import UNREADABLE, ExportSource
from hqlabel.jobs.results.read_tables import ImageRows, Row
from hqlabel.jobs.results.render_images import say_missed
from hqlabel.pipeline.errors import HqlabelError, ImageError, UsageError
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.storage.archive_uris import parse_archive_uri
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.uri_rules import check_uri, split_scheme
from hqlabel.pipeline.worker.image_guard import charge

T = TypeVar("T")
Way = Literal["link", "copy"]
_MOST_NAMED = 1000


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """How pictures get into an export below `place`. `context`: rights and limits of this call."""

    way: Way
    place: Store
    context: JobContext
    missed: list[tuple[Row, HqlabelError]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise UsageError where links were asked for and cannot be made."""
        scheme = split_scheme(self.place.place.uri)[0]
        if self.way == "link" and scheme != "file":
            raise UsageError(f"--images link: {scheme}:// holds no links; wanted --images copy, or a folder")

    def beside(self, source: ExportSource, rows: ImageRows, key: str) -> bool:
        """Return whether an image's picture is at `key` now; the image is counted where it is not."""
        if self.bring(rows.image, key):
            return True
        source.skip(rows, UNREADABLE)
        return False

    def bring(self, image: Row, key: str) -> bool:
        """Return whether the picture of a row of `images` is at `key` now; one that is not is noted."""
        if self.way == "link":
            source = self._got(image, self._target_of)
            if source is not None:
                self._link(source, key)
            return source is not None
        data = self.bytes_of(image)
        if data is not None and not self.place.put_if_absent(key, data):
            raise UsageError(shared_file(None, str(image["image_id"]), key))
        return data is not None

    def bytes_of(self, image: Row) -> bytes | None:
        """Return the encoded picture of a row of `images`; None, noted, where it cannot be had."""
        return self._got(image, self._read)

    def _got(self, image: Row, get: Callable[[Row], T]) -> T | None:
        try:
            return get(image)
        except HqlabelError as error:
            if len(self.missed) < _MOST_NAMED:
                self.missed.append((image, error))
            return None

    def _read(self, image: Row) -> bytes:
        uri = str(image["image_uri"])
        version = image["source_etag"] if parse_archive_uri(uri) else None  # its place may hold another
        try:
            return fetch_object(uri, self.context.access, self.context.limits, version).data
        except HqlabelError:
            raise
        except Exception as error:  # a picture costs itself here as in the stages
            raise charge(error, uri=uri, step="fetch") from error

    def _target_of(self, image: Row) -> str:
        uri = str(image["image_uri"])
        check_uri(uri, self.context.access)
        scheme, path = split_scheme(uri)
        if scheme != "file" or parse_archive_uri(uri) is not None:
            raise ImageError("uri_refused", "no file of its own to link to; --images copy reads it")
        if not os.path.isfile(path):
            raise ImageError("not_found", "there is no such file")
        return os.path.realpath(path)

    def _link(self, source: str, key: str) -> None:
        target = os.path.join(split_scheme(self.place.place.uri)[1], key)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(source, target)
        except OSError as error:
            raise UsageError(f"--images link: {target}: {error.strerror}; wanted --images copy") from error

    def say(self) -> None:
        """Say which pictures are missing, one line for each kind of fault."""
        say_missed(self.missed, self.context.access)
