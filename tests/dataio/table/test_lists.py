"""Are lists of images read as they were meant: CSV, JSON lines, data frames, Python's own?"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from tests.kit.images import grown
from tests.kit.sources import _csv, paths, touch
from thawline.dataio.errors import LabelError, SourceError, listed, quoted
from thawline.dataio.labels.labels import from_lists
from thawline.dataio.store.root import Root
from thawline.dataio.table import lists
from thawline.dataio.table.sources import from_csv, from_file, from_table

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


def test_values_are_quoted_in_one_line_of_80_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thawline.dataio.store.root._open", lambda uri: (pafs.LocalFileSystem(), str(tmp_path)))
    long = "x" * 10_000 + ".jpg"
    for names, column in ((["s3://box/" + long, "/b.jpg"], None), ([long, long], None), (["a.jpg", ""], "y" * 10_000)):
        with pytest.raises(SourceError) as caught:
            from_csv(_csv(tmp_path, names), path_column=column)
        assert len(str(caught.value)) < 500
    assert quoted("a\x1b[31m\n") == r"a\x1b[31m\n"
    assert (len(quoted("x" * 81)), quoted("x" * 80)) == (80, "x" * 80)
    assert len(quoted({"bytes": b"\xff" * 10_000})) <= 80
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
