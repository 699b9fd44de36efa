"""Bytes of a picture -> upright RGB uint8, resized once to the model's input side.

A pure function of the bytes; knows no storage, no Ray and no deadline. Hostile or unlucky bytes can
crash a native codec, hang it or eat memory, so the pipeline calls it through `decode_child`.

Rules, one each:
- The format is what the bytes say, from a list of seven; the name of the file plays no part.
- Size limits are checked on the header, before any pixel is decoded; Pillow's bomb warning is an error.
- `verify()` and `load()` both: a JPEG cut in half passes the first, a PNG with a flipped byte the second.
- Orientation 1 to 8 is applied (EXIF, a PNG's eXIf, a TIFF's tag, XMP where there is no EXIF: what Pillow's
  `exif_transpose` goes by). Any other value, and metadata that cannot be read, count as absent.
- Alpha is dropped: the colour under it is kept as stored, as `convert("RGB")` and OpenCV's colour reading
  do, because the boxes came from a detector that read its pictures so. Fully transparent is no failure.
- Grey of more than 8 bits is scaled over its whole range, as a TIFF states it: 0..65535, or 0..4095 for 12
  bits, and turned over where 0 is white. 32-bit integers and floats have no stated white point and are
  refused, as are pixel types that Pillow does not know (`pixel_type`).
- CMYK goes through Pillow's plain conversion (Adobe's inverted JPEGs included); ICC profiles are ignored.
- Of an animation or a file of many pages, the first.
- Reduced JPEG decoding changes pixels, so it is done only where it was asked for (`draft_jpeg`), and never to
  less than the picture is resized to afterwards.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# The plugins are named so that Pillow never loads the others (EPS starts Ghostscript, for example).
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from model.records import resize_image, target_size_hw
from pipeline.errors import ImageError

UInt8Array = npt.NDArray[np.uint8]

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

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of a TIFF; a photometric of 0: white is 0
_TO_RGB_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """One upright picture at the model's input side, and what it was before.

    `pixels_hwc`: uint8 RGB (h, w, 3) with max(h, w) == side; may be read-only. `size_hw`: upright, full size.
    `stored_size_hw`: as stored in the file, before its orientation was applied. `exif_orientation`: 1 to 8,
    or None where the file states none that can be used. `format`: Pillow's name, such as `JPEG`.
    `detector_hwc`: the same at the detector's size, where one was asked for and it is another size.
    """

    pixels_hwc: UInt8Array
    size_hw: tuple[int, int]
    stored_size_hw: tuple[int, int]
    exif_orientation: int | None
    format: str
    detector_hwc: UInt8Array | None = None


def decode_image(
    data: bytes, *, max_pixels: int, side: int, detector_side: int | None = None, draft_jpeg: bool = False
) -> DecodedImage:
    """The picture in `data`, upright, RGB, its long side resized to `side`.

    `detector_side`: also the picture as a detector sees it, with no side longer than this, never enlarged.
    `draft_jpeg`: let a JPEG be decoded at a half, a quarter or an eighth of its size, if that is enough.

    Raises:
        ImageError: `empty`, `not_an_image`, `format`, `truncated`, `corrupt`, `too_large` (more than
            `max_pixels`, or metadata over Pillow's bounds), `too_elongated`, `pixel_type`.
        MemoryError: the picture does not fit in what this process may use.
    """
    if not data:
        raise ImageError("empty", "the object has 0 bytes; upload the picture again")
    with _pillow_faults(data, max_pixels):
        least = min(side, detector_side or side)
        _check_header(Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS), max_pixels, least)
        picture = Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
        orientation = _orientation(picture) if picture.format == "TIFF" else None
        stored_hw = _reduce(picture, max(side, detector_side or side)) if draft_jpeg else None
        picture.load()
        if picture.format == "TIFF":  # Pillow turns TIFFs upright while loading, and forgets the tag
            upright = _to_rgb(picture)
        else:
            orientation = _orientation(picture)
            upright = _turned(_to_rgb(picture), orientation)
    size_hw = (upright.height, upright.width)
    swapped = orientation in (5, 6, 7, 8)
    if stored_hw is not None:
        size_hw = stored_hw[::-1] if swapped else stored_hw
    shown = None if detector_side is None else min(detector_side, max(size_hw))
    return DecodedImage(
        pixels_hwc=resize_image(upright, side, full_hw=size_hw),
        detector_hwc=None if shown in (None, side) else resize_image(upright, shown, full_hw=size_hw),
        size_hw=size_hw,
        stored_size_hw=size_hw[::-1] if swapped else size_hw,
        exif_orientation=orientation,
        format=str(picture.format),
    )


def measure_image(data: bytes, *, max_pixels: int, side: int) -> DecodedImage:
    """Sizes, orientation and format as the header of `data` states them; the pixels are empty, (0, 0, 3).

    Raises:
        ImageError: as `decode_image`, for what the header alone shows.
    """
    del side
    if not data:
        raise ImageError("empty", "the object has 0 bytes; upload the picture again")
    with _pillow_faults(data, max_pixels):
        picture = Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
        size_hw, orientation = (picture.height, picture.width), _orientation(picture)
    turned = size_hw[::-1] if orientation in (5, 6, 7, 8) else size_hw
    is_upright = picture.format == "TIFF"  # Pillow gives the size of a TIFF as it will be when loaded
    return DecodedImage(
        pixels_hwc=np.zeros((0, 0, 3), np.uint8),
        size_hw=size_hw if is_upright else turned,
        stored_size_hw=turned if is_upright else size_hw,
        exif_orientation=orientation,
        format=str(picture.format),
    )


def _check_header(picture: Image.Image, max_pixels: int, side: int) -> None:
    """Refuses by the header alone, then reads the stored checksums; `picture` is spent afterwards."""
    if picture.width * picture.height > max_pixels:
        raise ImageError("too_large", _too_many_pixels(f"{picture.width}x{picture.height}", max_pixels))
    try:
        target_size_hw((picture.height, picture.width), side)
    except ValueError as error:
        raise ImageError("too_elongated", str(error)) from None
    picture.verify()


def _reduce(picture: Image.Image, side: int) -> tuple[int, int] | None:
    """The size of a JPEG before it was told to load reduced, no side below those at `side`; else None."""
    if picture.format != "JPEG":
        return None
    stored_hw = (picture.height, picture.width)
    height, width = target_size_hw(stored_hw, side)
    picture.draft(picture.mode, (width, height))
    return stored_hw


def _to_rgb(picture: Image.Image) -> Image.Image:
    """The loaded picture as mode RGB, by the module's rules on pixel types; same frame."""
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16"):
        return Image.fromarray(_narrowed(picture)).convert("RGB")
    if picture.mode not in _TO_RGB_MODES:
        raise ImageError(
            "pixel_type",
            f"pixel type {picture.mode!r} has no stated meaning as 8-bit RGB; "
            "save the picture as 8-bit grey or RGB, or as 16-bit grey",
        )
    # Left in, a transparency entry makes Pillow blend or warn; the rule is to keep the stored colour.
    picture.info.pop("transparency", None)
    if picture.mode in ("RGBa", "La"):  # premultiplied: only the way over plain alpha is defined
        picture = picture.convert("RGBA" if picture.mode == "RGBa" else "LA")
    return picture.convert("RGB")


def _narrowed(picture: Image.Image) -> UInt8Array:
    """Grey of 9 to 16 bits as 8 bits, rounded; (h, w). Pillow leaves depth and direction to its callers."""
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    wide = np.asarray(picture).astype(np.uint32)
    narrow: UInt8Array = ((wide * 255 + white // 2) // white).astype(np.uint8)
    return np.invert(narrow) if tags.get(_PHOTOMETRIC) == 0 else narrow


def _orientation(picture: Image.Image) -> int | None:
    """The stated orientation, 1 to 8, or None where there is none, another value or garbage."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata never fails a picture; Pillow raises whatever the bytes lead it to
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def _turned(picture: Image.Image, orientation: int | None) -> Image.Image:
    method = _TRANSPOSE.get(orientation or 1)
    return picture if method is None else picture.transpose(method)


@contextlib.contextmanager
def _pillow_faults(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turns whatever Pillow raises on these bytes into an `ImageError`; bounds its pixels meanwhile.

    Changes two process-wide settings of Pillow and `warnings` for the duration: one call at a time.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError("too_large", _too_many_pixels(_sizes_in(error), max_pixels)) from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # struct.error, SyntaxError, KeyError ...: bad bytes surface as anything
        raise _damaged(data, error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _too_many_pixels(found: str, max_pixels: int) -> str:
    return f"the header announces {found} pixels, wanted at most {max_pixels} (limits.max_image_pixels)"


def _sizes_in(error: BaseException) -> str:
    digits = [word.strip("()") for word in str(error).split() if word.strip("()").isdigit()]
    return digits[0] if digits else "too many"


def _damaged(data: bytes, error: Exception) -> ImageError:
    """`too_large`, `truncated` or `corrupt` for a known format that does not decode."""
    found = f"{signature(data)} data"
    if "MAX_TEXT" in str(error):
        return ImageError("too_large", f"{found} with more text metadata than Pillow's bound of 64 MiB")
    if "runcated" in str(error) or _ends_early(data):
        return ImageError("truncated", f"{found} of {len(data)} bytes end early; upload the file again")
    return ImageError("corrupt", f"{found} are damaged ({type(error).__name__}: {error})")


def _unidentified(data: bytes) -> ImageError:
    """Why Pillow recognises nothing: damaged, a format that is not allowed, or no picture at all."""
    if signature(data) == "TIFF" and "unknown pixel mode" in _complaint(data):
        return ImageError(
            "pixel_type",
            "TIFF data of a pixel type with no stated meaning as 8-bit RGB; save the picture with 8 bits",
        )
    if signature(data) in ALLOWED_FORMATS:
        return _damaged(data, ValueError("the header cannot be read"))
    refused = _refused_format(data)
    if refused is not None:
        return ImageError(
            "format", f"this is {refused}; wanted one of {', '.join(ALLOWED_FORMATS)}, MPO: convert it"
        )
    return ImageError(
        "not_an_image", f"{len(data)} bytes of {_kind_of_text(data)}; check what the uri points at"
    )


def _complaint(data: bytes) -> str:
    """What Pillow's TIFF reader says of a header, which `Image.open` keeps to itself."""
    try:
        TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    except Exception as error:
        return str(error)
    return ""


SIGNATURE_BYTES = 16


def signature(data: bytes) -> str | None:
    """Return the picture format that the first SIGNATURE_BYTES bytes of a file say; None for another."""
    for name, matches in _SIGNATURES.items():
        if matches(data):
            return name
    return None


_SIGNATURES: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda d: d.startswith(b"\xff\xd8\xff"),
    "PNG": lambda d: d.startswith(b"\x89PNG"),
    "GIF": lambda d: d.startswith(b"GIF8"),
    "BMP": lambda d: d.startswith(b"BM"),
    "TIFF": lambda d: d[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "WEBP": lambda d: d.startswith(b"RIFF") and d[8:12] == b"WEBP",
}


def _ends_early(data: bytes) -> bool:
    """Whether bytes that did not decode lack their format's end; asked only after a failure."""
    name = signature(data)
    if name in ("WEBP", "BMP", "TIFF"):
        return len(data) < _announced_length(name, data)
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}.get(name or "")
    return end is not None and end not in data[-64:]


def _announced_length(name: str, data: bytes) -> int:
    """How many bytes the header says there are, at least; for TIFF to the end of its first directory."""
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8
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
    """The name of a picture format that is known and not allowed, or None."""
    for prefix, name in _REFUSED_PREFIXES:
        if data.startswith(prefix):
            return name
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return {b"avif": "AVIF", b"avis": "AVIF"}.get(brand, "HEIC or another ISO media file")
    if data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():
        return "a PPM-family picture"
    return "SVG" if b"<svg" in data[:1024].lower() else None


def _kind_of_text(data: bytes) -> str:
    """What no picture is made of, as words and never as content: the text may hold anything."""
    head = data[:256].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (the file itself was not downloaded)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if head.startswith(b"<"):
        return "XML (often a store's error answer)"
    return "no known picture format"
