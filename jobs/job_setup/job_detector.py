"""The job's detector, as the command line names it, to the record that workers load it by.

Loaded here once, before any work, asked for its fingerprint and shown a blank picture: what is wrong with it
ends the job with exit code 4, and not as a failure of every image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs.config import Config
from jobs.job_setup.resolve_settings import detector_settings
from jobs.terminal import console
from pipeline.errors import JobRefused
from pipeline.settings import JobDetector
from pipeline.stages.detect import load_detector, try_out


@dataclass(frozen=True, kw_only=True)
class FoundDetector:
    """A detector that works here. `settings`: with what it says of itself. `categories`: {"id", "name"}."""

    settings: JobDetector
    categories: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        licence = f"licence {self.settings.license}" if self.settings.license else "licence unknown"
        classes = console.count(len(self.categories), "category", "categories")
        fingerprint = console.fingerprint(self.settings.fingerprint)
        return f"{self.settings.title}; {classes}; fingerprint {fingerprint}; {licence}"


def read_detector(config: Config) -> FoundDetector | None:
    """The configured detector, loaded and tried on this machine's CPU; None where none is configured.

    Raises:
        UsageError: prompts that do not go with it.
        JobRefused: it cannot be loaded, or does not do what a detector does.
    """
    asked = detector_settings(config)
    if asked is None:
        return None
    detector = load_detector(asked)
    try_out(detector, asked)
    fingerprint = detector.fingerprint()
    if not isinstance(fingerprint, str) or not fingerprint:
        raise JobRefused(f"detector {asked.name}: its fingerprint is {fingerprint!r}; wanted a text")
    names = sorted(detector.categories, key=lambda one: one.id)
    facts = {"fingerprint": fingerprint, "title": detector.name, "license": detector.license}
    return FoundDetector(
        settings=asked.model_copy(update=facts),
        categories=tuple({"id": int(one.id), "name": one.name} for one in names),
    )
