"""Are images listed as the folder, the store, the CSV or the table says, in its order and under their names?"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from tests.kit.images import grown
from thawline.dataio.errors import LabelError, SourceError, listed, quoted
from thawline.dataio.store import files
from thawline.dataio.store.root import Root
from thawline.dataio.table import lists
from thawline.dataio.table.labels import from_lists
from thawline.dataio.table.sources import Table, from_csv, from_file, from_folder, from_table


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def paths(table: Table) -> list[str]:
    return table.rows["path"].to_pylist()


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


# --- from_csv, from_table, from_lists


def test_csv_keeps_order_and_text(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("\ufefffile,label,n\nb.jpg,007,1\na.jpg,NA,\n", encoding="utf-8")
    table = from_csv(tmp_path / "list.csv")
    assert table.rows.to_pydict() == {"path": ["b.jpg", "a.jpg"], "label": ["007", "NA"], "n": ["1", ""]}
    assert table.root == str(tmp_path.resolve())


def test_csv_path_column_root_and_tab(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("label\tname\ncat\t./x//a.jpg\ndog\t../b.jpg\ncow\t/data/c.jpg\n")
    table = from_csv(tmp_path / "list.tsv", path_column="name", root="/data/pets")
    assert table.rows.column_names == ["path", "label"]
    assert paths(table) == ["x/a.jpg", "/data/b.jpg", "/data/c.jpg"]
    full = [Root.of(table.root).full(path) for path in paths(table)]
    assert full == ["/data/pets/x/a.jpg", "/data/b.jpg", "/data/c.jpg"]
    (tmp_path / "list.csv").write_text("name;label\na.jpg;cat\n")
    assert paths(from_csv(tmp_path / "list.csv", delimiter=";")) == ["a.jpg"]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", None, "cannot be read as CSV"),
        ("path,label\n", None, "has no rows"),
        (
            "path,label\na.jpg,x,y\n",
            None,
            r"cannot be read as CSV: expected 2 columns, got 3 in row 2 of the file \(a\.jpg,x,y\)",
        ),
        ("path,label\na.jpg,x\n", "image", "no column 'image'; it has path, label"),
        ("path,label\na.jpg,x\n", "label", "a column 'path' beside the path column 'label'"),
        ("path,n,n\na.jpg,x,y\n", None, "two columns of one name"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", None, r"names 1 paths more than once \(a\.jpg\)"),
        ("path,label\na.jpg,x\n,y\n", None, "no usable path in row 2"),
    ],
)
def test_bad_csv_is_a_sentence(tmp_path: Path, text: str, column: str | None, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        from_csv(tmp_path / "list.csv", path_column=column)


LINES = [f"{i}.jpg,{i % 3}" for i in range(1, 61)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('47.jpg,"2', r"a quote in line 48 that does not close at the end of its value \(\"2\)"),
        ('"47.jpg,2', r"a quote in line 48 that does not close at the end of its value \(\"47\.jpg,2\)"),
        ('47.jpg,"2\n48.jpg,"1"', "a quote in line 48 that does not close"),  # closed by the next row's
        ('"47.jpg\n47b.jpg",2', r"a path with a line break in row 47 \('47\.jpg\\n47b\.jpg'\)"),
        ("47.jpg," + "x" * 20_000_000, "line 48 has more than 16,777,216 bytes, which is no row of a list of images"),
    ],
    ids=["label", "path", "closed later", "path of two lines", "long line"],
)
def test_a_csv_whose_quotes_or_lines_have_no_end_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    lines = ["file,label", *LINES]
    lines[47] = line
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(SourceError, match=message) as caught:
        from_csv(tmp_path / "list.csv")
    assert len(str(caught.value)) < 400


def test_the_separator_is_found_and_told(tmp_path: Path) -> None:
    for text, separator in (
        ("file;label\na.jpg;x\nb.jpg;y\n", ";"),
        ("file\tlabel\r\na.jpg\tx\r\nb.jpg\ty\r\n", "\t"),
        ("file|label\na.jpg|x\nb.jpg|y\n", "|"),
        ('"file";"label"\n"a.jpg";"x"\n"b.jpg";"y"\n', ";"),
        ("file;label;x\na.jpg;x;1,5\nb.jpg;y;2,5\n", ";"),  # decimal commas
        ("\ufeffsep=;\r\nfile;label\r\na.jpg;x\r\nb.jpg;y\r\n", ";"),  # Excel's own line
    ):
        (tmp_path / "list.csv").write_text(text, newline="", encoding="utf-8")
        table = from_csv(tmp_path / "list.csv")
        assert (paths(table), table.rows["label"].to_pylist()) == (["a.jpg", "b.jpg"], ["x", "y"])
        assert table.notes == (f"list.csv: columns are separated by {separator!r}",)
    (tmp_path / "list.csv").write_text("file,tags\na.jpg,x;y\nb.jpg,y;z\n")
    table = from_csv(tmp_path / "list.csv")
    assert (table.rows["tags"].to_pylist(), table.notes) == (["x;y", "y;z"], ())
    (tmp_path / "list.csv").write_text("name\na.jpg\n")
    assert paths(from_csv(tmp_path / "list.csv")) == ["a.jpg"]
    for separator in (";;", "\u00a7", '"', ""):
        with pytest.raises(SourceError, match=r"separator .* is not one character of ASCII"):
            from_csv(tmp_path / "list.csv", delimiter=separator)


def test_gzipped_lists_and_json_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(b"file,label\na.jpg,007\n"))
    assert from_csv(tmp_path / "list.csv.gz").rows.to_pydict() == {"path": ["a.jpg"], "label": ["007"]}
    lines = b'{"file": "a.jpg", "day": "2024-05-01", "n": 1}\n{"file": "b.jpg", "day": "2024-05-02", "n": 2}\n'
    (tmp_path / "list.jsonl").write_bytes(lines)
    (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("list.jsonl", "list.jsonl.gz"):
        assert from_file(tmp_path / name).rows.to_pydict() == {
            "path": ["a.jpg", "b.jpg"],
            "day": ["2024-05-01", "2024-05-02"],
            "n": [1, 2],
        }
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"file\na.jpg\n" * 100)[:-9])
    with pytest.raises(SourceError, match=r"cut\.csv\.gz cannot be unpacked"):
        from_csv(tmp_path / "cut.csv.gz")
    for text in (b"[1, 2]", b'{"a": 1}\n{"a"', b'{"a":' * 200_000):  # the last one would end the process
        (tmp_path / "bad.jsonl").write_bytes(text)
        with pytest.raises(SourceError, match=r"cannot be read as JSON lines: .*give an object a line"):
            from_file(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b'{"file": "a.jpg"}\n{"file": "\xe9.jpg"}\n')
    with pytest.raises(SourceError, match="cannot be read as JSON lines: line 2 is not UTF-8"):
        from_file(tmp_path / "bad.jsonl")
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(bytes(70 << 20)))
    with pytest.raises(SourceError, match="unpacks to more than 67,108,864 bytes, over 200 times its size"):
        from_csv(tmp_path / "bomb.csv.gz")


def test_what_is_no_text_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"PK\3\4 a workbook")
    with pytest.raises(SourceError, match=r"list\.csv is a zip archive or a workbook by its content: save its sheet"):
        from_csv(tmp_path / "list.csv")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "list.csv").write_text("file,label\na.jpg,x\n", encoding=encoding)
        with pytest.raises(SourceError, match="is text in UTF-16, which is not read: save it as UTF-8"):
            from_csv(tmp_path / "list.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(SourceError, match="not a regular file"):
        from_csv(tmp_path / "pipe.csv")
    for name, read in (("grown.csv", from_csv), ("grown.jsonl", from_file)):
        grown(tmp_path / name)
        with pytest.raises(SourceError, match="line 1 has more than 16,777,216 bytes, which is no row"):
            read(tmp_path / name)
    for name, message in (("a.xlsx", "is a workbook, which is not read: save its sheet as CSV"), ("a.txt", "no list")):
        with pytest.raises(SourceError, match=message):
            lists.check_kind(name)


def test_missing_csv_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no CSV file at .*none\.csv"):
        from_csv(tmp_path / "none.csv")


def test_pandas_and_arrow_give_the_same_table() -> None:
    frame = pd.DataFrame({"file": [Path("b.jpg"), Path("a.jpg")], "n": [1, 2]}, index=[7, 9])
    arrow = pa.table({"n": [1, 2], "file": ["b.jpg", "a.jpg"]})
    one = from_table(frame, path_column="file", root="/data")
    two = from_table(arrow, path_column="file", root="/data")
    assert one.rows.to_pydict() == two.rows.to_pydict() == {"path": ["b.jpg", "a.jpg"], "n": [1, 2]}
    with pytest.raises(SourceError, match="no column 'path'; it has file, n"):
        from_table(frame, path_column="path", root="/data")
    with pytest.raises(SourceError, match="no usable path in row 2"):
        from_table(pd.DataFrame({"file": ["a.jpg", None]}), path_column="file", root="/data")


def test_a_first_column_that_holds_no_paths_is_told_with_the_one_that_does(tmp_path: Path) -> None:
    frame = pd.DataFrame({"file": [f"{i}.jpg" for i in range(3)], "n": [5, 3, 4]})
    message = r"the first column of .*, '.*', counts rows \(.*\), as pandas' index does, .*--path-column file\)"
    for table in (frame, frame.set_index("n", drop=False).rename_axis("index")):
        table.to_csv(tmp_path / "list.csv")
        with pytest.raises(SourceError, match=message):
            from_csv(tmp_path / "list.csv")
        assert paths(from_csv(tmp_path / "list.csv", path_column="file")) == ["0.jpg", "1.jpg", "2.jpg"]
    pq.write_table(pa.Table.from_pandas(frame[["n", "file"]]), tmp_path / "list.parquet")
    frame.rename(columns={"file": "path"}).to_csv(tmp_path / "list.csv")
    with pytest.raises(SourceError, match=r"counts rows \(.*\), as pandas' index does, .*--path-column path\)"):
        from_csv(tmp_path / "list.csv")
    with pytest.raises(SourceError, match=r"column 'n' of .* holds int64 and no paths: .*--path-column file\)"):
        from_file(tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text("id,label\n0,x\n1,y\n")  # names of files, as far as a suffix says so
    assert paths(from_csv(tmp_path / "list.csv", suffix=".jpg")) == ["0.jpg", "1.jpg"]
    picture = [{"bytes": b"\xff\xd8" * 50_000, "path": "a.jpg"}]
    for table in (pa.table({"image": picture}), pd.DataFrame({"image": picture})):
        with pytest.raises(
            SourceError, match=r"'image' .* holds struct<bytes: binary, path: string>, the pictures them"
        ):
            from_table(table, root=tmp_path)


def test_backslashes_are_slashes_unless_a_file_has_one_in_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.jpg", r"b\c.jpg")
    assert paths(from_csv(_csv(tmp_path, ["photos\\a.jpg", "x\\b.jpg"]))) == ["photos/a.jpg", "x/b.jpg"]
    assert paths(from_csv(_csv(tmp_path, [r"b\c.jpg"]))) == [r"b\c.jpg"]
    with pytest.raises(SourceError, match=r"a path of Windows in row 1 \(C:\\me\\a\.jpg\), and that drive is not here"):
        from_csv(_csv(tmp_path, [r"C:\me\a.jpg"]))


def test_values_are_quoted_in_one_line_of_80_characters(tmp_path: Path) -> None:
    long = "x" * 100_000 + ".jpg"
    for names, column in ((["s3://box/" + long, "/b.jpg"], None), ([long, long], None), (["a.jpg", ""], "y" * 100_000)):
        with pytest.raises(SourceError) as caught:
            from_csv(_csv(tmp_path, names), path_column=column)
        assert len(str(caught.value)) < 500
    assert quoted("a\x1b[31m\n") == r"a\x1b[31m\n"
    assert (len(quoted("x" * 81)), quoted("x" * 80)) == (80, "x" * 80)
    assert len(quoted({"bytes": b"\xff" * 100_000})) <= 80
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"


def test_lists_come_labelled() -> None:
    single = from_lists(["a.jpg", Path("b.jpg")], [1, 0], root="/data")
    assert (single.task, single.rows["label"].to_pylist()) == ("single_label", ["1", "0"])
    multi = from_lists(["a.jpg", "b.jpg"], [("x", "y"), []], root="/data")
    assert (multi.task, multi.rows["label"].to_pylist()) == ("multi_label", [["x", "y"], []])
    with pytest.raises(SourceError, match="2 paths but 1 labels"):
        from_lists(["a.jpg", "b.jpg"], ["x"], root="/data")
    with pytest.raises(LabelError, match=r"1 of 2 images one text \(a\.jpg\) where multi_label needs a list"):
        from_lists(["a.jpg", "b.jpg"], ["x", ["y"]], root="/data")


def test_lists_without_labels_are_to_be_labelled_yet() -> None:
    table = from_lists([Path("/data/a.jpg"), "/data/x/b.jpg"])
    assert (table.root, paths(table), table.task) == ("/data", ["a.jpg", "x/b.jpg"], None)


def test_lists_hold_masks_and_points_when_asked() -> None:
    masks = from_lists(["a.jpg"], ["m/./a.png"], root="/data", task="mask", classes=("back", "pet"))
    assert (masks.task, masks.rows["label"].to_pylist(), masks.values) == ("mask", ["m/a.png"], (0, 1))
    points = from_lists(["a.jpg"], [[(1, 2), None]], root="/data", task="points", classes=("eye", "tail"))
    assert repr(points.rows["label"].to_pylist()) == "[[1.0, 2.0, nan, nan]]"
    assert points.classes == ("eye", "tail")


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


def _csv(folder: Path, names: list[str]) -> Path:
    (folder / "list.csv").write_text("\n".join(["file", *names]))
    return folder / "list.csv"


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
        (["a.jpg"], None, r"the list of paths has relative paths and no root: they lead nowhere; give root"),
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
