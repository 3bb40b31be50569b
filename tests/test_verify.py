"""Does verification read every file whole, name what is wrong, and know who can decode the rest?"""

import os
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import xxhash
from numpy.typing import NDArray
from PIL import Image

from dataio import files, geometry, verify
from dataio.errors import EngineError
from dataio.masks import MASK_CHECKS
from dataio.readers import transcode
from dataio.reference import decode
from dataio.spec import ImageSpec
from dataio.targets import decode_mask
from dataio.verify import CHECKS, check_files
from tests.hostile import exif, lying, pictures, png, saved, tiff, with_segments, xmp
from tests.images import PLAIN, make_work, photo, pixels_of, run_engine

Pixels = NDArray[np.uint8]
SMALL = {name: data for name, data in pictures().items() if "12000" not in name}


def written(folder: Path, named: dict[str, bytes]) -> list[str]:
    for name, data in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return list(named)


def checked(folder: Path, data: bytes) -> dict[str, Any]:
    """What is found out about one file."""
    row: dict[str, Any] = check_files(folder, written(folder, {"x": data})).to_pylist()[0]
    return row


# What is found out ------------------------------------------------------------------------------------------


def test_a_row_says_all_about_its_file(tmp_path: Path) -> None:
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    data = saved(photo(9, 5), "JPEG", exif=exif(6))
    (tmp_path / "x").write_bytes(data)
    expected = {
        "width": 5,
        "height": 9,
        "bytes": len(data),
        "hash": xxhash.xxh3_64(data).intdigest(),
        "format": "JPEG",
        "orientation": 6,
        "codec": "dali",
        "status": "ok",
    }
    found = check_files("/", [str(tmp_path / "x")])
    assert found.schema == CHECKS
    assert found.to_pylist() == [expected]


def test_a_broken_file_still_has_its_bytes_and_hash(tmp_path: Path) -> None:
    row = checked(tmp_path, b"<html>404</html>")
    assert (row["status"], row["bytes"]) == ("not an image", 16)
    assert row["hash"] == xxhash.xxh3_64(b"<html>404</html>").intdigest()
    assert [row[name] for name in ("width", "height", "format", "orientation", "codec")] == [None] * 5


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "secret.jpg").write_bytes(saved(photo(8, 8), "JPEG"))
    read = files.read

    def refuse(root: str, name: str) -> bytes:  # root may read everything, so a mode of 000 would test nothing
        if name == "secret.jpg":
            raise PermissionError(13, "Permission denied")
        if name == "ill.jpg":
            raise OSError(5, "Input/output error")
        return read(root, name)

    monkeypatch.setattr(files, "read", refuse)
    (tmp_path / "ill.jpg").touch()
    names = ["none.jpg", "folder.jpg", "secret.jpg", "secret.jpg/x.jpg", "ill.jpg"]
    found = check_files(tmp_path, names)
    reasons = ["missing", "a folder, not a file", "permission denied", "missing", "cannot be read: Input/output error"]
    assert found["status"].to_pylist() == reasons
    assert found["hash"].null_count == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    assert check_files(tmp_path, ["x.jpg"])["status"].to_pylist() == ["not a regular file"]


def test_files_of_a_remote_root_are_read_through_its_filesystem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = written(tmp_path, {"a/x.jpg": saved(photo(9, 5), "JPEG"), "y.jpg": b"no"})
    monkeypatch.setattr(files, "open_root", lambda root: (pafs.LocalFileSystem(), str(tmp_path)))
    found = check_files("s3://bucket/photos", [*names, "none.jpg"])
    assert found["status"].to_pylist() == ["ok", "not an image", "missing"]
    assert found["width"].to_pylist() == [9, None, None]


# How it goes about it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [20, 10_000])  # in memory at once
def test_rows_come_in_the_order_of_the_paths_and_progress_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(verify, "_ROWS", rows)
    count = 3 * verify._GROUP + 5
    names = written(tmp_path, {f"{i}.png": saved(photo(1 + i, 4), "PNG") for i in range(count)})[::-1]
    seen: list[tuple[int, int, str]] = []
    found = check_files(
        tmp_path, names, threads=3, progress=lambda *now: seen.append((*now, threading.current_thread().name))
    )
    assert found["width"].to_pylist() == list(range(count, 0, -1))
    assert seen == [(i + 1, count, threading.current_thread().name) for i in range(count)]
    assert check_files(tmp_path, []).equals(CHECKS.empty_table())


def test_an_interruption_ends_with_the_file_that_is_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = written(tmp_path, {"x.png": saved(photo(4, 4), "PNG")}) * 10 * verify._GROUP
    reads, interrupted = list[str](), threading.Event()
    read = files.read

    def slow(root: str, name: str) -> bytes:
        reads.append(name)
        if len(reads) > verify._GROUP:  # the first of the second group
            assert interrupted.wait(60)
        return read(root, name)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "read", slow)
    before = {*threading.enumerate()}
    with pytest.raises(KeyboardInterrupt):
        check_files(tmp_path, names, threads=1, progress=interrupt)
    interrupted.set()
    for thread in {*threading.enumerate()} - before:
        thread.join(60)
        assert not thread.is_alive()
    assert len(reads) <= verify._GROUP + 1


def test_warnings_of_pillow_stay_inside_and_the_filters_are_restored(tmp_path: Path) -> None:
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01"
    (tmp_path / "odd.jpg").write_bytes(saved(photo(8, 8), "JPEG", exif=odd))
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(tmp_path / "odd.jpg") as image:
        image.getexif()  # the file does warn
    before = list(warnings.filters)
    found = check_files(tmp_path, ["odd.jpg"] * 50, threads=8)
    assert set(found["status"].to_pylist()) == {"ok"}
    assert set(found["orientation"].to_pylist()) == {1}
    assert list(warnings.filters) == before


# Who can decode it ------------------------------------------------------------------------------------------


def test_dali_has_the_last_word_on_what_it_can_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = written(tmp_path, {f"{i}.jpg": saved(photo(20 + i, 10), "JPEG") for i in range(3)})

    def decodable(encoded: list[Pixels]) -> list[tuple[int, int] | str]:
        sizes = [decode(file).shape[:2] for file in encoded]
        return [(h, w) if w == 20 else "it failed" if w == 21 else (w, h) for h, w in sizes]

    monkeypatch.setattr(verify, "_decodable", lambda: decodable)
    found = check_files(tmp_path, names, threads=1)
    assert found["codec"].to_pylist() == ["dali", "pillow", "pillow"]  # the third came out on its side
    assert found["status"].to_pylist() == ["ok"] * 3
    assert found["width"].to_pylist() == [20, 21, 22]


def test_dali_gets_what_pillow_could_decode_and_no_more_at_once_than_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []

    def decodable(encoded: list[Pixels]) -> list[tuple[int, int] | str]:
        shapes = [decode(file).shape for file in encoded]
        calls.append([h * w for h, w, _ in shapes])
        return [(h, w) for h, w, _ in shapes]

    monkeypatch.setattr(verify, "_decodable", lambda: decodable)
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


def test_without_dali_the_formats_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    names = written(tmp_path, SMALL)
    both = check_files(tmp_path, names)
    monkeypatch.setitem(sys.modules, "dataio.dali", None)
    monkeypatch.setattr(verify, "_decodable", verify._decodable.__wrapped__)
    assert verify._decodable() is None
    assert check_files(tmp_path, names).equals(both)


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
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
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
        "white is 0": (tiff(SQUARE[..., :1], photometric=0), "dali"),
        "multiplied by alpha": (tiff(four, photometric=2, extra=1), "pillow"),
        "something beside rgb": (tiff(four, photometric=2, extra=0), "pillow"),
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
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
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
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    encoded = files.as_array(pillow_files()[name])
    np.testing.assert_allclose(shown(transcode(encoded, kind=kind)), decode(encoded), atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (51, 1), (7, 13), (641, 3)])
def test_transcoded_files_of_any_size_keep_it(size: tuple[int, int]) -> None:
    dali = pytest.importorskip("dataio.dali", reason="DALI is not installed")
    file = transcode(files.as_array(saved(photo(*size), "GIF")))
    assert dali.decodable([file]) == [(size[1], size[0])]
    assert decode(file).shape == (size[1], size[0], 3)


def test_16_bits_are_scaled_to_8_as_dali_does() -> None:
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    expected = np.repeat(np.rint(ramp[..., None] / 257), 3, axis=-1)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        encoded = files.as_array(saved(ramp, kind))
        np.testing.assert_array_equal(decode(encoded), expected, kind)
        pytest.importorskip("dataio.dali", reason="DALI is not installed")
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


# Masks ------------------------------------------------------------------------------------------------------


def grey(width: int, height: int, dtype: type = np.uint8) -> NDArray[Any]:
    """Values 3, 7 and 9."""
    return np.array([3, 7, 9], dtype)[np.arange(width * height) % 3].reshape(height, width)


def palette(width: int, height: int) -> Image.Image:
    image = Image.fromarray(grey(width, height)).convert("P")
    image.putdata(grey(width, height).ravel().tolist())
    return image


MASKS: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "values": (lambda: saved(grey(40, 30), "PNG"), "ok"),
    "palette": (lambda: saved(palette(40, 30), "PNG"), "ok"),
    "half as large": (lambda: saved(grey(20, 15), "PNG"), "ok"),
    "rounded": (lambda: saved(grey(13, 10), "PNG"), "ok"),
    "twice as large": (lambda: saved(grey(80, 60), "TIFF"), "ok"),
    "turned as its image": (lambda: saved(grey(30, 40), "PNG", exif=exif(6)), "ok"),
    "lying": (lambda: saved(grey(30, 40), "PNG"), "its shape, 30 x 40 px, is not that of the upright image, 40 x 30"),
    "wide": (lambda: saved(grey(40, 28), "PNG"), "its shape, 40 x 28 px, is not that of the upright image, 40 x 30"),
    "missing": (lambda: None, "missing"),
    "broken": (lambda: saved(grey(40, 30), "PNG")[:-30], "truncated: image file is truncated"),
    "text": (lambda: b"no", "not an image"),
    "empty": (lambda: b"", "empty file"),
    "colours": (
        lambda: saved(photo(40, 30), "PNG"),
        "cannot be decoded: its mode is RGB, and a mask has one value of 8 bits a pixel (grey, palette or black and "
        "white)",
    ),
    "16 bits": (
        lambda: saved(grey(40, 30, np.uint16), "PNG"),
        "cannot be decoded: its mode is I;16, and a mask has one value of 8 bits a pixel (grey, palette or black and "
        "white)",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_an_image_is_as_usable_as_its_mask(tmp_path: Path, name: str) -> None:
    make, reason = MASKS[name]
    data = make()
    (tmp_path / "x.jpg").write_bytes(saved(photo(30, 40), "JPEG", exif=exif(6)))  # 40 x 30 upright
    if data is not None:
        (tmp_path / "m.png").write_bytes(data)
    found = check_files(tmp_path, ["x.jpg"], masks=["m.png"])
    assert found.schema == pa.schema([*CHECKS, *MASK_CHECKS])
    (row,) = found.to_pylist()
    assert row["status"] == (reason if reason == "ok" else f"its mask m.png: {reason}")
    assert row["mask_hash"] == (None if data is None else xxhash.xxh3_64(data).intdigest())
    if reason == "ok":
        assert row["mask_values"] == [3, 7, 9]
    assert (row["width"], row["height"]) == (40, 30)


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        ((1000, 10), (500, 5), True),
        ((1000, 10), (500, 4), True),  # someone rounded down
        ((1000, 10), (500, 3), False),
        ((10, 1000), (4, 500), True),
        ((10, 1000), (3, 500), False),
        ((500, 375), (31, 23), True),
        ((500, 375), (1000, 751), True),
        ((500, 375), (500, 377), False),
        ((500, 375), (1000, 755), False),
    ],
)
def test_a_mask_may_have_another_scale_and_rounding(
    tmp_path: Path, image: tuple[int, int], mask: tuple[int, int], fits: bool
) -> None:
    written(tmp_path, {"x.png": saved(photo(*image), "PNG"), "m.png": saved(grey(*mask), "PNG")})
    (status,) = check_files(tmp_path, ["x.png"], masks=["m.png"])["status"].to_pylist()
    assert (status == "ok") == fits


def test_a_broken_image_is_named_before_its_mask(tmp_path: Path) -> None:
    written(tmp_path, {"x.jpg": b"no", "bits.png": saved(Image.fromarray(grey(9, 9) > 3), "PNG")})
    found = check_files(tmp_path, ["x.jpg", "none.jpg"], masks=["bits.png", "gone.png"]).to_pylist()
    assert [row["status"] for row in found] == ["not an image", "missing"]
    assert found[0]["mask_values"] == [0, 1]
