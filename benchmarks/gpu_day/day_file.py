"""What a GPU day has done so far: one event a line, appended, so that a kill loses no earlier one."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class DayFile:
    """The events of a state folder. One process writes.

    `call`: a call of the command began; `device`: where its parts run; `begun` and `ended`: a part, the
    latter with its rows, its seconds, and an error or what was missing; `forgotten`: what to do anew.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "events.jsonl"
        self.events = self._read()

    def _read(self) -> list[Event]:
        """The whole lines; the beginning of one that a kill has cut off is removed from the file."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self._path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, event: str, **values: Any) -> None:
        """Write an event; it is on the disk when this returns."""
        record = {"event": event, "at": round(time.time(), 3), **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=float) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.events.append(record)

    def forget(self, name: str) -> None:
        """Count a step's parts, or one part, as not done, although the file keeps what was measured."""
        self.append("forgotten", name=name)

    def ended(self) -> dict[str, Event]:
        """The last `ended` of each part that is done, by name. One that lacked something is not done."""
        found: dict[str, Event] = {}
        for event in self.events:
            if event["event"] == "ended":
                found[event["part"]] = event
            elif event["event"] == "forgotten":
                found = {name: one for name, one in found.items() if not _names(event, name)}
        return {name: event for name, event in found.items() if not event.get("missing")}

    def lacking(self) -> dict[str, str]:
        """What was missing for each part that could not be done, by the part's name."""
        last = {event["part"]: event.get("missing") for event in self.events if event["event"] == "ended"}
        return {name: missing for name, missing in last.items() if missing}

    def unfinished(self) -> Counter[str]:
        """How often each part has begun since it last ended or was forgotten."""
        found: Counter[str] = Counter()
        for event in self.events:
            if event["event"] == "begun":
                found[event["part"]] += 1
            elif event["event"] == "ended":
                found[event["part"]] = 0
            elif event["event"] == "forgotten":
                found = Counter({name: n for name, n in found.items() if not _names(event, name)})
        return +found

    def device(self) -> Event | None:
        """Where the first call's parts ran."""
        return next((event for event in self.events if event["event"] == "device"), None)


def _names(forgotten: Event, part: str) -> bool:
    return forgotten["name"] in (part, part.partition("/")[0])
