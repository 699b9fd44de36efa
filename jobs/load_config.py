"""The configuration of a job: one YAML file, flags for the common cases, `--set a.b=v` on top.

Every name that a user can write is a field of a section in `hqlabel.pipeline.settings`; an unknown name is
an error that proposes the nearest known one. Secrets have no field: they come from the environment, a profile
or a role of the machine. The resolved configuration is written to `config.yaml` in the output.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from hqlabel.pipeline.errors import UsageError, clean_text
from hqlabel.pipeline.settings import (
    MOST_NUMBER,
    BoxSettings,
    ClusterSettings,
    CostSettings,
    DetectorSettings,
    FilterSettings,
    Given,
    InputSettings,
    KeepsRows,
    Limits,
    ModelSettings,
    OutputSettings,
    Section,
)
from hqlabel.pipeline.storage.uri_rules import masked

CONFIG_KEY = "config.yaml"
MOST_CHARS = 2**18
MOST_DEEP = 50
MOST_VALUES = 100_000
MOST_DIGITS = 100


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
    storage: Given[KeepsRows[dict[str, dict[str, Any]]]] = Field(default_factory=dict)
    """fsspec options by uri scheme, such as s3: {endpoint_url: ...}; no secrets."""


@dataclass(frozen=True, kw_only=True)
class ConfigSources:
    """What a command's configuration is made of: a YAML file, flags, `a.b=value` texts.

    `flags`: by dotted name; None: not set.
    """

    path: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()

    def load(self) -> Config:
        """Return the configuration: the file, then flags, then `--set`.

        Raises `UsageError` with every mistake named.
        """
        read = _read_yaml(self.path) if self.path else {}
        tree = {name: value for name, value in read.items() if value is not None}  # a section's name alone
        flags = {name: value for name, value in self.flags.items() if value is not None}
        for name, value in flags.items():
            _put(tree, name, value, origin="a flag")
        for name, value in map(parse_set, self.sets):
            if name in flags and flags[name] != value:
                raise UsageError(
                    f"--set {name}={masked(str(value)[:200])} contradicts the flag that gives "
                    f"{_short(flags[name])}; keep one"
                )
            _put(tree, name, value, origin="--set")
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise UsageError(_explain(error)) from None


def _read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a local YAML file. Raises `UsageError` with the file, the line and the fault."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--config {path}: cannot be read: {reason}") from None
    return parse_yaml(text, f"--config {path}")


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Return the mapping in a YAML text, bounded in size, depth and what its aliases repeat.

    Raises:
        UsageError: with `name`, the line and the fault.
    """
    tree = _load(text, name)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{name}: wanted `name: value` lines at the top, found a {type(tree).__name__}")
    return tree


def _load(text: str, name: str) -> Any:
    if len(text) > MOST_CHARS:
        raise UsageError(f"{name}: over {MOST_CHARS:,} characters, which no configuration has")
    if _brackets_deep(text) > MOST_DEEP:  # the parser's time grows with the square of it
        raise UsageError(f"{name}: over {MOST_DEEP} brackets inside each other")
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {_one_line(error)}") from None
    except (RecursionError, ValueError, TypeError) as error:  # a date that is none, a list as a name
        raise UsageError(f"{name}: cannot be read: {clean_text(str(error)[:200])}") from None


def _brackets_deep(text: str) -> int:
    depth = deepest = 0
    for sign in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if sign in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


def parse_set(text: str) -> tuple[str, Any]:
    """Return the dotted name and the YAML-typed value of one `--set a.b=v`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text!r}: wanted name=value, such as --set model.dtype=float32")
    return name.strip(), _load(value, f"--set {name.strip()}") if value else None


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `--config` reads back to an equal `Config`."""
    return tree_to_yaml(config.model_dump())


def tree_to_yaml(tree: Mapping[str, Any]) -> str:
    """Return the content of `config.yaml` as YAML."""
    text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, default_flow_style=False)
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


def _put(tree: dict[str, Any], name: str, value: Any, *, origin: str) -> None:
    *folders, leaf = name.split(".")
    for folder in folders:
        inner = tree.get(folder)
        if inner is None:
            inner = tree[folder] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{origin}: {name} cannot be set, because {folder} is a plain value")
        tree = inner
    tree[leaf] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = clean_text(".".join(str(part)[:100] for part in item["loc"][:4]))
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.6)
            lines.append(f"{name}: no such name" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            hidden = item["type"] == "value_error" or item["loc"][0] in _MAY_BE_SECRET
            found = "" if hidden else f" (found {_short(item['input'])})"
            wanted = _SECTION if item["type"] == "model_type" else item["msg"]
            lines.append(f"{name}: {wanted.removeprefix('Value error, ')}{found}")
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "configuration: " + "; ".join([*dict.fromkeys(lines[:_SHOWN]), *more])


def _short(value: Any) -> str:
    """Return a value as a message repeats it: bounded, and without a credential."""
    return masked(repr(value)[:200])


def _one_line(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the text around it, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    problem = " ".join(str(getattr(error, "problem", None) or "cannot be parsed").split())
    return clean_text(problem[:300] + where)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice: YAML would silently keep the last; and what aliases repeat without end."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            problem = f"its aliases make more than {MOST_VALUES:,} values of it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the name {key!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return a number that a setting may have; the time that YAML takes grows with its length squared."""
        is_int = node.tag.endswith(":int")
        number: int | float = 0
        problem = f"a number of over {MOST_DIGITS} characters"
        if len(node.value) <= MOST_DIGITS:
            number = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
            problem = "" if number == number else "NaN is no number"
            if is_int and abs(number) > MOST_NUMBER:
                problem = f"a number beyond {MOST_NUMBER:,}"
        if problem:
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


for _kind in ("int", "float"):
    _UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _UniqueKeyLoader.construct_number)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node is, each as often as aliases repeat it; a circle is more than any."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is known: met again inside itself
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


_SHOWN = 10
_MAY_BE_SECRET = ("storage", "detector")
"""Sections with options of any name, whose values no message repeats."""
_SECTION = "wanted a section of `name: value` lines"
