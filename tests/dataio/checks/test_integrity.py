"""Is a manifest that was edited, damaged or made up told from the one that was written?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thawline.dataio.checks import integrity
from thawline.dataio.errors import ManifestError
from thawline.dataio.table import manifest
from thawline.dataio.table.manifest import Manifest, Shard

FORMATS = ("parquet", "arrow")
LABELS: dict[str, list[Any]] = {
    "single_label": ["a", "b", "a", "b"],
    "multi_label": [["a"], [], ["b", "a"], ["b"]],
    "points": [[1.0, 2.0], [3.0, 4.0, 5.0, math.nan], [], [None, None]],
    "mask": ["m/0.png", "m/1.png", "m/2.png", "m/3.png"],
}


def written(task: str = "single_label", **change: Any) -> Manifest:
    """Four images, two for validation, the last quarantined."""
    columns: dict[str, Any] = {"id": [0, 1, 2, 3], "path": ["0.jpg", "1.jpg", "2.jpg", "3.jpg"], "label": LABELS[task]}
    columns |= {"split": ["train", "valid", "valid", None], "status": ["ok", "ok", "ok", "missing"]}
    columns |= {"width": [10, 11, 12, None], "height": [9, 9, 9, None], "bytes": [90, 91, 92, None]}
    columns |= {"hash": [1, 2, 2**64 - 1, None], "format": ["JPEG", "PNG", "JPEG", None], "mask_hash": [5, 6, 7, None]}
    columns |= {"orientation": [1, 6, 1, None], "codec": ["dali", "pillow", "dali", None]}
    values = (0, 7) if task == "mask" else ()
    return manifest.build(columns | change, root="/data", task=task, classes=("a", "b"), values=values)


def stored(file: Path) -> pa.Table:
    return pq.read_table(file) if file.suffix == ".parquet" else pa.ipc.open_file(str(file)).read_all()


def write(table: pa.Table, file: Path) -> Path:
    """As any tool would."""
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    return file


def about(file: Path, **change: Any) -> Path:
    """The file with other metadata; None takes an entry out."""
    table = stored(file)
    words = {**json.loads(table.schema.metadata[b"thawline"]), **change}
    words = {name: value for name, value in words.items() if value is not None}
    return write(table.replace_schema_metadata({b"thawline": json.dumps(words)}), file)


def column(file: Path, name: str, values: list[Any], *, keep: bool = True) -> Path:
    """The file with another column, its metadata kept; not `keep`: without what it could be compared with."""
    table = stored(file)
    i = table.schema.get_field_index(name)
    made = pa.array(values, pa.string()) if pa.types.is_dictionary(table.schema.field(i).type) else pa.array(values)
    table = table.set_column(i, table.schema.field(i), made.cast(table.schema.field(i).type))
    write(table, file)
    return file if keep else about(file, checksum=None, fingerprint=None)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("task", LABELS)
def test_an_edited_manifest_is_told_whatever_was_edited(tmp_path: Path, task: str, kind: str) -> None:
    file = tmp_path / f"m.{kind}"
    written(task).save(file)
    whole, rows = file.read_bytes(), stored(file)
    assert Manifest.load(file).rows["path"].to_pylist() == rows["path"].to_pylist()
    others: dict[str, list[Any]] = {"id": [0, 1, 2, 4], "label": [rows["label"][i].as_py() for i in (1, 0, 2, 3)]}
    others |= {"path": ["1.jpg", "0.jpg", "2.jpg", "3.jpg"], "split": ["valid", "valid", "train", None]}
    others |= {"width": [10, 11, 13, None], "height": [9, 9, 10, None], "bytes": [90, 91, 93, None]}
    others |= {"format": ["JPEG", "JPEG", "JPEG", None], "orientation": [1, 8, 1, None]}
    others |= {"codec": ["dali", "dali", "dali", None], "status": ["ok", "ok", "ok", "truncated"]}
    for name, values in others.items():
        with pytest.raises(ManifestError, match=r"m\.\w+ was changed after thawline wrote it .* --out NEW\.parquet"):
            Manifest.load(column(file, name, values))
        file.write_bytes(whole)
    with pytest.raises(ManifestError, match="was changed after thawline wrote it"):
        Manifest.load(about(file, root="/other"))
    file.write_bytes(whole)
    with pytest.raises(ManifestError, match="was changed after thawline wrote it"):
        Manifest.load(write(stored(file).slice(0, 3), file))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_manifest_of_before_is_held_against_its_fingerprint(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"m.{kind}"
    written().save(file)
    about(file, checksum=None)
    assert Manifest.load(file).rows.num_rows == 4
    assert Manifest.load(about(file, root="/moved")).root == "/moved"
    with pytest.raises(ManifestError, match="was changed after thawline wrote it"):
        Manifest.load(column(file, "split", ["valid", "valid", "train", None]))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_manifest_of_before_leaves_to_pillow_what_dali_may_show_otherwise(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"m.{kind}"
    written().save(file)
    column(file, "format", ["PPM", "JPEG", "TIFF", None], keep=False)
    column(file, "codec", ["dali", "dali", "dali", None], keep=False)
    old = Manifest.load(file)
    assert old.rows["codec"].to_pylist() == ["pillow", "dali", "pillow", None]
    assert {column.num_chunks for column in old.rows.columns} == {1}
    old.save(file)  # with a checksum now, of what it says now
    assert Manifest.load(file).rows.equals(old.rows)


def test_a_change_that_was_meant_is_taken_as_the_sentence_says(tmp_path: Path) -> None:
    """The words of the remedy, after `thawline index`."""
    file = tmp_path / "m.parquet"
    written().save(file)
    with pytest.raises(ManifestError) as told:
        Manifest.load(column(file, "label", ["b", "b", "a", "b"]))
    words = f"{file} --path-column path --label column:label --valid column:split --out NEW.parquet"
    assert str(told.value).endswith(f"thawline index {words}")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("id", [7, 7, 7, 7], "has 7 for the id of row 0 as the next row"),
        ("id", [0, None, 2, 3], "has None for the id of row"),
        ("id", [0, 1, 2, -3], "has -3 for the id of row 0"),
        ("path", ["0.jpg", "", "2.jpg", "3.jpg"], "has '' for the path of row 1"),
        ("path", ["0.jpg", "1.\0jpg", "2.jpg", "3.jpg"], "has '1.*jpg' for the path of row 1"),
        ("path", ["0.jpg", "1.jpg", None, "3.jpg"], "has None for the path of row 2"),
        ("label", ["a", "c" * 99, "a", "b"], r"has 'c+\.\.\. for the label of row 1"),
        ("label", [None, "b", "a", "b"], "has None for the label of row 0"),
        ("split", ["train", "valid", "dev", None], "has 'dev' for the split of row 2"),
        ("split", ["train", None, "valid", None], "has None for the split of row 1"),
        ("width", [0, 11, 12, None], "has 0 for the width of row 0"),
        ("width", [None, 11, 12, None], "has None for the width of row 0"),
        ("height", [9, -5, 9, None], "has -5 for the height of row 1"),
        ("height", [9, 9, 2**31 - 1, None], "has 2147483647 for the height of row 2"),
        ("bytes", [-1, 91, 92, None], "has -1 for the bytes of row 0"),
        ("orientation", [1, 9, 1, None], "has 9 for the orientation of row 1"),
        ("codec", ["dali", "pillow", "gpu", None], "has 'gpu' for the codec of row 2"),
        ("status", ["ok", "ok", None, "missing"], "has None for the status of row 2"),
    ],
)
def test_values_that_cannot_be_are_a_sentence(
    tmp_path: Path, kind: str, name: str, values: list[Any], words: str
) -> None:
    file = tmp_path / f"m.{kind}"
    written().save(file)
    with pytest.raises(ManifestError, match=rf"manifest .*m\.{kind} {words}.*; make it again with thawline index"):
        Manifest.load(column(file, name, values, keep=False))


@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("multi_label", [["a"], ["c"], [], ["b"]]),
        ("multi_label", [["a"], [None], [], ["b"]]),
        ("points", [[1.0], [1.0, 2.0], [], []]),
        ("points", [[1.0] * 6, [1.0, 2.0], [], []]),
        ("points", [[1.0, math.inf], [1.0, 2.0], [], []]),
        ("mask", ["m/0.png", None, "m/2.png", "m/3.png"]),
    ],
)
def test_labels_that_mean_nothing_are_a_sentence(tmp_path: Path, task: str, values: list[Any]) -> None:
    file = tmp_path / "m.parquet"
    written(task).save(file)
    with pytest.raises(ManifestError, match=r"has .* for the label of row [01]: it is damaged"):
        Manifest.load(column(file, "label", values, keep=False))


SHARD = {"name": "a.arrow", "first": 0, "rows": 4, "bytes": 9, "hash": "ff"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"root": False}, "has False for a root"),
        ({"classes": ["a", "b", "a"]}, "has the class 'a' twice"),
        ({"classes": "ab"}, "has classes that are no list of names"),
        ({"classes": ["a", 2]}, "has classes that are no list of names"),
        ({"values": [1, 300]}, "has values that are no list of pixel values"),
        ({"values": [1, 2]}, "has 2 pixel values for 2 classes"),
        ({"shards": {"a": 1}}, "has shards that are no list"),
        ({"shards": [1]}, "has a shard that is none: 1"),
        ({"shards": [SHARD | {"first": -50}]}, "has a shard that is none: .*-50"),
        ({"shards": [SHARD | {"name": "../a.arrow"}]}, "has a shard that is none"),
        ({"shards": [SHARD | {"first": 1}]}, "has a shard 'a.arrow' that begins at row 1, not 0"),
        ({"shards": [SHARD | {"rows": 3}]}, "has 4 rows, and shards of 3"),
        ({"checksum": 5}, "has 5 for a checksum"),
        ({"task": ["points"]}, r"task \['points'\]"),
        ({"version": "two"}, "is not a thawline manifest"),
    ],
)
def test_metadata_that_mean_nothing_are_a_sentence(
    tmp_path: Path, kind: str, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / f"m.{kind}"
    written().save(file)
    about(file, **{"checksum": None, "fingerprint": None} | change)
    with pytest.raises(ManifestError, match=words):
        Manifest.load(file)


@pytest.mark.parametrize(
    "text", ["[" * 900 + "]" * 900, '{"a":' * 100_000, "[1, 2]", "null", "", "\xff", '{"version": Infinity}']
)
def test_metadata_that_are_no_metadata_are_a_sentence(tmp_path: Path, text: str) -> None:
    table = written().rows.replace_schema_metadata({b"thawline": text.encode("latin-1")})
    for kind in FORMATS:
        with pytest.raises(ManifestError, match="is not a thawline manifest; make one with thawline index"):
            Manifest.load(write(table, tmp_path / f"m.{kind}"))
    assert integrity.root_of(table.schema.metadata) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_a_manifest_at_a_uri_is_the_same_and_as_little_trusted(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"m.{kind}"
    written().save(file)
    assert Manifest.load(file.as_uri()).rows.equals(Manifest.load(file).rows)
    column(file, "label", ["b", "b", "a", "b"])
    with pytest.raises(ManifestError, match="was changed after thawline wrote it"):
        Manifest.load(file.as_uri())


def test_an_offset_beyond_the_text_is_a_sentence(tmp_path: Path) -> None:
    """Arrow hands such a table out, and the first `take` from it would read what is not the table's."""
    file = tmp_path / "m.arrow"
    written().save(file)
    data = file.read_bytes()
    offsets = b"".join(n.to_bytes(8, "little") for n in (0, 5, 10, 15, 20))
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, offsets[:16] + (1 << 40).to_bytes(8, "little") + offsets[24:]))
    with pytest.raises(ManifestError, match=r"cannot be read .* or a broken one"):
        Manifest.load(file)


def test_the_checksum_is_that_of_the_values() -> None:
    rows, words = written("points").rows, {"root": "/data"}
    one = integrity.checksum(rows, words)
    split = pa.array([2, 0, 0, None], pa.int8())
    coded = pa.DictionaryArray.from_arrays(split, pa.array(["valid", "test", "train"]))
    below = pa.Array.from_buffers(
        pa.int32(), 4, [pa.py_buffer(b"\x07"), pa.array([10, 11, 12, 99], pa.int32()).buffers()[1]]
    )
    for name, values in (("split", coded), ("width", below)):
        other = rows.set_column(rows.column_names.index(name), name, values)
        assert other[name].to_pylist() == rows[name].to_pylist()
        assert integrity.checksum(other, words) == one
    padded = pa.concat_tables([rows.slice(3), rows]).combine_chunks().slice(1)
    assert integrity.checksum(padded, words) == one
    assert integrity.checksum(rows, {"root": "/datb"}) != one


def test_shards_of_before_have_no_source(tmp_path: Path) -> None:
    shards = (Shard("a.arrow", 0, 3, 9, "ff", "0f"), Shard("b.arrow", 3, 1, 9, "ee"))
    file = tmp_path / "m.arrow"
    Manifest(written().rows, "/data", "single_label", ("a", "b"), shards=shards).save(file)
    assert Manifest.load(file).shards == shards
