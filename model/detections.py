"""What a detector is, and what it says: plain arrays, so that a detector of any library fits.

A person's own detector is a class with these names and nothing else of ours (docs/detectors.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


class DetectorError(ValueError):
    """A detector that cannot be found, loaded or used, or answers what none may; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Category:
    """One class of a detector: the number that its detections carry, and its name, if it has one."""

    id: int
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a detector found in one picture; N boxes, in any order.

    `boxes_xyxy`: (N, 4) in pixels of the picture that it was given. `category_ids`: (N,) integers, ids of
    `Detector.categories`. `scores`: (N,), or None where the detector has none. `box_ids`: a name a box.
    """

    boxes_xyxy: npt.NDArray[np.floating]
    category_ids: npt.NDArray[np.integer]
    scores: npt.NDArray[np.floating] | None = None
    box_ids: Sequence[str] | None = None


class Detector(Protocol):
    """Finds boxes in pictures. One a process, called from one thread.

    `name`: for people. `license`: of the code and the weights, None where unknown. `categories`: all that
    `category_ids` may hold.
    """

    name: str
    license: str | None
    categories: Sequence[Category]

    def fingerprint(self) -> str:
        """What changes whenever other boxes may come out for the same picture: weights, version, settings."""

    def detect(self, images: Sequence[npt.NDArray[np.uint8]]) -> Sequence[Detections]:
        """One result a picture, in order. `images`: upright RGB (h, w, 3), of any sizes, read-only."""
