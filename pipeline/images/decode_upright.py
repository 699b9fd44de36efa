"""Bytes of a picture -> upright RGB uint8, resized once to the model's input side, by the model's rule.

A pure function of the bytes; knows no storage, no Ray and no deadline. Hostile or unlucky bytes can
crash a native codec, hang it or eat memory, so the pipeline calls it through `decode_process`.

Rules, one each:
- The format is decided by the bytes, from a list of nine; the name of the file plays no part.
- Size limits are checked on the header, before any pixel is decoded; Pillow's bomb warning is an error. A
  HEIC's pixels may turn out to be more than its header states: they are checked again.
- `verify()` and `load()` both: a JPEG cut in half passes the first, a PNG with a flipped byte the second.
- Orientation 1 to 8 is applied (EXIF, a PNG's eXIf, a TIFF's tag, XMP where there is no EXIF: what Pillow's
  `exif_transpose` goes by). Any other value, and metadata that cannot be read, count as absent. A HEIC is
  turned by its own properties as it is decoded, by every program: for it, stored and upright are the same.
- Alpha is dropped: the colour under it is kept as stored, as `convert("RGB")` and OpenCV's colour reading
  do, because the boxes came from a detector that read its pictures so. Fully transparent is no failure.
- Grey of more than 8 bits is scaled over its whole range, as a TIFF states it: 0..65535, or 0..4095 for 12
  bits, and turned over where 0 is white. 32-bit integers and floats have no stated white point and are
  refused, as are pixel types that Pillow does not know (`pixel_type`).
- CMYK goes through Pillow's plain conversion (Adobe's inverted JPEGs included); ICC profiles are ignored.
- Of an animation or a file of many pages, the first.
- Reduced JPEG decoding changes pixels, so it is done only where it is set (`draft_jpeg`), and never to
  less than the picture is resized to afterwards.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from hqlabel.model.records import Fit, resize_image, target_size_hw
from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.images.picture_formats import damaged, formats_for, unidentified

UInt8Array = npt.NDArray[np.uint8]

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

    `pixels_hwc`: uint8 RGB (h, w, 3), of the size `target_size_hw`; may be read-only. `size_hw`: upright,
    full size. `stored_size_hw`: as stored in the file, before its orientation was applied.
    `exif_orientation`: 1 to 8, or None where the file states none that can be used. `format`: Pillow's name,
    such as `JPEG`.
    `detector_hwc`: the same as a detector sees it, where there is one and that is another picture.
    """

    pixels_hwc: UInt8Array
    size_hw: tuple[int, int]
    stored_size_hw: tuple[int, int]
    exif_orientation: int | None
    format: str
    detector_hwc: UInt8Array | None = None


def decode_image(
    data: bytes,
    *,
    max_pixels: int,
    side: int,
    fit: Fit = "pad",
    detector_side: int | None = None,
    draft_jpeg: bool = False,
) -> DecodedImage:
    """Return the picture in `data`, upright, RGB, resized for a model of input side `side`.

    `fit`: how; see `hqlabel.model.records.Fit`.
    `detector_side`: also the picture as a detector sees it, with no side longer than this, never enlarged and
    never out of proportion.
    `draft_jpeg`: let a JPEG be decoded at a half, a quarter or an eighth of its size, if that is enough.

    Raises:
        ImageError: `empty`, `not_an_image`, `format`, `truncated`, `corrupt`, `too_large` (more than
            `max_pixels`, or metadata over Pillow's bounds), `too_elongated`, `pixel_type`.
        MemoryError: the picture does not fit in what this process may use.
    """
    if not data:
        raise ImageError("empty", "the object has 0 bytes; upload the picture again")
    wanted: list[tuple[int, Fit]] = [(side, fit)]
    if detector_side is not None:
        wanted.append((detector_side, "pad"))
    with _pillow_faults(data, max_pixels):
        formats = formats_for(data)
        _check_header(Image.open(io.BytesIO(data), formats=formats), max_pixels, wanted)
        picture = Image.open(io.BytesIO(data), formats=formats)
        orientation = _orientation(picture) if picture.format == "TIFF" else None
        stored_hw = _reduce(picture, wanted) if draft_jpeg else None
        picture.load()
        _check_pixels(picture, max_pixels)
        if picture.format == "TIFF":  # Pillow turns TIFFs upright while loading, and forgets the tag
            upright = _to_rgb(picture)
        else:
            orientation = _orientation(picture)
            upright = _to_rgb(picture)
            if orientation in _TRANSPOSE:
                upright = upright.transpose(_TRANSPOSE[orientation])
    size_hw = (upright.height, upright.width)
    swapped = orientation in (5, 6, 7, 8)
    if stored_hw is not None:
        size_hw = stored_hw[::-1] if swapped else stored_hw
    longest = None if detector_side is None else min(detector_side, max(size_hw))
    own_picture = longest is not None and (longest != side or fit != "pad")
    return DecodedImage(
        pixels_hwc=resize_image(upright, side, full_hw=size_hw, fit=fit),
        detector_hwc=resize_image(upright, longest, full_hw=size_hw) if longest and own_picture else None,
        size_hw=size_hw,
        stored_size_hw=size_hw[::-1] if swapped else size_hw,
        exif_orientation=orientation,
        format=str(picture.format),
    )


def measure_image(data: bytes, *, max_pixels: int, side: int) -> DecodedImage:
    """Return sizes, orientation and format by the header of `data`; the pixels are empty, (0, 0, 3).

    Raises:
        ImageError: as `decode_image`, for what the header alone shows.
    """
    del side
    if not data:
        raise ImageError("empty", "the object has 0 bytes; upload the picture again")
    with _pillow_faults(data, max_pixels):
        picture = Image.open(io.BytesIO(data), formats=formats_for(data))
        size_hw, orientation = (picture.height, picture.width), _orientation(picture)
    turned_hw = size_hw[::-1] if orientation in (5, 6, 7, 8) else size_hw
    is_upright = picture.format == "TIFF"  # Pillow gives the size of a TIFF as it will be when loaded
    return DecodedImage(
        pixels_hwc=np.zeros((0, 0, 3), np.uint8),
        size_hw=size_hw if is_upright else turned_hw,
        stored_size_hw=turned_hw if is_upright else size_hw,
        exif_orientation=orientation,
        format=str(picture.format),
    )


def _check_header(picture: Image.Image, max_pixels: int, wanted: Sequence[tuple[int, Fit]]) -> None:
    """Raise ImageError by the header alone, then check stored checksums; `picture` is spent afterwards."""
    _check_pixels(picture, max_pixels)
    try:
        for side, fit in sorted(wanted):
            target_size_hw((picture.height, picture.width), side, fit)
    except ValueError as error:
        raise ImageError("too_elongated", str(error)) from None
    picture.verify()


def _check_pixels(picture: Image.Image, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise ImageError("too_large", _too_many_pixels(f"{picture.width}x{picture.height}", max_pixels))


def _reduce(picture: Image.Image, wanted: Sequence[tuple[int, Fit]]) -> tuple[int, int] | None:
    """Let a JPEG load reduced, no side below any that is wanted; return its full size, else None."""
    if picture.format != "JPEG":
        return None
    stored_hw = (picture.height, picture.width)
    sizes_hw = [target_size_hw(stored_hw, side, fit) for side, fit in wanted]
    height, width = (max(sides) for sides in zip(*sizes_hw, strict=True))
    picture.draft(picture.mode, (width, height))
    return stored_hw


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Return the loaded picture as mode RGB, by the module's rules on pixel types; same frame."""
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
    if picture.mode in ("RGBa", "La"):  # premultiplied: only the conversion through plain alpha is defined
        picture = picture.convert("RGBA" if picture.mode == "RGBa" else "LA")
    return picture.convert("RGB")


def _narrowed(picture: Image.Image) -> UInt8Array:
    """Return grey of 9 to 16 bits as 8 bits, rounded; (h, w). Pillow leaves depth and direction to us."""
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    white = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    wide = np.asarray(picture).astype(np.uint32)
    narrow: UInt8Array = ((wide * 255 + white // 2) // white).astype(np.uint8)
    return np.invert(narrow) if tags.get(_PHOTOMETRIC) == 0 else narrow


def _orientation(picture: Image.Image) -> int | None:
    """Return the stated orientation, 1 to 8, or None where there is none, another value or garbage."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata never fails a picture; Pillow raises whatever the bytes lead it to
        return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


@contextlib.contextmanager
def _pillow_faults(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turn whatever Pillow raises on these bytes into an `ImageError`; bound its pixels meanwhile.

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
        number = re.search(r"[0-9]+", str(error))
        found = number[0] if number else "too many"
        raise ImageError("too_large", _too_many_pixels(found, max_pixels)) from None
    except UnidentifiedImageError:
        raise unidentified(data) from None
    except Exception as error:  # struct.error, SyntaxError, KeyError ...: bad bytes surface as anything
        raise damaged(data, error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _too_many_pixels(found: str, max_pixels: int) -> str:
    return f"the header announces {found} pixels, wanted at most {max_pixels} (limits.max_image_pixels)"
