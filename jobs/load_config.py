"""The configuration of a job: one YAML file, flags for the common cases, `--set a.b=v` on top.

Every name that a user can write is a field of a section in `hqlabel.pipeline.settings`; an unknown name is
an error that proposes the nearest known one. Secrets have no field: they come from the environment, a profile
or a role of the machine. The resolved configuration is written to `config.yaml` in the output.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.settings import (
    BoxSettings,
    ClusterSettings,
    CostSettings,
    DetectorSettings,
    FilterSettings,
    InputSettings,
    Limits,
    ModelSettings,
    OutputSettings,
    Section,
)

CONFIG_KEY = "config.yaml"


class Config(Section):
    """A whole job."""

    version: Literal[1] = 1
    input: InputSettings = InputSettings()
    model: ModelSettings = ModelSettings()
    detector: DetectorSettings = DetectorSettings()
    boxes: BoxSettings = BoxSettings()
    filter: FilterSettings = FilterSettings()
    output: OutputSettings = OutputSettings()
    limits: Limits = Limits()
    cluster: ClusterSettings = ClusterSettings()
    cost: CostSettings = CostSettings()
    storage: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """fsspec options by uri scheme, such as s3: {endpoint_url: ...}; no secrets."""


@dataclass(frozen=True, kw_only=True)
class ConfigSources:
    """What a command's configuration is made of: a YAML file, flags, `a.b=value` texts.

    `flags`: by dotted name; None: not set.
    """

    path: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()

    def load(self, saved: str | None = None) -> Config:
        """Return the configuration: the saved one of a job (YAML), then the file, then flags, then `--set`.

        Raises `UsageError` with every mistake named.
        """
        tree = _parse_yaml(saved, "the saved configuration") if saved else {}
        _merge(tree, _read_yaml(self.path) if self.path else {})
        flags = {name: value for name, value in self.flags.items() if value is not None}
        for name, value in flags.items():
            _put(tree, name, value, origin="a flag")
        for name, value in map(parse_set, self.sets):
            if flags.get(name, value) != value:
                raise UsageError(
                    f"--set {name}={value} contradicts the flag that gives {flags[name]!r}; keep one"
                )
            _put(tree, name, value, origin="--set")
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise UsageError(_explain(error)) from None


def _read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a local YAML file. Raises `UsageError` with the file, the line and the fault."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--config {path}: cannot be read: {reason}") from None
    return _parse_yaml(text, f"--config {path}")


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{name}: wanted `name: value` lines at the top, found a {type(tree).__name__}")
    return tree


def parse_prompts(text: str | None) -> dict[str, str] | None:
    """Return `person; red car` as {"person": "person", "red car": "red car"}; None for None."""
    if text is None:
        return None
    prompts = [prompt.strip() for prompt in text.split(";") if prompt.strip()]
    if not prompts:
        raise UsageError(f"--prompts {text!r}: wanted words separated by ';', such as 'person; red car'")
    return {prompt: prompt for prompt in prompts}


def parse_set(text: str) -> tuple[str, Any]:
    """Return the dotted name and the YAML-typed value of one `--set a.b=v`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text!r}: wanted name=value, such as --set model.dtype=float32")
    try:
        return name.strip(), yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: the value is not valid YAML: {_one_line(error)}") from None


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `--config` reads back to an equal `Config`."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"# the resolved configuration of this job; `hqlabel label --config` reads it\n{text}"


def known_names() -> list[str]:
    """Return every dotted name of the configuration, in the order of the sections."""
    names: list[str] = []
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            names += [f"{name}.{setting}" for setting in section.model_fields]
        else:
            names.append(name)
    return names


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put `over` into `tree`: sections are merged name by name, anything else is replaced."""
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _put(tree: dict[str, Any], name: str, value: Any, *, origin: str) -> None:
    *folders, leaf = name.split(".")
    for folder in folders:
        inner = tree.get(folder)
        if inner is None:
            inner = tree[folder] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{origin}: {name} cannot be set, because {folder} is the value {inner!r}")
        tree = inner
    tree[leaf] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.6)
            lines.append(f"{name}: no such name" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
            wanted = _SECTION if item["type"] == "model_type" else item["msg"]
            lines.append(f"{name}: {wanted.removeprefix('Value error, ')}{found}")
    return "configuration: " + "; ".join(dict.fromkeys(lines))


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the name {key!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_SECTION = "wanted a section of `name: value` lines"
