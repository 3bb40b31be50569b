"""Which pictures do Pillow and DALI both read? Every format's bit depths, channels, orders, orientations and palettes.

`gallery(seed)` draws them all, about two hundred, of random scenes and sizes. None is broken: an engine shows Pillow's
pixels, or the file is left to Pillow, or refused for a true reason: likeness.py compares.
"""

import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.kit.encoders import bmp_of, dc_jpeg, fax_tiff, png_of
from tests.kit.hostile import exif, lying, saved, tiff, with_segments
from tests.kit.images import photo

Pixels = NDArray[np.uint8]


def gallery(seed: int) -> dict[str, bytes]:
    """Name -> bytes."""
    draw = np.random.default_rng(seed)
    width, height = (2 * int(side) + seed % 2 for side in draw.integers(9, 45, 2))  # one's centre lies in the other's
    scene = photo(width, height, seed=seed)
    return {**_jpegs(scene), **_pngs(scene), **_webps(scene), **_bmps(scene), **_pnms(scene), **_tiffs(scene)} | {
        **_jpeg2000s(scene),
        **_turned(scene),
    }


def _bits(scene: Pixels, bits: int) -> NDArray[Any]:
    """The scene in 0 to 2^bits - 1."""
    deep = np.rint(scene.astype(float) / 255 * (2**bits - 1))
    return deep.astype(np.uint8 if bits <= 8 else np.uint16)


def _two(scene: Pixels) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(scene[..., 0]), Image.fromarray(scene[::-1, :, 1])])


def _four(scene: Pixels) -> Image.Image:
    return Image.fromarray(np.dstack([scene, scene[::-1, :, 1]]), "RGBA")


def _profile() -> bytes:
    """A colour space far from sRGB, which a decoder that applies profiles would show differently."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


# JPEG -------------------------------------------------------------------------------------------------------


def _jpegs(scene: Pixels) -> dict[str, bytes]:
    rgb = Image.fromarray(scene)
    cmyk = saved(rgb.convert("CMYK"), "JPEG", quality=93)
    at = cmyk.index(b"Adobe")
    plain = saved(rgb, "JPEG", quality=90)
    out = {
        f"{name}_{sub}.jpg": saved(rgb, "JPEG", quality=quality, subsampling=sub, **more)
        for sub, (name, quality, more) in product(
            range(3),
            (("base", 75, {}), ("fine", 99, {}), ("coarse", 20, {}), ("progressive", 88, {"progressive": True})),
        )
    }
    for a, b in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2)):
        out[f"factors_{a}{b}.jpg"] = dc_jpeg(scene, a, b)
    return {
        **out,
        "restarts.jpg": saved(rgb, "JPEG", restart_marker_blocks=3),
        "optimised.jpg": saved(rgb, "JPEG", optimize=True),
        "rgb_inside.jpg": saved(rgb, "JPEG", keep_rgb=True),
        "profile.jpg": saved(rgb, "JPEG", icc_profile=_profile()),
        "comment.jpg": saved(rgb, "JPEG", comment=b"\xff\xd8 said so"),
        "grey.jpg": saved(scene[..., 0], "JPEG"),
        "grey_progressive.jpg": saved(scene[..., 0], "JPEG", progressive=True),
        "cmyk.jpg": cmyk,
        "ycck.jpg": cmyk[: at + 11] + b"\2" + cmyk[at + 12 :],
        "cmyk_not_adobe.jpg": cmyk[: at - 4] + cmyk[at + 12 :],
        "no_jfif.jpg": plain[:2] + plain[20:],
        "padded.jpg": plain[:2] + b"\xff" * 5 + plain[2:],
        "tail.jpg": plain + b"\0" * 999,
        "pair.mpo": saved(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]),
    }


def _pngs(scene: Pixels) -> dict[str, bytes]:
    rgb, out = Image.fromarray(scene), dict[str, bytes]()
    grey, alpha = scene[..., :1], scene[::-1, :, 1:2]
    for bits in (1, 2, 4, 8, 16):
        out[f"grey{bits}.png"] = png_of(_bits(grey, bits), bits, 0)
        out[f"grey{bits}_key.png"] = png_of(_bits(grey, bits), bits, 0, tRNS=struct.pack(">H", 1))
    for bits in (8, 16):
        for name, colour, values in (
            ("rgb", 2, scene),
            ("grey_alpha", 4, np.dstack([grey, alpha])),
            ("rgba", 6, np.dstack([scene, alpha])),
        ):
            out[f"{name}{bits}.png"] = png_of(_bits(values, bits), bits, colour)
        out[f"rgb{bits}_key.png"] = png_of(_bits(scene, bits), bits, 2, tRNS=struct.pack(">HHH", 9, 9, 9))
    for bits in (1, 2, 4, 8):
        colours = np.random.default_rng(bits).integers(0, 256, 3 * 2**bits, np.uint8).tobytes()
        index = _bits(grey, bits)
        out[f"palette{bits}.png"] = png_of(index, bits, 3, PLTE=colours)
        out[f"palette{bits}_clear.png"] = png_of(index, bits, 3, PLTE=colours, tRNS=bytes(range(2**bits)))
    meta = {
        "gamma1": {"gAMA": struct.pack(">I", 100_000)},
        "gamma3": {"gAMA": struct.pack(">I", 30_000)},
        "srgb": {"sRGB": b"\0"},
        "wide": {"cHRM": struct.pack(">8I", 31270, 32900, 73470, 26530, 15960, 84040, 3660, 10)},
        "profile": {"iCCP": b"p\0\0" + zlib.compress(_profile())},
        "broken_profile": {"iCCP": b"p\0\0" + zlib.compress(b"nothing")},
        "background": {"bKGD": struct.pack(">HHH", 200, 10, 90)},
        "significant": {"sBIT": b"\5\6\5"},
        "exif6": {"eXIf": exif(6).removeprefix(b"Exif\0\0")},
    }
    for name, chunks in meta.items():
        out[f"{name}.png"] = png_of(scene, 8, 2, **chunks)
    out["gamma3_alpha.png"] = png_of(np.dstack([scene, alpha]), 8, 6, **meta["gamma3"])
    out["gamma3_grey16.png"] = png_of(_bits(grey, 16), 16, 0, **meta["gamma3"])
    out["background_alpha.png"] = png_of(np.dstack([scene, alpha]), 8, 6, **meta["background"])
    out["animated.png"] = saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)])
    return out


# WebP, BMP, PNM ---------------------------------------------------------------------------------------------


def _webps(scene: Pixels) -> dict[str, bytes]:
    rgb, alpha = Image.fromarray(scene), _four(scene)
    return {
        "lossy.webp": saved(rgb, "WEBP", quality=80),
        "coarse.webp": saved(rgb, "WEBP", quality=5),
        "lossless.webp": saved(rgb, "WEBP", lossless=True),
        "lossy_alpha.webp": saved(alpha, "WEBP", quality=80),
        "lossless_alpha.webp": saved(alpha, "WEBP", lossless=True, exact=True),
        "grey.webp": saved(Image.fromarray(scene[..., 0]), "WEBP", lossless=True),
        "palette.webp": saved(rgb.quantize(7), "WEBP", lossless=True),
        "profile.webp": saved(rgb, "WEBP", lossless=True, icc_profile=_profile()),
        "animated.webp": saved(rgb, "WEBP", lossless=True, save_all=True, append_images=[rgb.rotate(180)]),
        "animated_alpha.webp": saved(alpha, "WEBP", lossless=True, save_all=True, append_images=[alpha.rotate(180)]),
    }


def _bmps(scene: Pixels) -> dict[str, bytes]:
    height, width = scene.shape[:2]
    rgb, five = Image.fromarray(scene), scene.astype(np.uint16) >> 3
    packed = {
        "555": (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2], ()),
        "565": (five[..., 0] << 11 | scene[..., 1].astype(np.uint16) >> 2 << 5 | five[..., 2], (0xF800, 0x7E0, 0x1F)),
    }
    out = {
        f"{name}.bmp": bmp_of(np.ascontiguousarray(values.astype("<u2")).view(np.uint8), width, 16, masks=masks)
        for name, (values, masks) in packed.items()
    }
    bgrx = np.dstack([scene[..., ::-1], scene[::-1, :, 1]])
    rgbx = np.dstack([scene, scene[::-1, :, 1]])
    out["32.bmp"] = bmp_of(bgrx.reshape(height, -1), width, 32)
    out["32_fields.bmp"] = bmp_of(bgrx.reshape(height, -1), width, 32, masks=(0xFF0000, 0xFF00, 0xFF))
    out["32_swapped.bmp"] = bmp_of(rgbx.reshape(height, -1), width, 32, masks=(0xFF, 0xFF00, 0xFF0000))
    for bits in (1, 4, 8):
        colours = np.random.default_rng(bits).integers(0, 256, (2**bits, 4), np.uint8)
        colours[:, 3] = 0
        index = _bits(scene[..., 0], bits)
        rows = np.packbits((index[..., None] >> np.arange(bits)[::-1] & 1).reshape(height, -1), axis=1)
        out[f"palette{bits}.bmp"] = bmp_of(rows, width, bits, palette=colours.tobytes())
    plain = saved(rgb, "BMP")
    upside = plain[:22] + struct.pack("<i", -height) + plain[26:]
    return {
        **out,
        "24.bmp": plain,
        "top_down.bmp": upside,
        "grey.bmp": saved(scene[..., 0], "BMP"),
        "one.bmp": saved(Image.fromarray(scene[..., 0] > 128), "BMP"),
        "rgba.bmp": saved(_four(scene), "BMP"),
        "rle8.bmp": _rle8(scene[..., 0]),
    }


def _rle8(grey: Pixels) -> bytes:
    """A BMP in runs of one pixel."""
    height, width = grey.shape
    body = b"".join(bytes(v for value in row for v in (1, value)) + b"\0\0" for row in grey[::-1].tolist()) + b"\0\1"
    palette = b"".join(bytes([v, v, v, 0]) for v in range(256))
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + palette + body


def _pnms(scene: Pixels) -> dict[str, bytes]:
    height, width = scene.shape[:2]
    grey, out = scene[..., 0], dict[str, bytes]()

    def raw(magic: str, values: NDArray[Any], most: int | None) -> bytes:
        head = f"{magic}\n# a comment\n{width} {height}\n" + ("" if most is None else f"{most}\n")
        return head.encode() + values.tobytes()

    def text(magic: str, values: NDArray[Any], most: int | None) -> bytes:
        head = f"{magic} {width} {height} {'' if most is None else most}\n"
        return (
            head + "\n".join(" ".join(map(str, row)) for row in values.reshape(height, -1).tolist()) + "\n"
        ).encode()

    for most in (1, 15, 100, 255, 256, 1023, 4095, 16383, 65535):
        kind = np.uint8 if most < 256 else np.dtype(">u2")
        for ending, magics, values in (("pgm", ("P5", "P2"), grey), ("ppm", ("P6", "P3"), scene)):
            scaled = np.rint(values.astype(float) / 255 * most).astype(kind)
            out[f"max{most}.{ending}"] = raw(magics[0], scaled, most)
            if most in (15, 255, 4095):
                out[f"text{most}.{ending}"] = text(magics[1], scaled, most)
    ones = (grey < 128).astype(np.uint8)
    out["raw.pbm"] = raw("P4", np.packbits(ones, axis=1), None)
    out["text.pbm"] = text("P1", ones, None)
    for depth, name, values in ((1, "GRAYSCALE", grey), (3, "RGB", scene), (4, "RGB_ALPHA", np.asarray(_four(scene)))):
        head = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\nMAXVAL 255\nTUPLTYPE {name}\nENDHDR\n"
        out[f"{name.lower()}.pam"] = head.encode() + values.tobytes()
    out["float.pfm"] = f"Pf\n{width} {height}\n-1.0\n".encode() + (grey / 255).astype("<f4")[::-1].tobytes()
    return out


# TIFF -------------------------------------------------------------------------------------------------------


def _tiffs(scene: Pixels) -> dict[str, bytes]:
    rgb, grey, one = Image.fromarray(scene), scene[..., :1], Image.fromarray(scene[..., 0] > 128)
    deep, four = _bits(scene, 16), np.asarray(_four(scene))
    out = {
        f"{name}_{kind}.tif": saved(image, "TIFF", compression=kind)
        for kind in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")
        for name, image in (("rgb", rgb), ("grey", Image.fromarray(scene[..., 0])), ("palette", rgb.quantize(50)))
    }
    for kind in ("raw", "group3", "group4", "tiff_ccitt"):
        out[f"one_{kind}.tif"] = saved(one, "TIFF", compression=kind)
    for photometric, planar, (name, values) in product(
        (0, 1), (False,), (("grey8", grey), ("grey16", deep[..., :1]), ("two8", four[..., [0, 3]]))
    ):
        extra = {"extra": 2} if name == "two8" else {}
        out[f"{name}_photo{photometric}.tif"] = tiff(values, photometric=photometric, planar=planar, **extra)
    for planar, (name, values, extra) in product(
        (False, True),
        (("rgb8", scene, None), ("rgb16", deep, None), *((f"rgba8_{e}", four, e) for e in (0, 1, 2))),
    ):
        out[f"{name}_planar{planar:d}.tif"] = tiff(values, photometric=2, planar=planar, extra=extra)
    white = bytearray(saved(one, "TIFF"))
    return {
        **out,
        "jpeg.tif": saved(rgb, "TIFF", compression="jpeg"),
        "cmyk.tif": saved(rgb.convert("CMYK"), "TIFF"),
        "lab.tif": saved(_lab(rgb), "TIFF"),
        "ycc.tif": saved(rgb.convert("YCbCr"), "TIFF"),
        "alpha.tif": saved(_two(scene), "TIFF"),
        "profile.tif": saved(rgb, "TIFF", icc_profile=_profile()),
        "big_endian.tif": saved(Image.fromarray(deep[..., 0].astype(">u2")), "TIFF"),
        "big.tif": saved(rgb, "TIFF", big_tiff=True),
        "float.tif": saved((scene[..., 0] / 255).astype(np.float32), "TIFF"),
        "signed.tif": saved(Image.fromarray(scene[..., 0].astype(np.int32)), "TIFF"),
        "strips.tif": saved(rgb, "TIFF", strip_size=scene.shape[1] * 3 * 5),
        "fax.tif": fax_tiff(scene[..., 0] > 128, long=False),
        "fax_long.tif": fax_tiff(scene[..., 0] > 128, long=True),
        "pages.tif": saved(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(180)]),
        "one_bit.tif": bytes(white),
    }


def _lab(rgb: Image.Image) -> Image.Image:
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(rgb, *spaces, outputMode="LAB")
    assert lab is not None
    return lab


# JPEG 2000, and turned ones ----------------------------------------------------------------------------------


def _jpeg2000s(scene: Pixels) -> dict[str, bytes]:
    rgb, deep = Image.fromarray(scene), _bits(scene[..., 0], 16)
    return {
        "rgb.jp2": saved(rgb, "JPEG2000"),
        "rgb.j2k": saved(rgb, "JPEG2000", no_jp2=True),
        "lossy.jp2": saved(rgb, "JPEG2000", irreversible=True, quality_layers=[20]),
        "no_transform.jp2": saved(rgb, "JPEG2000", mct=0),
        "tiles.jp2": saved(rgb, "JPEG2000", tile_size=(16, 16)),
        "grey.jp2": saved(scene[..., 0], "JPEG2000"),
        "grey.j2k": saved(scene[..., 0], "JPEG2000", no_jp2=True),
        "grey16.jp2": saved(deep, "JPEG2000"),
        "two.jp2": saved(_two(scene), "JPEG2000"),
        "four.jp2": saved(_four(scene), "JPEG2000"),
        "ycc.jp2": saved(rgb.convert("YCbCr"), "JPEG2000"),
        "cmyk.jp2": saved(rgb.convert("CMYK"), "JPEG2000"),
    }


def _turned(scene: Pixels) -> dict[str, bytes]:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "jpg": ("JPEG", {"quality": 95}),
        "png": ("PNG", {}),
        "webp": ("WEBP", {"lossless": True}),
        "tif": ("TIFF", {"compression": "tiff_lzw"}),
    }
    out = {
        f"turned{o}.{ending}": saved(lying(scene, o), kind, exif=exif(o), **options)
        for ending, (kind, options) in kinds.items()
        for o in range(1, 9)
    }
    twice = with_segments(saved(scene, "JPEG"), exif(2), exif(1))
    return out | {"turned_twice.jpg": twice}
