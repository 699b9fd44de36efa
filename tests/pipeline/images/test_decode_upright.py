"""Bytes in, upright RGB at the model's side out; every bad kind of bytes under its own code."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from hqlabel.model.records import fit_image, resize_longest_side
from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.images import decode_upright
from hqlabel.pipeline.images.decode_upright import decode_image

SIDE = 64
MAX_PIXELS = 89_478_485


def decode(data, *, side=SIDE, max_pixels=MAX_PIXELS):
    return decode_image(data, max_pixels=max_pixels, side=side)


def code_of(data, **options):
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.code


def encode(picture, format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def quadrants(height=48, width=64):
    """A picture whose four corners differ, so that no turn or flip of it equals another."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 20, 20)
    pixels[: height // 2, width // 2 :] = (20, 240, 20)
    pixels[height // 2 :, : width // 2] = (20, 20, 230)
    pixels[height // 2 :, width // 2 :] = (200, 200, 40)
    return Image.fromarray(pixels)


def noise(height=120, width=160):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_of(width, height, depth, colour_type, raw, *, chunks=b""):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunks
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


LOSSLESS = {
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff raw": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
}
LOSSY = {
    "jpeg": ("JPEG", {"quality": 95}),
    "jpeg progressive": ("JPEG", {"quality": 95, "progressive": True}),
    "jpeg 4:4:4 restart": ("JPEG", {"quality": 95, "subsampling": 0, "restart_marker_blocks": 4}),
    "webp lossy": ("WEBP", {"quality": 95}),
    "tiff jpeg": ("TIFF", {"compression": "jpeg", "quality": 95}),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_one_resize_of_the_same_pixels(name):
    format_name, options = LOSSLESS[name]

    found = decode(encode(noise(), format_name, **options))

    assert np.array_equal(found.pixels_hwc, resize_longest_side(np.asarray(noise()), SIDE))
    assert (found.size_hw, found.stored_size_hw, found.exif_orientation) == ((120, 160), (120, 160), None)
    assert found.format == format_name


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_keep_the_colours(name):
    format_name, options = LOSSY[name]

    found = decode(encode(quadrants(), format_name, **options))

    assert np.abs(found.pixels_hwc[4:20, 4:28].astype(int) - (250, 20, 20)).max() < 12
    assert np.abs(found.pixels_hwc[30:44, 36:60].astype(int) - (200, 200, 40)).max() < 12


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format_gives_the_same_upright_picture(format_name, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = quadrants()
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(format_name, {})

    found = decode(encode(stored, format_name, exif=exif, **lossless))

    largest = np.abs(found.pixels_hwc.astype(int) - np.asarray(upright)).max()
    assert largest <= (60 if format_name == "JPEG" else 0), f"largest difference {largest}"
    assert found.size_hw == (48, 64)
    assert found.stored_size_hw == (stored.height, stored.width)
    assert found.exif_orientation == orientation


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_outside_1_to_8_counts_as_absent(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation

    found = decode(encode(quadrants(), "PNG", exif=exif))

    assert (found.exif_orientation, found.size_hw) == (None, (48, 64))


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "garbage", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xa5" * 40, b"Exif\0\0MM"]
)
def test_garbage_in_the_metadata_never_fails_a_picture(format_name, garbage):
    found = decode(encode(quadrants(), format_name, exif=garbage, icc_profile=b"\x13" * 200))

    assert (found.exif_orientation, found.size_hw) == (None, (48, 64))


def test_pixel_types_become_rgb_by_the_stated_rules():
    grey = quadrants().convert("L")
    grey_rgb = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    rgb = np.asarray(quadrants())
    clear = quadrants().copy()
    clear.putalpha(0)
    grey_clear = grey.copy()
    grey_clear.putalpha(0)
    palette = quadrants().quantize(16)
    palette_rgb = np.asarray(palette.convert("RGB"))
    bilevel = grey.point(lambda v: 255 * (v > 100), "1")
    cases = {
        "L": (encode(grey, "PNG"), grey_rgb),
        "LA, wholly transparent": (encode(grey_clear, "PNG"), grey_rgb),
        "RGBA, wholly transparent": (encode(clear, "PNG"), rgb),
        "RGBA, lossless webp": (encode(clear, "WEBP", lossless=True, exact=True), rgb),
        "P": (encode(palette, "PNG"), palette_rgb),
        "P, transparent index": (encode(palette, "PNG", transparency=0), palette_rgb),
        "P, transparency table": (encode(palette, "PNG", transparency=bytes(16)), palette_rgb),
        "1": (encode(bilevel, "PNG"), np.asarray(bilevel.convert("RGB"))),
        "CMYK, tiff": (encode(quadrants().convert("CMYK"), "TIFF"), rgb),
        "gif": (encode(palette, "GIF"), palette_rgb),
    }
    for name, (data, expected) in cases.items():
        assert np.array_equal(decode(data).pixels_hwc, expected), name


def test_adobe_cmyk_jpegs_are_not_inverted():
    found = decode(encode(quadrants().convert("CMYK"), "JPEG", quality=95))

    assert np.abs(found.pixels_hwc[4:20, 4:28].astype(int) - (250, 20, 20)).max() < 25


def test_sixteen_bit_grey_is_scaled_and_never_white():
    ramp = np.linspace(0, 65535, 64 * 32).astype(">u2").reshape(32, 64)
    png = png_of(64, 32, 16, 0, b"".join(b"\0" + row.tobytes() for row in ramp))
    expected = np.round(ramp.astype(float) / 257).astype(np.uint8)

    assert np.array_equal(decode(png).pixels_hwc[..., 0], expected)
    for order in ("<u2", ">u2"):
        tiff = encode(Image.fromarray(ramp.astype(order)), "TIFF")
        assert np.array_equal(decode(tiff).pixels_hwc[..., 1], expected), order


def test_sixteen_bit_rgb_keeps_its_high_bytes():
    values = np.random.default_rng(1).integers(0, 65536, (32, 64, 3)).astype(">u2")
    png = png_of(64, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in values))

    assert np.array_equal(decode(png).pixels_hwc, (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_wide_integers_and_floats_are_refused(kind):
    assert code_of(encode(Image.fromarray(np.full((8, 8), 100, kind)), "TIFF")) == "pixel_type"


def test_of_many_frames_the_first_counts():
    frames = [Image.new("RGB", (64, 48), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format_name in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        data = encode(frames[0], format_name, save_all=True, append_images=frames[1:])

        found = decode(data)

        assert np.abs(found.pixels_hwc.astype(int) - (255, 0, 0)).max() < 6, format_name
        assert found.format == format_name


def test_a_tiff_whose_directories_run_in_a_circle_ends():
    data = bytearray(encode(quadrants(), "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[first : first + 2], "little")
    data[first + 2 + entries * 12 : first + 6 + entries * 12] = struct.pack("<I", first)

    assert decode(bytes(data)).size_hw == (48, 64)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_pictures_that_end_early_are_truncated(name):
    format_name, options = (LOSSLESS | LOSSY)[name]
    data = encode(noise(), format_name, **options)

    codes = {cut: code_of(data[:cut]) for cut in (12, 20, 100, len(data) // 2, len(data) - 64)}

    # Cut by 64 bytes, a TIFF with JPEG inside has all its directories: only its codec can complain.
    allowed = {"truncated", "corrupt"} if name == "tiff jpeg" else {"truncated"}
    assert set(codes.values()) <= allowed, codes


def test_one_flipped_byte_in_a_png_is_found():
    data = bytearray(encode(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF

    assert code_of(bytes(data)) == "corrupt"


def test_bytes_that_are_no_picture_are_named_and_not_repeated():
    secret = b"AKIA-SECRET"
    cases = {
        b"": "empty",
        bytes(4096): "not_an_image",
        b"<!DOCTYPE html><html>" + secret: "not_an_image",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>" + secret: "not_an_image",
        b"version https://git-lfs.github.com/spec/v1\n" + secret: "not_an_image",
        b"PK\x03\x04" + secret * 9: "not_an_image",
    }
    for data, code in cases.items():
        with pytest.raises(ImageError) as caught:
            decode(data)
        assert caught.value.code == code, data[:20]
        assert "AKIA" not in caught.value.message


def test_formats_outside_the_list_are_refused_by_name():
    cases = {
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200),
        "MP4": b"\0\0\0\x20ftypisom" + bytes(200),
        "ICO": encode(quadrants(), "ICO"),
        "PPM": encode(quadrants(), "PPM"),
        "EPS": b"\xc5\xd0\xd3\xc6" + bytes(200),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(200),
        "PDF": b"%PDF-1.7\n" + bytes(200),
        "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    }
    for name, data in cases.items():
        with pytest.raises(ImageError, match=name) as caught:
            decode(data)
        assert caught.value.code == "format", name


def test_trailing_bytes_after_the_picture_are_ignored():
    data = encode(quadrants(), "JPEG") + b"PK\x03\x04<script>" * 50

    assert decode(data).size_hw == (48, 64)


def test_bombs_are_refused_by_their_header():
    lying_png = png_of(60_000, 60_000, 8, 2, b"\0" * 100)
    jpeg = bytearray(encode(quadrants(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    gif = bytearray(encode(quadrants().quantize(8), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)

    assert {code_of(bytes(data)) for data in (lying_png, jpeg, gif)} == {"too_large"}


def test_the_limit_is_a_limit_and_not_a_warning():
    data = encode(quadrants(), "PNG")

    assert decode(data, max_pixels=48 * 64).size_hw == (48, 64)
    assert code_of(data, max_pixels=48 * 64 - 1) == "too_large"
    assert code_of(data, max_pixels=48 * 64 // 3) == "too_large"


def test_a_bomb_of_text_metadata_is_too_large():
    body = b"Comment\0\0" + zlib.compress(bytes(80 * 2**20))
    text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))

    assert code_of(png_of(2, 2, 8, 0, b"\0\0\0" * 2, chunks=text)) == "too_large"


def test_a_side_of_nothing_is_too_elongated():
    for size in ((1, 4000), (4000, 1), (20, 3000)):
        assert code_of(encode(Image.new("RGB", size), "PNG")) == "too_elongated", size
    assert decode(encode(Image.new("RGB", (1, 1)), "PNG")).pixels_hwc.shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size_hw", [(601, 900), (330, 401), (257, 515), (239, 303), (40, 50)])
def test_a_jpeg_decoded_reduced_has_the_sizes_of_a_whole_one_and_nearly_its_pixels(
    size_hw, orientation, monkeypatch
):
    loaded = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda p, *a, **k: loaded.append(p.size) or real(p, *a, **k))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    smooth = quadrants().resize(size_hw[::-1], Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95, exif=exif)

    whole = decode_image(data, max_pixels=MAX_PIXELS, side=SIDE, detector_side=100)
    full = loaded[-1]
    draft = decode_image(data, max_pixels=MAX_PIXELS, side=SIDE, detector_side=100, draft_jpeg=True)

    for name in ("size_hw", "stored_size_hw", "exif_orientation", "format"):
        assert getattr(draft, name) == getattr(whole, name), name
    for name in ("pixels_hwc", "detector_hwc"):
        ours, theirs = (getattr(one, name).astype(int) for one in (draft, whole))
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).mean() < 2
    reduced = round(max(full) / max(loaded[-1]))
    assert reduced == {900: 8, 401: 4, 515: 4, 303: 2, 50: 1}[max(size_hw)]
    assert max(loaded[-1]) >= min(100, max(size_hw))


def test_only_jpegs_are_decoded_reduced():
    data = encode(noise(600, 900), "PNG")

    drafted = decode_image(data, max_pixels=MAX_PIXELS, side=SIDE, draft_jpeg=True)

    assert np.array_equal(drafted.pixels_hwc, decode(data).pixels_hwc)


def test_pillow_is_left_as_it_was():
    before = Image.MAX_IMAGE_PIXELS

    code_of(encode(quadrants(), "PNG"), max_pixels=10)

    assert before == Image.MAX_IMAGE_PIXELS


SEEDS = [encode(quadrants(), name) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")]


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=12),
    cut=st.integers(0, 6000),
)
def test_any_bytes_give_a_picture_or_a_listed_error(seed, changes, cut):
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value

    try:
        found = decode(bytes(data[: max(cut, 0)]), max_pixels=10**6)
    except ImageError:
        return
    assert max(found.pixels_hwc.shape[:2]) == SIDE


@pytest.mark.parametrize("size", [(160, 120), (64, 48), (90, 400)], ids=str)
def test_a_model_that_stretches_gets_both_sides_and_its_detector_a_picture_in_proportion(size):
    stored = noise().resize(size)
    data = encode(stored, "PNG")

    found = decode_image(data, max_pixels=MAX_PIXELS, side=SIDE, fit="stretch", detector_side=SIDE)

    assert np.array_equal(found.pixels_hwc, fit_image(np.asarray(stored), SIDE, "stretch"))
    assert found.pixels_hwc.shape == (SIDE, SIDE, 3)
    assert found.size_hw == size[::-1]
    assert np.array_equal(found.detector_hwc, resize_longest_side(np.asarray(stored), min(SIDE, max(size))))


def test_a_strip_is_too_elongated_for_a_model_that_pads_or_a_detector_alone():
    data = encode(Image.new("RGB", (1000, 2)), "PNG")

    assert decode_image(data, max_pixels=MAX_PIXELS, side=SIDE, fit="stretch").size_hw == (2, 1000)
    for options in ({}, {"fit": "stretch", "detector_side": SIDE}):
        with pytest.raises(ImageError, match="cut it into pieces") as caught:
            decode_image(data, max_pixels=MAX_PIXELS, side=SIDE, **options)
        assert caught.value.code == "too_elongated"


@pytest.mark.parametrize(("width", "loaded"), [(8 * SIDE, 8), (8 * SIDE - 8, 4), (SIDE, 1)])
def test_a_jpeg_is_reduced_for_a_model_that_stretches_by_its_short_side(width, loaded, monkeypatch):
    """Its long side would allow more, and would leave the short one with fewer pixels than the model gets."""
    data = encode(Image.new("RGB", (width, 16 * SIDE), "red"), "JPEG")
    seen = []
    monkeypatch.setattr(
        decode_upright, "resize_image", lambda image, *_, **__: seen.append(image.size) or np.zeros((1, 1, 3))
    )

    found = decode_image(data, max_pixels=10**8, side=SIDE, fit="stretch", draft_jpeg=True)

    assert seen == [(-(-width // loaded), 16 * SIDE // loaded)]
    assert found.size_hw == (16 * SIDE, width)


def test_a_stored_checksum_that_does_not_fit_is_damage_though_the_pixels_can_be_read() -> None:
    data = bytearray(encode(quadrants(), "PNG"))
    begin = data.index(b"IDAT")
    checksum = begin + 4 + int.from_bytes(data[begin - 4 : begin], "big")
    data[checksum] ^= 1
    Image.open(io.BytesIO(bytes(data))).load()
    assert code_of(bytes(data)) == "corrupt"
