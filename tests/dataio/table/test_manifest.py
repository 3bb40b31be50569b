"""Is the manifest the same after a trip to disk, in either format, and refused when it is not what it says?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.kit.manifests import FORMATS, TASKS, holey, pictures, sized
from thawline.dataio.errors import ManifestError
from thawline.dataio.labels.labels import by_parent, label, mask_path
from thawline.dataio.labels.targets import View, decode_mask, value_table
from thawline.dataio.pixels.geometry import centred
from thawline.dataio.pixels.pictures import VOID
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.table import manifest as manifests
from thawline.dataio.table.draws import random_split
from thawline.dataio.table.manifest import Manifest, Shard
from thawline.dataio.table.schema import columns
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import split
from thawline.dataio.table.subset import Rows
from thawline.dataio.table.tasks import TASKS as KINDS

NAN = math.nan


def rows_of(manifest: Manifest) -> str:
    """All rows, as text, so that NaN equals NaN."""
    return repr(manifest.rows.to_pylist())


# --- parts


def test_part_holds_usable_rows_in_id_order_whatever_the_order_of_the_table(tmp_path: Path) -> None:
    manifest = holey(tmp_path)
    shuffled = replace(manifest, rows=manifest.rows.take(np.arange(10)[::-1]))
    shuffled.save(tmp_path / "shuffled.parquet")
    for name in ("train", "valid"):
        oracle = [row for row in manifest.rows.to_pylist() if row["split"] == name]
        for part in (manifest.subset(name), Manifest.load(tmp_path / "shuffled.parquet").subset(name)):
            assert len(part) == len(oracle) == 4
            assert part.ids.tolist() == [row["id"] for row in oracle]
            taken = part.take(np.array([2, 0, 2]))
            chosen = [oracle[2], oracle[0], oracle[2]]
            assert taken.paths == [row["path"] for row in chosen]
            assert taken.labels.to_pylist() == [row["label"] for row in chosen]
            for given, column in (
                (taken.numbers, "id"),
                (taken.ids, "id"),
                (taken.widths, "width"),
                (taken.heights, "height"),
                (taken.hashes, "hash"),
            ):
                assert given.tolist() == [row[column] for row in chosen]
            assert not taken.pillow.any()
            assert not taken.mask_hashes.any()
            arrays = (taken.ids, taken.widths, taken.heights, taken.hashes)
            assert all(array.flags.writeable for array in arrays)  # torch warns of others
            assert [str(array.dtype) for array in arrays] == ["int64", "int32", "int32", "uint64"]
    with pytest.raises(ManifestError, match=r"in split 'test' \(its splits: train, valid\)"):
        manifest.subset("test")


def test_what_was_not_verified_has_no_size_and_no_hash() -> None:
    taken = TASKS["single_label"]().subset("train").take(np.arange(3))
    assert [array.tolist() for array in (taken.widths, taken.heights, taken.hashes)] == [[0, 0, 0]] * 3


def test_a_file_for_pillow_alone_is_marked(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "04.gif")
    part = split(label(from_folder(tmp_path), by_parent()), random_split(valid=0.25)).subset("train")
    taken = part.take(np.arange(len(part)))
    assert taken.pillow.tolist() == [path.endswith("gif") for path in taken.paths]


# --- targets


def targets_of(manifest: Manifest, numbers: list[int]) -> np.ndarray:
    """Targets of these places in the training part, as a model of 8 x 8 px would get them of images squished to it."""
    taken: Rows = manifest.subset("train").take(np.array(numbers))
    place = centred(ImageSpec(presize_px=8, size_px=8, presize="squish"), widths=taken.widths, heights=taken.heights)
    return KINDS[manifest.task].targets(taken.labels, View(manifest.classes, place, 8))


@pytest.mark.parametrize("kind", FORMATS)
def test_classes_are_numbers_or_zeros_and_ones(tmp_path: Path, kind: str) -> None:
    for task, dtype, oracle in (
        ("single_label", np.int64, [1, 1, 0]),
        ("multi_label", np.float32, [[0, 0, 1], [1, 1, 0], [0, 0, 0]]),
        ("mask", np.int64, [0, 0, 0]),
    ):
        sized(TASKS[task]()).save(tmp_path / f"{task}.{kind}")
        targets = targets_of(Manifest.load(tmp_path / f"{task}.{kind}"), [2, 0, 1])
        np.testing.assert_array_equal(targets, np.array(oracle, dtype))
        assert targets.dtype == dtype


@pytest.mark.parametrize("kind", FORMATS)
def test_points_are_placed_and_padded_with_nan(tmp_path: Path, kind: str) -> None:
    sized(TASKS["points"]()).save(tmp_path / f"points.{kind}")
    manifest = Manifest.load(tmp_path / f"points.{kind}")
    # 10 wide and 20 high: x / 5 - 1 and y / 10 - 1
    oracle = [[[-0.8, -0.8], [-0.4, -0.6]], [[NAN, NAN], [0.0, -0.4]], [[NAN, NAN], [NAN, NAN]]]
    np.testing.assert_allclose(targets_of(manifest, [0, 2, 1]), np.array(oracle), atol=1e-6)


def test_masks_are_values_of_classes_or_void(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    values = np.arange(88, dtype=np.uint8).reshape(8, 11) % 11
    for i in range(4):
        Image.fromarray(values[:, : 8 + i]).save(tmp_path / f"{i}.png")
    table = label(
        from_folder(tmp_path, folders=("cat", "dog")),
        mask_path(lambda row: f"{int(row['path'][-5])}.png"),
        classes=("seven", "two"),
        values=(7, 2),
    )
    manifest = split(table, random_split(valid=0.25, seed=0))
    part = manifest.subset("train")
    taken = part.take(np.arange(len(part)))
    assert taken.mask_hashes.all()
    found = value_table(manifest.values)[decode_mask(np.fromfile(tmp_path / "3.png", np.uint8))]
    oracle = [[0 if value == 7 else 1 if value == 2 else VOID for value in row] for row in values]
    np.testing.assert_array_equal(found, oracle)


def test_labels_that_are_no_classes_are_told() -> None:
    manifest = replace(sized(TASKS["single_label"]()), classes=("a",))
    with pytest.raises(ManifestError, match="2 labels are not among the 1 classes"):
        targets_of(manifest, [0, 1, 2])


# --- disk


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_manifest_survives_the_disk(tmp_path: Path, task: str, kind: str) -> None:
    manifest = TASKS[task]()
    file = tmp_path / "deep" / f"m.{kind}"
    manifest.save(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    loaded = Manifest.load(file)
    assert rows_of(loaded) == rows_of(manifest)
    assert loaded.rows.schema.equals(columns(task), check_metadata=True)
    assert all(column.num_chunks == 1 for column in loaded.rows.columns)
    for name in ("root", "task", "classes", "values", "shards"):
        assert getattr(loaded, name) == getattr(manifest, name)
    assert loaded.home == str(tmp_path / "deep")
    if kind == "parquet":
        about = json.loads(pq.read_schema(file).metadata[b"thawline"])
        assert (about["version"], about["task"], about["root"]) == (2, task, "/data")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_checked_manifest_with_holes_survives_with_all_its_columns(tmp_path: Path, kind: str) -> None:
    manifest = holey(tmp_path / "in")
    shards = (Shard("a.arrow", 0, 4, 100, "ff"), Shard("b.arrow", 4, 6, 200, "ee"))
    replace(manifest, shards=shards).save(tmp_path / f"m.{kind}")
    loaded = Manifest.load(tmp_path / f"m.{kind}")
    assert rows_of(loaded) == rows_of(manifest)
    assert loaded.shards == shards
    assert loaded.rows["width"].to_pylist() == [None, *(8 + i for i in (2, 4, 6, 8, 1, 3)), None, 15, 17]


def test_an_arrow_manifest_is_mapped_and_not_read(tmp_path: Path) -> None:
    n = 200_000
    made: dict[str, Any] = {name: pa.nulls(n) for name in columns("single_label").names}
    made |= {"id": np.arange(n), "path": [f"{i}.jpg" for i in range(n)], "label": ["a", "b"] * (n // 2)}
    made |= {"split": ["train"] * n, "status": ["ok"] * n}
    manifests.build(made, root="/data", task="single_label", classes=("a", "b")).save(tmp_path / "m.arrow")
    before = pa.total_allocated_bytes()
    loaded = Manifest.load(tmp_path / "m.arrow")
    assert pa.total_allocated_bytes() - before < 100_000, "a few MB lie in the file"
    assert loaded.rows.nbytes > 5_000_000
    assert loaded.subset("train").take(np.array([199_999])).paths == ["199999.jpg"]


def test_moved_images_are_found_at_their_new_root(tmp_path: Path) -> None:
    manifest = split(pictures(tmp_path / "old"), random_split(valid=0.3))
    manifest.save(tmp_path / "m.parquet")
    (tmp_path / "old").rename(tmp_path / "new")
    loaded = Manifest.load(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=r"10 of 10 files .* root .*/old: .*cat/00\.png.*--data\.root"):
        loaded.check_paths()
    moved = Manifest.load(tmp_path / "m.parquet", root=tmp_path / "new")
    moved.check_paths()
    assert moved.root == str(tmp_path / "new")


def test_check_paths_looks_at_an_even_sample_and_allows_a_share(tmp_path: Path) -> None:
    manifest = split(pictures(tmp_path), random_split(valid=0.5))
    last = manifest.rows["path"][9].as_py()
    (tmp_path / last).unlink()
    with pytest.raises(ManifestError, match=rf"1 of 4 files checked \(of 10\).*{last}"):
        manifest.check_paths(most=4)  # rows 0, 3, 6, 9
    (tmp_path / manifest.rows["path"][1].as_py()).unlink()
    with pytest.raises(ManifestError, match="1 of 4 files"):
        manifest.check_paths(most=4)
    with pytest.raises(ManifestError, match="2 of 10 files"):
        manifest.check_paths(allowed=0.1)
    manifest.check_paths(allowed=0.2)


def test_check_paths_looks_for_every_shard_beside_the_manifest(tmp_path: Path) -> None:
    shards = tuple(Shard(f"{i}.arrow", i, 1, 10, "") for i in range(3))
    manifest = replace(TASKS["single_label"](), shards=shards, home=str(tmp_path))
    for name in ("0.arrow", "2.arrow"):
        (tmp_path / name).touch()
    with pytest.raises(
        ManifestError, match=r"1 of 3 shards are not where the manifest says, .*: 1\.arrow; .*pack again"
    ):
        manifest.check_paths(allowed=1.0)
    (tmp_path / "1.arrow").touch()
    manifest.check_paths()


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = TASKS["single_label"]()
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


def test_a_file_s_uri_is_its_path(tmp_path: Path) -> None:
    manifest = TASKS["single_label"]()
    manifest.save(tmp_path / "a b.arrow")
    assert Manifest.load((tmp_path / "a b.arrow").as_uri()).fingerprint() == manifest.fingerprint()
    with pytest.raises(ManifestError, match="no manifest at /dev/zero"):  # as a URI it would be read
        Manifest.load("file:///dev/zero")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_no_manifest_is_a_sentence(tmp_path: Path, kind: str) -> None:
    manifest = TASKS["single_label"]()
    about = {"version": 2, "task": "single_label", "classes": ["0"], "root": "/data"}

    def write(name: str, rows: pa.Table, **change: object) -> Path:
        rows = rows.replace_schema_metadata({b"thawline": json.dumps(about | change)} if change else None)
        if kind == "parquet":
            pq.write_table(rows, tmp_path / name)
        else:
            with pa.ipc.new_file(str(tmp_path / name), rows.schema) as writer:
                writer.write_table(rows)
        return tmp_path / name

    (tmp_path / "text").write_text("neither")
    (tmp_path / "l.csv").write_text("path,label\na.jpg,cat\n")
    manifest.save(tmp_path / f"cut.{kind}")
    (tmp_path / "cut").write_bytes((tmp_path / f"cut.{kind}").read_bytes()[:-20])
    word = manifest.rows.set_column(4, "width", pa.array(["wide"] * 4))
    for file, message in (
        (tmp_path / "none", "no manifest at .*none"),
        (tmp_path, "no manifest at .*, but a folder, which has no classes and splits: index it first"),
        (tmp_path / "l.csv", "no manifest at .*l.csv, but a list, which has no classes and splits: index it first"),
        (tmp_path / "text", "text cannot be read .*it is no manifest, or a broken one"),
        (tmp_path / "cut", "cut cannot be read"),
        (write("other", manifest.rows), "other is not a thawline manifest; make one with thawline index"),
        (write("old", manifest.rows, version=1), r"\(version 1, .*an older thawline: this one reads version 2"),
        (write("new", manifest.rows, version=3), r"\(version 3, .*a newer thawline: .*index again, or install"),
        (write("task", manifest.rows, task="boxes"), "task 'boxes'.*newer thawline"),
        (write("few", manifest.rows.drop_columns(["hash", "split"]), version=2), "lacks columns split, hash"),
        (write("word", word, version=2), "has a column of another type"),
    ):
        with pytest.raises(ManifestError, match=message):
            Manifest.load(file)
