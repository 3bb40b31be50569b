"""Is every file judged truly, every row on the right side, and the manifest the same after a trip to disk?"""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

import dataio.splits as splits
from dataio.errors import ManifestError, SourceError, SplitError
from dataio.labels import by_parent, by_regex, label
from dataio.manifest import Manifest
from dataio.samples import write_digits
from dataio.sources import Table, from_folder, from_lists
from dataio.splits import random_split, split
from dataio.verify import check_files


def encoded(kind: str, width: int = 12, height: int = 8, mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def folder_of(root: Path, count: int = 10) -> Path:
    """Write `count` small JPEGs, i-th i+8 px wide, alternately in cat/ and dog/."""
    for index in range(count):
        path = root / ("cat", "dog")[index % 2] / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("JPEG", width=8 + index))
    return root


def labelled(root: Path, count: int = 10) -> Table:
    return label(from_folder(folder_of(root, count)), by_parent())


def unlooked(count: int, **columns: list[str]) -> Table:
    """A labelled table whose files do not exist, for verify=False."""
    rows = pa.table({"path": [f"{i}.jpg" for i in range(count)], **columns})
    return label(Table(rows, Path("/data")), by_regex(r"\d"))


# --- verify


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_is_that_of_the_upright_image(tmp_path: Path, kind: str, orientation: int) -> None:
    (tmp_path / "x").write_bytes(encoded(kind, 12, 8, exif=exif(orientation)))
    row = check_files(tmp_path, ["x"]).to_pylist()[0]
    assert row["status"] == "ok"
    assert (row["width"], row["height"]) == ((8, 12) if orientation in (6, 8) else (12, 8))


def test_size_and_hash_are_those_of_the_bytes(tmp_path: Path) -> None:
    data = encoded("BMP", 5, 4)
    (tmp_path / "x.bmp").write_bytes(data)
    expected = {
        "width": 5,
        "height": 4,
        "bytes": len(data),
        "hash": xxhash.xxh3_64(data).hexdigest(),
        "status": "ok",
    }
    assert check_files(Path("/"), [str(tmp_path / "x.bmp")]).to_pylist() == [expected]


def bad_files() -> dict[str, tuple[bytes, str]]:
    jpeg, png = encoded("JPEG", 64, 48), encoded("PNG")
    bits = encoded("TIFF", mode="1")
    return {
        "empty": (b"", "empty file"),
        "text": (b"<html>404</html>", "not an image"),
        "half": (jpeg[: len(jpeg) // 2], "truncated: image file is truncated"),
        "png end": (png[:-12], "truncated: PNG without its end"),
        "png data": (png[:150] + b"\0" * 9 + png[159:], "cannot be decoded: "),
        "gif": (encoded("GIF"), "GIF: the engine cannot decode this format"),
        "avif": (b"\0\0\0\x20ftypavif" + bytes(20), "AVIF: the engine cannot decode this format"),
        "heic": (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC: the engine cannot decode this format"),
        "1-bit tiff": (bits, "TIFF without BitsPerSample"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_content_is_named_for_what_it_is_behind_a_jpg_name(tmp_path: Path, name: str) -> None:
    data, status = bad_files()[name]
    (tmp_path / "x.jpg").write_bytes(data)
    row = check_files(tmp_path, ["x.jpg"]).to_pylist()[0]
    assert row["status"].startswith(status)
    assert (row["bytes"], row["hash"]) == (len(data), xxhash.xxh3_64(data).hexdigest())


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "secret.jpg").write_bytes(encoded("JPEG"))
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:  # root may read everything, so a mode of 000 would test nothing
        if path.name == "secret.jpg":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    checks = check_files(tmp_path, ["none.jpg", "folder.jpg", "secret.jpg", "folder.jpg/x.jpg"])
    assert checks["status"].to_pylist() == ["missing", "a folder, not a file", "permission denied", "missing"]
    assert checks["hash"].null_count == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.jpg")
    assert check_files(tmp_path, ["x.jpg"])["status"].to_pylist() == ["not a regular file"]


def test_decompression_bomb_is_refused_and_a_merely_large_image_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    (tmp_path / "large.png").write_bytes(encoded("PNG", 12, 8))  # Pillow warns from 81 and refuses from 161
    (tmp_path / "bomb.png").write_bytes(encoded("PNG", 20, 10))
    checks = check_files(tmp_path, ["large.png", "bomb.png"])
    assert checks["status"].to_pylist() == ["ok", "too large: decompression bomb, more than 160 pixels"]


def test_warnings_of_pillow_stay_inside_and_the_filters_are_restored(tmp_path: Path) -> None:
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01"
    (tmp_path / "odd.jpg").write_bytes(encoded("JPEG", exif=odd))
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(tmp_path / "odd.jpg") as image:
        image.getexif()  # the file does warn
    before = list(warnings.filters)
    checks = check_files(tmp_path, ["odd.jpg"] * 50, threads=8)
    assert set(checks["status"].to_pylist()) == {"ok"}
    assert list(warnings.filters) == before


def test_checks_come_in_the_order_of_the_paths_and_progress_counts_them(tmp_path: Path) -> None:
    folder_of(tmp_path, 10)
    names = [f"{('cat', 'dog')[i % 2]}/{i:02d}.jpg" for i in (7, 3, 9, 0)]
    seen: list[tuple[int, int]] = []
    checks = check_files(tmp_path, names, threads=3, progress=lambda done, total: seen.append((done, total)))
    assert checks["width"].to_pylist() == [15, 11, 17, 8]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert check_files(tmp_path, []).num_rows == 0


# --- splits


@pytest.mark.parametrize(("count", "valid", "expected"), [(1797, 0.2, 359), (10, 0.25, 2), (7, 0.9, 6)])
def test_random_split_is_exact_and_a_function_of_seed_and_count(count: int, valid: float, expected: int) -> None:
    rows = pa.table({"path": [str(i) for i in range(count)]})
    mask = random_split(valid=valid, seed=7)(rows)
    oracle = np.random.Generator(np.random.PCG64(7)).permutation(count)[:expected]
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(oracle))
    assert not np.array_equal(mask, random_split(valid=valid, seed=8)(rows))


def test_column_folder_and_function_pick_their_rows() -> None:
    rows = pa.table(
        {
            "path": ["valid/a", "x/valid/b", "valid", "invalid/c", "/valid/d"],
            "word": ["Valid", " test ", "train", "NO", "1"],
            "flag": [True, True, False, False, True],
        }
    )
    oracle = [True, True, False, False, True]
    for splitter in (
        splits.by_column("word"),
        splits.by_column("flag"),
        splits.by_folder(),
        splits.by_function(lambda row: row["flag"]),
    ):
        assert splitter(rows).tolist() == oracle
    assert splits.by_folder("x")(rows).tolist() == [False, True, False, False, False]


def test_split_mistakes_are_sentences() -> None:
    for valid in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(SplitError, match="not between 0 and 1"):
            random_split(valid=valid)
    with pytest.raises(SplitError, match="seed=-1 is negative"):
        random_split(seed=-1)
    table = unlooked(4, side=["train", "maybe", "", "valid"])
    for splitter, message in (
        (splits.by_column("nope"), "no column 'nope' to split by; there are path, side, label"),
        (splits.by_column("side"), r"name no side \('maybe', ''\) in 2 rows"),
        (splits.by_folder("valid"), "leaves valid empty: all 4 usable images"),
        (splits.by_function(lambda row: True), "leaves train empty"),
        (random_split(valid=0.2), "leaves valid empty"),
        (splits.by_function(lambda row: row["x"]), r"failed with KeyError\('x'\)"),
        (lambda rows: np.array([1, 0, 0, 0]), r"returned int64 of shape \(4,\) for 4 rows"),
    ):
        with pytest.raises(SplitError, match=message):
            split(table, splitter, verify=False)
    with pytest.raises(SplitError, match="has no labels"):
        split(Table(table.rows.select(["path"]), table.root), random_split())


def test_null_in_a_split_column_names_no_side() -> None:
    rows = pa.table({"path": ["a", "b"], "side": pa.array([True, None])})
    with pytest.raises(SplitError, match=r"\(None\) in 1 rows"):
        splits.by_column("side")(rows)


def test_bad_files_are_quarantined_with_their_reason_and_the_rest_is_split(tmp_path: Path) -> None:
    table = labelled(tmp_path, 10)
    (tmp_path / "cat" / "04.jpg").write_bytes(b"")
    (tmp_path / "dog" / "09.jpg").write_bytes(b"hello")
    manifest = split(table, random_split(valid=0.25, seed=3))
    rows = manifest.rows.to_pylist()
    assert [row["id"] for row in rows] == list(range(10))
    assert [row["path"] for row in rows] == table.rows["path"].to_pylist()
    bad = {row["path"]: (row["status"], row["split"]) for row in rows if row["status"] != "ok"}
    assert bad == {"cat/04.jpg": ("empty file", None), "dog/09.jpg": ("not an image", None)}
    usable = [row for row in rows if row["status"] == "ok"]
    oracle = set(np.random.default_rng(3).permutation(8)[:2].tolist())  # int(.25 * 8) of the usable rows
    assert [row["split"] for row in usable] == ["valid" if i in oracle else "train" for i in range(8)]
    assert "2 quarantined, not used: cat/04.jpg (empty file); dog/09.jpg (not an image)" in manifest.summary()
    assert "8 images: 6 train, 2 valid" in manifest.summary()
    assert "8 to 16 px wide, 8 to 8 px high" in manifest.summary()


def test_splitter_mistake_shows_before_any_file_is_opened(tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(SplitError, match="no column 'side'"):
        split(labelled(tmp_path, 4), splits.by_column("side"), progress=lambda done, total: seen.append(done))
    assert seen == []


def test_no_usable_file_and_one_usable_class_are_sentences(tmp_path: Path) -> None:
    table = labelled(tmp_path, 4)
    for name in ("dog/01.jpg", "dog/03.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SplitError, match=r"2 usable images show 1 classes \(cat\)"):
        split(table, random_split(valid=0.5))
    for name in ("cat/00.jpg", "cat/02.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(SplitError, match=r"none of the 4 files in .*: cat/00\.jpg \(missing\); .*dog/01\.jpg \(empty"):
        split(table, random_split(valid=0.5))


def test_classes_cover_both_sides_sorted() -> None:
    table = unlooked(4)  # labels '0' to '3'
    manifest = split(table, splits.by_function(lambda row: row["label"] == "0"), verify=False)
    assert manifest.classes == ("0", "1", "2", "3")
    assert manifest.part("valid").targets.tolist() == [0]


# --- manifest


def test_part_holds_usable_rows_in_id_order(tmp_path: Path) -> None:
    table = labelled(tmp_path, 10)
    (tmp_path / "dog" / "01.jpg").write_bytes(b"")
    manifest = split(table, random_split(valid=0.5, seed=1))
    shuffled = Manifest(manifest.rows.take(np.arange(10)[::-1]), manifest.root, manifest.task, manifest.classes)
    for name in ("train", "valid"):
        oracle = [row for row in manifest.rows.to_pylist() if row["split"] == name]
        for part in (manifest.part(name), shuffled.part(name)):
            assert part.ids.tolist() == [row["id"] for row in oracle]
            assert part.paths == [str(tmp_path / row["path"]) for row in oracle]
            assert part.targets.tolist() == [("cat", "dog").index(row["label"]) for row in oracle]
            assert part.widths.tolist() == [row["width"] for row in oracle]
            assert part.heights.tolist() == [8] * len(oracle)
            arrays = (part.ids, part.targets, part.widths, part.heights)
            assert all(array.flags.writeable for array in arrays)  # torch warns of others
            kinds = [str(array.dtype) for array in arrays]
            assert kinds == ["int64", "int64", "int32", "int32"]
    with pytest.raises(ManifestError, match=r"in split 'test' \(its splits: train, valid\)"):
        manifest.part("test")


def test_multi_label_targets_are_zeros_and_ones(tmp_path: Path) -> None:
    tags = [["b", "a"], [], ["c"], ["a", "a"]]
    table = from_lists([f"{i}.jpg" for i in range(4)], tags, root=tmp_path)
    manifest = split(table, splits.by_function(lambda row: row["path"] == "2.jpg"), verify=False)
    manifest.save(tmp_path / "m.parquet")
    for each in (manifest, Manifest.load(tmp_path / "m.parquet")):
        part = each.part("train")
        np.testing.assert_array_equal(part.targets, np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], np.float32))
        assert part.targets.dtype == np.float32
        assert part.widths.tolist() == [0, 0, 0]  # not verified


def test_manifest_survives_the_disk_and_finds_moved_images(tmp_path: Path) -> None:
    manifest = split(labelled(tmp_path / "old"), random_split(valid=0.3))
    file = tmp_path / "deep" / "m.parquet"
    manifest.save(file)
    assert [path.name for path in file.parent.iterdir()] == ["m.parquet"]
    loaded = Manifest.load(file)
    assert loaded.rows.equals(manifest.rows)
    assert loaded.rows.schema.equals(manifest.rows.schema, check_metadata=True)
    assert (loaded.root, loaded.task, loaded.classes) == (manifest.root, manifest.task, manifest.classes)
    assert json.loads(pq.read_schema(file).metadata[b"thawline"]) == {
        "version": 1,
        "task": "single_label",
        "classes": ["cat", "dog"],
        "root": str(tmp_path / "old"),
    }
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ManifestError, match=r"10 of 10 files .* root .*/old: .*cat/00\.jpg.*--data\.root"):
        loaded.check_paths()
    moved = Manifest.load(file, root=tmp_path / "new")
    moved.check_paths()
    assert Path(moved.part("train").paths[0]).read_bytes()


def test_check_paths_looks_at_an_even_sample(tmp_path: Path) -> None:
    manifest = split(labelled(tmp_path, 10), random_split(valid=0.5))
    last = manifest.rows["path"][9].as_py()
    (tmp_path / last).unlink()
    with pytest.raises(ManifestError, match=rf"1 of 4 files looked at \(of 10\).*{last}"):
        manifest.check_paths(most=4)  # rows 0, 3, 6, 9
    (tmp_path / manifest.rows["path"][1].as_py()).unlink()
    with pytest.raises(ManifestError, match="1 of 4 files"):
        manifest.check_paths(most=4)
    with pytest.raises(ManifestError, match="2 of 10 files"):
        manifest.check_paths()


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = split(unlooked(4), random_split(valid=0.5), verify=False)
    file = tmp_path / "m.parquet"
    manifest.save(file)
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ManifestError, match=r"cannot be written \(No space left on device\)"):
        manifest.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ManifestError, match="cannot be written"):
        manifest.save(file / "below.parquet")


def test_what_is_no_manifest_is_a_sentence(tmp_path: Path) -> None:
    manifest = split(unlooked(4), random_split(valid=0.5), verify=False)
    about = {"version": 1, "task": "single_label", "classes": ["0"], "root": "/data"}

    def write(name: str, rows: pa.Table, **change: object) -> Path:
        meta = {b"thawline": json.dumps(about | change)} if change else None
        pq.write_table(rows.replace_schema_metadata(meta), tmp_path / name)
        return tmp_path / name

    (tmp_path / "text").write_text("not parquet")
    manifest.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-20])
    for file, message in (
        (tmp_path / "none", "no manifest at .*none"),
        (tmp_path, "no manifest at"),
        (tmp_path / "text", "cannot be read as Parquet"),
        (tmp_path / "cut", "cannot be read as Parquet"),
        (write("other", manifest.rows), "other is not a thawline manifest; make one with thawline index"),
        (write("new", manifest.rows, version=2), "version 2, task 'single_label'.*newer thawline"),
        (write("task", manifest.rows, task="points"), "task 'points'.*newer thawline"),
        (write("few", manifest.rows.drop_columns(["hash", "split"]), version=1), "lacks columns split, hash"),
    ):
        with pytest.raises(ManifestError, match=message):
            Manifest.load(file)
    with pytest.raises(ManifestError, match="labels are not among the 1 classes"):
        Manifest.load(write("classes", manifest.rows, version=1)).part("train")


# --- samples


def test_digits_are_the_right_pixels_under_the_right_names(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    seen: list[tuple[int, int]] = []
    folder = tmp_path / "deep" / "digits"
    assert write_digits(folder, size_px=24, progress=lambda done, total: seen.append((done, total))) == 1797
    assert seen[-1] == (1797, 1797)
    assert len(list(folder.iterdir())) == 1797
    digits = load_digits()
    for index in (0, 7, 1796):
        with Image.open(folder / f"{digits.target[index]}_{index:04d}.jpg") as image:
            assert image.size == (24, 24)
            centres = np.asarray(image.convert("L"), np.float64)[1::3, 1::3]
        # bicubic interpolation passes through its samples, which enlarged 3 times lie at every third pixel
        np.testing.assert_allclose(centres, digits.images[index] * 255 / 16, atol=8)  # JPEG at quality 92

    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_digits(folder, size_px=24) == 1797
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "0_0000.jpg").unlink()
    write_digits(folder, size_px=24)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    write_digits(folder, size_px=16)  # another size is not "already there"
    with Image.open(folder / "0_0000.jpg") as image:
        assert image.size == (16, 16)
    assert len(label(from_folder(folder), by_regex(r"(.+)_\d+\.jpg$")).rows["label"].unique()) == 10


def test_digits_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="digits cannot"):
        write_digits(tmp_path / "file")
    with pytest.raises(SourceError, match="size_px=0"):
        write_digits(tmp_path / "x", size_px=0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'thawline\[samples\]'"):
        write_digits(tmp_path / "x")
    assert not (tmp_path / "x").exists()
