"""What a uri may point at, and what options may hold: checked before anything is opened.

Uris are taken byte for byte: nothing is percent-decoded, normalised or expanded, so `a%20b.jpg` is
the file of that very name. Nothing here is handed to a parser of uri chains, so `::` in a file's
name is only a name, while a head such as `simplecache::` is refused as an unknown scheme.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Mapping
from typing import Any

from hqlabel.pipeline.errors import ImageError, UsageError
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.archive_uris import container_of

_SCHEME = re.compile(r"([a-z][a-z0-9+.\-]*)://(.*)", re.DOTALL)
_SIGNED = re.compile(
    r"[?&](x-amz-(signature|credential|security-token)|x-goog-signature|signature|sig|access_token|token"
    r"|api[_-]?key|password)=",
    re.IGNORECASE,
)
_USER_AND_PASSWORD = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_USER = re.compile(r"://[^/\s]*@")  # alone it may be a token
_SECRET_OPTION = re.compile(
    r"(^|_)(key|secret|token|password|passwd|passphrase|credentials?|sas|connection_string|authorization"
    r"|cookies?|username)(_|$)"
)
_HARMLESS_OPTIONS = frozenset({"sse_kms_key_id", "ssekms_key_id", "bucket_key_enabled"})
_HARMLESS_TOKENS = frozenset({"anon", "cloud", "google_default"})


def split_scheme(uri: str) -> tuple[str, str]:
    """Return (scheme, rest) of a uri; ("file", absolute or relative path) for a plain path or `file://`.

    The rest is as written. `file://host/...` keeps its host, and so is no absolute path.
    """
    match = _SCHEME.fullmatch(uri)
    if match is None:
        return "file", uri
    scheme, rest = match.group(1), match.group(2)
    if scheme == "file" and rest.startswith("localhost/"):
        rest = rest.removeprefix("localhost")
    return scheme, rest


def options_for(uri: str, access: AccessRules) -> Mapping[str, Any]:
    """Return the fsspec options that `access` keeps for the scheme of `uri`; empty when it keeps none."""
    return access.options.get(split_scheme(uri)[0], {})


def check_uri(uri: str, access: AccessRules) -> None:
    """Check that `uri` may be opened under `access`; open nothing, follow local links by `stat` only.

    Raises:
        ImageError: `uri_refused`, saying which rule; `not_found` for a link that leaves the roots for a place
            where there is nothing. Whether other files are there is left to the reader.
    """
    if not uri.strip():
        raise _refused("the uri is empty")
    if "\x00" in uri:
        raise _refused("the uri holds a NUL character")
    uri = container_of(uri)
    scheme, rest = split_scheme(uri)
    if scheme == "file":
        _check_local(rest, access.roots)
    elif scheme not in access.schemes:
        allowed = ", ".join(access.schemes) or "none"
        raise _refused(f"scheme {scheme!r} is not allowed (allowed: local files, {allowed})")
    else:
        _check_remote(scheme, rest)


def _refused(reason: str) -> ImageError:
    return ImageError("uri_refused", reason)


def _check_remote(scheme: str, rest: str) -> None:
    head, _, path = rest.partition("/")
    if "@" in head and (":" in head or scheme.startswith("http")):
        raise _refused("the uri carries a user name or password; give credentials by environment or role")
    if not head or not path:
        raise _refused("the uri names no object: expected scheme://bucket/key")
    # An HTTP client normalises "..", which can lead out of the bucket.
    if any(part in (".", "..") for part in path.split("/")):
        raise _refused("the uri has a '.' or '..' segment")
    if scheme.startswith("http"):
        _check_http(head, rest)


def _check_http(head: str, rest: str) -> None:
    if _SIGNED.search(rest):
        raise _refused("the uri carries a signature or token, which would be copied into the output")
    host = head.rsplit(":", 1)[0] if head.count(":") == 1 else head
    host = host.strip("[]").split("]")[0].rstrip(".").lower()
    if host == "metadata.google.internal" or _is_link_local(host):
        raise _refused("the uri points at the machine's metadata address")


def _is_link_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:  # 0xa9fea9fe and 2852039166 are addresses too
            address = ipaddress.ip_address(socket.inet_aton(host))
        except OSError:
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_link_local)


def _check_local(path: str, roots: tuple[str, ...]) -> None:
    if not path.startswith("/"):
        raise _refused("neither an absolute path nor a uri with an allowed scheme")
    real = os.path.realpath(path)
    if not any(is_inside(real, root) for root in roots):
        if _is_dead_link(path, real, roots):  # no flag would help
            raise ImageError("not_found", f"a link to {real}, where there is nothing")
        raise _refused(
            f"the file lies outside the allowed folders, in {os.path.dirname(real)} (see --allow-root); "
            "links are followed"
        )
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refused("the file is a circle of symbolic links") from None
        return  # missing or unreadable: the reader reports it, with its own code
    check_regular(mode)


def _is_dead_link(path: str, real: str, roots: tuple[str, ...]) -> bool:
    """Return whether `path` is a link inside a root to `real`, where there is nothing."""
    if not os.path.islink(path) or os.path.lexists(real):
        return False
    folder = os.path.realpath(os.path.dirname(path))
    return any(is_inside(folder, root) for root in roots)


def check_regular(mode: int) -> None:
    """Raise ImageError `uri_refused`, naming what it is, unless the mode bits are a regular file's."""
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    name = next((word for test, word in kinds if test(mode)), "no regular file")
    raise _refused(f"this is {name}, not a file")


def is_inside(path: str, root: str) -> bool:
    """Return whether a path is a root or lies below it; both absolute, links resolved."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def without_credentials(text: str) -> str:
    """Return `text`, such as an image id that is a uri; a placeholder where it carries a credential."""
    carries = _SIGNED.search(text) or _USER.search(text)
    return "(withheld: it carries a credential)" if carries else text


def refuse_secrets(options: Mapping[str, Any], *, where: str) -> None:
    """Refuse options that look like secrets, at any depth: options are kept in job.json.

    Raises:
        UsageError: names the option, never its value, and states where credentials belong.
    """
    for name in secret_options(options):
        raise UsageError(
            f"{where}: option {name!r} looks like a secret, and options are written to job.json. "
            "Leave it out: credentials come from the environment, a profile, a role or a mounted file."
        )


def refuse_password(uri: str | None, *, where: str) -> None:
    """Refuse a place whose uri carries a user name and a password: places are kept in job.json.

    Raises:
        UsageError: names the flag or setting, never the uri, and states where credentials belong.
    """
    if uri and _USER_AND_PASSWORD.search(uri):
        raise UsageError(
            f"{where}: the uri carries a user name and a password, and places are written to job.json. "
            "Leave them out: credentials come from the environment, a profile, a role or a mounted file."
        )


def secret_options(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return dotted names of the options that look like secrets, in the order given."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            found += secret_options(value, f"{prefix}{name}.")
        elif _is_secret(str(name), value):
            found.append(f"{prefix}{name}")
    return found


def _is_secret(name: str, value: Any) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    if isinstance(value, str) and _USER_AND_PASSWORD.search(value):
        return True
    if value is None or isinstance(value, bool) or snake in _HARMLESS_OPTIONS:
        return False
    harmless = isinstance(value, str) and value in _HARMLESS_TOKENS
    return bool(_SECRET_OPTION.search(snake)) and not harmless
