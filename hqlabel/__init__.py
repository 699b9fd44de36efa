"""SAM-HQ masks for detector boxes, over millions of images.

`SamHQ` predicts masks of one image, `SegmentImages` is a stage for Ray Data pipelines, `label` runs a whole
job. Each is imported when it is first used: `import hqlabel` brings neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqlabel.label_job import JobEnded, LabelledTables, label
    from hqlabel.predict import Prediction, SamHQ
    from hqlabel.ray_data_stage import SegmentImages

__all__ = ["JobEnded", "LabelledTables", "Prediction", "SamHQ", "SegmentImages", "label"]

_HOME = {
    "JobEnded": "label_job",
    "LabelledTables": "label_job",
    "Prediction": "predict",
    "SamHQ": "predict",
    "SegmentImages": "ray_data_stage",
    "label": "label_job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hqlabel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hqlabel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
