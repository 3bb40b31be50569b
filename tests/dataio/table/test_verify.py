"""Does verification read every file whole, name what is wrong, and know who can decode the rest?"""

import errno
import itertools
import os
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import xxhash
from numpy.typing import NDArray
from PIL import Image

from tests.kit.hostile import exif, lying, pictures, png, saved, tiff, with_segments, xmp
from tests.kit.images import PLAIN, make_work, photo, pixels_of, run_engine
from thawline.dataio.errors import EngineError, ResourceError, SourceError
from thawline.dataio.pixels import geometry, probe
from thawline.dataio.pixels.pictures import decode, transcode
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.reading.readers import FileReader
from thawline.dataio.store import files
from thawline.dataio.store.root import Root
from thawline.dataio.table import verify
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.masks import MASK_CHECKS
from thawline.dataio.table.targets import decode_mask
from thawline.dataio.table.verify import CHECKS, check_files

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
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
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
    read = Root.read

    def refuse(
        root: Root, name: str, **limits: Any
    ) -> bytes:  # root may read everything, so a mode of 000 would test nothing
        if name == "secret.jpg":
            raise PermissionError(13, "Permission denied")
        if name == "ill.jpg":
            raise OSError(5, "Input/output error")
        return read(root, name, **limits)

    monkeypatch.setattr(Root, "read", refuse)
    (tmp_path / "ill.jpg").touch()
    names = ["none.jpg", "folder.jpg", "secret.jpg", "secret.jpg/x.jpg", "ill.jpg"]
    found = check_files(tmp_path, names)
    reasons = ["missing", "a folder, not a file", "permission denied", "missing", "cannot be read: Input/output error"]
    assert found["status"].to_pylist() == reasons
    assert found["hash"].null_count == 5


def test_what_is_no_regular_file_of_a_sane_size_is_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "kernel.jpg").symlink_to("/proc/kmsg")  # a regular file of 0 bytes that blocks whoever reads it
    (tmp_path / "grown.jpg").write_bytes(saved(photo(8, 8), "JPEG"))
    os.truncate(tmp_path / "grown.jpg", 20 << 30)
    (tmp_path / "image.jpg").write_bytes(saved(photo(8, 8), "JPEG"))
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(os.path.relpath(tmp_path / "ear.jpg"))  # relative, since 107 bytes are the most
    names = ["pipe.jpg", "zeros.jpg", "grown.jpg", "kernel.jpg", "ear.jpg"]
    reasons = check_files(tmp_path, names)["status"].to_pylist()
    assert reasons[:3] == [
        "not a regular file",
        "not a regular file",
        "too large: 21,474,836,480 bytes, and no more than 1,073,741,824 are read",
    ]
    assert reasons[3] in ("empty file", "permission denied", "missing")
    assert reasons[4] == "not a regular file"
    masks = check_files(tmp_path, ["image.jpg"] * 3, masks=names[:3])["status"].to_pylist()
    assert masks == [f"its mask {name}: {why}" for name, why in zip(names, reasons[:3], strict=False)]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_out_of_files_or_memory_blames_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: Manifest, number: int
) -> None:
    written(tmp_path, {"x.jpg": saved(photo(8, 8), "JPEG")})

    def refuse(path: Any, *options: Any) -> int:
        if str(path).endswith("x.jpg"):
            raise OSError(number, os.strerror(number), path)
        return real(path, *options)

    real = os.open
    monkeypatch.setattr("thawline.dataio.store.root._RETRIES_S", ())
    monkeypatch.setattr(os, "open", refuse)
    why = rf"x\.jpg could not be read \({os.strerror(number)}\), nor could any other"
    with pytest.raises(ResourceError, match=why):
        check_files(tmp_path, ["x.jpg"])
    rows = replace(flat.subset("valid").take(np.zeros(1, np.int64)), paths=["x.jpg"])
    with pytest.raises(ResourceError, match=why):
        FileReader(Root.of(tmp_path)).read(rows, 0)


def test_a_picture_of_more_pixels_than_allowed_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(13_000, 13_000, 8, 2, b"")
    names = written(tmp_path, {"bomb.png": bomb, "x.png": saved(photo(30, 20), "PNG"), "large.png": bomb})
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail(f"{image.size} was decoded"))
    found = check_files(tmp_path, ["bomb.png"])
    why = "too large: 169,000,000 pixels, more than --max-pixels 120,000,000"
    assert found["status"].to_pylist() == [why]
    monkeypatch.undo()
    assert check_files(tmp_path, ["x.png"], masks=["large.png"])["status"].to_pylist() == [f"its mask large.png: {why}"]
    few = check_files(tmp_path, names[1:2], max_pixels=599)["status"].to_pylist()
    assert few == ["too large: 600 pixels, more than --max-pixels 599"]
    assert check_files(tmp_path, names[1:2], max_pixels=600)["status"].to_pylist() == ["ok"]
    with pytest.raises(SourceError, match=r"max_pixels=999,999,999 is not in 1 to 178,956,970"):
        check_files(tmp_path, names, max_pixels=999_999_999)


def test_a_jpeg_that_cannot_hold_its_pixels_is_truncated(tmp_path: Path) -> None:
    flat = saved(Image.new("RGB", (16, 16), (90, 90, 90)), "JPEG")
    at = flat.index(b"\xff\xc0") + 5
    lie = flat[:at] + struct.pack(">HH", 13_000, 13_000) + flat[at + 4 :]
    decode(files.as_array(lie))  # libjpeg makes up the rest
    row = checked(tmp_path, lie)
    assert row["status"] == f"truncated: {len(lie)} bytes, and 13,000 x 13,000 pixels take 330,078 at least"
    smallest = saved(Image.new("L", (10_000, 1_000)), "JPEG", progressive=True, optimize=True)
    assert checked(tmp_path, smallest)["status"] == "ok"


def test_files_of_a_remote_root_are_read_through_its_filesystem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = written(tmp_path, {"a/x.jpg": saved(photo(9, 5), "JPEG"), "y.jpg": b"no"})
    monkeypatch.setattr("thawline.dataio.store.root._open", lambda uri: (pafs.LocalFileSystem(), str(tmp_path)))
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
    read = Root.read

    def slow(root: Root, name: str, **limits: Any) -> bytes:
        reads.append(name)
        if len(reads) > verify._GROUP:  # the first of the second group
            assert interrupted.wait(60)
        return read(root, name, **limits)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Root, "read", slow)
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


def asked_instead(monkeypatch: pytest.MonkeyPatch, answer: probe.Ask) -> None:
    """Let `answer` play DALI."""

    @contextmanager
    def dali() -> Iterator[probe.Ask]:
        yield answer

    monkeypatch.setattr(probe, "dali", dali)


def shifted(pixels: Pixels) -> Pixels:
    """With one row moved by a pixel."""
    out = pixels.copy()
    out[7] = np.roll(out[7], 1, axis=0)
    return out


DIFFERENT: dict[str, Callable[[Pixels], probe.Found]] = {
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
    answers = {**alike, **DIFFERENT}
    scene = photo(20, 20)
    names = written(tmp_path, {f"{i}.{end}": saved(scene, end) for end in ("PNG", "JPEG") for i in answers})

    def answer(encoded: Sequence[bytes], _: Sequence[Pixels]) -> list[probe.Found]:
        turn = [*answers.values()]
        return [turn[next(count) % len(turn)](decode(files.as_array(file))) for file in encoded]

    count = itertools.count()
    asked_instead(monkeypatch, answer)
    found = dict(zip(names, check_files(tmp_path, names, threads=1).to_pylist(), strict=True))
    assert {row["status"] for row in found.values()} == {"ok"}
    by_dali = {name for name, row in found.items() if row["codec"] == "dali"}
    assert by_dali == {"equal.PNG", "equal.JPEG", "rounded.JPEG"}


def test_dali_gets_what_pillow_could_decode_and_no_more_at_once_than_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []

    def answer(encoded: Sequence[bytes], _: Sequence[Pixels]) -> list[probe.Found]:
        pictures = [decode(files.as_array(file)) for file in encoded]
        calls.append([picture.size // 3 for picture in pictures])
        return [*pictures]

    asked_instead(monkeypatch, answer)
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
    "lying": (lambda: saved(grey(30, 40), "PNG"), "30 x 40 px, and the upright image 40 x 30"),
    "wide": (lambda: saved(grey(40, 28), "PNG"), "40 x 28 px, and the upright image 40 x 30"),
    "missing": (lambda: None, "missing"),
    "broken": (lambda: saved(grey(40, 30), "PNG")[:-30], "truncated: image file is truncated"),
    "text": (lambda: b"no", "not an image"),
    "empty": (lambda: b"", "empty file"),
    "colours": (lambda: saved(photo(40, 30), "PNG"), "its mode is RGB: save it as 8-bit grey or palette"),
    "16 bits": (
        lambda: saved(grey(40, 30, np.uint16), "PNG"),
        "its mode is I;16: save it as 8-bit grey or palette",
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
