"""What a user names, as files: one file, those of a folder, or those that match a pattern.

Their names alone decide which are meant; of a single file without a known ending the first bytes
are checked.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from hqlabel.pipeline.errors import JobRefused, clean_text, count
from hqlabel.pipeline.images.picture_formats import SIGNATURE_BYTES, signature
from hqlabel.pipeline.inputs.image_box_lists import examples, has_picture_name, is_picture
from hqlabel.pipeline.inputs.read_table import TABLE_SUFFIXES, TableFormat, instead_of, table_format
from hqlabel.pipeline.inputs.yolo_boxes import label_files
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.archive_uris import TAR
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.list_folders import Listed, allow_root
from hqlabel.pipeline.storage.read_objects import (
    LABEL_SUFFIXES,
    head_object,
    is_no_utf8,
    list_inputs,
    open_input,
    what_is,
)
from hqlabel.pipeline.storage.uri_rules import is_inside, options_for, split_scheme


def absolute(uri: str) -> str:
    """Return a local path made absolute, `file://` taken off; another uri as it is, without "/" at the end.

    Raises:
        JobRefused: It is not UTF-8, so neither `job.json` nor a table can name it.
    """
    if is_no_utf8(uri):
        raise JobRefused(f"the name '{clean_text(uri)}' is not UTF-8, and no table can hold it: rename it")
    scheme, rest = split_scheme(uri)
    return os.path.abspath(rest) if scheme == "file" else uri.rstrip("/")


_kept: ContextVar[dict[str, InputFiles] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def listings_kept() -> Iterator[None]:
    """Let what is listed within the block be listed once: a folder of millions takes minutes."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """What a user names, as files: one, those of a folder, or those that match a pattern.

    `root`: the folder that relative names start from. `kind`: how it was named. `roots`: local folders and
    files that may be read, links resolved.
    """

    uri: str
    listed: Listed
    root: str
    kind: Literal["file", "picture", "folder", "pattern"]
    roots: tuple[str, ...] = ()

    @property
    def entries(self) -> Sequence[Entry]:
        """The files."""
        return self.listed.entries

    @classmethod
    def at(cls, uri: str, access: AccessRules) -> InputFiles:
        """Return the files at `uri`; a name with a known ending may yet be a folder, as Spark writes them.

        Within `listings_kept` the second call gives what the first one found.

        Raises:
            JobRefused: The place cannot be listed, or holds what could not be named in a table.
        """
        kept = _kept.get()
        if kept is None:
            return cls._at(uri, access)
        if uri not in kept:
            kept[uri] = cls._at(uri, access)
            return kept[uri]
        return kept.pop(uri)

    @classmethod
    def _at(cls, uri: str, access: AccessRules) -> InputFiles:
        if is_pattern(uri):
            return cls._below(uri, pattern_root(uri), access, "pattern")
        known = table_format(uri) is not None or is_tar(uri)
        if known or has_picture_name(uri):
            entry = head_object(uri, options_for(uri, access))
            if entry is not None:
                kind: Literal["file", "picture"] = "file" if known else "picture"
                return cls(uri=uri, listed=Listed(entries=[entry]), root=parent_of(uri), kind=kind)
        place = cls._below(uri, uri, access, "folder")
        if not place.entries and (entry := head_object(uri, options_for(uri, access))) is not None:
            _refuse_unless_picture(uri, access)
            return cls(uri=uri, listed=Listed(entries=[entry]), root=parent_of(uri), kind="picture")
        return place

    @classmethod
    def _below(
        cls, uri: str, root: str, access: AccessRules, kind: Literal["folder", "pattern"]
    ) -> InputFiles:
        roots = (*map(os.path.realpath, access.roots), *pointed_at(uri))
        pattern = uri.removeprefix(f"{root}/") if kind == "pattern" else None
        listed = list_inputs(root, options_for(uri, access), roots=roots, pattern=pattern)
        listed.notes += _on_names(listed.unnameable, pictures=sum(is_picture(e.key) for e in listed.entries))
        _skip_outputs(root, listed)
        return cls(uri=uri, listed=listed, root=root, kind=kind, roots=roots)

    def tars(self) -> list[str]:
        """Return the tars, when they are meant: named as such, or a folder of nothing else that could be."""
        tars = [entry.key for entry in self.entries if is_tar(entry.key) and not self._is_hidden(entry.key)]
        if self.is_listing() or any(table_format(entry.key) for entry in self.entries):
            return []
        return self._readable(tars)

    def is_listing(self) -> bool:
        """Return whether the files are themselves the pictures."""
        if self.kind == "pattern" and states_ending(self.uri):
            return table_format(self.uri) is None and not is_tar(self.uri)
        return self.kind == "picture" or (
            self.kind != "file" and any(is_picture(entry.key) for entry in self.entries)
        )

    def label_files(self) -> list[str]:
        """Return YOLO's label files, where there are no tables."""
        if self.kind != "folder" or any(table_format(entry.key) for entry in self.entries):
            return []
        labels = label_files(self.root, self.entries)
        if labels:
            self._readable([e.key for e in self.entries if e.key.lower().endswith(LABEL_SUFFIXES)])
        return labels

    def tables(self) -> list[str]:
        """Return the tables, all of one kind; JobRefused where there are none."""
        if self.kind == "file":
            return [self.uri]
        if self.kind == "picture":
            raise JobRefused(f"{self.uri}: a picture; wanted boxes. Pictures are named with --images")
        return self._readable(_tables_in(self))

    def _readable(self, keys: Sequence[str]) -> list[str]:
        """Return `keys`; raise JobRefused where one is no file, or a link to what may not be read."""
        links = self.listed.links
        targets = {key: links[key] for key in keys if key in links}
        out = {k: path for k, path in targets.items() if not any(is_inside(path, r) for r in self.roots)}
        if out:
            link, real = next(iter(out.items()))
            flags = allow_root(os.path.dirname(path) for path in out.values())
            raise JobRefused(f"{link} is a link to {real}, outside what may be read: allow it with {flags}")
        for key in self.listed.odd:
            if key in keys:
                raise JobRefused(f"{key}: {what_is(key)}")
        return list(keys)

    def _is_hidden(self, key: str) -> bool:
        return self.kind == "folder" and _is_hidden(key.removeprefix(self.root))


def pointed_at(uri: str) -> list[str]:
    """Return the local paths that naming `uri` allows to be read, links resolved.

    A folder, the one above a pattern or a table; a picture alone; what a named table or tar is a link to;
    and the blobs of a snapshot in the cache of Hugging Face's hub.
    """
    scheme, path = split_scheme(uri)
    if scheme != "file":
        return []
    if is_pattern(path):
        return _with_blobs(pattern_root(path))
    if os.path.isdir(path):
        return _with_blobs(path)
    if is_json(path) or is_tar(path) or table_format(path) is not None:
        folder, real = _with_blobs(parent_of(path)), os.path.realpath(path)
        return folder if any(is_inside(real, root) for root in folder) else [*folder, real]
    return [os.path.realpath(path)]


_SNAPSHOT = re.compile(r"(.*/[a-z]+s--[^/]+)/snapshots/[^/]+(/.*)?", re.DOTALL)


def _with_blobs(folder: str) -> list[str]:
    """Return a folder, links resolved, and where the files of a snapshot in huggingface_hub's cache lie.

    There every file is a link from `models--OWNER--NAME/snapshots/REVISION/` into `blobs/` next to
    `snapshots/`, which holds files of the same repository alone. A `blobs` that is itself a link is not
    believed.
    """
    real = os.path.realpath(folder)
    match = _SNAPSHOT.fullmatch(real)
    blobs = f"{match.group(1)}/blobs" if match else ""
    return [real, blobs] if blobs and os.path.isdir(blobs) and not os.path.islink(blobs) else [real]


def _skip_outputs(root: str, listed: Listed) -> None:
    """Take the outputs of ours below `root`, which hold pictures, off the list, and note them."""
    keys = [entry.key for entry in listed.entries]
    marks = [key.removesuffix("job.json") for key in keys if key.endswith("/job.json")]
    planned = {key.partition("/plan/")[0] + "/" for key in keys if marks and "/plan/" in key}
    outputs = tuple(mark for mark in marks if mark in planned and mark != f"{root}/")
    if outputs:
        listed.entries = [entry for entry in listed.entries if not entry.key.startswith(outputs)]
        first = clean_text(outputs[0])
        listed.notes.append(f"outputs of hqlabel among the files: {len(outputs)}, such as {first}: left out")


def _on_names(names: Sequence[str], *, pictures: int) -> list[str]:
    """Return sentences on files whose names no table can hold. `pictures`: of names that one can.

    Raises:
        JobRefused: One of them is called like a table, a tar or labels, of which nobody knows the rows;
            or most pictures are such.
    """
    lost = [name for name in names if is_picture(name)]
    wanted = [name for name in names if table_format(name) or is_tar(name) or _is_label(name)]
    if len(lost) > pictures:
        wanted += lost
    if wanted:
        raise JobRefused(
            f"{len(wanted)} names are not UTF-8, such as '{wanted[0]}', and no table can hold them: rename "
            "these files (convmv does it for whole folders)"
        )
    others = len(names) - len(lost)
    failed = (
        f"{count(len(lost), 'picture')} with a name that is not UTF-8, such as '{lost[0]}': a row that fails "
        "(uri_refused), under that spelling of the name; convmv renames whole folders"
    ) if lost else ""  # fmt: skip
    left_out = f"{others} other files with names that are not UTF-8: left out" if others else ""
    return [text for text in (failed, left_out) if text]


def _is_label(name: str) -> bool:
    return name.lower().endswith(LABEL_SUFFIXES)


def _tables_in(place: InputFiles) -> list[str]:
    """Return the tables of a folder, all of one kind; hidden files and folders are skipped."""
    uri, entries = place.root, place.entries
    if place.kind == "folder":
        _refuse_versioned(uri, entries)
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
    raise nothing_in(place, f"pictures or tables ({', '.join(TABLE_SUFFIXES)})")


_VERSIONED = {
    "Delta Lake": re.compile(r"(?:.*/)?_delta_log/[0-9]+[^/]*\.(?:json|parquet)", re.DOTALL),
    "Iceberg": re.compile(
        r"(?:.*/)?metadata/(?:v[0-9]+|[0-9]+-[0-9a-f-]{36})(?:\.gz)?\.metadata\.json", re.DOTALL
    ),
}
"""Tables whose log states which of their files still count: by name, what such a log is called."""


def _refuse_versioned(root: str, entries: Sequence[Entry]) -> None:
    """Raise JobRefused for a table of which deleted and replaced rows still lie in the folder."""
    for name, log in _VERSIONED.items():
        found = next((e.key for e in entries if log.fullmatch(e.key.removeprefix(f"{root}/"))), None)
        if found is not None:
            raise JobRefused(
                f"{root}: a {name} table ({found}): only its log, which is not read, lists which of its "
                "files still count; write the rows as plain Parquet into another folder, or name the files "
                "that count with a pattern"
            )


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def nothing_in(place: InputFiles, wanted: str) -> JobRefused:
    """Return the error for a place that holds other things than wanted."""
    uri, entries = place.uri, place.entries
    local = split_scheme(uri)[0] == "file" and not is_pattern(uri)
    braces = "; {a,b} is no pattern here: give the folder, or one pattern" if "{" in uri else ""
    if local and not os.path.lexists(uri):
        return JobRefused(f"{uri}: there is no such file or folder{braces}")
    if local and not os.path.isdir(uri):
        return JobRefused(f"{uri}: {what_is(uri)}; wanted {wanted}")
    found = (
        f"{len(entries)} other files, such as {examples([e.key for e in entries])}" if entries else "nothing"
    )
    return JobRefused("; ".join([f"{uri}: no {wanted}; found {found}{braces}", *place.listed.notes]))


def picture_format(uri: str, access: AccessRules) -> str | None:
    """Return the picture format of a file's first bytes, whatever its name; None for other files."""
    with open_input(uri, options_for(uri, access), block=SIGNATURE_BYTES) as file:
        return signature(file.read(SIGNATURE_BYTES))


def _refuse_unless_picture(uri: str, access: AccessRules) -> None:
    """Raise JobRefused for a file of no known ending, unless its first bytes are a picture's."""
    if picture_format(uri, access) is None:
        listed = "; a list of pictures is a .csv whose first line is image_uri" if _is_label(uri) else ""
        raise JobRefused(
            f"{uri}: a file of no known kind by its name, and no picture by its first "
            f"bytes{instead_of(uri)}; wanted a picture, or {', '.join((*TABLE_SUFFIXES, '.json', TAR))}"
            f"{listed}"
        )


def is_pattern(uri: str) -> bool:
    """Return whether it has a wildcard, unless a local file or folder has that very name."""
    scheme, path = split_scheme(uri)
    return any(sign in uri for sign in "*?[") and not (scheme == "file" and os.path.lexists(path))


def pattern_root(pattern: str) -> str:
    """Return the folder above the first wildcard."""
    first = min(pattern.index(sign) for sign in "*?[" if sign in pattern)
    return pattern[:first].rpartition("/")[0]


def states_ending(uri: str) -> bool:
    """Return whether a pattern ends in a file ending."""
    _, dot, ending = uri.rpartition("/")[2].rpartition(".")
    return is_pattern(uri) and bool(dot) and not any(sign in ending for sign in "*?[")


def is_json(uri: str) -> bool:
    """Return whether a name ends as JSON's do."""
    return uri.lower().endswith(".json")


def parent_of(uri: str) -> str:
    """Return the folder that a file lies in."""
    return uri.rpartition("/")[0]


def is_tar(uri: str) -> bool:
    """Return whether a name ends as a plain tar's does."""
    return uri.lower().endswith(TAR)
