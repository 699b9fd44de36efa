"""What of a folder is meant: which names are skipped, what a pattern matches, and where links lead.

Skipped, with all that is in them: files and folders whose name begins with a dot, and the folders that
systems and programs keep next to a user's files (`SKIPPED`). Names count from the place that a user
names: a hidden folder that is named itself is meant. The same holds for the keys of an object store.

Links to folders are entered where they lead to what may be read. Each folder is listed once, under its own
name or else under the first link to it, so that circles end and no picture is taken twice.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import stat
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hqlabel.pipeline.errors import clean_text, count
from hqlabel.pipeline.storage.backend import Each, Entry, local_tag
from hqlabel.pipeline.storage.uri_rules import is_inside

SKIPPED = frozenset(
    [
        *("__macosx", "network trash folder", "temporary items"),  # macOS, and its zip files
        *("@eadir", "@tmp", "@sharebin", "#recycle", "#snapshot"),  # Synology
        *("@recycle", "@recently-snapshot"),  # QNAP
        *("$recycle.bin", "system volume information"),  # Windows
        *("lost+found", "__pycache__"),
    ]
)
"""Folders that no user fills, in small letters; those that begin with a dot need no naming."""

_WILD = re.compile(r"[*?\[]")


@dataclass(kw_only=True)
class Listed:
    """The files below a folder, sorted by path or uri, and what is to be reported of the rest.

    `links`: linked files -> where they lead, links resolved. `odd`: pipes, devices and the like.
    `unnameable`: names that are not UTF-8, escaped; no entries. `hidden_folders`: names of those skipped ->
    how many. `again`: links to folders that are listed under another name. `leading_out`, `unreadable`:
    folders whose content is not known -> where they lead, or why. `dead`: links to what is not there.
    `notes`: what is skipped, in sentences.
    """

    entries: list[Entry] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    unnameable: list[str] = field(default_factory=list)
    hidden_folders: Counter[str] = field(default_factory=Counter)
    hidden_files: int = 0
    again: list[str] = field(default_factory=list)
    leading_out: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sentences(self, place: str) -> list[str]:
        """Return sentences on what is skipped in `place`."""
        sentences = []
        if self.hidden_folders:
            names = ", ".join(map(clean_text, list(self.hidden_folders)[:5]))
            more = ", …" if len(self.hidden_folders) > 5 else ""
            folders = count(self.hidden_folders.total(), "hidden folder")
            sentences.append(f"{folders} ({names}{more}) in {place}: left out")
        if self.hidden_files:
            sentences.append(f"{count(self.hidden_files, 'hidden file')} in {place}: left out")
        if self.again:
            links, first = count(len(self.again), "link"), clean_text(self.again[0])
            sentences.append(f"{links} to folders that are listed already, such as {first}: left out")
        if self.dead:
            first = min(self.dead)
            sentences.append(
                f"{count(len(self.dead), 'link')} to what is not there, such as {clean_text(first)}, "
                f"a link to {clean_text(self.links[first])}"
            )
        return sentences


def is_hidden(name: str) -> bool:
    """Return whether the name of a file or folder is one that is skipped."""
    return name.startswith(".") or name.lower() in SKIPPED


def is_hidden_path(path: str) -> bool:
    """Return whether a path, such as a member's name in a tar, holds a hidden name; "." and ".." are none."""
    return any(is_hidden(name) for name in path.split("/") if name not in (".", ".."))


def _hides(name: str, _depth: int) -> bool:
    return is_hidden(name)


class Pattern:
    """A pattern of paths below a folder: `*`, `?` and `[a-z]` stop at "/", `**` does not.

    As in a shell, hidden names are matched only where the pattern names them: `.thumbnails/*.jpg`.
    """

    def __init__(self, pattern: str) -> None:
        """Take a pattern relative to the folder that is listed."""
        self._parts = pattern.split("/")
        self._whole = re.compile(_regex(pattern))
        depth = next((at for at, part in enumerate(self._parts) if "**" in part), None)
        self._any_below = depth is not None
        fixed = self._parts[:-1] if depth is None else self._parts[:depth]
        self._folders = [re.compile(_regex(part)) for part in fixed]

    def matches(self, path: str) -> bool:
        """Return whether a file's path below the folder matches."""
        return self._whole.fullmatch(path) is not None

    def may_hold(self, path: str) -> bool:
        """Return whether something below this folder, itself below the listed one, could match."""
        names = path.split("/")
        if len(names) > len(self._folders) and not self._any_below:
            return False
        pairs = zip(self._folders, names, strict=False)
        return all(accepts.fullmatch(name) is not None for accepts, name in pairs)

    def hides(self, name: str, depth: int) -> bool:
        """Return whether a name at this depth is hidden and no part of the pattern could mean it."""
        fixed = depth < len(self._folders) or not self._any_below
        parts = self._parts[depth : depth + 1] if fixed else self._parts[len(self._folders) :]
        return is_hidden(name) and not any(
            part and not _WILD.match(part) and fnmatch.fnmatchcase(name, part) for part in parts
        )


_SHOWN = rf"(?!\.|(?i:{'|'.join(map(re.escape, sorted(SKIPPED)))})(?:/|\Z))"
"""Before a wildcard that begins a name: no name that is skipped."""


def _regex(pattern: str) -> str:
    """Return a pattern as a regular expression for a whole path."""
    written, begins = [], True
    for piece in filter(None, re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)):
        shown = _SHOWN if begins else ""
        if piece == "**/":
            written.append(f"(?:{shown}[^/]+/)*" if begins else "(?:.*/)?")
        elif piece == "**":
            written.append(f"(?:{shown}[^/]+/)*{shown}[^/]*" if begins else ".*")
        elif piece in ("*", "?"):
            written.append(f"{shown}[^/]{'*' if piece == '*' else ''}")
        elif piece.startswith("["):
            written.append(shown + fnmatch.translate(piece)[4:-3])
        else:
            written.append(re.escape(piece))
        begins = piece.endswith("/")
    return f"(?s:{''.join(written)})"


def allow_root(targets: Iterable[str]) -> str:
    """Return the flags that allow paths to be read: the nearest folder above them, or the first few alone."""
    known = sorted(set(targets))
    common = os.path.commonpath(known)
    named = known[:3] if common == "/" else [common]
    flags = " ".join(f"--allow-root {shlex.quote(clean_text(path))}" for path in named)
    return flags if common != "/" or len(known) <= len(named) else f"{flags} …"


def visible_of(objects: Sequence[Entry], prefix: str, pattern: Pattern | None) -> Listed:
    """Return what of a store's objects below `prefix` is meant."""
    listed, folders = Listed(), dict[str, str]()
    hides = pattern.hides if pattern else _hides
    for one in objects:
        path = one.key.removeprefix(prefix)
        names = path.split("/")
        at = next((at for at, name in enumerate(names) if hides(name, at)), None)
        if at is None:
            if pattern is None or pattern.matches(path):
                listed.entries.append(one)
        elif at < len(names) - 1:
            folders["/".join(names[: at + 1])] = names[at]
        else:
            listed.hidden_files += 1
    listed.hidden_folders.update(folders.values())
    return listed


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder to be listed: the path that is shown, where it really lies, its path below the first."""

    path: str
    real: str
    below: str


class _Walk:
    """One walk through a local folder and what its links lead to."""

    def __init__(
        self, roots: Sequence[str], pattern: Pattern | None, each: Each[list[os.DirEntry[str]]]
    ) -> None:
        self.listed = Listed()
        self._each = each
        self._roots = roots
        self._pattern = pattern
        self._hides = pattern.hides if pattern else _hides
        self._seen: set[str] = set()
        self._links: deque[_Folder] = deque()

    def run(self, top: str) -> None:
        """List `top`, then what links to folders lead to, in the order of their names."""
        self._tree(_Folder(path=top, real=os.path.realpath(top), below=""))
        while self._links:
            waiting = sorted(self._links, key=lambda link: link.path)
            self._links.clear()
            for link in waiting:
                self._follow(link)

    def _follow(self, link: _Folder) -> None:
        if link.real in self._seen:
            self.listed.again.append(link.path)
        elif not any(is_inside(link.real, root) for root in self._roots):
            self.listed.leading_out[link.path] = link.real
        else:
            self._tree(link)

    def _tree(self, top: _Folder) -> None:
        """List a folder and its own sub-folders; a deep one must not be a deep recursion."""
        stack = [top]
        while stack:
            folder = stack.pop()
            if folder.real not in self._seen:
                self._seen.add(folder.real)
                stack += self._one(folder, is_top=not folder.below)

    def _one(self, folder: _Folder, *, is_top: bool) -> list[_Folder]:
        """List one folder; return the sub-folders that are to be listed next."""
        entries = self._each(lambda _: self._scan(folder.path, is_top=is_top))
        return [sub for entry in entries if (sub := self._entry(entry, folder)) is not None]

    def _scan(self, path: str, *, is_top: bool) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as error:
            if is_top:
                raise
            self.listed.unreadable[path] = error.strerror or str(error)
            return []

    def _entry(self, entry: os.DirEntry[str], folder: _Folder) -> _Folder | None:
        """Take a file or a link into account; return a folder that is to be listed next."""
        below = f"{folder.below}/{entry.name}" if folder.below else entry.name
        is_folder, is_link = _is_folder(entry), entry.is_symlink()
        if self._hides(entry.name, below.count("/")):
            if is_folder:
                self.listed.hidden_folders[entry.name] += 1
            else:
                self.listed.hidden_files += 1
            return None
        if is_folder:
            real = os.path.realpath(entry.path) if is_link else f"{folder.real.rstrip('/')}/{entry.name}"
            if self._pattern is not None and not self._pattern.may_hold(below):
                return None
            sub = _Folder(path=entry.path, real=real, below=below)
            if is_link:
                self._links.append(sub)
                return None
            return sub
        if self._pattern is None or self._pattern.matches(below):
            self._file(entry, is_link)
        return None

    def _file(self, entry: os.DirEntry[str], is_link: bool) -> None:
        if is_link:
            self.listed.links[entry.path] = os.path.realpath(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            # Dangling, a circle, or closed: listed, so that its reader can report what is wrong.
            if is_link and isinstance(error, FileNotFoundError):
                self.listed.dead.append(entry.path)
            self.listed.entries.append(Entry(key=entry.path, size=0))
            return
        if not stat.S_ISREG(status.st_mode):
            self.listed.odd.append(entry.path)
        self.listed.entries.append(Entry(key=entry.path, size=status.st_size, etag=local_tag(status)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links, or one into a closed folder
        return False


def walk(
    top: str, roots: Sequence[str], pattern: Pattern | None, each: Each[list[os.DirEntry[str]]]
) -> Listed:
    """List the files below a local folder, links to folders inside `roots` followed; sorted by path.

    `each` scans one folder, with all its tries; it raises for `top` itself when that cannot be read.
    """
    walking = _Walk(roots, pattern, each)
    walking.run(top)
    walking.listed.entries.sort(key=lambda one: one.key)
    return walking.listed
