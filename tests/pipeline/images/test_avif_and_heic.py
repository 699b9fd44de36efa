"""AVIF by Pillow and HEIC by pillow-heif: under the same limits as the others, in the same process.

pillow-heif is an extra that the locks lack: without it the tests of HEIC's pixels are skipped.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.images import picture_formats
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.decode_upright import DecodedImage, decode_image, measure_image
from hqlabel.pipeline.settings import Limits

RED, GREEN, BLUE = [200, 30, 30], [20, 200, 40], [30, 40, 200]
HEIC_START = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"


@pytest.fixture(params=["AVIF", "HEIF"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    if request.param == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    return str(request.param)


def photo() -> Image.Image:
    """Red above, green below left, blue below right; 160 wide, 96 high."""
    pixels = np.zeros((96, 160, 3), np.uint8)
    pixels[:48], pixels[48:, :80], pixels[48:, 80:] = RED, GREEN, BLUE
    return Image.fromarray(pixels)


def encoded(kind: str, *, orientation: int = 1) -> bytes:
    picture, file = photo(), io.BytesIO()
    if orientation != 1:
        picture.getexif()[0x112] = orientation
    picture.save(file, kind, quality=95, exif=picture.getexif().tobytes())
    return file.getvalue()


def decode(data: bytes, **options: Any) -> DecodedImage:
    return decode_image(data, **{"max_pixels": 10**6, "side": 160, **options})


def code_of(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.code


def test_pixels_size_and_format_are_those_of_the_picture(kind: str) -> None:
    found = decode(encoded(kind))

    assert (kind, (96, 160), None) == (found.format, found.size_hw, found.exif_orientation)
    for place, colour in (((10, 80), RED), ((85, 20), GREEN), ((85, 140), BLUE)):
        assert np.abs(found.pixels_hwc[place].astype(int) - colour).max() < 20
    header = measure_image(encoded(kind), max_pixels=10**6, side=1)
    assert (found.size_hw, found.format) == (header.size_hw, header.format)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_picture_is_upright(kind: str, orientation: int) -> None:
    data = encoded(kind, orientation=orientation)

    found, header = decode(data), measure_image(data, max_pixels=10**6, side=1)

    turned = photo().rotate({3: 180, 6: 270, 8: 90}[orientation], expand=True)
    assert (turned.height, turned.width) == found.size_hw == header.size_hw
    difference = np.abs(found.pixels_hwc[4:-4:9, 4:-4:9].astype(int) - np.asarray(turned)[4:-4:9, 4:-4:9])
    assert np.median(difference) < 10
    if kind == "AVIF":
        assert (found.exif_orientation, found.stored_size_hw) == (orientation, (96, 160))
    assert found.stored_size_hw == header.stored_size_hw


def test_limits_and_cuts_are_found(kind: str) -> None:
    data = encoded(kind)

    assert "too_large" == code_of(data, max_pixels=96 * 160 - 1)
    assert (96, 160) == decode(data, max_pixels=96 * 160).size_hw
    assert {"truncated"} == {code_of(data[: len(data) * part // 10]) for part in (1, 5, 9)}
    assert "corrupt" == code_of(data[:40] + bytes(len(data)))


def test_a_changed_byte_ends_in_a_picture_or_a_code(kind: str) -> None:
    rng, data = np.random.default_rng(0), encoded(kind)
    for _ in range(150):
        changed = bytearray(data)
        for place in rng.integers(0, min(len(data), 700), 3):
            changed[place] = rng.integers(0, 256)
        with contextlib.suppress(ImageError):  # nothing else is raised
            assert decode(bytes(changed)).pixels_hwc.size <= 3 * 160 * 160


def test_the_supervised_process_reads_them_too(kind: str) -> None:
    child = DecodeChild(Limits(max_image_pixels=96 * 160), side=160)
    try:
        found = child.decode(encoded(kind))
        np.testing.assert_array_equal(found.pixels_hwc, decode(encoded(kind)).pixels_hwc)
    finally:
        child.close()


def test_what_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    for load in (picture_formats._load_heif, picture_formats._load_avif):
        monkeypatch.setitem(
            picture_formats._LOADED, "HEIF" if "heif" in load.__name__ else "AVIF", load.__wrapped__
        )

    with pytest.raises(
        ImageError, match=r"HEIC, which needs pillow-heif .* pip install 'hqlabel\[heif\]'"
    ) as heic:
        decode(HEIC_START + bytes(200))
    with pytest.raises(ImageError, match="AVIF, which this build of Pillow cannot read") as avif:
        decode(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + bytes(200))

    assert ["format", "format"] == [heic.value.code, avif.value.code]


@pytest.mark.parametrize(
    ("brands", "found"),
    [
        *((b"avif\0\0\0\0mif1", "AVIF"), (b"avis\0\0\0\0msf1", "AVIF"), (b"mif1\0\0\0\0avif", "AVIF")),
        *((b"heic\0\0\0\0mif1", "HEIF"), (b"mif1\0\0\0\0heic", "HEIF"), (b"msf1\0\0\0\0hevc", "HEIF")),
        *((b"isom\0\0\0\0avc1", None), (b"qt  \0\0\0\0qt  ", None), (b"crx \0\0\0\0heic", None)),
    ],
)
def test_brands_tell_pictures_from_films(brands: bytes, found: str | None) -> None:
    box = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands

    assert found == picture_formats.signature(box + bytes(100))
