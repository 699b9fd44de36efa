"""Names of images and classes in formats that cannot hold every sign, and files that two images would share.

What cannot be held is said before the first file is written: an image is left out and counted, a class is
escaped, and two classes that become one by it are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from hqlabel.jobs.export.export_source import Classes, ExportSource
from hqlabel.pipeline.errors import UsageError

NO_FILE = "images whose names no disk can hold (./, ../, //, more than 255 bytes)"
_OF_IMAGES = ("area", "prompt_bbox", "category_id", "category_name")
"""What decides, beside what is always read, whether an image is exported."""
_LONGEST_NAME, _LONGEST_PATH = 255, 1000  # bytes: of a name on disks, and of a key in S3 but for its prefix
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def can_be_a_file(path: str) -> bool:
    """Return whether disks and buckets can hold a file at this relative path."""
    parts = path.split("/")
    plain = "\0" not in path and not {"", ".", ".."} & set(parts)
    return (
        plain
        and len(path.encode()) <= _LONGEST_PATH
        and max(map(len, map(str.encode, parts))) <= _LONGEST_NAME
    )


def without_ending(name: str) -> str:
    """Return a relative path without what follows the last dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] if '.' in last else last}"


def refuse_shared_files(source: ExportSource, file_of: Callable[[str], str | None]) -> None:
    """Raise UsageError, before anything is written, where two images would share a file.

    `file_of`: from an image's name to its file, None where it is left out. The rows are read once more for
    it, without their masks.
    """
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for rows in replace(source, columns=_OF_IMAGES, tally=Counter(), roots=set()).images():
        name = source.file_name(rows.image)
        key = file_of(name)
        if key is None:
            continue
        above = [folder for folder in _folders(key) if folder in seen]
        other = seen.get(key) or folders.get(key) or (seen[above[0]] if above else None)
        if other is not None:
            raise UsageError(shared_file(other, name, key))
        seen[key] = name
        folders.update(dict.fromkeys(_folders(key), name))


def _folders(key: str) -> Iterator[str]:
    parts = key.split("/")
    return ("/".join(parts[:number]) for number in range(1, len(parts)))


def shared_file(other: str | None, name: str, key: str) -> str:
    """Return what is wrong with two images that want one file; `other`: None for one written before."""
    first = "an image before it" if other is None else f"{other!a}"
    return (
        f"{first} and {name!a} would share the file {key!a}: labels know no ending, a file system perhaps no "
        "case; export them apart (--where) or rename one"
    )


def escaped(name: str, bad: re.Pattern[str] = NOT_XML) -> str:
    """Return the name with what the format cannot hold escaped; `bad`: one such sign, of XML by default."""
    return bad.sub(lambda found: _escape(found[0]), name)


def _escape(sign: str) -> str:
    code = ord(sign)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def labels_of(classes: Classes, bad: re.Pattern[str] = NOT_XML, *, distinct: bool = False) -> dict[int, str]:
    """Return the label of each class by its id. `distinct`: names that several ids have get the id behind.

    Raises:
        UsageError: two names become one label, because the format cannot hold a sign of one.
    """
    names = classes.distinct_names() if distinct else dict(classes.names)
    first: dict[str, str] = {}
    for name in names.values():
        other = first.setdefault(escaped(name, bad), name)
        if other != name:
            raise UsageError(
                f"the classes {other!a} and {name!a} would be one label: the format cannot "
                "hold a sign of one of them; rename it in the boxes, or choose another format"
            )
    return {number: escaped(name, bad) for number, name in names.items()}
