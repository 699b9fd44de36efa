"""Writes docs/configuration.md from the configuration's own fields and docstrings.

.venv/bin/python tools/configuration.py
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jobs.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Every setting of a job, in the order of the YAML file that `--config` reads.
Written by `tools/configuration.py`; do not edit.

Flags and `--set section.name=value` go before the file; an unknown name is an error and proposes the nearest.
Secrets have no setting: they come from the environment, a profile or a role of the machine.
`null` means "not given"; the resolved configuration of a job lies beside its tables as `config.yaml`.

```yaml
input:
  images: s3://bucket/photos/
  boxes: s3://bucket/boxes.parquet
model:
  checkpoint: s3://bucket/sam_hq_vit_h.pth
output:
  uri: s3://bucket/labels/
storage:
  s3: {endpoint_url: https://minio.example.com}
```
"""


def kind(annotation: Any) -> str:
    """A field's type in the words of YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is UnionType or str(origin) == "typing.Union":
        return " or ".join(kind(part) for part in inner if part is not NoneType)
    if origin in (list, dict):
        return {list: "list", dict: "mapping"}[origin]
    if origin is not None:  # Annotated and the like: what they annotate
        return kind(inner[0])
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def default(field: FieldInfo) -> str:
    """A field's default as YAML writes it."""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def bounds(field: FieldInfo) -> str:
    """A field's limits, such as ` (≥ 1)`; empty without."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(m, name)}"
        for m in field.metadata
        for name, sign in signs.items()
        if getattr(m, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def meaning(field: FieldInfo) -> str:
    """A field's docstring on one line, safe in a table."""
    return re.sub(r"\s+", " ", field.description or "").replace("|", "\\|")


def rows(section: type[BaseModel]) -> list[str]:
    """A section's fields as the rows of a table."""
    return [
        f"| `{name}` | {kind(field.annotation)}{bounds(field)} | `{default(field)}` | {meaning(field)} |"
        for name, field in section.model_fields.items()
    ]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += [f"## {name}", "", (section.__doc__ or "").split("\n")[0], ""]
            lines += ["| name | type | default | meaning |", "|---|---|---|---|", *rows(section), ""]
        else:
            lines += [f"## {name}", "", f"Default `{default(field)}`. {meaning(field)}".rstrip(), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
