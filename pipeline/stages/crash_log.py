"""How often a unit was started, kept outside the process: an image that kills its worker must not loop.

Ray restarts a dead actor and its task for ever. So every start leaves a mark in the store before the
work, in `attempts/<unit>.g<generation>/`. From the second start on a unit runs image by image and the
image in work is written down; one that was in work at two deaths is given up as `crashed` (or
`timeout`, where the process ended itself for that), after three deaths in all. Deaths of the driver are
not an image's fault: with it all workers go, and an innocent image may be in work. So marks of other
drivers count only in bulk.

Nothing here needs a delete: a commit makes the marks of its unit meaningless.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import HqlabelError
from pipeline.failpoints import visit
from pipeline.storage.store import Store

IMAGE_BY_IMAGE_FROM = 1  # earlier starts
DEATHS_UNDER_ONE_DRIVER = 2
DEATHS_UNDER_ANY_DRIVER = 4


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a unit, to be worked on now.

    `earlier`: starts before this one that led to no commit. `image_by_image`: whether the image in
    work must be noted with `Attempts.note_image`. `crashed`: image ids that are to be written as
    `failed`, without being touched again, with the code: `crashed` or `timeout`.
    """

    unit_id: int
    generation: int
    number: int
    earlier: int
    image_by_image: bool
    crashed: dict[str, str]


class Attempts:
    """The marks of one job. `epoch`: the number of its driver (`Owner.number`)."""

    def __init__(self, store: Store, *, epoch: int) -> None:
        self._store = store
        self._epoch = epoch

    def note_start(self, unit_id: int, generation: int = 0) -> Start:
        """This start, marked in the store before any work; one request when there was none before."""
        number = 0
        while not self._store.put_if_absent(self._key(unit_id, generation, number), self._mark(number)):
            number += 1
        visit("attempt.started")
        crashed = self._crashed(unit_id, generation) if number else {}
        return Start(
            unit_id=unit_id,
            generation=generation,
            number=number,
            earlier=number,
            image_by_image=number >= IMAGE_BY_IMAGE_FROM,
            crashed=crashed,
        )

    def note_image(self, start: Start, image_id: str | None, *, code: str = "crashed") -> None:
        """None; `image_id` is now what this start works on, None: nothing that could kill.

        `code`: what a death from here on means; `timeout` right before this process ends itself.
        """
        body = json.dumps({"epoch": self._epoch, "image_id": image_id, "code": code}).encode()
        self._store.put(self._key(start.unit_id, start.generation, start.number, "image"), body)
        visit("attempt.image")

    def _mark(self, number: int) -> bytes:
        # Unlike in every start, or a second one would count as the first one's repeated request.
        return json.dumps({"epoch": self._epoch, "number": number, "token": secrets.token_hex(8)}).encode()

    def _key(self, unit_id: int, generation: int, number: int, what: str = "start") -> str:
        return f"{_folder(unit_id, generation)}{number:04d}.{what}.json"

    def _crashed(self, unit_id: int, generation: int) -> dict[str, str]:
        marks = list(self._deaths(unit_id, generation))
        everywhere = Counter(mark["image_id"] for mark in marks)
        here = Counter(mark["image_id"] for mark in marks if mark["epoch"] == self._epoch)
        codes = {
            mark["image_id"]: "timeout" if mark.get("code") == "timeout" else "crashed" for mark in marks
        }
        return {
            image_id: codes[image_id]
            for image_id, deaths in sorted(everywhere.items())
            if here[image_id] >= DEATHS_UNDER_ONE_DRIVER or deaths >= DEATHS_UNDER_ANY_DRIVER
        }

    def _deaths(self, unit_id: int, generation: int) -> Iterator[dict[str, Any]]:
        """The image marks of every start that ended with an image in work, first to last."""
        for entry in self._store.list(_folder(unit_id, generation)):
            if entry.key.endswith(".image.json"):
                mark = _read(self._store, entry.key)
                if isinstance(mark.get("image_id"), str):
                    yield mark


def _folder(unit_id: int, generation: int) -> str:
    return f"attempts/{unit_id:08d}.g{generation}/"


def _read(store: Store, key: str) -> dict[str, Any]:
    body = store.read(key)
    try:
        return dict(json.loads(body))
    except (ValueError, TypeError) as error:
        raise HqlabelError(
            f"{store.place.uri}/{key} cannot be read ({error}); delete this one file"
        ) from error
