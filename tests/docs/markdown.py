"""Reads sections, tables and code blocks out of the pages of docs/."""

from __future__ import annotations

import re


def section(page: str, heading: str) -> str:
    """The text under `## heading`, up to the next heading of that level. Raises when there is none."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    found = {parts[i].strip().replace("`", ""): parts[i + 1] for i in range(1, len(parts), 2)}
    return found[heading]


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table in `text`, by column heading, without backticks and backslashes."""
    lines = re.findall(r"^\|(.+)\|$", text, flags=re.MULTILINE)
    cells = [[cell.strip().replace("`", "").replace("\\", "") for cell in line.split("|")] for line in lines]
    assert len(cells) > 2, "no table in this section"
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    """One column of a table."""
    return [row[name] for row in rows]


def blocks(page: str, language: str) -> list[str]:
    """The contents of every fenced block of `language`, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
