"""`hqlabel config`: a configuration to start from, every setting in a comment with its meaning and default.

What is left in comments is the default, so the file as it is printed is an empty configuration.
"""

from __future__ import annotations

import textwrap

import yaml
from pydantic.fields import FieldInfo

from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.settings import Section

_HEAD = """# A job's settings: hqlabel label --config job.yaml
# Each is shown with its default; take the # away from what you change. Flags go before this file.
# Secrets have no setting: they come from the environment, a profile or a role of the machine.
"""


def run(given: ConfigSources, *, json: bool) -> int:
    """Print the template, or with `json` the defaults as an object, and return 0."""
    if given.path or given.sets:
        raise UsageError("config prints the defaults: it takes neither --config nor --set")
    if json:
        console.data_json(Config().model_dump())
    else:
        console.data(template().rstrip("\n"))
    return 0


def template() -> str:
    """Return the commented YAML text."""
    lines = [_HEAD]
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines += [f"# {(section.__doc__ or '').splitlines()[0]}", f"{name}:"]
            for setting, field in section.model_fields.items():
                lines += _setting(setting, field)
            lines.append("")
        elif name != "version":
            lines += _setting(name, info, indent="")
    return "\n".join(lines) + "\n"


def _setting(name: str, field: FieldInfo, indent: str = "  ") -> list[str]:
    meaning = " ".join((field.description or "").split())
    default = field.get_default(call_default_factory=True)
    value = yaml.safe_dump(default, default_flow_style=True, allow_unicode=True).split("\n")[0]
    comment = f"{indent}# "
    lines = textwrap.wrap(meaning, 90, initial_indent=comment, subsequent_indent=comment)
    return [*lines, f"{comment}{name}: {value}"]
