"""Does every source, with every label and every split, give the rows one would write by hand? And through the CLI?

The three tables below are the whole specification: what is listed, what each image is called, which side it is on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.kit.data_block import BY_FILE, COLUMNS, FILES, IMAGES, MASKS, POINTS, ROWS, arrow, frame, number
from thawline.cluster.cli import main
from thawline.dataio.labels import labels
from thawline.dataio.store import root
from thawline.dataio.table import draws, sources, splits
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import Table

STORE = "s3://box"  # looked up in a folder, see `place`


@dataclass(frozen=True)
class Source:
    """Where the rows come from: in Python below a base folder, and in words of the command line."""

    table: Callable[[Path], Table]
    words: tuple[str, ...] | None = None  # BASE stands for the folder
    columns: bool = True  # it has those of COLUMNS
    lists: bool = False  # its tags are lists


@dataclass(frozen=True)
class Label:
    """What the images are called: the labeller, its words, and by hand the task, the classes and eight labels."""

    labeller: labels.Labeller
    words: tuple[str, ...] | None
    task: str
    classes: tuple[str, ...]
    expected: list[Any]
    columns: bool = False  # it needs columns
    options: tuple[tuple[str, Any], ...] = ()
    lists: bool | None = None  # it needs tags as lists, or as texts


@dataclass(frozen=True)
class Split:
    """Which side the images are on: the splitter, its words, and by hand eight letters: train, valid, x for test."""

    splitter: draws.Splitter
    words: tuple[str, ...] | None
    expected: str
    columns: bool = False
    halves: bool = False  # by hand for labels that tell cats from dogs


FOLDERS = ["test", "train", "valid"]
SOURCES = {
    "folder": Source(lambda base: sources.from_folder(base, folders=FOLDERS), ("BASE", *IMAGES), columns=False),
    "file URI": Source(
        lambda base: sources.from_folder(f"file://{base}", folders=FOLDERS), ("file://BASE", *IMAGES), columns=False
    ),
    "store": Source(
        lambda base: sources.from_folder(f"{STORE}/pets", folders=FOLDERS), (f"{STORE}/pets", *IMAGES), columns=False
    ),
    "CSV": Source(lambda base: sources.from_csv(base / "rows.csv"), ("BASE/rows.csv",)),
    "CSV in a store": Source(lambda base: sources.from_csv(f"{STORE}/pets/rows.csv"), (f"{STORE}/pets/rows.csv",)),
    "CSV of URIs": Source(
        lambda base: sources.from_csv(base / "uris.csv", root=f"{STORE}/pets"),
        ("BASE/uris.csv", "--root", f"{STORE}/pets"),
    ),
    "CSV of bare names": Source(
        lambda base: sources.from_csv(base / "bare.csv", suffix=".png", column_names=COLUMNS),
        ("BASE/bare.csv", "--suffix", ".png", "--column-names", ",".join(COLUMNS)),
    ),
    "TSV": Source(
        lambda base: sources.from_csv(base / "deep" / "rows.tsv", path_column="file", root=base),
        ("BASE/deep/rows.tsv", "--path-column", "file", "--root", "BASE"),
    ),
    "Parquet": Source(lambda base: sources.from_file(base / "rows.parquet"), ("BASE/rows.parquet",), lists=True),
    "Arrow": Source(
        lambda base: sources.from_file(base / "rows.arrow", path_column="file"),
        ("BASE/rows.arrow", "--path-column", "file"),
        lists=True,
    ),
    "data frame": Source(lambda base: sources.from_table(frame(base), root=base), lists=True),
    "Arrow table": Source(
        lambda base: sources.from_table(arrow(base), path_column="file", root=base), None, lists=True
    ),
    "list": Source(lambda base: labels.from_lists([Path(file) for file in FILES], root=base), columns=False),
}

CATS = ["cat", "dog", "cat", "cat", "dog", "dog", "cat", "dog"]
SPECIES = ["felis", "canis", "felis", "felis", "canis", "canis", "felis", "canis"]
NAMES = ["tom", "rex", "tom", "tom", "rex", "rex", "tom", "rex"]
TAGS = [["soft", "old"], ["old"], [], ["soft"], ["old", "soft"], ["big"], ["soft"], ["old", "soft"]]
LABELS = {
    "parent": Label(labels.by_parent(), (), "single_label", ("cat", "dog"), CATS),
    "regex": Label(
        labels.by_regex(r"^(\w+)_\d"), ("--label", r"regex:^(\w+)_\d"), "single_label", ("rex", "tom"), NAMES
    ),
    "regex on the path": Label(
        labels.by_regex(r"^\w+/(\w)", whole_path=True),
        ("--label", r"path-regex:^\w+/(\w)"),
        "single_label",
        ("c", "d"),
        ["c", "d", "c", "c", "d", "d", "c", "d"],
    ),
    "column": Label(
        labels.by_column("species"),
        ("--label", "column:species"),
        "single_label",
        ("canis", "felis"),
        SPECIES,
        columns=True,
    ),
    "a given vocabulary": Label(
        labels.by_column("species"),
        ("--label", "column:species", "--classes", "felis,ursus,canis"),
        "single_label",
        ("felis", "ursus", "canis"),
        SPECIES,
        columns=True,
        options=(("classes", ("felis", "ursus", "canis")),),
    ),
    "delimiter": Label(
        labels.by_column("tags", delimiter=";"),
        ("--label", "column:tags", "--delimiter", ";"),
        "multi_label",
        ("big", "old", "soft"),
        TAGS,
        columns=True,
        lists=False,
    ),
    "column of lists": Label(
        labels.by_column("tags"),
        ("--label", "column:tags"),
        "multi_label",
        ("big", "old", "soft"),
        TAGS,
        columns=True,
        lists=True,
    ),
    "function": Label(
        labels.by_function(lambda row: number(row) > 2),
        None,
        "single_label",
        ("False", "True"),
        ["True", "True", "False", "False", "True", "True", "True", "True"],
    ),
    "function of several": Label(
        labels.by_function(lambda row: {"two"} if number(row) % 2 == 0 else set()),
        None,
        "multi_label",
        ("two",),
        [[], ["two"], [], ["two"], [], ["two"], [], ["two"]],
    ),
    "mask": Label(
        labels.mask_path("masks/{stem}.png"),
        ("--label", "mask:masks/{stem}.png", "--classes", "back,pet"),
        "mask",
        ("back", "pet"),
        MASKS,
        options=(("classes", ("back", "pet")),),
    ),
    "mask by function": Label(
        labels.mask_path(lambda row: Path("masks") / Path(row["path"]).name),
        None,
        "mask",
        ("0", "1"),
        MASKS,
        options=(("values", (0, 1)),),
    ),
    "mask by column": Label(
        labels.by_column("mask"),
        ("--label", "mask-column:mask", "--values", "0,1"),
        "mask",
        ("0", "1"),
        MASKS,
        columns=True,
        options=(("task", "mask"), ("values", (0, 1))),
    ),
    "points": Label(
        labels.points_by_columns(("ear_x", "ear_y", "tail_x", "tail_y")),
        ("--label", "points:ear_x,ear_y,tail_x,tail_y"),
        "points",
        ("ear", "tail"),
        POINTS,
        columns=True,
    ),
    "points by function": Label(
        labels.points_by_function(lambda row: BY_FILE[row["path"]]),
        None,
        "points",
        ("point 0", "point 1"),
        [*POINTS[:6], [], POINTS[7]],
    ),
}

# by the hash of seed 5 and their paths, the rows stand in the order 3 1 6 5 4 7 0 2
SPLITS = {
    "random": Split(draws.random_split(valid=0.25, seed=5), ("--valid", "0.25", "--seed", "5"), "tvtvtttt"),
    "random with a test": Split(
        draws.random_split(valid=0.25, test=0.3, seed=5),
        ("--valid", "0.25", "--test", "0.3", "--seed", "5"),
        "xvxvtttt",
    ),
    # cats stand in the order 3 6 0 2, dogs 1 5 4 7
    "stratified": Split(
        draws.stratified(valid=0.5, test=0.25, seed=5),
        ("--valid", "stratified:0.5", "--test", "0.25", "--seed", "5"),
        "tvxvtvvx",
        halves=True,
    ),
    "stratified twice": Split(
        draws.stratified(valid=0.25, test=0.5, seed=5),
        ("--valid", "stratified:0.25", "--test", "stratified:0.5", "--seed", "5"),
        "xvxvxttx",
        halves=True,
    ),
    "fold": Split(draws.k_fold(4, 1, seed=5), ("--valid", "fold:1/4", "--seed", "5"), "tttttvvt"),
    "stratified fold": Split(
        draws.k_fold(4, 1, seed=5, stratify=True),
        ("--valid", "stratified-fold:1/4", "--seed", "5"),
        "tttttvvt",
        halves=True,
    ),
    "column": Split(splits.by_column("side"), ("--valid", "column:side"), "xxttttvv", columns=True),
    "column of truths": Split(splits.by_column("is_valid"), ("--valid", "column:is_valid"), "tttvttvt", columns=True),
    "folder": Split(splits.by_folder(), ("--valid", "folder:valid"), "xxttttvv"),
    "folder by name": Split(
        splits.by_folder("dog", test="valid"), ("--valid", "folder:dog", "--test", "folder:valid"), "tvttvvxv"
    ),
    "function": Split(splits.by_function(lambda row: number(row) in (1, 8)), None, "tvvttttt"),
    "function of names": Split(
        splits.by_function(lambda row: {1: "valid", 2: "test", 3: None}.get(number(row), "train")), None, "ttvx-ttt"
    ),
    # the other rows stand in the order 3 6 5 4 7 2, and two are in fold 0 of 3
    "hold out": Split(
        splits.hold_out(splits.by_folder("test"), then=draws.k_fold(3, 0, seed=5)),
        ("--valid", "fold:0/3", "--test", "folder:test", "--seed", "5"),
        "xxtvttvt",
    ),
    "test alone": Split(splits.by_function(lambda row: "test"), ("--test", "all"), "xxxxxxxx"),
}
SIDES = {"t": "train", "v": "valid", "x": "test", "-": None}


# The files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, their masks, and lists of them in every kind of file."""
    base = tmp_path_factory.mktemp("a store") / "pets"
    for i, (file, mask) in enumerate(zip(FILES, MASKS, strict=True)):
        for name, mode, pixels in ((file, "RGB", (i, 2, 3)), (mask, "L", 0)):
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            image = Image.new(mode, (7, 5), pixels)
            if mode == "L":
                image.putpixel((i % 7, 2), 1)
            image.save(base / name)
    texts = [["" if cell is None else str(cell) for cell in row] for row in ROWS]
    (base / "deep").mkdir()
    for name, mark, lines in (
        ("rows.csv", ",", [list(COLUMNS), *texts]),
        ("uris.csv", ",", [list(COLUMNS), *([f"{STORE}/pets/{row[0]}", *row[1:]] for row in texts)]),
        ("bare.csv", ",", [[row[0].removesuffix(".png"), *row[1:]] for row in texts]),
        ("deep/rows.tsv", "\t", [[line[i] for i in (1, 0, *range(2, 10))] for line in [list(COLUMNS), *texts]]),
    ):
        (base / name).write_text("\n".join(mark.join(line) for line in lines))
    pq.write_table(arrow(base), base / "rows.parquet")
    with pa.ipc.new_file(str(base / "rows.arrow"), arrow(base).schema) as writer:
        writer.write_table(arrow(base))
    return base


@pytest.fixture(autouse=True)
def place(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STORE is the folder above the images, seen through a filesystem of pyarrow as remote stores are."""
    store = pafs.SubTreeFileSystem(str(base.parent), pafs.LocalFileSystem())
    real = root._open

    def opened(uri: str) -> tuple[pafs.FileSystem, str]:
        return (store, uri.removeprefix(STORE).strip("/")) if uri.startswith(STORE) else real(uri)

    monkeypatch.setattr("thawline.dataio.store.root._open", opened)


def fits(source: Source, label: Label, split: Split) -> bool:
    """Whether the rows written by hand mean this combination."""
    if (label.columns or split.columns) and not source.columns:
        return False
    if label.lists is not None and label.lists != source.lists:
        return False
    return not split.halves or sorted(map(str, label.expected)) in (sorted(CATS), sorted(NAMES), sorted(SPECIES))


def check(manifest: Manifest, label: Label, split: Split) -> None:
    """Compare with the rows written by hand, NaN equal to NaN."""
    assert (manifest.task, manifest.classes) == (label.task, label.classes)
    rows = manifest.rows.select(["path", "label", "split"]).to_pylist()
    by_hand = zip(FILES, label.expected, [SIDES[letter] for letter in split.expected], strict=True)
    assert repr(rows) == repr([{"path": p, "label": what, "split": side} for p, what, side in by_hand])


PAIRED = [
    pytest.param(source, label, id=f"{source}-{label}")
    for source in SOURCES
    for label in LABELS
    if any(fits(SOURCES[source], LABELS[label], split) for split in SPLITS.values())
]


@pytest.mark.parametrize(("source", "label"), PAIRED)
def test_every_split_gives_the_rows_written_by_hand(base: Path, source: str, label: str) -> None:
    listed, wanted = SOURCES[source], LABELS[label]
    table = labels.label(listed.table(base), wanted.labeller, **dict(wanted.options))
    for split in SPLITS.values():
        if fits(listed, wanted, split):
            check(splits.split(table, split.splitter, verify=False), wanted, split)


def commands() -> Iterator[Any]:
    """Every source with every label that words reach, each with the next of the splits."""
    turn = 0
    for name, source in SOURCES.items():
        for what, label in LABELS.items():
            fitting = [s for s in SPLITS if SPLITS[s].words is not None and fits(source, label, SPLITS[s])]
            if source.words is not None and label.words is not None and fitting:
                split, turn = fitting[turn % len(fitting)], turn + 1
                yield pytest.param(name, what, split, id=f"{name}-{what}-{split}")
    for split, words in SPLITS.items():
        if words.words is not None:
            yield pytest.param("CSV", "parent", split, id=f"every split-{split}")


def words_of(base: Path, source: str, label: str, split: str) -> list[str]:
    """What to type for it."""
    parts = (SOURCES[source].words, LABELS[label].words, SPLITS[split].words)
    return [word.replace("BASE", str(base)) for part in parts if part is not None for word in part]


@pytest.mark.parametrize(("source", "label", "split"), list(commands()))
def test_the_command_gives_the_rows_written_by_hand(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    source: str,
    label: str,
    split: str,
) -> None:
    out = tmp_path / "made.arrow"
    monkeypatch.setattr(sys, "argv", ["thawline", "index", *words_of(base, source, label, split), "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (0, f"{out}\n"), printed.err
    made = Manifest.load(out)
    check(made, LABELS[label], SPLITS[split])
    assert made.rows["width"].to_pylist() == [7] * 8, "every file was opened"
