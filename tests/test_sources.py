"""Are images listed and labelled as the folder, the CSV or the function says?"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

import dataio.labels as labels
from dataio.errors import LabelError, SourceError
from dataio.labels import label
from dataio.sources import Table, absolute, from_csv, from_folder, from_lists, from_table


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def paths(table: Table) -> list[str]:
    return table.rows["path"].to_pylist()


def listed(*names: str, root: str = "/data") -> Table:
    return Table(pa.table({"path": list(names)}), Path(root))


# --- from_folder


def test_folder_lists_images_in_code_point_order_and_nothing_hidden(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.JPG", "a.png", "B.Tiff", "b/10.jpeg", "notes.txt", ".x.jpg", ".git/y.jpg", "ä/z.webp")
    table = from_folder(tmp_path)
    assert paths(table) == ["B.Tiff", "a.png", "b/10.jpeg", "b/2.JPG", "ä/z.webp"]
    assert table.root == tmp_path.resolve()
    assert table.task is None


def test_folder_takes_other_extensions_in_any_spelling(tmp_path: Path) -> None:
    touch(tmp_path, "a.ppm", "b.jpg", "cppm")
    assert paths(from_folder(tmp_path, extensions=["PPM"])) == ["a.ppm"]


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
    touch(tmp_path, "x/a.txt", "x/b.TXT", "x/c", "x/d.gif")
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


# --- from_csv, from_table, from_lists


def test_csv_keeps_order_and_text(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("\ufefffile,label,n\nb.jpg,007,1\na.jpg,NA,\n", encoding="utf-8")
    table = from_csv(tmp_path / "list.csv")
    assert table.rows.to_pydict() == {"path": ["b.jpg", "a.jpg"], "label": ["007", "NA"], "n": ["1", ""]}
    assert table.root == tmp_path.resolve()


def test_csv_path_column_root_and_tab(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("label\tname\ncat\t./x//a.jpg\ndog\t../b.jpg\ncow\t/data/c.jpg\n")
    table = from_csv(tmp_path / "list.tsv", path_column="name", root="/data/pets")
    assert table.rows.column_names == ["path", "label"]
    assert paths(table) == ["x/a.jpg", "/data/b.jpg", "/data/c.jpg"]
    full = absolute(table.root, table.rows["path"]).to_pylist()
    assert full == ["/data/pets/x/a.jpg", "/data/b.jpg", "/data/c.jpg"]
    (tmp_path / "list.csv").write_text("name;label\na.jpg;cat\n")
    assert paths(from_csv(tmp_path / "list.csv", delimiter=";")) == ["a.jpg"]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", None, "cannot be read as CSV"),
        ("path,label\n", None, "has no rows"),
        ("path,label\na.jpg,x,y\n", None, "Expected 2 columns, got 3"),
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


def test_lists_come_labelled() -> None:
    single = from_lists(["a.jpg", Path("b.jpg")], [1, 0], root="/data")
    assert (single.task, single.rows["label"].to_pylist()) == ("single_label", ["1", "0"])
    multi = from_lists(["a.jpg", "b.jpg"], [("x", "y"), []], root="/data")
    assert (multi.task, multi.rows["label"].to_pylist()) == ("multi_label", [["x", "y"], []])
    with pytest.raises(SourceError, match="2 paths but 1 labels"):
        from_lists(["a.jpg", "b.jpg"], ["x"], root="/data")
    with pytest.raises(SourceError, match="mix texts and lists"):
        from_lists(["a.jpg", "b.jpg"], ["x", ["y"]], root="/data")


# --- labels


def test_parent_regex_and_function_label_as_they_say() -> None:
    table = listed("cats/tom_1.jpg", "deep/dogs/rex_dog_22.jpg")
    for labeller, expected in (
        (labels.by_parent(), ["cats", "dogs"]),
        (labels.by_regex(r"(.+)_\d+\.jpg$"), ["tom", "rex_dog"]),
        (labels.by_regex(r"\d+"), ["1", "22"]),
        (labels.by_function(lambda row: str(len(row["path"]))), ["14", "24"]),
    ):
        labelled = label(table, labeller)
        assert labelled.rows["label"].to_pylist() == expected
        assert labelled.task == "single_label"
    assert table.rows.column_names == ["path"]


def test_regex_sees_the_file_name_only() -> None:
    with pytest.raises(LabelError, match="none of the 2 images"):
        label(listed("cat_1/a.jpg", "dog_2/b.jpg"), labels.by_regex(r"_\d"))


def test_column_gives_one_label_or_several() -> None:
    rows = pa.table({"path": ["a", "b", "c"], "label": ["007", "7", "8"], "tags": ["x; y;", "", " z "], "n": [1, 2, 3]})
    table = Table(rows, Path("/data"))
    assert label(table, labels.by_column("label")).rows["label"].to_pylist() == ["007", "7", "8"]
    assert label(table, labels.by_column("n")).rows["label"].to_pylist() == ["1", "2", "3"]
    multi = label(table, labels.by_column("tags", delimiter=";"))
    assert multi.rows["label"].to_pylist() == [["x", "y"], [], ["z"]]
    assert multi.rows.schema.field("label").type == pa.list_(pa.string())
    assert multi.task == "multi_label"
    assert multi.rows.column_names == ["path", "tags", "n", "label"]


def test_pattern_that_matches_nothing_names_itself_and_three_files() -> None:
    table = listed(*(f"d/{i}.jpg" for i in range(5)))
    with pytest.raises(LabelError, match=re.escape("by_regex('(cat)')")) as caught:
        label(table, labels.by_regex("(cat)"))
    assert "tried 0.jpg, 1.jpg, 2.jpg)" in str(caught.value)


def test_rows_without_a_label_are_counted_and_named() -> None:
    with pytest.raises(LabelError, match=r"2 of 3 images no label \(b\.jpg, c\.jpg\)"):
        label(listed("x/a.jpg", "b.jpg", "c.jpg"), labels.by_parent())


def test_one_class_only_is_named_unless_multi_label() -> None:
    with pytest.raises(LabelError, match="one class only: all 2 images are 'cat'"):
        label(listed("cat/a.jpg", "cat/b.jpg"), labels.by_parent())
    assert label(listed("a", "b"), labels.by_function(lambda row: ["cat"])).task == "multi_label"
    with pytest.raises(LabelError, match="none of the 2 images"):
        label(listed("a", "b"), labels.by_function(lambda row: []))


def test_other_label_mistakes_are_sentences() -> None:
    table = listed("a.jpg", "b.jpg")
    with pytest.raises(LabelError, match=r"missing \), unterminated subpattern"):
        labels.by_regex("(.+")
    with pytest.raises(LabelError, match="no column 'breed' to take labels from; there are path"):
        label(table, labels.by_column("breed"))
    with pytest.raises(LabelError, match="delimiter '' separates nothing"):
        labels.by_column("tags", delimiter="")
    with pytest.raises(LabelError, match=r"some images a list and others one text \(a\.jpg\)"):
        label(table, labels.by_function(lambda row: "x" if row["path"] == "a.jpg" else ["x"]))
    with pytest.raises(LabelError, match=r"by_function\(<lambda>\) failed on a\.jpg with KeyError\('nope'\)"):
        label(table, labels.by_function(lambda row: row["nope"]))
