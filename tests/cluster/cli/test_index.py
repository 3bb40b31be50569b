"""Do the words of `thawline index` say what they do: vocabularies, quarantine, duplicates, and mistakes in a sentence?

Which rows come of which words is test_data_block.py's question.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.kit.runs import thawline
from thawline.cluster.cli import main
from thawline.cluster.cli.index import described, make_manifest
from thawline.dataio.errors import DataError, LabelError, ManifestError, QuarantineError, SourceError, SplitError
from thawline.dataio.labels import counts
from thawline.dataio.labels.keypoints import UNPAIRED
from thawline.dataio.store.outputs import check_output
from thawline.dataio.table.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of cats and dogs, no two alike, and a list of them."""
    lines = ["file,what,tags,x,y"]
    for i in range(10):
        name = f"{('cat', 'dog')[i % 2]}/{i}.png"
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (20 * i, 0, 99)).save(tmp_path / "in" / name)
        lines.append(f"{name},{i % 3},a;{i % 2},{i},{i + 1}")
    (tmp_path / "in" / "rows.csv").write_text("\n".join(lines))
    return tmp_path / "in"


@pytest.mark.slow
def test_a_whole_command_in_a_process_of_its_own_tells_of_copies_on_both_sides(folder: Path, tmp_path: Path) -> None:
    (folder / "valid").mkdir()
    shutil.copy(folder / "cat" / "2.png", folder / "valid" / "copy.png")
    out = tmp_path / "deep" / "m.arrow"
    words = ("--label", r"path-regex:^(\w).*\d?\.png", "--valid", "folder:valid", "--test", "folder:dog")
    done = thawline("index", folder, *words, "--out", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert done.stderr.startswith("11 images: 5 train, 1 valid, 5 test\n3 classes (single_label): c, d, v\n")
    assert "WARNING: 1 images of valid are also in train (valid/copy.png = cat/2.png)" in done.stderr
    assert Manifest.load(out).rows["label"].to_pylist() == [*"ccccc", *"ddddd", "v"]
    assert [path.name for path in out.parent.iterdir()] == ["m.arrow"]


@pytest.mark.slow
def test_the_command_tells_of_classes_by_side_and_of_what_it_left_out(tmp_path: Path) -> None:
    for side, name, count in (("train", "cat", 4), ("valid", "cat", 2), ("valid", "dog", 2), ("train", "Owl ", 1)):
        for i in range(count):
            file = tmp_path / "in" / side / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 6), (20 * i, ord(name[0]), ord(side[0]))).save(file)
    (tmp_path / "in" / "train" / "cat" / "@eaDir").mkdir()
    shutil.copy(tmp_path / "in" / "train" / "cat" / "0.png", tmp_path / "in" / "train" / "0.png")
    shutil.copy(tmp_path / "in" / "valid" / "dog" / "0.png", tmp_path / "in" / "valid" / "cat" / "9.png")
    (tmp_path / "in" / "train" / "dog").mkdir()
    (tmp_path / "in" / "train" / "dog" / "0.heic").touch()
    words = ("--label", r"path-regex:/(.+)/", "--valid", "folder:valid", "--skip-unlabelled")
    done = thawline("index", tmp_path / "in", *words, "--out", tmp_path / "m.parquet")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-13:] == [
        f"root {tmp_path}/in",
        "           train      valid",
        "  cat          4          3",
        "  dog          0          2",
        "  Owl          1          0",
        "WARNING: skipped 1 hidden or system folders (1 @eaDir): nothing in them is indexed",
        "WARNING: 1 files are left out for their endings (1 .heic): no image is left of train/dog/; if they are "
        "images, convert or rename them, or name their endings with --extensions",
        "WARNING: 1 of 11 images are left out, since by_regex('/(.+)/') gives them no label (0.png)",
        "WARNING: 1 class names of 1 images are normalised in spaces, case or Unicode form ('Owl ' is 'Owl'); "
        "--classes keeps its own names apart",
        "WARNING: no training images of 1 of 3 classes (dog): they cannot be learned; give more images of them",
        "WARNING: no validation images of 1 of 3 classes (Owl): they are measured by no metric; give more images of "
        "them",
        "WARNING: 1 files have copies with different labels (valid/cat/9.png (cat) = valid/dog/0.png (dog)): they "
        "teach and test both; keep the right one of each",
        "copies within one split: 1 in valid",
    ]


def test_of_many_classes_the_largest_and_the_smallest_are_shown() -> None:
    names = tuple(f"c{i:02}" for i in range(30))
    shown = counts.table({"train": np.arange(30), "valid": np.ones(30, np.int64)}, names)
    assert [line.split()[0] for line in shown[1:]] == [*reversed(names[20:]), "...", *reversed(names[:10])]
    assert shown[11] == "  ... 10 more ..."
    assert [line.split() for line in counts.table({"test": np.array([1, 1000])}, ("a", "b\x1b"))] == [
        ["test"],
        [r"b\x1b", "1,000"],
        ["a", "1"],
    ]


def test_a_rule_that_makes_a_class_an_image_is_told(folder: Path) -> None:
    made = make_manifest(folder, label="regex:(.+)")
    assert "10 images have 10 classes, 1.0 images a class: the rule of --label seems" in described(made)
    assert "no training images of 2 of 10 classes (" in described(made)
    assert "no validation images of 8 of 10 classes (" in described(made)
    assert "WARNING" not in described(make_manifest(folder, valid="stratified:0.2"))
    told = described(make_manifest(folder, valid="folder:dog"))  # five of each, so that a fifth is one
    assert "no training images of 1 of 2 classes (dog): they cannot be learned; divide by class (--valid strat" in told
    tests_only = make_manifest(folder, classes="cat,dog,owl", test="all")
    assert "WARNING" not in described(tests_only), "a test needs neither"


def test_nothing_but_another_manifest_is_written_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pa.table({"path": [f"{('cat', 'dog')[i % 2]}/{i}.png" for i in range(10)], "what": list("ababababab")})
    pq.write_table(rows, folder / "labels.parquet")
    (folder / "mine.parquet").write_bytes(b"PAR1 and something of mine")
    with pa.ipc.new_file(str(folder / "mine.arrow"), rows.schema) as sink:
        sink.write_table(rows)
    manifest = make_manifest(folder)
    manifest.save(folder / "in.parquet")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for source, label, out, why in (
        ("labels.parquet", "column:what", "labels.parquet", "is what the manifest is made from"),
        ("in.parquet", "column:label", "in.parquet", "is what the manifest is made from"),
        ("rows.csv", "column:what", "rows.csv", r"does not end in .parquet or .arrow"),
        ("labels.parquet", "column:what", "cat/0.png", r"does not end in .parquet or .arrow"),
        ("labels.parquet", "column:what", "mine.parquet", "exists and is no thawline manifest"),
        ("labels.parquet", "column:what", "mine.arrow", "exists and is no thawline manifest"),
    ):
        words = ["thawline", "index", str(folder / source), "--label", label, "--out", str(folder / out)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        assert (stop.value.code, said.out) == (1, "")
        assert said.err.lstrip().startswith(f"thawline: {folder / out} {why}")
    for name in ("mine.parquet", "mine.arrow"):
        with pytest.raises(ManifestError, match="exists and is no thawline manifest: it is not written over"):
            manifest.save(folder / name)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_place_where_nothing_can_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file" / "m.parquet", "file is no folder that this user may write"),
        ("a\0.arrow", "NUL"),
    ):
        with pytest.raises(ManifestError, match=message):
            check_output(out)
    with pytest.raises(SourceError, match="holds a NUL"):
        make_manifest("a\0b")


def test_an_older_manifest_is_replaced_and_what_a_kill_left_of_it_removed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".m.parquet.0123456789ab.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    for name, valid in (("m.parquet", "0.3"), ("m.parquet", "0.5"), ("m.arrow", "0.3"), ("m.arrow", "0.5")):
        make_manifest(folder, valid=valid).save(tmp_path / name)
        assert len(Manifest.load(tmp_path / name).subset("valid")) == 10 * float(valid)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "in", "m.arrow", "m.parquet"]


def test_too_many_broken_files_are_refused_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    for name in ("0", "4"):
        (folder / "cat" / f"{name}.png").write_bytes(b"")
    with pytest.raises(QuarantineError, match=r"^2 of 10 files \(20\.0%\) cannot be used, and at most 1 may \(1\.0%\)"):
        make_manifest(folder).save(tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()
    assert make_manifest(folder, max_bad=0.2).quarantined().to_pylist() == [
        {"path": "cat/0.png", "status": "empty file"},
        {"path": "cat/4.png", "status": "empty file"},
    ]


def test_classes_come_from_words_a_text_file_or_another_manifest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\nowl, barn\n\ncat\n")
    for words, expected in (
        ("dog, cat,cow", ("dog", "cat", "cow")),
        (str(tmp_path / "names.txt"), ("dog", "owl, barn", "cat")),
    ):
        assert make_manifest(folder, classes=words).classes == expected
    one = make_manifest(folder, classes="dog,cow,cat")
    one.save(tmp_path / "one.parquet")
    other = make_manifest(folder / "dog", label=r"regex:(?=(\d))", classes="1,3,5,7,9,11", test="all")
    with pytest.raises(ManifestError, match=r"other classes than this one \(-dog, -cow, -cat, \+1"):
        one.check_vocabulary(other)
    # all are dogs, which is enough where the classes are known, and all are for the test
    shutil.copytree(folder / "dog", tmp_path / "late" / "dog")
    late = make_manifest(tmp_path / "late", classes=str(tmp_path / "one.parquet"), test="all")
    one.check_vocabulary(late)
    assert len(late.subset("test")) == 5


def test_a_manifest_is_a_source_again_with_its_own_root(folder: Path, tmp_path: Path) -> None:
    make_manifest(folder, valid="0.3").save(tmp_path / "m.parquet")
    again = make_manifest(tmp_path / "m.parquet", label="column:label", valid="column:split", path_column="path")
    first = Manifest.load(tmp_path / "m.parquet")
    assert again.root == first.root
    assert again.rows.equals(first.rows)


def test_masks_without_classes_are_called_by_the_values_that_occur(folder: Path) -> None:
    (folder / ".masks").mkdir()
    for i in range(10):
        mask = Image.new("L", (9, 6), 0)
        mask.putpixel((1, 1), 255)
        mask.save(folder / ".masks" / f"{i}.png")
    assert make_manifest(folder, label="mask:.masks/{stem}.png").values == (0, 255)
    mask.putpixel((2, 2), 7)
    mask.save(folder / ".masks" / "9.png")
    made = make_manifest(folder, label="mask:.masks/{stem}.png")
    assert (made.values, made.classes) == ((0, 7), ("0", "7")), "beside others 255 is void"
    given = make_manifest(folder, label="mask:.masks/{stem}.png", values="255,0", classes="pet,back")
    assert (given.values, given.classes) == ((255, 0), ("pet", "back"))
    given.save(folder.parent / "given.parquet")
    same = make_manifest(folder, label="mask:.masks/{stem}.png", classes=str(folder.parent / "given.parquet"))
    assert (same.values, same.classes) == ((255, 0), ("pet", "back"))
    nothing = r"its mask \.masks/0\.png: no pixel has one of the values 1, 2"
    with pytest.raises(SplitError, match=rf"none of the 10 files .*\({nothing}\)"):
        make_manifest(folder, label="mask:.masks/{stem}.png", values="1,2")
    with pytest.raises(QuarantineError, match=r"^9 of 10 files .*: 9 its mask; the first"):
        make_manifest(folder, label="mask:.masks/{stem}.png", values="7,8")
    one = make_manifest(folder, label="mask:.masks/{stem}.png", values="7,8", max_bad=1, test="all")
    assert one.subset("test").ids.tolist() == [9], "a mask of void alone teaches nothing"


def test_pairs_of_points_come_from_words_or_from_another_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "eyes.csv").write_text("file,l_x,l_y,r_x,r_y\n" + "".join(f"cat/{i}.png,1,2,5,2\n" for i in (0, 2, 4, 6)))

    def made(*given: str, classes: str | None = None) -> Manifest:
        label = "points:l_x,l_y,r_x,r_y"
        return make_manifest(folder / "eyes.csv", label=label, valid="0.5", swap=given, classes=classes)

    def swap(*given: str, classes: str | None = None) -> object:
        return made(*given, classes=classes).swap

    assert f"root {folder}\n{UNPAIRED}" in described(made())
    paired = made("r, l")
    assert (paired.swap, UNPAIRED in described(paired)) == ((("l", "r"),), False)
    paired.save(tmp_path / "m.parquet")
    assert swap(classes=str(tmp_path / "m.parquet")) == (("l", "r"),)
    assert swap("none") == ()
    with pytest.raises(LabelError, match="--swap 'l' is not two names with a comma between"):
        swap("l")
    with pytest.raises(LabelError, match="'l' is in two pairs"):
        swap("l,r", "r,l")


def test_a_folder_can_be_looked_into_in_part(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "x.ppm").write_bytes(b"P6 1 1 255 abc")
    shutil.copy(folder / "cat" / "0.png", folder / "0.png")

    def paths(**options: object) -> list[str]:
        made = make_manifest(folder, label=r"path-regex:(\w)\.p", valid="0.5", **options)
        return made.rows["path"].to_pylist()

    dogs = [f"dog/{i}.png" for i in (1, 3, 5, 7, 9)]
    assert paths(folders=("dog",)) == dogs
    assert paths(folders=("cat",), extensions=("png,ppm",))[-1] == "cat/x.ppm"
    assert paths(extensions=("PNG",)) == ["0.png", *(f"cat/{i}.png" for i in (0, 2, 4, 6, 8)), *dogs]
    shutil.copy(folder / "cat" / "2.png", folder / "2.png")
    assert paths(recursive=False) == ["0.png", "2.png"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label": "parents"}, LabelError, r"--label 'parents' is not known: give parent, regex:PATTERN"),
        ({"label": "column:"}, LabelError, r"--label 'column:' is not known"),
        ({"label": "mask:all.png"}, LabelError, r"is one file for all images: put \{stem\}"),
        ({"label": "mask:{file}.png"}, LabelError, r"its placeholders are \{parent\}, \{name\}, \{stem\}"),
        ({"label": "points:x"}, LabelError, r"points_by_columns\(x\) has 1 columns that do not pair up"),
        ({"delimiter": ";"}, LabelError, r"--delimiter splits a column's value"),
        ({"values": "0,one"}, LabelError, r"--values '0,one' are not numbers"),
        ({"values": "0,1"}, LabelError, r"values are the pixel values of masks, and the task is single_label"),
        ({"classes": "cat,cow"}, LabelError, r"by_parent\(\) gives 1 labels that are not among the 2 .* \(dog\)"),
        ({"classes": "cat,dog,cat"}, LabelError, r"the classes \(cat, dog, cat\) repeat or lack a name"),
        ({"classes": "none.txt"}, LabelError, r"--classes none\.txt cannot be read"),
        ({"classes": "none.parquet"}, ManifestError, r"no manifest at none\.parquet"),
        ({"max_bad": math.nan}, SplitError, r"max_bad=nan is no share of the files"),
        ({"max_bad": -1}, SplitError, r"max_bad=-1 is no share of the files"),
        ({"valid": "some"}, SplitError, r"--valid 'some' is not known: give a fraction such as 0\.2"),
        ({"valid": "stratified:x"}, SplitError, r"--valid has 'x' for a fraction"),
        ({"valid": "fold:5/5"}, SplitError, r"there is no fold 5 of 5: .* give 0 to 4"),
        ({"valid": "fold:5"}, SplitError, r"--valid 'fold:5' is not known"),
        ({"valid": "0.6", "test": "0.4"}, SplitError, r"test=0\.4 beside valid=0\.6 leaves nothing to train on"),
        ({"test": "fold:0/5"}, SplitError, r"--test 'fold:0/5' is not known"),
        ({"root": "/x"}, SourceError, r"--root goes with a CSV or table, and .* is none"),
        ({"suffix": ".png", "column_names": ("a",)}, SourceError, r"--suffix and --column-names go with a CSV or"),
    ],
)
def test_words_that_mean_nothing_are_told(
    folder: Path, options: dict[str, str], error: type[DataError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_manifest(folder, **options)


def test_words_that_do_not_fit_a_list_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(LabelError, match=r"none\.txt holds no class: write one a line"):
        make_manifest(folder, classes=str(tmp_path / "none.txt"))
    with pytest.raises(SourceError, match=r"--folders and --no-recursive go with a folder, and .*rows\.csv is none"):
        make_manifest(folder / "rows.csv", folders=("cat",), recursive=False)
    make_manifest(folder, classes="cat,dog,a,0,1").save(tmp_path / "m.parquet")
    with pytest.raises(SourceError, match=r"--column-names goes with a CSV"):
        make_manifest(tmp_path / "m.parquet", column_names=("a", "b"))
    with pytest.raises(
        ManifestError, match=r"m\.parquet is for single_label and --label column:tags gives multi_label"
    ):
        make_manifest(folder / "rows.csv", label="column:tags", delimiter=";", classes=str(tmp_path / "m.parquet"))


def test_the_share_of_broken_files_that_is_allowed_is_rounded_up(folder: Path) -> None:
    (folder / "cat" / "0.png").write_bytes(b"text")
    assert len(make_manifest(folder).quarantined()) == 1, "one of a few is forgiven"
    with pytest.raises(QuarantineError, match=r"1 of 10 files \(10\.0%\) cannot be used, and at most 0 may \(0\.0%\)"):
        make_manifest(folder, max_bad=0)
    (folder / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(QuarantineError) as caught:
        make_manifest(folder)
    sentence = str(caught.value)
    assert "1 not an image, 1 empty file; the first are cat/0.png (not an image); dog/1.png (empty file)" in sentence
    assert "allow more with max_bad=0.2 (--max-bad 0.2)" in sentence
    assert len(make_manifest(folder, max_bad=0.2).quarantined()) == 2
