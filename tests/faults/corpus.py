"""Every case of bad and odd input, made here, each with what must become of it.

Pictures show four quadrants of plain colours, so that a wrong turn, channel or scale is seen from the
colours that come out. `picture_cases()` are files and uris, `box_cases()` lists of boxes on a good picture.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features
from PIL import JpegImagePlugin as _jpeg  # noqa: F401 - CMYK is saved by it

SIZE_WH = (96, 64)
COLOURS = {"ul": (250, 20, 20), "ur": (20, 240, 20), "ll": (20, 20, 230), "lr": (200, 200, 40)}
BOXES = {
    "ul": [4.0, 4.0, 40.0, 26.0],
    "ur": [54.0, 4.0, 92.0, 26.0],
    "ll": [4.0, 38.0, 40.0, 60.0],
    "lr": [54.0, 38.0, 92.0, 60.0],
}
EXACT, NEAR = 2, 40

Colour = tuple[int, int, int]
Place = Callable[[Path], None]
Box = tuple[Any, str | None, tuple[str, ...]]
FOUR: tuple[Box, ...] = tuple((box, None, ()) for box in BOXES.values())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image. `place` puts it under the root; `uri`: instead of a name below the root.

    `codes`: what may become of it: `labelled`, `no_boxes` or error codes. `colours`: of BOXES, by their
    names, with a tolerance of `within`. `boxes`: (given, reason or None, flags); None: a null list.
    """

    name: str
    codes: tuple[str, ...]
    place: Place | None = None
    uri: str | None = None
    boxes: tuple[Box, ...] | None = FOUR
    labels: tuple[str | None, ...] | None = None
    scores: tuple[float | None, ...] | None = None
    colours: dict[str, Colour] = field(default_factory=dict)
    within: int = EXACT
    size_hw: tuple[int, int] | None = None

    @property
    def is_good(self) -> bool:
        """Labelled whatever happens: part of the run without the bad ones."""
        return self.codes == ("labelled",)

    def given(self) -> list[Any] | None:
        """The box list as it stands in the table."""
        return None if self.boxes is None else [given for given, _, _ in self.boxes]


# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------


def quadrants(mode: str = "RGB") -> Image.Image:
    """The picture that most cases show."""
    width, height = SIZE_WH
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = COLOURS["ul"]
    pixels[: height // 2, width // 2 :] = COLOURS["ur"]
    pixels[height // 2 :, : width // 2] = COLOURS["ll"]
    pixels[height // 2 :, width // 2 :] = COLOURS["lr"]
    return Image.fromarray(pixels).convert(mode)


def noise() -> Image.Image:
    """A picture that compresses badly: half of its file is half of its pixels."""
    values = np.random.default_rng(0).integers(0, 256, (SIZE_WH[1], SIZE_WH[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.copy().save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(
    size_wh: tuple[int, int], depth: int, colour_type: int, raw: bytes, *, chunks: bytes = b""
) -> bytes:
    """A PNG of raw scan lines as they are; sound but for what `raw` lacks."""
    header = struct.pack(">IIBBBBB", *size_wh, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + chunks
        + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    )  # fmt: skip


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tiff_of(values: bytes, size_wh: tuple[int, int], bits: int, photometric: int) -> bytes:
    """A one-strip grey TIFF; photometric 0: white is 0."""
    width, height = size_wh
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        277: 1,
        278: height,
        279: len(values),
    }
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + values


def grey_16() -> np.ndarray:
    """The luminance of the quadrants as 16 bits."""
    return np.asarray(quadrants("L")).astype(np.uint16) * 257


def twelve_bits(values: np.ndarray) -> bytes:
    """Pairs of 12-bit values packed into three bytes, as a TIFF keeps them."""
    first, second = values.reshape(-1, 2).astype(np.uint32).T
    return (
        np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
        .astype(np.uint8)
        .tobytes()
    )


def ycck() -> bytes:
    """A JPEG as Adobe writes it: YCCK, inverted. Made as CMYK, and called YCCK in its marker."""
    c, m, y, k = (np.asarray(band).astype(float) for band in quadrants("CMYK").split())
    luma = 0.299 * c + 0.587 * m + 0.114 * y
    blue, red = 128 + (y - luma) * 0.564, 128 + (c - luma) * 0.713
    bands = [255 - luma, 255 - blue, 255 - red, k]
    picture = Image.merge(
        "CMYK", [Image.fromarray(np.clip(b, 0, 255).round().astype(np.uint8)) for b in bands]
    )
    data = bytearray(encode(picture, "JPEG", quality=97, subsampling=0))
    marker = data.index(b"Adobe")
    data[marker + 11] = 2
    return bytes(data)


def frames(kind: str) -> bytes:
    rest = [Image.new("RGB", SIZE_WH, colour) for colour in ((0, 255, 255), (255, 0, 255))]
    return encode(quadrants(), kind, save_all=True, append_images=rest)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def stored(orientation: int) -> Image.Image:
    """The quadrants as a camera stores them that says `orientation`."""
    return quadrants().transpose(_STORED[orientation]) if orientation in _STORED else quadrants()


def jpeg_of_size(size_wh: tuple[int, int]) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(encode(quadrants(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", size_wh[1], size_wh[0])
    return bytes(data)


def gif_of_size(size_wh: tuple[int, int]) -> bytes:
    data = bytearray(encode(quadrants().quantize(8), "GIF"))
    data[6:10] = struct.pack("<HH", *size_wh)
    return bytes(data)


def bmp_of_size(size_wh: tuple[int, int]) -> bytes:
    data = bytearray(encode(quadrants(), "BMP"))
    data[18:26] = struct.pack("<ii", *size_wh)
    return bytes(data)


def looping_tiff() -> bytes:
    data = bytearray(encode(quadrants(), "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[first : first + 2], "little")
    data[first + 2 + entries * 12 : first + 6 + entries * 12] = struct.pack("<I", first)
    return bytes(data)


def with_comments(count: int) -> bytes:
    """A JPEG with so many comments of 64 KiB."""
    comment = b"\xff\xfe" + struct.pack(">H", 65_535) + b"<script>" * 8191 + b"<scri"
    data = encode(quadrants(), "JPEG", quality=95)
    return data[:2] + comment * count + data[2:]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def write(data: bytes) -> Callable[[str], Place]:
    return lambda name: lambda root: _write(root / name, data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def good(name: str, data: bytes, colours: dict[str, Colour] | None = None, within: int = EXACT) -> Case:
    return Case(
        name=name,
        codes=("labelled",),
        place=write(data)(name),
        colours=COLOURS if colours is None else colours,
        within=within,
        size_hw=(SIZE_WH[1], SIZE_WH[0]),
    )


def bad(name: str, data: bytes, *codes: str) -> Case:
    return Case(name=name, codes=codes, place=write(data)(name))


def greys() -> dict[str, Colour]:
    """The colours of the quadrants as luminance."""
    picture = quadrants("L")
    points = {"ul": (8, 8), "ur": (90, 8), "ll": (8, 60), "lr": (90, 60)}
    return {name: (int(picture.getpixel(at)),) * 3 for name, at in points.items()}  # type: ignore[arg-type]


def format_cases() -> Iterable[Case]:
    """Good pictures in every format and pixel type of the list, and what those types become."""
    rgb = quadrants()
    yield good("f/baseline.jpg", encode(rgb, "JPEG", quality=95), within=NEAR)
    yield good("f/progressive.jpg", encode(rgb, "JPEG", quality=95, progressive=True), within=NEAR)
    yield good(
        "f/restart.jpg", encode(rgb, "JPEG", quality=95, subsampling=0, restart_marker_blocks=4), within=NEAR
    )
    yield good("f/grey.jpg", encode(quadrants("L"), "JPEG", quality=95), greys(), NEAR)
    yield good("f/cmyk.jpg", encode(quadrants("CMYK"), "JPEG", quality=97, subsampling=0), within=NEAR)
    yield good("f/ycck.jpg", ycck(), within=NEAR)
    yield good("f/8.png", encode(rgb, "PNG"))
    wide = np.asarray(rgb).astype(">u2") * 257
    lines = b"".join(b"\0" + row.tobytes() for row in wide)
    yield good("f/rgb16.png", png_of(SIZE_WH, 16, 2, lines))
    lines = b"".join(b"\0" + row.tobytes() for row in grey_16().astype(">u2"))
    yield good("f/grey16.png", png_of(SIZE_WH, 16, 0, lines), greys())
    yield good("f/grey.png", encode(quadrants("L"), "PNG"), greys())
    yield good("f/grey-alpha.png", encode(quadrants("LA"), "PNG"), greys())
    yield good("f/opaque.png", encode(quadrants("RGBA"), "PNG"))
    clear = quadrants("RGBA")
    clear.putalpha(0)
    yield good("f/clear.png", encode(clear, "PNG"))
    palette = rgb.quantize(4)
    yield good("f/palette.png", encode(palette, "PNG"))
    yield good("f/palette-transparent.png", encode(palette, "PNG", transparency=bytes(4)))
    bilevel = quadrants("L").point(lambda value: 255 * (value > 100), "1")
    black_white = {n: (255 * (c[0] > 100),) * 3 for n, c in greys().items()}
    yield good("f/bilevel.png", encode(bilevel, "PNG"), black_white)
    yield good("f/bilevel-fax.tif", encode(bilevel, "TIFF", compression="group4"), black_white)
    yield good("f/lossless.webp", encode(rgb, "WEBP", lossless=True))
    yield good("f/lossy.webp", encode(rgb, "WEBP", quality=95), within=NEAR)
    yield good("f/alpha.webp", encode(clear, "WEBP", lossless=True, exact=True))
    yield good("f/24.bmp", encode(rgb, "BMP"))
    yield good("f/palette.bmp", encode(palette, "BMP"))
    for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield good(f"f/{name}.tif", encode(rgb, "TIFF", compression=name))
    yield good("f/jpeg.tif", encode(rgb, "TIFF", compression="jpeg", quality=97), within=NEAR)
    yield good("f/cmyk.tif", encode(quadrants("CMYK"), "TIFF"))
    values = grey_16()
    yield good("f/grey16.tif", encode(Image.fromarray(values), "TIFF"), greys())
    yield good("f/grey16-white-is-0.tif", tiff_of((65535 - values).tobytes(), SIZE_WH, 16, 0), greys())
    yield good("f/grey12.tif", tiff_of(twelve_bits(values >> 4), SIZE_WH, 12, 1), greys())
    yield good(
        "f/grey8-white-is-0.tif", tiff_of((~np.asarray(quadrants("L"))).tobytes(), SIZE_WH, 8, 0), greys()
    )
    for kind, within in (("GIF", EXACT), ("WEBP", NEAR), ("PNG", EXACT), ("TIFF", EXACT), ("MPO", NEAR)):
        yield good(f"f/frames.{kind.lower()}", frames(kind), within=within)
    yield good("f/still.gif", encode(palette, "GIF"))
    yield bad(
        "f/float32.tif", encode(Image.fromarray(np.asarray(quadrants("F")) / 255), "TIFF"), "pixel_type"
    )
    yield bad(
        "f/int32.tif",
        encode(Image.fromarray(np.asarray(quadrants("L")).astype(np.int32)), "TIFF"),
        "pixel_type",
    )
    yield bad("f/lab.tif", encode(ImageCms.applyTransform(rgb, _to_lab()), "TIFF"), "pixel_type")
    yield bad("f/grey24.tif", tiff_of(bytes(3 * 96 * 64), SIZE_WH, 24, 1), "pixel_type")


def _to_lab() -> Any:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.buildTransform(srgb, lab, "RGB", "LAB")


def metadata_cases() -> Iterable[Case]:
    """Orientations, and metadata of every kind that must not fail a picture."""
    for orientation in range(1, 9):
        data = encode(stored(orientation), "JPEG", quality=97, subsampling=0, exif=exif(orientation))
        yield good(f"e/{orientation}.jpg", data, within=NEAR)
    yield good("e/6.png", encode(stored(6), "PNG", exif=exif(6)))
    yield good("e/6.tif", encode(stored(6), "TIFF", exif=exif(6)))
    yield good("e/8.webp", encode(stored(8), "WEBP", lossless=True, exif=exif(8)))
    for odd in (0, 9):
        yield good(f"e/{odd}.png", encode(quadrants(), "PNG", exif=exif(odd)))
    garbage = b"Exif\0\0II*\0\xff\xff\xff\xff"
    yield good("e/garbage-exif.jpg", encode(quadrants(), "JPEG", quality=97, exif=garbage), within=NEAR)
    yield good("e/garbage-icc.png", encode(quadrants(), "PNG", icc_profile=b"\x13" * 300))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield good("e/icc.jpg", encode(quadrants(), "JPEG", quality=97, icc_profile=profile), within=NEAR)
    yield good("e/comments.jpg", with_comments(8), within=NEAR)
    yield good(
        "e/trailing.jpg", encode(quadrants(), "JPEG", quality=97) + b"PK\x03\x04<script>" * 99, within=NEAR
    )
    yield good("e/zip-behind.png", encode(quadrants(), "PNG") + b"PK\x03\x04" + bytes(500))
    yield good("e/png-called.jpg", encode(quadrants(), "PNG"))
    yield good("e/jpeg-called.png", encode(quadrants(), "JPEG", quality=97), within=NEAR)
    yield good("e/gif-called.webp", encode(quadrants().quantize(4), "GIF"))
    yield good("e/looping.tif", looping_tiff())


def damage_cases() -> Iterable[Case]:
    """Pictures cut short, flipped, empty, or no pictures."""
    kinds: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "GIF": {},
    }  # fmt: skip
    for kind, options in kinds.items():
        data = encode(noise() if kind != "GIF" else noise().quantize(256), kind, **options)
        for what, length in (("head", 20), ("half", len(data) // 2), ("most", len(data) - 64)):
            yield bad(f"d/{what}.{kind.lower()}", data[:length], "truncated")
    yield bad("d/half-progressive.jpg", encode(noise(), "JPEG", progressive=True)[:3000], "truncated")
    jpeg = encode(noise(), "TIFF", compression="jpeg", quality=95)
    yield bad("d/jpeg-cut.tif", jpeg[:-64], "truncated", "corrupt")
    yield bad("d/no-end.jpg", encode(quadrants(), "JPEG")[:-2], "labelled", "truncated")
    yield bad("d/no-end.png", encode(quadrants(), "PNG")[:-12], "labelled", "truncated")
    data = encode(noise(), "PNG")
    yield bad("d/flipped.png", flipped(data, len(data) // 2), "corrupt")
    yield bad("d/flipped-header.png", flipped(data, 20), "corrupt", "too_large")
    yield bad("d/lines-missing.png", png_of(SIZE_WH, 8, 2, bytes(999)), "truncated", "corrupt")
    yield bad("d/empty.jpg", b"", "empty")
    yield bad("d/zeros.jpg", bytes(4096), "not_an_image")
    yield bad("d/random.jpg", np.random.default_rng(1).bytes(4096), "not_an_image")
    yield bad("d/page.jpg", b"<!DOCTYPE html><html>AKIA-CANARY</html>", "not_an_image")
    yield bad(
        "d/denied.jpg", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "not_an_image"
    )
    yield bad("d/lfs.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not_an_image")
    yield bad("d/text.png", b"no picture at all\n", "not_an_image")
    yield bad("d/archive.jpg", b"PK\x03\x04" + bytes(200), "not_an_image")
    yield bad("d/pickle.jpg", b"\x80\x04\x95" + b"cos\nsystem\n(S'touch CANARY'\ntR." * 9, "not_an_image")


def refused_cases() -> Iterable[Case]:
    """Formats that never reach a decoder, under honest and dishonest names."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch CANARY) (w) file\n"
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    signatures = {
        "heic": b"\0\0\0\x20ftypheic" + bytes(200), "mp4": b"\0\0\0\x20ftypisom" + bytes(200), "svg": svg,
        "pdf": b"%PDF-1.7\n" + bytes(200), "eps": eps, "psd": b"8BPS\0\1" + bytes(200),
        "jxl": b"\xff\x0a" + bytes(200), "qoi": b"qoif" + bytes(200), "dds": b"DDS " + bytes(200),
        "exr": b"v/1\x01" + bytes(200), "ico": encode(quadrants(), "ICO"), "ppm": encode(quadrants(), "PPM"),
    }  # fmt: skip
    if features.check("jpg_2000"):
        signatures["jp2"] = encode(quadrants(), "JPEG2000")
    for ending, data in signatures.items():
        yield bad(f"r/{ending}.{ending}", data, "format")
        yield bad(f"r/{ending}.jpg", data, "format")


def bomb_cases() -> Iterable[Case]:
    """Pictures that claim, or are, far more than they look. The limits are those of the test's job."""
    yield bad("b/900-megapixels.png", png_of((30_000, 30_000), 1, 0, bytes(30_000 * 3751)), "too_large")
    yield bad("b/144-megapixels.png", png_of((12_000, 12_000), 1, 0, bytes(12_000 * 1501)), "too_large")
    yield bad("b/header-only.png", png_of((60_000, 60_000), 8, 2, bytes(100)), "too_large")
    yield bad("b/claims.jpg", jpeg_of_size((60_000, 60_000)), "too_large")
    yield bad("b/claims.gif", gif_of_size((65_535, 65_535)), "too_large")
    yield bad("b/claims.bmp", bmp_of_size((60_000, 60_000)), "too_large")
    yield bad("b/claims.tif", tiff_of(bytes(100), (60_000, 60_000), 8, 1), "too_large")
    for name, head in (("zTXt", b"Comment\0\0"), ("iCCP", b"profile\0\0")):
        chunk = png_chunk(name.encode(), head + zlib.compress(bytes(80 * 2**20)))
        lines = (b"\0" + bytes(96)) * 64
        yield bad(f"b/{name}.png", png_of(SIZE_WH, 8, 0, lines, chunks=chunk), "too_large", "labelled")
    text = png_chunk(b"tEXt", b"Comment\0" + b"x" * 3 * 2**20)
    yield good("b/long-text.png", png_of(SIZE_WH, 8, 2, _lines(quadrants()), chunks=text))
    yield bad("b/bytes.bmp", encode(Image.new("RGB", (1400, 1400)), "BMP"), "too_many_bytes")
    yield Case(name="b/sparse.jpg", codes=("too_many_bytes",), place=_sparse)
    yield bad("b/1x4000.png", encode(Image.new("RGB", (1, 4000)), "PNG"), "too_elongated")
    yield bad("b/4000x1.png", encode(Image.new("RGB", (4000, 1)), "PNG"), "too_elongated")
    yield bad("b/3x3000.png", encode(Image.new("RGB", (3, 3000)), "PNG"), "too_elongated")
    strip = Image.new("RGB", (40, 3000), (9, 90, 200))
    yield one_pixel(good("b/40x3000.png", encode(strip, "PNG"), {}))
    yield one_pixel(good("b/1x1.png", encode(Image.new("RGB", (1, 1)), "PNG"), {}))
    large = quadrants().resize((4000, 3000), Image.Resampling.NEAREST)
    yield one_pixel(good("b/12-megapixels.jpg", encode(large, "JPEG", quality=90), {}))


def _lines(picture: Image.Image) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in np.asarray(picture))


def _sparse(root: Path) -> None:
    _write(root / "b/sparse.jpg", b"\xff\xd8\xff")
    os.truncate(root / "b/sparse.jpg", 5 * 2**30)


def one_pixel(case: Case) -> Case:
    """The case with one box that lies in any picture of at least one pixel."""
    return replace(case, boxes=(([0.0, 0.0, 1.0, 1.0], None, ()),), size_hw=None)


def file_cases(outside: Path) -> Iterable[Case]:
    """What may lie where a picture should. `outside`: a folder beyond the root, with `secret.png` in it."""

    def special(name: str, code: str, make: Callable[[Path], None]) -> Case:
        def place(root: Path) -> None:
            (root / name).parent.mkdir(exist_ok=True)
            make(root / name)

        return Case(name=name, codes=(code,), place=place)

    yield special("s/folder.jpg", "uri_refused", lambda path: path.mkdir())
    yield Case(name="s/missing.jpg", codes=("not_found",))
    yield Case(name="s/no-such-folder/missing.jpg", codes=("not_found",))
    yield Case(name="s/target.png/below-a-file.jpg", codes=("not_found", "uri_refused"))
    yield special("s/dangling.jpg", "not_found", lambda path: path.symlink_to("nowhere.jpg"))
    yield special("s/loop.jpg", "uri_refused", lambda path: path.symlink_to(path))
    yield special("s/to-folder.jpg", "uri_refused", lambda path: path.symlink_to(path.parent))
    yield special("s/outside.jpg", "uri_refused", lambda path: path.symlink_to(outside / "secret.png"))
    yield special("s/pipe.jpg", "uri_refused", os.mkfifo)
    yield special("s/device.jpg", "uri_refused", lambda path: path.symlink_to("/dev/zero"))
    yield good("s/target.png", encode(quadrants(), "PNG"))
    inside = special("s/inside.jpg", "labelled", lambda path: path.symlink_to("target.png"))
    yield inside


NAMES = [
    "a b.png", " outer .png", "é.png", "e\u0301.png", "日本.png", "🙂.png", "\u202er.png",
    "%20.png", "%2F.png", "#.png", "?.png", "&+.png", "*.png", "[1].png", "{a,b}.png", "a::b.png",
    "new\nline.png", "tab\t.png", "\"q'.png", "back\\slash.png", "-l.png", ".dot.png",
    "$(touch CANARY).png", "=1+1.png", "UP.PNG", "none",
    "x" * 246 + ".png", ";|.png", "file:", "s3:", "~.png", "`id`.png",
]  # fmt: skip


def name_cases() -> Iterable[Case]:
    """Good pictures under names that a shell, a uri parser or a spreadsheet would make something of."""
    data = encode(quadrants(), "PNG")
    return [good(f"n/{name}", data) for name in NAMES]


def uri_cases(outside: Path) -> Iterable[Case]:
    """Uris that must be refused before anything is opened."""
    secret = outside / "secret.png"
    uris = [
        str(secret), "../outside/secret.png", f"n/../../{outside.name}/secret.png",
        "file:///etc/passwd", "file://host/etc/passwd", "/proc/self/environ", "/dev/zero", "/dev/fd/0",
        "http://127.0.0.1:9/a.jpg", "https://example.invalid/a.jpg", "http://169.254.169.254/latest/meta-data/",
        "http://2852039166/latest/", "ftp://127.0.0.1/a.jpg", "sftp://127.0.0.1/a.jpg", "github://o:r@main/a.jpg",
        "memory://a.jpg", "data:image/png;base64,AA", "local:///etc/passwd", "FILE:///etc/passwd",
        f"simplecache::file://{secret}", f"filecache::file://{secret}", "zip://a.jpg::s3://bucket/b.zip",
        "reference::s3://bucket/a", f"async_wrapper::file://{secret}", "s3://key:CANARY@bucket/a.jpg",
        "https://user:CANARY@host.invalid/a.jpg", "s3://bucket/../other/a.jpg", "s3://bucket", "s3:///key",
        "https://host.invalid/a.jpg?X-Amz-Signature=CANARY", " ", "s3://bucket/a\0.jpg",
    ]  # fmt: skip
    return [Case(name=f"uri {i}", uri=uri, codes=("uri_refused",)) for i, uri in enumerate(uris)]


def picture_cases(outside: Path) -> list[Case]:
    """All cases of pictures, files, names and uris."""
    parts = (
        format_cases(), metadata_cases(), damage_cases(), refused_cases(), bomb_cases(),
        file_cases(outside), name_cases(), uri_cases(outside),
    )  # fmt: skip
    return [case for part in parts for case in part]


# ---------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
OK = ([4.0, 4.0, 40.0, 26.0], None, ())


def box_cases() -> list[Case]:
    """Lists of boxes on a good picture, each box with its reason, or None, and its flags."""
    width, height = (float(side) for side in SIZE_WH)
    bad_boxes = {
        "nan": [([NAN, 4, 40, 26], "box_not_finite"), ([4, 4, 40, NAN], "box_not_finite")],
        "inf": [([4, -INF, 40, 26], "box_not_finite"), ([4, 4, INF, 26], "box_not_finite")],
        "inverted": [([40, 4, 4, 26], "box_inverted"), ([4, 26, 40, 4], "box_inverted")],
        "empty": [([4, 4, 4, 26], "box_empty"), ([4, 4, 40, 4], "box_empty"), ([4, 4, 4, 4], "box_empty")],
        "outside": [([200, 4, 240, 26], "box_outside"), ([-40, 4, -4, 26], "box_outside")],
        "touching": [([width, 4, width + 9, 26], "box_outside"), ([4, -9, 40, 0], "box_outside")],
        "malformed": [
            ([4, 4, 40], "box_malformed"), ([4, 4, 40, 26, 1], "box_malformed"), ([], "box_malformed"),
            (None, "box_malformed"), ([4, None, 40, 26], "box_malformed"),
        ],
    }  # fmt: skip
    cases = []
    for name, rejected in bad_boxes.items():
        among = [OK, *[(box, reason, ()) for box, reason in rejected], OK]
        cases.append(boxes_case(f"among good: {name}", among))
        alone = [(box, reason, ()) for box, reason in rejected]
        cases.append(boxes_case(f"alone: {name}", alone, codes=("no_usable_box",)))
    clipped = ("box_clipped",)
    cases += [
        boxes_case("partly outside", [([-9, -9, 40, 26], None, clipped), ([50, 30, 200, 99], None, clipped)]),
        boxes_case("over by rounding", [([10, 10, width + 0.4, height + 0.0001], None, clipped)]),
        boxes_case("huge", [([-1e30, -1e30, 1e30, 1e30], None, clipped), OK]),
        boxes_case("quarter of a pixel", [([10.1, 10.1, 10.35, 10.35], None, ())]),
        boxes_case("normalised", [([0.1, 0.1, 0.5, 0.5], None, ())]),
        boxes_case("corner pixel", [([width - 1, height - 1, width, height], None, ())]),
        boxes_case(
            "whole frame", [([0, 0, width, height], None, ()), ([-0.0, -0.0, width, height], None, ())]
        ),
        boxes_case("xywh read as xyxy", [([60, 40, 20, 10], "box_inverted", ())], codes=("no_usable_box",)),
        boxes_case("the same three times", [OK, OK, OK]),
        boxes_case("sixty", [([i, i / 2, i + 30.0, i / 2 + 30], None, ()) for i in range(60)]),
        boxes_case(
            "two thousand", [([i % 60, i % 30, i % 60 + 9, i % 30 + 9], None, ()) for i in range(2000)]
        ),
        boxes_case("too many", [OK] * 2001, codes=("too_many_boxes",)),
        boxes_case("empty list", [], codes=("no_boxes",)),
        replace(boxes_case("null list", [], codes=("boxes_missing",)), boxes=None),
        boxes_case("more labels", [OK], labels=("a", "b"), codes=("labels_mismatch",)),
        boxes_case("fewer scores", [OK, OK], scores=(0.5,), codes=("labels_mismatch",)),
        boxes_case("null labels", [OK, OK], labels=(None, "b"), scores=(None, 0.5)),
        boxes_case("odd scores", [OK] * 4, scores=(NAN, -1.0, 7.5, INF)),
        boxes_case("odd labels", [OK] * 6, labels=("", "a\nb", "\"q'", "x" * 10_000, "nul\0", "=1+1")),
        boxes_case(
            "mixed and clipped", [OK, ([4, 4, 4, 4], "box_empty", ()), ([-1, -1, 9, 9], None, clipped)]
        ),
    ]
    corrupt = boxes_case("no boxes and no picture", [], codes=("no_boxes",))
    return [*cases, replace(corrupt, place=write(b"no picture")(corrupt.name))]


def boxes_case(name: str, boxes: list[Any], codes: tuple[str, ...] = ("labelled",), **rest: Any) -> Case:
    as_floats = tuple(
        (None if box is None else [None if v is None else float(v) for v in box], reason, flags)
        for box, reason, flags in boxes
    )
    place = write(encode(quadrants(), "PNG"))(f"x/{name}.png")
    return Case(name=f"x/{name}.png", codes=codes, boxes=as_floats, place=place, **rest)
