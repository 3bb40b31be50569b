"""Are images listed as the folder, the store, the CSV or the table says, in its order and under their names?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from tests.kit.sources import _csv, paths, touch
from thawline.dataio.errors import SourceError
from thawline.dataio.labels.labels import from_lists
from thawline.dataio.store import files
from thawline.dataio.table.sources import from_csv, from_file, from_folder, from_table


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that s3://box is, seen through a filesystem of pyarrow as remote stores are."""
    inside = pafs.SubTreeFileSystem(str(tmp_path / "box"), pafs.LocalFileSystem())
    monkeypatch.setattr(
        "thawline.dataio.store.root._open", lambda uri: (inside, uri.removeprefix("s3://box").strip("/"))
    )
    (tmp_path / "box").mkdir()
    return tmp_path / "box"


def test_a_table_that_was_read_leaves_its_bytes_to_nobody(tmp_path: Path) -> None:
    """A thread of Arrow's that lets go of them while Python ends would abort the process."""
    rows = pa.table({"a": list(range(1000)), "b": [str(i) for i in range(1000)]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=100)
    data = (tmp_path / "a.parquet").read_bytes()
    before = sys.getrefcount(data)
    for _ in range(300):
        assert files.as_table(data).equals(rows)
        assert sys.getrefcount(data) == before


# --- from_folder


def test_folder_lists_images_in_code_point_order_and_nothing_hidden(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.JPG", "a.png", "B.Tiff", "b/10.jpeg", "notes.txt", ".x.jpg", ".git/y.jpg", "ä/z.webp")
    table = from_folder(tmp_path)
    assert paths(table) == ["B.Tiff", "a.png", "b/10.jpeg", "b/2.JPG", "ä/z.webp"]
    assert table.root == str(tmp_path.resolve())
    assert table.task is None


def test_folder_takes_other_extensions_in_any_spelling(tmp_path: Path) -> None:
    touch(tmp_path, "a.tga", "b.jpg", "ctga")
    assert paths(from_folder(tmp_path, extensions=["TGA"])) == ["a.tga"]


def test_what_only_pillow_decodes_is_listed_too(tmp_path: Path) -> None:
    touch(tmp_path, "a.gif", "b.AVIF", "c.jp2", "d.heic", "e.svg")
    assert paths(from_folder(tmp_path)) == ["a.gif", "b.AVIF", "c.jp2"]


def test_some_folders_or_the_top_alone_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "train/x/b.jpg", "train2/c.jpg", "valid/d.jpg", "masks/b.png")
    assert paths(from_folder(tmp_path, folders=["valid", "train/"])) == ["train/x/b.jpg", "valid/d.jpg"]
    assert paths(from_folder(tmp_path, recursive=False)) == ["a.jpg"]
    with pytest.raises(SourceError, match=r"no images in tests of .*holds 0 other files"):
        from_folder(tmp_path, folders=["tests"])


def test_names_with_spaces_line_breaks_and_other_letters_keep_them(tmp_path: Path) -> None:
    names = sorted(["a b/c d.jpg", "line\nbreak.jpg", "\u6c34/\u00fc\u0308.jpg", 'comma, and "quote".jpg'])
    root = touch(tmp_path / "my photos", *names)
    assert paths(from_folder(root)) == names
    assert paths(from_folder(f"file://{root}")) == names
    one_line = [name for name in names if "\n" not in name]
    pd.DataFrame({"file": one_line, "n": range(3)}).to_csv(root / "rows.csv", index=False)
    assert paths(from_csv(root / "rows.csv")) == one_line
    captions = [f'line\nbreak, and "quote" {i}' for i in range(60_000)]
    frame = pd.DataFrame({"file": [f"{i}.jpg" for i in range(60_000)], "caption": captions})
    frame.to_csv(root / "many.csv", index=False)
    assert from_csv(root / "many.csv").rows["caption"].to_pylist() == captions


def test_a_store_is_listed_as_a_folder_is(store: Path) -> None:
    names = ["a b.png", "cat/1.JPG", "cat/x/2.gif", "d\u00f6g/3.jpg"]
    touch(store / "pets", *names, "cat/.hidden.jpg", ".git/4.jpg", "notes.txt")
    touch(store, "other/5.jpg")
    table = from_folder("s3://box/pets/")
    assert (table.root, paths(table)) == ("s3://box/pets", names)
    assert paths(from_folder("s3://box/pets", recursive=False)) == ["a b.png"]
    assert paths(from_folder("s3://box")) == ["other/5.jpg", *(f"pets/{name}" for name in names)]
    assert table.notes[0].startswith("WARNING: skipped 1 hidden or system folders (1 .git) and 1 hidden images")
    with pytest.raises(SourceError, match="s3://box/none does not exist"):
        from_folder("s3://box/none")
    with pytest.raises(SourceError, match=r"no images in s3://box/pets: it holds 5 other files"):
        from_folder("s3://box/pets", extensions=["bmp"])


def test_a_store_that_is_unknown_is_told() -> None:
    message = r"ftp://box.* cannot be opened .*s3://, gs://, hdfs://"
    with pytest.raises(SourceError, match=message):
        from_folder("ftp://box/pets")
    with pytest.raises(SourceError, match=message):
        from_lists(["ftp://box/pets/1.jpg"])


def test_linked_folders_are_listed_once_under_their_own_name_and_do_not_loop(tmp_path: Path) -> None:
    root, other = touch(tmp_path / "root", "cats/1.jpg"), touch(tmp_path / "other", "3.jpg")
    (root / "again").symlink_to(root / "cats")  # sorts before cats, and yet must not take its place
    (root / "cats" / "loop").symlink_to(root)
    (root / "more").symlink_to(other)
    (root / "file.jpg").symlink_to(other / "3.jpg")
    (root / "broken.jpg").symlink_to(other / "none.jpg")
    assert paths(from_folder(root)) == ["broken.jpg", "cats/1.jpg", "file.jpg", "more/3.jpg"]


def test_missing_folder_file_and_folder_without_images_are_each_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nope does not exist"):
        from_folder(tmp_path / "nope")
    touch(tmp_path, "x/a.txt", "x/b.TXT", "x/c", "x/d.mp4")
    with pytest.raises(SourceError, match="is a file, not a folder"):
        from_folder(tmp_path / "x" / "a.txt")
    with pytest.raises(SourceError, match=r"holds 4 other files \(2 \.txt, 1 .*\.jpg \.jpeg"):
        from_folder(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds 0 other files;"):
        from_folder(tmp_path / "empty")


def test_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"caf\\udce9\.jpg' is not UTF-8"):
        from_folder(tmp_path)


def test_what_a_folder_holds_besides_is_counted_and_told(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "cat/1.jpg",
        "cat/2.heic",
        "cat/3",
        "fox/1.HEIC",
        "fox/2.HEIC",
        "Thumbs.db",
        "cat/._1.jpg",
        ".DS_Store",
    )
    touch(tmp_path, "cat/@eaDir/1.jpg/THUMB.jpg", "__MACOSX/x.jpg", ".git/y.jpg", "fox/@eaDir/2.jpg")
    table = from_folder(tmp_path)
    assert paths(table) == ["cat/1.jpg"]
    assert table.notes == (
        "WARNING: skipped 4 hidden or system folders (2 @eaDir, 1 .git, 1 __MACOSX) and 1 hidden images: "
        "nothing in them is indexed",
        "WARNING: 4 files are left out for their endings (3 .heic, 1 without one): no image is left of fox/; if they "
        "are images, convert or rename them, or name their endings with --extensions",
    )
    assert from_folder(tmp_path, extensions=["jpg", "heic"]).notes[1] == (
        "1 files are left out for their endings (1 without one)"
    )
    assert from_folder(touch(tmp_path / "list", "a.jpg", "rows.csv", "b/1.xml")).notes == (
        "2 files are left out for their endings (1 .csv, 1 .xml)",
    )
    assert from_folder(touch(tmp_path / "plain", "a.jpg")).notes == ()


# --- folders, suffixes, headers, files


def test_bare_names_get_a_folder_and_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,label\n001,cat\nx/002,dog\n")
    oracle = ["train/001.jpg", "train/x/002.jpg"]
    assert paths(from_csv(tmp_path / "list.csv", folder="train", suffix=".jpg")) == oracle
    frame = pd.DataFrame({"image": ["001", "x/002"]})
    assert paths(from_table(frame, root=tmp_path, folder="train/", suffix=".jpg")) == oracle
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "list.parquet")
    assert paths(from_file(tmp_path / "list.parquet", folder="train", suffix=".jpg")) == oracle


def test_a_file_that_does_not_begin_with_names_is_given_them(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.jpg,cat\nb.jpg,dog\n")
    with pytest.raises(SourceError, match=r"begins with a row \(a\.jpg, cat\) .* \(--column-names path,label\)"):
        from_csv(tmp_path / "list.csv")
    table = from_csv(tmp_path / "list.csv", column_names=["file", "what"], path_column="file")
    assert table.rows.to_pydict() == {"path": ["a.jpg", "b.jpg"], "what": ["cat", "dog"]}
    unnamed = pd.DataFrame([["a.jpg", 1], ["b.jpg", 2]])
    assert from_table(unnamed, root="/data").rows.to_pydict() == {"path": ["a.jpg", "b.jpg"], "1": [1, 2]}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_parquet_and_arrow_files_keep_order_and_types(tmp_path: Path, kind: str) -> None:
    rows = pa.table({"n": [1, 2], "file": pa.array(["b.jpg", "a.jpg"]).dictionary_encode(), "tags": [["x"], []]})
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(rows, file)
    else:
        with pa.ipc.new_file(str(file), rows.schema) as writer:
            writer.write_table(rows)
    table = from_file(file, path_column="file")
    assert table.rows.to_pydict() == {"path": ["b.jpg", "a.jpg"], "n": [1, 2], "tags": [["x"], []]}
    assert table.rows.schema.field("n").type == pa.int64()
    assert table.root == str(tmp_path)
    with pytest.raises(SourceError, match=r"no column 'path'; it has n, file, tags"):
        from_file(file, path_column="path")


def test_what_is_no_table_of_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"ARROW1 not really")
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "c.parquet").mkdir()
    rows = pa.table({"path": ["a.jpg"]})
    with pa.ipc.new_stream(tmp_path / "e.parquet", rows.schema) as stream:
        stream.write_table(rows)
    pq.write_table(rows.drop_columns(["path"]), tmp_path / "f.parquet")
    for name, message in (
        ("a", "cannot be read as Parquet or Arrow"),
        ("b", "cannot be read as Parquet or Arrow"),
        ("c", "c.parquet cannot be read"),
        ("d", "no Parquet or Arrow file at .*d.parquet"),
        ("e", "e.parquet is a stream of Arrow's"),
        ("f", "f.parquet has no columns"),
    ):
        with pytest.raises(SourceError, match=message):
            from_file(tmp_path / f"{name}.parquet")


# --- roots and URIs


def test_a_list_in_a_store_names_files_beside_it(store: Path) -> None:
    touch(store / "pets", "a.jpg")
    (store / "pets" / "rows.csv").write_text("file,n\na.jpg,1\nx/../b.jpg,2\n")
    table = from_csv("s3://box/pets/rows.csv")
    assert (table.root, paths(table)) == ("s3://box/pets", ["a.jpg", "b.jpg"])
    pq.write_table(pa.table({"file": ["a.jpg"]}), store / "rows.parquet")
    assert paths(from_file("s3://box/rows.parquet", root="s3://box/pets")) == ["a.jpg"]
    with pytest.raises(SourceError, match=r"no CSV file at s3://box/pets/none\.csv"):
        from_csv("s3://box/pets/none.csv")


def test_uris_of_one_store_have_it_for_a_root(store: Path, tmp_path: Path) -> None:
    uris = ["s3://box/pets/a b.jpg", "s3://box/x//b?c.jpg"]
    for table in (
        from_lists(uris),
        from_table(pd.DataFrame({"path": uris})),
        from_csv(_csv(tmp_path, uris)),
    ):
        assert (table.root, paths(table)) == ("s3://box", ["pets/a b.jpg", "x/b?c.jpg"])
    table = from_lists([uris[0], "c.jpg"], root="s3://box/pets")
    assert (table.root, paths(table)) == ("s3://box/pets", ["a b.jpg", "c.jpg"])


@pytest.mark.parametrize(
    ("names", "root", "message"),
    [
        (["s3://box/a.jpg", "gs://box/a.jpg"], None, r"names files of 2 stores \(gs://box, s3://box\)"),
        (
            ["s3://box/a.jpg", "/data/b.jpg"],
            None,
            r"path in row 2 that is not below the root s3://box \(/data/b\.jpg\)",
        ),
        (["s3://box/a.jpg"], "/data", r"path in row 1 that is not below the root /data \(s3://box/a\.jpg\)"),
        (["a.jpg", "s3://box2/a.jpg"], "s3://box", r"row 2 that is not below the root s3://box \(s3://box2/a\.jpg\)"),
        (["../a.jpg"], "s3://box/pets", r"not below the root s3://box/pets \(\.\./a\.jpg\)"),
        (["a.jpg"], None, r"the list of paths has relative paths and no root: they cannot be resolved; give root"),
        (["s3://box/a.jpg"], "s3://me:secret@box", r"the URI of box carries a password"),
    ],
)
@pytest.mark.usefixtures("store")
def test_paths_that_lie_nowhere_or_in_two_places_are_told(names: list[Any], root: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        from_lists(names, root=root)


def test_local_uris_and_absolute_paths_are_below_a_local_root(tmp_path: Path) -> None:
    names = [f"file://{tmp_path}/x/a.jpg", f"{tmp_path}/b.jpg"]
    table = from_lists(names)
    assert (table.root, paths(table)) == (str(tmp_path), ["x/a.jpg", "b.jpg"])
    assert paths(from_lists(names, root=tmp_path / "x")) == ["a.jpg", f"{tmp_path}/b.jpg"]
    assert from_csv(_csv(tmp_path, names)).root == str(tmp_path)
