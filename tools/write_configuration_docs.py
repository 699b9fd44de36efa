"""Write docs/configuration.md from the settings' own declarations.

.venv/bin/python tools/write_configuration_docs.py
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hqlabel.jobs.load_config import Config
from hqlabel.pipeline.settings import GIVEN, IDENTITY, MARKS, REDO, Unit

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Every setting of a job, in the order of the YAML file that `--config` reads.
Written by `tools/write_configuration_docs.py`; do not edit.

Flags and `--set section.name=value` go before the file; an unknown name is an error and proposes the nearest.
Secrets have no setting: they come from the environment, a profile or a role of the machine.
`null` means "not given"; the resolved configuration of a job is next to its tables as `config.yaml`.

*Rows*: `identity` settings change masks or rows, and a job is resumed with the same ones or refused; of the
checkpoint and the detector the content counts, not the place. `redo`: so too, but `retry` does failed images
again with another value, which the footers of their units state. `marks`: changes what published tables mark.
`no`: changes no row. *Given*: where to connect, what to read, with which rights, on what to run; a command
takes it from its own call, never from an output. `storage` is such a setting.

A command refuses a `--set` that it does not use, and a value that contradicts the job of its output.

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
TABLE = "| name | type | default | rows | given | meaning |\n|---|---|---|---|---|---|"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def kind(annotation: Any) -> str:
    """A field's type in the words of YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (UnionType, Union):
        return " or ".join(kind(part) for part in inner if part is not NoneType)
    if origin in (list, dict):
        return {list: "list", dict: "mapping"}[origin]
    if origin is not None:  # Annotated
        return kind(inner[0]) + unit(inner[1:])
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def unit(metadata: Any) -> str:
    """What a number counts, such as `, seconds`; empty where that is not marked."""
    return "".join(f", {mark.name}" for mark in metadata if isinstance(mark, Unit))


def bounds(field: FieldInfo) -> str:
    """A field's limits, such as ` (≥ 1)`; empty without."""
    limits = [
        f"{sign} {getattr(mark, name)}"
        for mark in field.metadata
        for name, sign in SIGNS.items()
        if getattr(mark, name, None) is not None
    ]
    return f" ({', '.join(limits)})" if limits else ""


def default(field: FieldInfo) -> str:
    """A field's default as YAML writes it."""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def rows(field: FieldInfo) -> str:
    """Whether a field can change a row, and is compared when a job is resumed."""
    names = {REDO: "redo", IDENTITY: "identity", MARKS: "marks"}
    return next((name for mark, name in names.items() if mark in field.metadata), "no")


def given(field: FieldInfo) -> str:
    """Whether a field is of the call alone, never from an output."""
    return "yes" if GIVEN in field.metadata else ""


def meaning(field: FieldInfo) -> str:
    """A field's docstring on one line, safe in a table."""
    return re.sub(r"\s+", " ", field.description or "").replace("|", "\\|")


def row(name: str, field: FieldInfo) -> str:
    """A field as a row of its section's table."""
    values = f"{kind(field.annotation)}{unit(field.metadata)}{bounds(field)} | `{default(field)}`"
    return f"| `{name}` | {values} | {rows(field)} | {given(field)} | {meaning(field)} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += [f"## {name}", "", (section.__doc__ or "").split("\n")[0], ""]
            lines += [TABLE, *(row(*item) for item in section.model_fields.items()), ""]
        else:
            lines += [f"## {name}", "", f"Default `{default(field)}`. {meaning(field)}".rstrip(), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
