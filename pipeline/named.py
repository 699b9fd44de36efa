"""What a person points at, as files: one file, those of a folder, or those that match a pattern.

Which of them are meant is told by their names alone; nothing is opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.access import split_scheme
from pipeline.errors import JobRefused
from pipeline.listings import examples, is_picture
from pipeline.members import TAR
from pipeline.records import AccessRules
from pipeline.storage import Entry, glob_objects, head_object, list_objects, options_for
from pipeline.tables import TABLE_SUFFIXES, TableFormat, instead_of, table_format
from pipeline.yolo import label_files


def absolute(uri: str) -> str:
    """A local path made absolute, `file://` taken off; another uri as it is, without "/" at the end."""
    scheme, rest = split_scheme(uri)
    return os.path.abspath(rest) if scheme == "file" else uri.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a person points at, as files: one, those of a folder, or those that match a pattern.

    `root`: the folder that relative names start from. `kind`: how it was named.
    """

    uri: str
    entries: tuple[Entry, ...]
    root: str
    kind: Literal["file", "folder", "pattern"]

    @classmethod
    def of(cls, uri: str, access: AccessRules) -> Named:
        """The files at `uri`; a name with a known ending may yet be a folder, as Spark writes them."""
        options = options_for(uri, access)
        if is_pattern(uri):
            found = glob_objects(uri, options)
            return cls(uri=uri, entries=tuple(found), root=pattern_root(uri), kind="pattern")
        if table_format(uri) is not None or is_tar(uri):
            entry = head_object(uri, options)
            if entry is not None:
                return cls(uri=uri, entries=(entry,), root=parent_of(uri), kind="file")
        return cls(uri=uri, entries=tuple(list_objects(uri, options)), root=uri, kind="folder")

    def tars(self) -> list[str]:
        """The tars, when that is what is meant: named as such, or a folder of nothing else that could be."""
        tars = [entry.key for entry in self.entries if is_tar(entry.key) and not self._is_hidden(entry.key)]
        return [] if self.is_listing() or any(table_format(entry.key) for entry in self.entries) else tars

    def is_listing(self) -> bool:
        """Whether the files are themselves the pictures."""
        if self.kind == "pattern" and states_ending(self.uri):
            return table_format(self.uri) is None and not is_tar(self.uri)
        return self.kind != "file" and any(is_picture(entry.key) for entry in self.entries)

    def label_files(self) -> list[str]:
        """YOLO's label files, where there are no tables."""
        if self.kind != "folder" or any(table_format(entry.key) for entry in self.entries):
            return []
        return label_files(self.root, self.entries)

    def tables(self, access: AccessRules) -> list[str]:
        """The tables, all of one kind; JobRefused where there are none."""
        if self.kind == "file":
            return [self.uri]
        return _tables_in(self.root, self.entries, access)

    def _is_hidden(self, key: str) -> bool:
        return self.kind == "folder" and _is_hidden(key.removeprefix(self.root))


def _tables_in(uri: str, entries: Sequence[Entry], access: AccessRules) -> list[str]:
    """The tables of a folder, all of one kind; hidden files and folders are left out."""
    shown = [entry.key for entry in entries if not _is_hidden(entry.key.removeprefix(uri))]
    kinds: dict[TableFormat, list[str]] = {}
    for key in shown:
        kind = table_format(key)
        if kind is not None:
            kinds.setdefault(kind, []).append(key)
    if len(kinds) > 1:
        found = ", ".join(f"{len(keys)} {kind} ({keys[0]})" for kind, keys in kinds.items())
        raise JobRefused(f"{uri}: tables of several kinds: {found}; give a folder of one kind, or one file")
    if kinds:
        return next(iter(kinds.values()))
    if not entries and _is_file(uri, access):
        raise JobRefused(
            f"{uri}: a file of no known kind{instead_of(uri)}; "
            f"wanted {', '.join((*TABLE_SUFFIXES, '.json', TAR))}"
        )
    raise nothing_in(uri, entries, f"pictures or tables ({', '.join(TABLE_SUFFIXES)})")


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def nothing_in(uri: str, entries: Sequence[Entry], wanted: str) -> JobRefused:
    """The error for a place that holds other things than wanted."""
    if split_scheme(uri)[0] == "file" and not is_pattern(uri) and not os.path.lexists(uri):
        return JobRefused(f"{uri}: there is no such file or folder")
    found = (
        f"{len(entries)} other files, such as {examples([e.key for e in entries])}" if entries else "nothing"
    )
    return JobRefused(f"{uri}: no {wanted}; found {found}")


def is_pattern(uri: str) -> bool:
    """True with a wildcard, unless a local file or folder has that very name."""
    scheme, path = split_scheme(uri)
    return any(sign in uri for sign in "*?[") and not (scheme == "file" and os.path.lexists(path))


def pattern_root(pattern: str) -> str:
    """The folder above the first wildcard."""
    first = min(pattern.index(sign) for sign in "*?[" if sign in pattern)
    return pattern[:first].rpartition("/")[0]


def states_ending(uri: str) -> bool:
    """Whether a pattern says how the names end."""
    _, dot, ending = uri.rpartition("/")[2].rpartition(".")
    return is_pattern(uri) and bool(dot) and not any(sign in ending for sign in "*?[")


def is_json(uri: str) -> bool:
    """Whether a name ends as JSON's do."""
    return uri.lower().endswith(".json")


def _is_file(uri: str, access: AccessRules) -> bool:
    """False for a folder that is called like a table, as Spark writes them."""
    return head_object(uri, options_for(uri, access)) is not None


def parent_of(uri: str) -> str:
    """The folder that a file lies in."""
    return uri.rpartition("/")[0]


def is_tar(uri: str) -> bool:
    """Whether a name ends as a plain tar's does."""
    return uri.lower().endswith(TAR)
