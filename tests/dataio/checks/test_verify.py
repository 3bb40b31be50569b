"""Does verification read every file whole, name what is wrong, and know who can decode the rest?"""

import errno
import os
import socket
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import xxhash
from PIL import Image

from tests.kit.checks import checked, grey, palette, written
from tests.kit.hostile import exif, png, saved
from tests.kit.images import photo
from thawline.dataio.checks import verify
from thawline.dataio.checks.verify import CHECKS, check_files
from thawline.dataio.errors import ResourceError, SourceError
from thawline.dataio.labels.masks import MASK_CHECKS
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.reading.readers import FileReader
from thawline.dataio.store import files
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest

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
    count = 3 * verify.GROUP + 5
    names = written(tmp_path, {f"{i}.png": saved(photo(1 + i, 4), "PNG") for i in range(count)})[::-1]
    seen: list[tuple[int, int, str]] = []
    found = check_files(
        tmp_path, names, threads=3, progress=lambda *now: seen.append((*now, threading.current_thread().name))
    )
    assert found["width"].to_pylist() == list(range(count, 0, -1))
    assert seen == [(i + 1, count, threading.current_thread().name) for i in range(count)]
    assert check_files(tmp_path, []).equals(CHECKS.empty_table())


def test_an_interruption_ends_with_the_file_that_is_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = written(tmp_path, {"x.png": saved(photo(4, 4), "PNG")}) * 10 * verify.GROUP
    reads, interrupted = list[str](), threading.Event()
    read = Root.read

    def slow(root: Root, name: str, **limits: Any) -> bytes:
        reads.append(name)
        if len(reads) > verify.GROUP:  # the first of the second group
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
    assert len(reads) <= verify.GROUP + 1


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
