"""How often work was started, counted outside the process: an image that kills its worker must not loop.

Ray restarts a dead actor and its task for ever. So every start of a unit leaves a mark in the store before
the work, in `attempts/<unit>.g<generation>/`. From the second start on a unit is done image by image and the
image in work is written down; one that was in work at two deaths is given up as `crashed` (or
`timeout`, where the process ended itself for that), after three deaths in all. Deaths of the driver are
not an image's fault: with it all workers go, and an innocent image may be in work. So marks of other
drivers count only in bulk. Processes that die while they load their model are counted likewise.

Nothing here needs a delete: a commit makes the marks of its unit meaningless.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import HqlabelError, SystemicFault
from pipeline.failpoints import visit
from pipeline.storage.output_store import Store

DEATHS_UNDER_ONE_DRIVER = 2
DEATHS_UNDER_ANY_DRIVER = 4
MAX_DEATHS_IN_LOADING = 3


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a unit, to be worked on now.

    `earlier`: starts before this one that led to no commit. `crashed`: image ids that are to be written as
    `failed`, without being touched again, with the code: `crashed` or `timeout`.
    """

    unit_id: int
    generation: int
    earlier: int
    crashed: dict[str, str]

    @property
    def image_by_image(self) -> bool:
        """Whether the image in work must be noted with `CrashLog.note_image`."""
        return self.earlier > 0


class CrashLog:
    """The marks of one job. `epoch`: the number of its driver (`Owner.number`)."""

    def __init__(self, store: Store, *, epoch: int) -> None:
        self._store = store
        self._epoch = epoch

    def note_start(self, unit_id: int, generation: int = 0) -> Start:
        """Mark this start in the store before any work; one request when there was none before."""
        earlier = 0
        while not self._store.put_if_absent(self._key(unit_id, generation, earlier), self._mark(earlier)):
            earlier += 1
        visit("attempt.started")
        crashed = self._crashed(unit_id, generation) if earlier else {}
        return Start(unit_id=unit_id, generation=generation, earlier=earlier, crashed=crashed)

    def note_image(self, start: Start, image_id: str | None, *, code: str = "crashed") -> None:
        """Note the image that this start works on from now; None: nothing that could kill.

        `code`: what a death from here on means; `timeout` right before this process ends itself.
        """
        body = json.dumps({"epoch": self._epoch, "image_id": image_id, "code": code}).encode()
        self._store.put(self._key(start.unit_id, start.generation, start.earlier, "image"), body)
        visit("attempt.image")

    @contextlib.contextmanager
    def limit_load_crashes(self, restarted: str | None) -> Iterator[None]:
        """Count the processes of a worker that die while the block loads their model.

        Too little memory for the weights kills each one, and Ray would start the next for ever.
        `restarted`: the name of the worker, None when no process of it has died.

        Raises:
            SystemicFault: `resources`, at the start after `MAX_DEATHS_IN_LOADING` of them.
        """
        if restarted is None:
            yield
            return
        key = f"attempts/model.{self._epoch}.{restarted}.json"
        deaths = int(self._store.read(key)) if self._store.head(key) is not None else 0
        if deaths >= MAX_DEATHS_IN_LOADING:
            raise SystemicFault(
                "resources",
                f"{deaths} processes died one after another while they loaded the model, most likely for "
                "lack of memory; give the nodes more, or set fewer cluster.actors",
            )
        self._store.put(key, str(deaths + 1).encode())
        yield
        self._store.put(key, b"0")

    def _mark(self, number: int) -> bytes:
        # Unlike in every start, or a second one would count as the first one's repeated request.
        return json.dumps({"epoch": self._epoch, "number": number, "token": secrets.token_hex(8)}).encode()

    def _key(self, unit_id: int, generation: int, number: int, kind: str = "start") -> str:
        return f"{_folder(unit_id, generation)}{number:04d}.{kind}.json"

    def _crashed(self, unit_id: int, generation: int) -> dict[str, str]:
        """Return the images to give up, by the image marks of every start that ended with one in work."""
        entries = self._store.list(_folder(unit_id, generation))
        marks = [_read(self._store, one.key) for one in entries if one.key.endswith(".image.json")]
        marks = [mark for mark in marks if isinstance(mark.get("image_id"), str)]
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
