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
from collections.abc import Callable, Mapping
from typing import Any

from hqlabel.pipeline.errors import ImageError, UsageError
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.archive_uris import container_of

_SCHEME = re.compile(r"([a-z][a-z0-9+.\-]*)://(.*)", re.DOTALL)
_SIGNED = re.compile(
    r"[?&](x-amz-(signature|credential|security-token)|x-goog-(signature|credential)|signature|sig"
    r"|[^=&\s]{0,99}(token|api[_-]?key|passw|pwd|secret|credential)[^=&\s]{0,99}|auth|jwt|key(?!=[0-9]{1,5}(?![^&;#\s])))=",
    re.IGNORECASE,
)
_WEB = re.compile(r"https?://[^\s\"'<>]+", re.IGNORECASE)
_SIGNED_WEB = re.compile(
    r"([?&;#](?:[^=&;#\s]{0,99}(?:token|api[_-]?key|passw|pwd|secret|credential|signature|sess(?:ion)?[_-]?id)"
    r"[^=&;#\s]{0,99}|auth|bearer|hmac|jwt|key-pair-id|otp|pass|pat|sas|sig"
    r"|(?:code|key|login|policy|session|sid|ticket)(?!=[0-9]{1,5}(?![^&;#\s\"'<])))=)[^&\s\"'<]+",
    re.IGNORECASE,
)
"""What signs a web address: in its query, its fragment, or the parameters of a part of its path.

Under names that mean other things too, a number of up to five digits is none (`?code=1`).
"""
_RANDOM_VALUE = re.compile(
    r"([?&;#][^=&;#\s\"'<]{1,99}=)(?:[0-9a-fA-F-]{32,}"
    r"|(?=[^&;#\s\"'<]*[a-z])(?=[^&;#\s\"'<]*[A-Z])(?=[^&;#\s\"'<]*[0-9])[\w+/=%~-]{24,})(?=[&;#\s\"'<]|\Z)"
)
"""A long value that looks drawn at random, under any name: not refused, and not shown."""
_USER_AND_PASSWORD = re.compile(r"://[^/@\s]+:[^/@\s]+@")
_USER = re.compile(r"://[^/\s]*@")  # alone it may be a token
_SECRET_OPTION = re.compile(
    r"(^|_)((api|access|secret|private|account|shared|p)?key|secret|[a-z]*token|passw(or)?d|pass|pwd"
    r"|passphrase|credentials?|creds?|sas|conn(ection)?_?str(ing)?|dsn|auth|authorization|bearer|jwt"
    r"|cookies?|headers?|hdrs?|user(name)?|login|sig|signature|hmac|pat|otp|pin)(_|$)"
    r"|^(auth_|access_)?code$|^session(_?id|_token|_key|_cookie)?$"
)
_HARMLESS_OPTIONS = frozenset(
    {"sse_kms_key_id", "ssekms_key_id", "bucket_key_enabled", "signature_version", "session_kwargs"}
)
_TEXT_NAMES = (
    "endpoint_url region_name region profile profile_name signature_version addressing_style acl "
    "server_side_encryption sse_kms_key_id ssekms_key_id storage_class request_payer user_agent "
    "user_agent_extra expected_bucket_owner checksum_algorithm request_checksum_calculation "
    "response_checksum_validation payload_signing_enabled mode content_type content_encoding "
    "cache_control default_cache_type cache_type api_version version_id us_east_1_regional_endpoint "
    "token project access consistency location default_location requester_pays account_name "
    "account_host container_name blob_type tenant_id client_id endpoint revision repo_type host "
    "port protocol scheme encoding compression size_policy verify ca_bundle proxy proxies http https "
    "no_proxy timeout connect_timeout read_timeout"
)
_TEXT_OPTIONS = frozenset(_TEXT_NAMES.split())
"""Options of stores that may hold a text: of others nobody knows whether it is a secret."""
_LOGIN = re.compile(r"(?<!abfs)(?<!abfss)(?<!az)(?<!wasb)(?<!wasbs)://[^/\s@\"']+@")
"""A user, a token or a password before a host; Azure names its containers there."""
_BEARER = re.compile(r"\b(Bearer|Basic) +[\w.~+/=-]{8,}")
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
        if _is_signed(f"{scheme}://{rest}"):
            raise _refused("the uri carries a signature or token, which would be copied into the output")
        check_web_place(scheme, re.split(r"[/?#]", rest, maxsplit=1)[0])


_HOST = re.compile(
    r"(?=.{1,253}\Z)(?:[A-Za-z0-9_](?:[A-Za-z0-9_\-]{0,61}[A-Za-z0-9_])?)(?:\.[A-Za-z0-9_\-]{1,63})*\.?"
)
_AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[^\[\]:@]{1,254}))(?::(?P<port>[0-9]{1,5}))?"
)


def check_web_place(scheme: str, authority: str) -> None:
    """Check what stands between "://" and the path of a web address, before any name is resolved.

    Raises:
        ImageError: `uri_refused`, unless it is a plain host (a name, or an address in any spelling) with at
            most a port, and no address of a machine's own.
    """
    if scheme not in ("http", "https"):
        raise _refused(f"scheme {scheme!r} is no web address")
    if "@" in authority:
        raise _refused("the uri carries a user name or password; give credentials by environment or role")
    match = _AUTHORITY.fullmatch(authority)
    host = match and (match["v6"] or match["host"])
    if match is None or not host or (match["host"] and _HOST.fullmatch(host) is None):
        raise _refused(
            f"{authority[:80]!r} is no host: expected letters, digits, '-' and '.' (others as xn--...), or "
            "an address, with at most a port"
        )
    if int(match["port"] or 80) > 65535:
        raise _refused(f"port {match['port']} is none: expected 1 to 65535")
    if host.rstrip(".").lower() in _METADATA_NAMES:
        raise _refused(_OWN)
    address = _spelled_address(host)
    if address is not None:
        check_address(address)


_METADATA_NAMES = ("metadata.google.internal", "metadata.goog", "instance-data.ec2.internal", "instance-data")
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # GCP over IPv6, Alibaba, Azure, Oracle; 169.254.169.254 of all of them is link-local
        ("fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
    )
)
_OWN = "the uri points at the machine's metadata address, or another link-local one"
_AWS_SERVICES = ipaddress.ip_network("fd00:ec2::/32")
"""Metadata, credentials of pods, time and names over IPv6."""
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))
"""RFC 6052, 8215 and 7915: the last 32 bits are an IPv4 address. ISATAP's have these before them:"""
_ISATAP = (0x00005EFE, 0x02005EFE)


def check_address(text: str) -> None:
    """Check one IP address, as a connection would go to it.

    Loopback and private networks are allowed: object stores and file servers of an organisation live there.

    Raises:
        ImageError: `uri_refused` for a link-local or metadata address, in any IPv6 wrapping too.
    """
    address = ipaddress.ip_address(text)
    for one in (address, *_wrapped(address)):
        if one.is_link_local or one.is_multicast or one in _METADATA or one in _AWS_SERVICES:
            raise _refused(_OWN)


def _wrapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address stands for: mapped, translated, tunnelled."""
    if not isinstance(address, ipaddress.IPv6Address):
        return []
    plain = ipaddress.IPv6Address(int(address))  # without the name of an interface
    found = [plain.ipv4_mapped, plain.sixtofour, *(plain.teredo or ())]
    is_translated = any(plain in network for network in _TRANSLATED)
    if is_translated or int(plain) < 2**32 or int(plain) >> 32 & 0xFFFFFFFF in _ISATAP:
        found.append(ipaddress.IPv4Address(int(plain) & 0xFFFFFFFF))
    return [one for one in found if one is not None]


def _spelled_address(host: str) -> str | None:
    """Return the address that a host is as written, in any of inet_aton's spellings; None for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        try:  # 0xa9fea9fe, 2852039166, 0251.254.169.254 and 169.254.43518 are addresses too
            return socket.inet_ntoa(socket.inet_aton(host.rstrip(".")))
        except OSError:
            return None


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
    carries = _is_signed(text) or _USER.search(text)
    return "(withheld: it carries a credential)" if carries else text


def _is_signed(text: str) -> bool:
    return bool(_SIGNED.search(text)) or any(map(_SIGNED_WEB.search, _WEB.findall(text)))


def masked(text: str) -> str:
    """Return a text to be shown, with what looks like a credential replaced.

    Logins, signed queries, bearers, and in web addresses long values that look drawn at random.
    """
    return _WEB.sub(lambda uri: _RANDOM_VALUE.sub(r"\1***", uri[0]), _without_named_secrets(text))


def _without_named_secrets(text: str) -> str:
    text = _LOGIN.sub("://***@", text)
    text = _WEB.sub(lambda uri: _SIGNED_WEB.sub(r"\1***", uri[0]), text)
    text = re.sub(rf"({_SIGNED.pattern})[^&\s\"'<]+", r"\1***", text, flags=re.IGNORECASE)
    return _BEARER.sub(r"\1 ***", text)


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


def refuse_storage_secrets(options: Mapping[str, Any], *, where: str) -> None:
    """Refuse options of a store that look like secrets, or hold a text under a name that may be one.

    Raises:
        UsageError: names the option, never its value, and states where credentials belong.
    """
    refuse_secrets(options, where=where)
    for name in _found(options, "", "", _may_be_secret):
        raise UsageError(
            f"{where}: option {name[:100]!r} holds a text, and hqlabel does not know that it is no secret; "
            "options are written to job.json. Leave it out: give it by the environment, a profile or the "
            "configuration file of the store's client."
        )


def refuse_password(uri: str | None, *, where: str) -> None:
    """Refuse a place whose uri carries a login, a token or a signature: places are kept in job.json.

    Raises:
        UsageError: names the flag or setting, never the uri, and states where credentials belong.
    """
    if uri and (_USER_AND_PASSWORD.search(uri) or _without_named_secrets(uri) != uri):
        raise UsageError(
            f"{where}: the uri carries a user name and a password, a token or a signature, and places are "
            "written to job.json. Leave them out: credentials come from the environment, a profile, a role "
            "or a mounted file."
        )


def secret_options(options: Mapping[str, Any]) -> list[str]:
    """Return dotted names of the options that look like secrets, in the order given."""
    return _found(options, "", "", _is_secret)


def _found(value: Any, name: str, path: str, judge: Callable[[str, Any], bool]) -> list[str]:
    """Return the dotted names of what is secret in a value, each once; what a list holds has its name."""
    if not isinstance(value, Mapping | list | tuple | set):
        return [path] if judge(name, value) else []
    if value and _is_secret_name(name):
        return [path]
    found: list[str] = []
    if isinstance(value, Mapping):
        for key, below in value.items():
            found += _found(below, str(key), f"{path}.{key}" if path else str(key), judge)
    else:
        for below in value:
            found += _found(below, name, path, judge)
    return list(dict.fromkeys(found))


def _is_secret(name: str, value: Any) -> bool:
    if isinstance(value, str) and (
        _USER_AND_PASSWORD.search(value) or _without_named_secrets(value) != value
    ):
        return True
    if value is None or isinstance(value, bool):
        return False
    harmless = isinstance(value, str) and value in _HARMLESS_TOKENS
    return _is_secret_name(name) and not harmless


def _may_be_secret(name: str, value: Any) -> bool:
    return not isinstance(value, bool | int | float | None) and _snake(name) not in _TEXT_OPTIONS


def _is_secret_name(name: str) -> bool:
    snake = _snake(name)
    return snake not in _HARMLESS_OPTIONS and bool(_SECRET_OPTION.search(snake))


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-. ]", "_", name).lower()
