"""docs/cluster.md lists the metrics that a job really has, with kind, tags and meaning."""

from __future__ import annotations

from pathlib import Path

from hqlabel.pipeline.ray_execution.metrics import METRICS
from tests.docs.markdown import section, table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()


def test_every_metric_is_on_the_page() -> None:
    rows = table(section(PAGE, "Metrics"))

    assert [(r["name"], r["kind"], r["tags"], r["meaning"]) for r in rows] == [
        (one.name, one.kind, ", ".join(one.tags), one.meaning) for one in METRICS.values()
    ]
