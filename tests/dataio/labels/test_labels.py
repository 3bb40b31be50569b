"""Is every image called what the folder, the name, the column or the function says, and every mistake by its name?"""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from thawline.dataio.errors import LabelError, SourceError
from thawline.dataio.labels import labels
from thawline.dataio.labels.labels import from_lists, label
from thawline.dataio.table.sources import Table

NAN = math.nan


def listed(*names: str, root: str = "/data", **columns: Any) -> Table:
    return Table(pa.table({"path": list(names), **columns}), root)


def given(table: Table) -> list[Any]:
    return table.rows["label"].to_pylist()


# --- single_label, multi_label


def test_parent_regex_and_function_label_as_they_say() -> None:
    table = listed("cats/tom_1.jpg", "deep/dogs/rex_dog_22.jpg")
    for labeller, expected in (
        (labels.by_parent(), ["cats", "dogs"]),
        (labels.by_regex(r"(.+)_\d+\.jpg$"), ["tom", "rex_dog"]),
        (labels.by_regex(r"\d+"), ["1", "22"]),
        (labels.by_regex(r"^(\w+)/", whole_path=True), ["cats", "deep"]),
        (labels.by_function(lambda row: str(len(row["path"]))), ["14", "24"]),
    ):
        labelled = label(table, labeller)
        assert given(labelled) == expected
        assert (labelled.task, labelled.classes, labelled.values) == ("single_label", None, None)
    assert table.rows.column_names == ["path"]
    assert given(label(table, lambda row: row["path"][0])) == ["c", "d"], "a bare function will do"


def test_regex_sees_the_file_name_only() -> None:
    with pytest.raises(LabelError, match="none of the 2 images"):
        label(listed("cat_1/a.jpg", "dog_2/b.jpg"), labels.by_regex(r"_\d"))


def test_column_gives_one_label_or_several() -> None:
    table = listed("a", "b", "c", label=["007", "7", "8"], tags=["x; y;", "", " z "], n=[1, 2, 3])
    assert given(label(table, labels.by_column("label"))) == ["007", "7", "8"]
    assert given(label(table, labels.by_column("n"))) == ["1", "2", "3"]
    multi = label(table, labels.by_column("tags", delimiter=";"))
    assert given(multi) == [["x", "y"], [], ["z"]]
    assert multi.rows.schema.field("label").type == pa.list_(pa.string())
    assert multi.task == "multi_label"
    assert multi.rows.column_names == ["path", "tags", "n", "label"]


def test_sets_and_arrays_are_several_labels_in_one_order() -> None:
    table = listed("a", "b")
    answers = {"a": {"y", "x", "w"}, "b": np.array([3, 1])}
    assert given(label(table, labels.by_function(lambda row: answers[row["path"]]))) == [["w", "x", "y"], ["3", "1"]]


def test_pattern_that_matches_nothing_names_itself_and_three_files() -> None:
    table = listed(*(f"d/{i}.jpg" for i in range(5)))
    with pytest.raises(LabelError, match=re.escape("by_regex('(cat)')")) as caught:
        label(table, labels.by_regex("(cat)"))
    assert "tried 0.jpg, 1.jpg, 2.jpg)" in str(caught.value)


def test_rows_without_a_label_are_counted_and_named() -> None:
    with pytest.raises(LabelError, match=r"2 of 3 images no label \(b\.jpg, c\.jpg\)"):
        label(listed("x/a.jpg", "b.jpg", "c.jpg"), labels.by_parent())


def test_one_class_only_is_named_unless_multi_label_or_in_a_given_vocabulary() -> None:
    cats = listed("cat/a.jpg", "cat/b.jpg")
    with pytest.raises(LabelError, match="one class only: all 2 images are 'cat'"):
        label(cats, labels.by_parent())
    assert label(cats, labels.by_parent(), classes=("cat", "dog")).classes == ("cat", "dog")
    assert label(listed("a", "b"), labels.by_function(lambda row: ["cat"])).task == "multi_label"
    with pytest.raises(LabelError, match="none of the 2 images"):
        label(listed("a", "b"), labels.by_function(lambda row: []))


def test_labels_outside_a_given_vocabulary_are_named() -> None:
    table = listed("a", "b", "c", tags=[["x"], ["x", "z"], ["y"]])
    assert label(table, labels.by_column("tags"), classes=("z", "y", "x")).classes == ("z", "y", "x")
    with pytest.raises(LabelError, match=r"gives 2 labels that are not among the 1 given classes \(y, z\)"):
        label(table, labels.by_column("tags"), classes=("x",))
    with pytest.raises(LabelError, match=r"the classes \(x, x\) repeat"):
        label(table, labels.by_column("tags"), classes=("x", "x"))
    with pytest.raises(LabelError, match="values are the pixel values of masks, and the task is multi_label"):
        label(table, labels.by_column("tags"), values=(1, 2))


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def test_names_that_differ_in_spaces_case_or_unicode_form_are_one_and_it_is_told() -> None:
    what = ["cat ", "cat", "Cat", "cat", "big\u00a0 dog", "big dog", NFD, NFC, "x", "X"]
    table = listed(*(f"{i}.jpg" for i in range(10)), what=what, tags=[[name, "y"] for name in what])
    oracle = ["cat", "cat", "cat", "cat", "big dog", "big dog", NFC, NFC, "x", "X"]
    made = label(table, labels.by_column("what"))
    assert given(made) == oracle
    assert made.notes == (
        r"WARNING: 4 class names of 4 images are normalised in spaces, case or Unicode form ('cat ' is 'cat'; 'Cat' is "
        r"'cat'; 'big\xa0 dog' is 'big dog'; ...); --classes keeps its own names apart",
        "WARNING: single letters in two cases are kept as classes of their own (X/x)",
    )
    assert given(label(table, labels.by_column("tags"))) == [[name, "y"] for name in oracle]
    assert label(listed("a", "b", "c", what=["cat", "dog", "Dogs"]), labels.by_column("what")).notes == ()


def test_a_given_vocabulary_has_its_own_spelling() -> None:
    table = listed("a", "b", "c", "d", what=["Cat", "cat", "dog ", NFC])
    kept = label(table, labels.by_column("what"), classes=("Cat", "cat", "DOG", NFD))
    assert given(kept) == ["Cat", "cat", "DOG", NFD]
    with pytest.raises(LabelError, match=r"1 labels that are not among the 3 given classes \(caf"):
        label(table, labels.by_column("what"), classes=("Cat", "cat", "DOG"))


def test_what_says_nothing_is_no_label_and_may_be_left_out() -> None:
    what = [1.0, NAN, 0.0, None, 1.0]
    table = listed(
        "a", "b", "c", "d", "e", what=what, text=["x", " ", "y", "", "nan"], tags=[["x"], [], ["y", None], None, ["z"]]
    )
    for column, missing, kept in (("what", "b, d", "ace"), ("text", "b, d", "ace"), ("tags", "c, d", "abe")):
        with pytest.raises(LabelError, match=rf"gives 2 of 5 images no label \({missing}\).*--skip-unlabelled"):
            label(table, labels.by_column(column))
        made = label(table, labels.by_column(column), skip_unlabelled=True)
        assert "".join(made.rows["path"].to_pylist()) == kept
        assert made.notes[0] == (
            f"WARNING: 2 of 5 images are left out, since by_column('{column}') gives them no label ({missing})"
        )
    assert given(label(table, labels.by_column("what"), skip_unlabelled=True)) == ["1.0", "0.0", "1.0"]
    told = label(table, labels.by_column("text"), skip_unlabelled=True).notes[1]
    assert told.startswith("WARNING: 1 images have the class 'nan', which looks like a missing value")
    with pytest.raises(LabelError, match="none of the 1 images"):
        label(listed("a"), lambda row: None, skip_unlabelled=True)
    points = label(
        listed("a", "b"),
        lambda row: [(NAN, NAN)] if row["path"] == "a" else [(1, 2)],
        task="points",
        skip_unlabelled=True,
    )
    assert (points.rows.num_rows, points.notes) == (2, ())


def test_a_label_that_is_no_text_is_told_by_its_kind() -> None:
    for value, kind in ((b"\xff" * 100_000, "bytes"), ({"bytes": b"\xff" * 100_000}, "dict")):
        with pytest.raises(LabelError, match=rf"gives a a label of kind {kind} \(.*\): classes are texts") as caught:
            label(listed("a", "b"), lambda row: value)  # noqa: B023
        assert len(str(caught.value)) < 300


def test_a_list_of_one_column_may_have_another_separator() -> None:
    with pytest.raises(
        LabelError, match=r"no column 'what' .*; there is none but that of the paths: .*\(--separator\)"
    ):
        label(listed("a b"), labels.by_column("what"))


def test_a_label_of_two_lines_is_refused_with_its_row() -> None:
    table = listed("a.jpg", "b.jpg", what=["x", "2\nphotos/c.jpg,1\n"])
    with pytest.raises(
        LabelError, match=r"gives b\.jpg in row 2 a label with a line break \('2\\nphotos/c\.jpg,1\\n'\)"
    ):
        label(table, labels.by_column("what"))


def test_other_label_mistakes_are_sentences() -> None:
    table = listed("a.jpg", "b.jpg")
    with pytest.raises(LabelError, match=r"missing \), unterminated subpattern"):
        labels.by_regex("(.+")
    with pytest.raises(
        LabelError, match="no column 'breed' to take labels from; there are path, what: name one of these"
    ):
        label(listed("a.jpg", what=["x"]), labels.by_column("breed"))
    with pytest.raises(LabelError, match="delimiter '' separates nothing"):
        labels.by_column("tags", delimiter="")
    with pytest.raises(LabelError, match=r"gives 1 of 2 images one text \(a\.jpg\) where multi_label needs a list"):
        label(table, labels.by_function(lambda row: "x" if row["path"] == "a.jpg" else ["x"]))
    with pytest.raises(LabelError, match=r"gives 2 of 2 images a list \(a\.jpg, b\.jpg\) where single_label needs one"):
        label(table, lambda row: ["x"], task="single_label")
    with pytest.raises(LabelError, match=r"by_function\(<lambda>\) failed on a\.jpg with KeyError\('nope'\)"):
        label(table, labels.by_function(lambda row: row["nope"]))
    with pytest.raises(LabelError, match=r"3 is not a function"):
        labels.by_function(3)  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="task 'boxes' is not known: give single_label, multi_label, number"):
        label(table, lambda row: "x", task="boxes")


# --- masks


def test_mask_paths_are_filled_in_and_lie_below_the_root_or_beside_it() -> None:
    table = listed("train/cat/a b.jpg", "c.d.jpg")
    for place, expected in (
        ("masks/{stem}_m.png", ["masks/a b_m.png", "masks/c.d_m.png"]),
        ("masks/{parent}/{name}.png", ["masks/train/cat/a b.jpg.png", "masks/c.d.jpg.png"]),
        ("../{stem}.png", ["/a b.png", "/c.d.png"]),
        ("/data/{stem}.png", ["a b.png", "c.d.png"]),
        (lambda row: Path("m") / row["path"][-5:], ["m/b.jpg", "m/d.jpg"]),
    ):
        made = label(table, labels.mask_path(place))
        assert given(made) == expected
        assert (made.task, made.classes, made.values) == ("mask", None, None)
    store = listed("x/a.jpg", root="s3://box/x")
    assert given(label(store, labels.mask_path("s3://box/x/m/{stem}.png"))) == ["m/a.png"]
    with pytest.raises(SourceError, match=r"not below the root s3://box/x \(\.\./a\.png\)"):
        label(store, labels.mask_path("../{stem}.png"))


def test_mask_classes_and_values_stand_for_each_other() -> None:
    table = listed("a.jpg", "b.jpg")
    options: dict[str, Any]
    for options, classes, values in (
        ({"classes": ("back", "pet")}, ("back", "pet"), (0, 1)),
        ({"values": (0, 255)}, ("0", "255"), (0, 255)),
        ({"classes": ("pet", "back"), "values": (255, 0)}, ("pet", "back"), (255, 0)),
    ):
        made = label(table, labels.mask_path("{stem}.png"), **options)
        assert (made.classes, made.values) == (classes, values)
    for options, message in (
        ({"classes": ("a",), "values": (0, 1)}, "1 classes but 2 values"),
        ({"values": (0, 256)}, r"values \[0, 256\] are not the pixel values"),
        ({"values": (1, 1)}, r"values \[1, 1\] are not"),
        ({"values": ()}, r"values \[\] are not"),
    ):
        with pytest.raises(LabelError, match=message):
            label(table, labels.mask_path("{stem}.png"), **options)


@pytest.mark.parametrize("place", ["masks/{}.png", "{file}.png", "{stem", "{stem.x}.png"])
def test_a_template_that_cannot_be_filled_is_told(place: str) -> None:
    with pytest.raises(LabelError, match=r"cannot be filled .*its placeholders are \{parent\}, \{name\}, \{stem\}"):
        labels.mask_path(place)


def test_a_mask_that_is_missing_is_no_label() -> None:
    with pytest.raises(LabelError, match=r"mask_path\(<lambda>\) gives 1 of 2 images no label \(b\.jpg\)"):
        label(listed("a.jpg", "b.jpg"), labels.mask_path(lambda row: "m.png" if row["path"] == "a.jpg" else None))


# --- points


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (("left_x", "left_y", "right_x", "right_y"), ("left", "right")),
        (("X_nose", "Y_nose"), ("nose",)),
        (("eye.x.left", "eye.y.left"), ("eye..left",)),
        (("x0", "y0", "x1", "y1"), ("0", "1")),
        (("x", "y"), ("point 0",)),
        (("a", "b", "tail_x", "tail_y"), ("point 0", "tail")),
        (("a_x", "a_y", "ax", "ay"), ("point 0", "point 1")),
    ],
)
def test_columns_name_their_points(columns: tuple[str, ...], names: tuple[str, ...]) -> None:
    values: dict[str, Any] = {name: [float(i)] for i, name in enumerate(columns)}
    table = listed("a.jpg", **values)
    made = label(table, labels.points_by_columns(columns))
    assert (made.task, made.classes) == ("points", names)
    assert given(made) == [[float(i) for i in range(len(columns))]]
    assert made.rows.schema.field("label").type == pa.list_(pa.float32())


def test_cells_of_text_are_numbers_and_empty_ones_points_that_are_not_there() -> None:
    table = listed("a.jpg", "b.jpg", x=["1.5", ""], y=["2", ""])
    assert repr(given(label(table, labels.points_by_columns(("x", "y"))))) == "[[1.5, 2.0], [nan, nan]]"


def test_images_may_show_different_numbers_of_points() -> None:
    answers: dict[str, Any] = {
        "a.jpg": [(1, 2), (3, 4)],
        "b.jpg": np.array([[5.0, 6.0]]),
        "c.jpg": [None, (7, 8), (NAN, NAN)],
        "d.jpg": [],
    }
    ask = labels.points_by_function(lambda row: answers[row["path"]])
    made = label(listed(*answers), ask)
    assert repr(given(made)) == "[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0], [nan, nan, 7.0, 8.0, nan, nan], []]"
    assert made.classes == ("point 0", "point 1", "point 2")
    assert label(listed(*answers), ask, classes=("a", "b", "c", "d")).classes == ("a", "b", "c", "d")
    with pytest.raises(LabelError, match=r"gives 1 images more than the 2 named points \(c\.jpg\)"):
        label(listed(*answers), ask, classes=("a", "b"))


def test_a_column_or_list_of_numbers_or_pairs_is_points_when_asked() -> None:
    flat, pairs = [[1.0, 2.0, 3.0, 4.0], []], [[[1.0, 2.0], [3.0, 4.0]], []]
    for column in (flat, pairs):
        table = listed("a.jpg", "b.jpg", where=column)
        assert given(label(table, labels.by_column("where"), task="points")) == flat
        assert given(from_lists(["a.jpg", "b.jpg"], column, root="/data", task="points")) == flat
    text = listed("a.jpg", where=["1 2  3 4"])
    assert given(label(text, labels.by_column("where", delimiter=" "), task="points")) == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2, 3], r"a\.jpg what is not a list of points \(3 numbers are no pairs\)"),
        ([(1, 2, 3)], "3 numbers are no pairs"),
        ([(1, NAN)], r"\(1\.0, nan\) is not a point"),
        ([(1, math.inf)], r"\(1\.0, inf\) is not a point"),
        ([(1e300, 1)], r"\(1e\+300, 1\.0\) is not a point"),  # infinite as float32
        ([("one", 2)], "could not convert string to float: 'one'"),
        ("1 2", r"'1 2' is not a list"),
        (5, "5 is not a list"),
        (None, r"gives 1 of 1 images no label \(a\.jpg\)"),
        ([None], "gives none of the 1 images a point"),
    ],
)
def test_what_is_no_list_of_points_is_told(answer: Any, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        label(listed("a.jpg"), labels.points_by_function(lambda row: answer))


def test_pairs_of_points_are_names_of_two_each_once() -> None:
    cells: Any = {f"{name}_{axis}": [1.0] for name in ("nose", "left", "right", "tail") for axis in "xy"}
    table = listed("a.jpg", **cells)
    names = labels.points_by_columns([column for column in table.rows.column_names if column != "path"])
    assert label(table, names).swap is None
    assert label(table, names, swap=[]).swap == ()
    assert label(table, names, swap=[("tail", "nose"), ("right", "left")]).swap == (("nose", "tail"), ("left", "right"))
    for swap, message in (
        ([("left", "ear")], r"'ear' is not among the 4 points \(nose, left, right, tail\)"),
        ([("left", "left")], "'left,left' is not a pair"),
        ([("left", "right"), ("nose", "left")], "'left' is in two pairs"),
        (["ab"], "'ab' is not a pair"),
    ):
        with pytest.raises(LabelError, match=rf"swap cannot be used \({message}.*\): .* name two points"):
            label(table, names, swap=swap)  # type: ignore[arg-type]
    with pytest.raises(LabelError, match=r"swap names points .*, and the task is single_label: leave it out"):
        label(listed("x/a.jpg", "y/b.jpg"), labels.by_parent(), swap=[("x", "y")])


@pytest.mark.parametrize("columns", [(), ("x",), ("x", "y", "x", "y"), ("x", "y", "z")])
def test_columns_that_do_not_pair_up_are_told(columns: tuple[str, ...]) -> None:
    with pytest.raises(LabelError, match="do not pair up"):
        labels.points_by_columns(columns)
