"""Who can decode a file, and does everybody show the same pixels of it?"""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.kit.checks import checked, written
from tests.kit.hostile import exif, lying, pictures, png, saved, tiff, with_segments, xmp
from tests.kit.images import PLAIN, make_work, photo, pixels_of, run_engine
from thawline.dataio.checks import verify
from thawline.dataio.checks.verify import check_files
from thawline.dataio.errors import EngineError
from thawline.dataio.labels.targets import decode_mask
from thawline.dataio.pixels import geometry, probe
from thawline.dataio.pixels.pictures import decode, transcode
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.store import files

Pixels = NDArray[np.uint8]

SMALL = {name: data for name, data in pictures().items() if "12000" not in name}

# Who can decode it ------------------------------------------------------------------------------------------


def replace_dali(monkeypatch: pytest.MonkeyPatch, decoder: probe.Decoder) -> None:
    """Let `decoder` stand in for DALI."""

    @contextmanager
    def dali() -> Iterator[probe.Decoder]:
        yield decoder

    monkeypatch.setattr(probe, "dali_decoder", dali)


def shifted(pixels: Pixels) -> Pixels:
    """With one row moved by a pixel."""
    out = pixels.copy()
    out[7] = np.roll(out[7], 1, axis=0)
    return out


DIFFERENT: dict[str, Callable[[Pixels], probe.Decoded]] = {
    "fails": lambda p: "it failed",
    "on its side": lambda p: np.rot90(p),
    "on its head": lambda p: p[::-1, ::-1],
    "mirrored": lambda p: p[:, ::-1],
    "blue for red": lambda p: p[..., ::-1],
    "black": np.zeros_like,
    "negative": lambda p: 255 - p,
    "darker": lambda p: (p * 0.95).astype(np.uint8),
    "one row moved": shifted,
    "one pixel": lambda p: np.where(np.arange(p.size).reshape(p.shape) == 99, p ^ 128, p),
}


def test_who_shows_other_pixels_than_pillow_does_not_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {"equal": lambda p: p, "rounded": lambda p: np.maximum(p, 3) - 3}
    decodings = {**alike, **DIFFERENT}
    scene = photo(20, 20)
    names = written(tmp_path, {f"{i}.{end}": saved(scene, end) for end in ("PNG", "JPEG") for i in decodings})

    def decoder(encoded: Sequence[bytes], _: Sequence[Pixels]) -> list[probe.Decoded]:
        turn = [*decodings.values()]
        return [turn[next(count) % len(turn)](decode(files.as_array(file))) for file in encoded]

    count = itertools.count()
    replace_dali(monkeypatch, decoder)
    found = dict(zip(names, check_files(tmp_path, names, threads=1).to_pylist(), strict=True))
    assert {row["status"] for row in found.values()} == {"ok"}
    by_dali = {name for name, row in found.items() if row["codec"] == "dali"}
    assert by_dali == {"equal.PNG", "equal.JPEG", "rounded.JPEG"}


def test_dali_gets_what_pillow_could_decode_and_no_more_at_once_than_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []

    def decoder(encoded: Sequence[bytes], _: Sequence[Pixels]) -> list[probe.Decoded]:
        pictures = [decode(files.as_array(file)) for file in encoded]
        calls.append([picture.size // 3 for picture in pictures])
        return [*pictures]

    replace_dali(monkeypatch, decoder)
    monkeypatch.setattr(verify, "_DALI_PX", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns from here and refuses from twice as many
    good = {f"{i}.png": saved(photo(20, 20), "PNG") for i in range(9)}
    more = {"large.png": saved(photo(60, 50), "PNG"), "bomb.png": png(100, 50, 1, 0, bytes(100)), "text.png": b"no"}
    found = check_files(tmp_path, written(tmp_path, {**good, **more}), threads=1)
    assert found["status"].to_pylist()[-3:] == [
        "ok",
        "too large: decompression bomb, more than 4,000 pixels",
        "not an image",
    ]
    assert calls == [[400] * 3, [400] * 3, [400] * 3, [3000]]
    assert set(found["codec"].to_pylist()[:-2]) == {"dali"}


def test_without_dali_all_is_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    names = written(tmp_path, SMALL)
    found = check_files(tmp_path, names).to_pylist()
    assert {row["codec"] for row in found if row["status"] == "ok"} == {"pillow"}


SQUARE = photo(64, 64, seed=8)

TURNED = lying(SQUARE, 3)


def shown(encoded: Pixels) -> NDArray[np.float64]:
    """(64, 64, 3), 0..255: what DALI makes of a file of 64 x 64, resampled by no fraction of a pixel."""
    spec, size = ImageSpec(size_px=64, presize_px=64, **PLAIN), np.array([64], np.int32)
    work = make_work([encoded], geometry.centred(spec, widths=size, heights=size), size_px=64)
    (batch,) = run_engine("dali", [work], spec)
    return pixels_of(batch, work, spec)[0]


def tag(kind: int, value: bytes, *, order: str = "<") -> bytes:
    """An EXIF block of one tag, the orientation, of that type."""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + start + struct.pack(f"{order}HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def turned_files() -> dict[str, tuple[bytes, str]]:
    """Name -> a picture that lies on its head, and says so in some way, and who can decode it."""
    jpeg, tiff = saved(TURNED, "JPEG", quality=95), {"compression": "tiff_lzw"}
    space = b"http://ns.adobe.com/xap/1.0/\0"
    return {
        "little endian": (with_segments(jpeg, tag(3, b"\3\0\0\0")), "dali"),
        "big endian": (with_segments(jpeg, tag(3, b"\0\3\0\0", order=">")), "dali"),
        "behind XMP": (with_segments(jpeg, space + xmp(1), exif(3)), "dali"),
        "in a PNG": (saved(TURNED, "PNG", exif=exif(3)), "dali"),
        "in a TIFF": (saved(TURNED, "TIFF", exif=exif(3), **tiff), "dali"),
        "four bytes long": (with_segments(jpeg, tag(4, b"\0\0\0\3", order=">")), "pillow"),
        "one byte long": (with_segments(jpeg, tag(1, b"\3\0\0\0")), "pillow"),
        "XMP": (with_segments(jpeg, space + xmp(3)), "pillow"),
        "XMP against EXIF": (with_segments(jpeg, exif(3), space + xmp(1)), "dali"),
        "twice": (with_segments(jpeg, exif(3), exif(1)), "pillow"),
        "XMP in a WebP": (saved(TURNED, "WEBP", xmp=xmp(3)), "pillow"),
        "XMP in a TIFF": (saved(TURNED, "TIFF", tiffinfo={700: xmp(3)}, **tiff), "pillow"),
    }


@pytest.mark.parametrize("name", turned_files())
def test_both_engines_turn_a_picture_alike_however_it_says_so(tmp_path: Path, name: str) -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    data, codec = turned_files()[name]
    row = checked(tmp_path, data)
    assert (row["status"], row["codec"]) == ("ok", codec)
    assert row["orientation"] == (1 if name == "one byte long" else 3)
    encoded = files.as_array(data)
    expected = decode(encoded).astype(float)
    seen = shown(encoded if codec == "dali" else transcode(encoded))
    assert np.abs(seen - expected).mean() < 0.1
    upright = TURNED if name == "one byte long" else SQUARE  # what Pillow does not understand, nobody obeys
    assert np.abs(seen - upright).mean() < 6


def odd_files() -> dict[str, tuple[bytes, str]]:
    """Name -> a picture of a kind that decoders disagree about, and who shall decode it."""
    image, ramp = Image.fromarray(SQUARE), np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    deep = np.dstack([ramp, ramp[::-1], ramp.T])
    four = np.dstack([SQUARE, SQUARE[::-1, :, 0]])
    cmyk = saved(image.convert("CMYK"), "JPEG", quality=95)
    at = cmyk.index(b"Adobe")
    return {
        "rgb": (tiff(SQUARE, photometric=2), "dali"),
        "16 bits": (tiff(deep, photometric=2), "dali"),
        "alpha": (tiff(four, photometric=2, extra=2), "dali"),
        "white is 0": (tiff(SQUARE[..., :1], photometric=0), "pillow"),
        "multiplied by alpha": (tiff(four, photometric=2, extra=1), "pillow"),
        "something beside rgb": (tiff(four, photometric=2, extra=0), "dali"),
        "planes of 16 bits": (tiff(deep, photometric=2, planar=True), "pillow"),
        "two bands": (tiff(SQUARE[..., :2], extra=0), "pillow"),
        "grey and alpha": (saved(image.convert("LA"), "TIFF"), "pillow"),
        "luma and chroma": (saved(image.convert("YCbCr"), "TIFF"), "pillow"),
        "cmyk tiff": (saved(image.convert("CMYK"), "TIFF"), "pillow"),
        "palette tiff": (saved(image.convert("P"), "TIFF"), "dali"),
        "jpeg 2000": (saved(image, "JPEG2000"), "dali"),
        "jpeg 2000 in luma and chroma": (saved(image.convert("YCbCr"), "JPEG2000"), "pillow"),
        "cmyk": (cmyk, "dali"),
        "cmyk that is not inverted": (cmyk[: at - 4] + cmyk[at + 12 :], "pillow"),
    }


@pytest.mark.parametrize("name", odd_files())
def test_what_dali_would_show_otherwise_is_left_to_pillow(tmp_path: Path, name: str) -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    data, codec = odd_files()[name]
    row = checked(tmp_path, data)
    assert (row["status"], row["codec"], row["width"], row["height"]) == ("ok", codec, 64, 64)
    encoded = files.as_array(data)
    seen = shown(encoded if codec == "dali" else transcode(encoded))
    assert np.abs(seen - decode(encoded)).mean() < 1  # the palette of a TIFF has 16 bits: 0.6


# What reading it gives --------------------------------------------------------------------------------------


def pillow_files() -> dict[str, bytes]:
    image = Image.fromarray(SQUARE)
    return {
        "gif": saved(image, "GIF"),
        "avif": saved(image, "AVIF"),
        "turned.avif": saved(image, "AVIF", exif=exif(6)),
        "grey_alpha.tif": saved(image.convert("LA"), "TIFF"),
        "black_white.tif": saved(image.convert("1"), "TIFF"),
        "cmyk.tif": saved(image.convert("CMYK"), "TIFF"),
        "tga": saved(image, "TGA"),
    }


@pytest.mark.parametrize("kind", ["PPM", "PNG"])
@pytest.mark.parametrize("name", pillow_files())
def test_dali_decodes_what_was_transcoded_to_exactly_pillow_s_pixels(name: str, kind: str) -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    encoded = files.as_array(pillow_files()[name])
    np.testing.assert_allclose(shown(transcode(encoded, kind=kind)), decode(encoded), atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (51, 1), (7, 13), (641, 3)])
def test_transcoded_files_of_any_size_keep_it(size: tuple[int, int]) -> None:
    dali = pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    file = transcode(files.as_array(saved(photo(*size), "GIF")))
    assert dali.decodable([file]) == [(size[1], size[0])]
    assert decode(file).shape == (size[1], size[0], 3)


def test_16_bits_are_scaled_to_8_as_dali_does() -> None:
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    expected = np.repeat(np.rint(ramp[..., None] / 257), 3, axis=-1)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        encoded = files.as_array(saved(ramp, kind))
        np.testing.assert_array_equal(decode(encoded), expected, kind)
        pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
        np.testing.assert_allclose(shown(encoded), expected, atol=1e-3, err_msg=kind)


def test_what_pillow_refuses_is_a_sentence_whatever_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    assert decode(files.as_array(saved(photo(12, 8), "PNG"))).shape == (8, 12, 3)  # without a warning
    for data, why in ((saved(photo(20, 10), "PNG"), "decompression bomb, more than 160"), (b"", "it is no image")):
        for read in (decode, decode_mask):
            with pytest.raises(EngineError, match=rf"^x\.png cannot be .+{why}"):
                read(files.as_array(data), path="x.png")

    def fail(*_: Any) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(EngineError, match="unpack requires"):
        decode(files.as_array(saved(photo(8, 8)[..., 0], "PNG")))
