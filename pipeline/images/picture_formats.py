"""Picture formats that are read, how bytes are recognised, and why bytes do not decode.

Everything goes by the bytes; the name of the file plays no part. AVIF and HEIC need parts that not every
installation has: they are loaded when the first such picture comes, and named where they are missing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

# The plugins are named so that Pillow never loads the others (EPS starts Ghostscript, for example).
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from hqlabel.pipeline.errors import ImageError

_PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
    GifImagePlugin.GifImageFile,
)
ALLOWED_FORMATS: tuple[str, ...] = tuple(str(plugin.format) for plugin in _PLUGINS)
"""What is tried, by content. JPEG covers MPO (several JPEGs in one file), which reports itself as MPO."""


def formats_for(data: bytes) -> tuple[str, ...]:
    """Return the formats to try on some bytes, as Pillow names them, each with its plugin loaded.

    Raises:
        ImageError: `format`: AVIF or HEIC, and what reads it is not installed here; says what to install.
    """
    kind = signature(data)
    if kind is None or kind not in _LOADED:
        return ALLOWED_FORMATS
    if missing := _LOADED[kind]():
        raise ImageError("format", missing)
    return (kind,)


@lru_cache(maxsize=1)
def _load_avif() -> str | None:
    """Let Pillow read AVIF, on one thread; return what is missing, as text, where it cannot."""
    from PIL import AvifImagePlugin

    if not AvifImagePlugin.SUPPORTED:
        return (
            "this is AVIF, which this build of Pillow cannot read: install Pillow's own wheel, or convert it"
        )
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a core for each decoder; its pixels do not depend on it
    return None


@lru_cache(maxsize=1)
def _load_heif() -> str | None:
    """Let Pillow read HEIC by pillow-heif, with libheif's own limits and without what is not the picture."""
    try:
        import pillow_heif
    except ImportError:
        return (
            "this is HEIC, which needs pillow-heif where pictures are decoded: pip install 'hqlabel[heif]', "
            "or convert it"
        )
    pillow_heif.register_heif_opener(
        decode_threads=1,
        thumbnails=False,
        depth_images=False,
        aux_images=False,
        disable_security_limits=False,
    )
    return None


_LOADED: dict[str, Callable[[], str | None]] = {"AVIF": _load_avif, "HEIF": _load_heif}


def damaged(data: bytes, error: Exception) -> ImageError:
    """Return `too_large`, `truncated` or `corrupt` for a known format that does not decode."""
    found = f"{signature(data)} data"
    if "MAX_TEXT" in str(error):
        return ImageError("too_large", f"{found} with more text metadata than Pillow's bound of 64 MiB")
    if "runcated" in str(error) or _ends_early(data):
        return ImageError("truncated", f"{found} of {len(data)} bytes end early; upload the file again")
    return ImageError("corrupt", f"{found} are damaged ({type(error).__name__}: {error})")


def unidentified(data: bytes) -> ImageError:
    """Return why Pillow recognises nothing: damaged, a format that is not allowed, or no picture at all."""
    if signature(data) == "TIFF" and "unknown pixel mode" in _complaint(data):
        return ImageError(
            "pixel_type",
            "TIFF data of a pixel type with no stated meaning as 8-bit RGB; save the picture with 8 bits",
        )
    if signature(data) in (*ALLOWED_FORMATS, *_LOADED):
        return damaged(data, ValueError("the header cannot be read"))
    refused = _refused_format(data)
    if refused is not None:
        return ImageError(
            "format",
            f"this is {refused}; wanted one of {', '.join(ALLOWED_FORMATS)}, MPO, AVIF, HEIC: convert it",
        )
    return ImageError(
        "not_an_image", f"{len(data)} bytes of {_kind_of_text(data)}; check what the uri points at"
    )


def _complaint(data: bytes) -> str:
    """Return what Pillow's TIFF reader reports of a header, which `Image.open` drops."""
    try:
        TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except Exception as error:
        return str(error)
    return ""


SIGNATURE_BYTES = 16


def signature(data: bytes) -> str | None:
    """Return the picture format of the first SIGNATURE_BYTES bytes of a file; None for another."""
    return next((name for name, matches in _SIGNATURES.items() if matches(data)), None)


_SIGNATURES: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda d: d.startswith(b"\xff\xd8\xff"),
    "PNG": lambda d: d.startswith(b"\x89PNG"),
    "GIF": lambda d: d.startswith(b"GIF8"),
    "BMP": lambda d: d.startswith(b"BM"),
    "TIFF": lambda d: d[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "WEBP": lambda d: d.startswith(b"RIFF") and d[8:12] == b"WEBP",
    "AVIF": lambda d: _iso_format(d) == "AVIF",
    "HEIF": lambda d: _iso_format(d) == "HEIF",
}
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
_IMAGE_BRANDS = (b"mif1", b"mif2", b"msf1")
"""Of an image in either coding; the brands behind say which, and cameras' HEIC files begin so too."""


def _iso_format(data: bytes) -> str | None:
    """Return AVIF or HEIF by the brands of an ISO media file's first box; None for another, such as MP4."""
    if data[4:8] != b"ftyp":
        return None
    major, end = data[8:12], min(int.from_bytes(data[:4], "big"), 16 + 4 * 64)
    others = [data[at : at + 4] for at in range(16, end, 4)] if major in _IMAGE_BRANDS else []
    brands = (major, *others)
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF"
    return "HEIF" if any(brand in (*_HEIF_BRANDS, *_IMAGE_BRANDS) for brand in brands) else None


def _iso_length(data: bytes) -> int:
    """Return how many bytes the boxes of an ISO media file announce, to the first that goes over its end."""
    at = 0
    while at + 16 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file
            return len(data)
        at += size
    return at


def _ends_early(data: bytes) -> bool:
    """Return whether bytes that did not decode lack their format's end; called only after a failure."""
    name = signature(data)
    if name in ("WEBP", "BMP", "TIFF", *_LOADED):
        return len(data) < _announced_length(name, data)
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}.get(name or "")
    return end is not None and end not in data[-64:]


def _announced_length(name: str, data: bytes) -> int:
    """Return how many bytes the header announces, at least; for TIFF to the end of its first directory."""
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8
    if name in _LOADED:
        return _iso_length(data)
    if name == "BMP":
        return max(26, int.from_bytes(data[2:6], "little"))
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    directory = int.from_bytes(data[4:8], order)  # nonsense in a BigTIFF, which then counts as corrupt
    entries = int.from_bytes(data[directory : directory + 2], order)
    return directory + 2 + 12 * entries + 4


_REFUSED_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\x01\0", "ICO"),
    (b"\0\0\x02\0", "CUR"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"v/1\x01", "OpenEXR"),
)


def _refused_format(data: bytes) -> str | None:
    """Return the name of a picture format that is known and not allowed, or None."""
    for prefix, name in _REFUSED_PREFIXES:
        if data.startswith(prefix):
            return name
    if data[4:8] == b"ftyp":
        return "an ISO media file, such as MP4"
    if data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():
        return "a PPM-family picture"
    return "SVG" if b"<svg" in data[:1024].lower() else None


def _kind_of_text(data: bytes) -> str:
    """Return what bytes of no picture are, as text and never their content, which may hold anything."""
    head = data[:256].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (the file itself was not downloaded)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if head.startswith(b"<"):
        return "XML (often a store's error answer)"
    return "no known picture format"
