"""Which files do people really have? Pictures of every kind, turned, cut, misnamed and broken, as small as possible.

`pictures()` makes the bytes, all of known content; `write` lays them out with links, modes and names that a folder may
hold as well. What must become of each is written down in test_hostile.py.
"""

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.kit.images import photo

Pixels = NDArray[np.uint8]
WIDTH, HEIGHT = 64, 48
CORNERS = np.array([[(220, 30, 30), (30, 200, 40)], [(40, 50, 230), (230, 220, 40)]], np.uint8)
"""Red, green; blue, yellow."""
NAMES = (
    *("with space.jpg", "new\nline.jpg", "ünïcödé 東京 🐱.jpg", "'quoted\".jpg", "-dash.jpg", "%20#a?b=c&d.jpg"),
    *("tab\t*.jpg", "n" * 240 + ".jpg", "UPPER.JPG", "two.png.jpg"),
)


def corners(width: int = WIDTH, height: int = HEIGHT) -> Pixels:
    """(height, width, 3) uint8: a quarter in each of `CORNERS`, so that every turn and mirror shows."""
    return CORNERS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def lying(upright: Pixels, orientation: int) -> Pixels:
    """The pixels of a file that shows `upright` when turned by EXIF."""
    undone = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    return np.ascontiguousarray(undone[orientation])


def saved(image: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    """The file's bytes."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    """An EXIF block that holds the orientation, as cameras write it."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def with_segments(jpeg: bytes, *bodies: bytes) -> bytes:
    """The JPEG with APP1 segments in front."""
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body for body in bodies) + jpeg[2:]


def xmp(orientation: int) -> bytes:
    """An orientation in XMP."""
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG with this header, whatever the rows are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def tiff(pixels: NDArray[Any], *, photometric: int = 1, planar: bool = False, extra: int | None = None) -> bytes:
    """An uncompressed TIFF of (h, w, samples) uint8 or uint16; `planar`: sample after sample; `extra`: ExtraSamples."""
    (height, width, samples), strips = pixels.shape, pixels.shape[2] if planar else 1
    data = (pixels.transpose(2, 0, 1) if planar else pixels).tobytes()
    shorts = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * samples, 259: [1], 262: [photometric]}
    shorts |= {277: [samples], 278: [height], 284: [1 + planar]} | ({} if extra is None else {338: [extra]})
    longs = {279: [len(data) // strips] * strips, 273: [0] * strips}  # lengths and places of the strips

    def laid_out(start: int) -> bytes:
        longs[273] = [start + i * len(data) // strips for i in range(strips)]
        values = {tag: (3, struct.pack(f"<{len(v)}H", *v), len(v)) for tag, v in shorts.items()}
        values |= {tag: (4, struct.pack(f"<{len(v)}I", *v), len(v)) for tag, v in longs.items()}
        entries, beyond, at = b"", b"", 8 + 2 + 12 * len(values) + 4
        for tag, (kind, raw, count) in sorted(values.items()):
            place = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<I", at + len(beyond))
            beyond += raw if len(raw) > 4 else b""
            entries += struct.pack("<HHI", tag, kind, count) + place
        return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + beyond

    return laid_out(len(laid_out(0))) + data


@cache
def pictures() -> dict[str, bytes]:
    """Name -> bytes; not to be changed."""
    return {**_kinds(), **_turned(), **_cut(), **_broken(), **_sizes()}


def write(folder: Path) -> None:
    """All of `pictures`, the odd `NAMES`, and entries that are no files or cannot be reached."""
    (folder / "valid").mkdir(parents=True)
    for name, data in pictures().items():
        (folder / name).write_bytes(data)
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(saved(photo(WIDTH, HEIGHT, seed=100 + i), "JPEG"))
    (folder / "mode000.jpg").write_bytes(saved(photo(WIDTH, HEIGHT, seed=120), "JPEG"))
    (folder / "mode000.jpg").chmod(0)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "broken_link.jpg").symlink_to("nowhere.jpg")
    (folder / "link.jpg").symlink_to("rgb.jpg")
    (folder / "valid" / "round").symlink_to("..")  # a folder that holds itself


def _kinds() -> dict[str, bytes]:
    rgb, grey = Image.fromarray(photo(WIDTH, HEIGHT, seed=1)), Image.fromarray(photo(WIDTH, HEIGHT, seed=2)[..., 0])
    alpha, other = Image.merge("RGBA", [*rgb.split(), grey]), rgb.rotate(180)
    two = Image.merge("LA", [grey, grey.rotate(180)])
    ramp = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    deep = np.dstack([ramp, ramp[::-1], ramp[:, ::-1]]).astype(">u2")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    cmyk = saved(rgb.convert("CMYK"), "JPEG", quality=92)
    at = cmyk.index(b"Adobe")
    return {
        "rgb.jpg": saved(rgb, "JPEG", quality=92),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "full_chroma.jpg": saved(rgb, "JPEG", subsampling=0),
        "grey.jpg": saved(grey, "JPEG"),
        "cmyk.jpg": cmyk,
        "ycck.jpg": cmyk[: at + 11] + b"\2" + cmyk[at + 12 :],
        "cmyk_not_adobe.jpg": cmyk[: at - 4] + cmyk[at + 12 :],
        "two_pictures.jpg": saved(rgb, "MPO", save_all=True, append_images=[other]),
        "rgb.png": saved(rgb, "PNG"),
        "grey.png": saved(grey, "PNG"),
        "black_white.png": saved(grey.convert("1"), "PNG"),
        "alpha.png": saved(alpha, "PNG"),
        "grey_alpha.png": saved(two, "PNG"),
        "palette.png": saved(palette, "PNG"),
        "palette_alpha.png": saved(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "grey16.png": saved(ramp, "PNG"),
        "rgb16.png": png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)),
        "animated.png": saved(rgb, "PNG", save_all=True, append_images=[other]),
        "rgb.tif": saved(rgb, "TIFF"),
        "lzw.tif": saved(rgb, "TIFF", compression="tiff_lzw"),
        "grey16.tif": saved(ramp, "TIFF"),
        "grey_alpha.tif": saved(two, "TIFF"),
        "cmyk.tif": saved(rgb.convert("CMYK"), "TIFF"),
        "black_white.tif": saved(grey.convert("1"), "TIFF"),
        "float.tif": saved(ramp.astype(np.float32) / 65535, "TIFF"),
        "rgb.webp": saved(rgb, "WEBP", quality=90),
        "alpha.webp": saved(alpha, "WEBP", lossless=True),
        "animated.webp": saved(rgb, "WEBP", lossless=True, save_all=True, append_images=[other]),
        "rgb.bmp": saved(rgb, "BMP"),
        "rgb.ppm": saved(rgb, "PPM"),
        "rgb.jp2": saved(rgb, "JPEG2000"),
        "still.gif": saved(palette, "GIF"),
        "animated.gif": saved(palette, "GIF", save_all=True, append_images=[other]),
        "rgb.avif": saved(rgb, "AVIF", quality=90),
        "png_called.jpg": saved(rgb, "PNG"),
        "gif_called.jpg": saved(palette, "GIF"),
        "avif_called.png": saved(rgb, "AVIF"),
        "valid/rgb.jpg": saved(other, "JPEG"),
        "valid/rgb.gif": saved(other, "GIF"),
    }


def _turned() -> dict[str, bytes]:
    kinds = {
        "jpg": ("JPEG", {"quality": 95}),
        "png": ("PNG", {}),
        "webp": ("WEBP", {"quality": 95}),
        "tif": ("TIFF", {}),
    }
    files = {
        f"turned{o}.{ending}": saved(lying(corners(), o), kind, exif=exif(o), **options)
        for ending, (kind, options) in kinds.items()
        for o in range(1, 9)
    }
    mirrored = saved(lying(corners(), 2), "JPEG", quality=95)
    return {
        **files,
        "turned6.avif": saved(lying(corners(), 6), "AVIF", quality=95, exif=exif(6)),
        "turned2_by_xmp.jpg": with_segments(mirrored, b"http://ns.adobe.com/xap/1.0/\0" + xmp(2)),
        "turned2_by_xmp.webp": saved(lying(corners(), 2), "WEBP", quality=95, xmp=xmp(2)),
        "turned2_then_1.jpg": with_segments(mirrored, exif(2), exif(1)),
        "turned9.jpg": saved(corners(), "JPEG", quality=95, exif=exif(9)),
        "broken_exif.jpg": saved(corners(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01"),
        "valid/turned8.png": saved(lying(corners(), 8), "PNG", exif=exif(8)),
    }


def _cut() -> dict[str, bytes]:
    scene = photo(150, 100, seed=3)
    whole = {
        "jpg": saved(scene, "JPEG"),
        "progressive.jpg": saved(scene, "JPEG", progressive=True),
        "png": saved(scene, "PNG"),
    }
    files = {f"cut{i}.{end}": data[: len(data) * (2 * i + 1) // 20] for end, data in whole.items() for i in range(10)}
    first = Image.fromarray(photo(WIDTH, HEIGHT, seed=4))
    animated = saved(first, "GIF", save_all=True, append_images=[first.rotate(180)])
    webp, avif = saved(first, "WEBP"), saved(first, "AVIF")
    return {
        **files,
        "without_end.jpg": whole["jpg"][:-2],
        "without_end.png": whole["png"][:-12],
        "rubbish_behind.jpg": whole["jpg"] + b"rubbish" * 100,
        "cut_in_second_picture.gif": animated[: len(animated) * 3 // 4],
        "cut_in_first_picture.gif": animated[: len(animated) // 3],
        "cut.webp": webp[: len(webp) // 2],
        "cut.avif": avif[: len(avif) // 2],
    }


def _broken() -> dict[str, bytes]:
    whole = saved(photo(150, 100, seed=5), "JPEG")
    start = whole.index(b"\xff\xda") + 14  # behind the headers: the picture itself
    flipped = {}
    for i in range(10):
        data, draw = bytearray(whole), np.random.default_rng(i)
        for at in draw.integers(start, len(whole) - 2, 3):
            data[at] ^= 1 << draw.integers(8)
        flipped[f"bits_flipped{i}.jpg"] = bytes(data)
    data = bytearray(saved(photo(WIDTH, HEIGHT, seed=6), "PNG"))
    data[-20] ^= 255  # in the checksum of the pixels
    return {
        **flipped,
        "wrong_checksum.png": bytes(data),
        "empty.jpg": b"",
        "text.jpg": b"this is not a picture",
        "page.png": b"<!DOCTYPE html><title>404 Not Found</title>",
        "zeros.jpg": bytes(5000),
        "noise.jpg": np.random.default_rng(0).bytes(5000),
        "only_a_header.jpg": whole[:4],
        "five_bands.tif": tiff(np.zeros((HEIGHT, WIDTH, 5), np.uint8)),  # a satellite's
        "phone.heic.jpg": b"\0\0\0\x18ftypheic" + bytes(100),
        "program.eps.jpg": saved(photo(8, 8), "EPS"),
    }


def _sizes() -> dict[str, bytes]:
    return {
        "1x1.jpg": saved(photo(1, 1), "JPEG"),
        "1x1.png": saved(photo(1, 1), "PNG"),
        "1x10000.png": saved(photo(1, 10_000), "PNG"),
        "10000x1.jpg": saved(photo(10_000, 1), "JPEG"),
        "3x5000.gif": saved(photo(3, 5000), "GIF"),
        "valid/12000x9000.jpg": saved(Image.new("RGB", (12_000, 9_000), (200, 30, 90)), "JPEG"),
        "bomb.png": png(60_000, 60_000, 1, 0, bytes(1000)),
        "bomb.gif": saved(photo(8, 8), "GIF").replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 60_000, 60_000)),
    }
