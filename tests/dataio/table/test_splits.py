"""Is every row on the side that the draw, the column, the folder or the function says?"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from PIL import Image

from thawline.dataio.errors import QuarantineError, SplitError
from thawline.dataio.labels.labels import Row, by_parent, by_regex, label, mask_path, points_by_function
from thawline.dataio.table import splits
from thawline.dataio.table.draws import Splitter, k_fold, random_split, stratified
from thawline.dataio.table.sources import Table, from_folder
from thawline.dataio.table.splits import split


def rows_of(count: int, **columns: Any) -> pa.Table:
    return pa.table({"path": [f"{i}.jpg" for i in range(count)], **columns})


def unlooked(count: int, **columns: Any) -> Table:
    """A labelled table whose files do not exist, for verify=False."""
    return label(Table(rows_of(count, **columns), "/data"), by_regex(r"\d+"))


def labelled(root: Path, count: int = 10) -> Table:
    """`count` small images on disk, alternately in cat/ and dog/, the i-th i + 8 px wide."""
    for index in range(count):
        path = root / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + index, 8)).save(path)
    return label(from_folder(root), by_parent())


def rows_on(side: str, sides: np.ndarray) -> list[int]:
    return np.flatnonzero(sides == side).tolist()


# --- draws


def by_hash(rows: pa.Table, seed: int) -> list[int]:
    """Row numbers by the hash of seed and path: the oracle's order."""
    return sorted(range(rows.num_rows), key=lambda i: xxhash.xxh3_64_intdigest(rows["path"][i].as_py().encode(), seed))


@pytest.mark.parametrize(("count", "valid", "expected"), [(1797, 0.2, 359), (10, 0.25, 2), (7, 0.9, 6)])
def test_random_split_is_exact_and_a_function_of_seed_and_paths(count: int, valid: float, expected: int) -> None:
    rows = rows_of(count)
    sides = random_split(valid=valid, seed=7)(rows)
    assert rows_on("valid", sides) == sorted(by_hash(rows, 7)[:expected])
    assert set(sides) == {"train", "valid"}
    assert not np.array_equal(sides, random_split(valid=valid, seed=8)(rows))
    backwards = rows.take(pa.array(np.arange(count)[::-1]))
    np.testing.assert_array_equal(random_split(valid=valid, seed=7)(backwards)[::-1], sides)


def test_no_side_moves_another() -> None:
    rows = rows_of(101)
    order = by_hash(rows, 3)
    for valid, test in ((0.2, 0.0), (0.2, 0.35), (0.5, 0.35)):
        sides = random_split(valid=valid, test=test, seed=3)(rows)
        assert rows_on("valid", sides) == sorted(order[: int(valid * 101)])
        assert rows_on("test", sides) == sorted(order[101 - int(test * 101) :])


@pytest.mark.parametrize(
    ("draw", "border"),
    [
        (random_split(valid=0.2, test=0.1, seed=1), 2),
        (stratified(valid=0.2, test=0.1, seed=1), 2 * 3),  # as many as there are classes
        (k_fold(5, 2, seed=1), 2),
        (k_fold(5, 2, seed=1, stratify=True), 2 * 3),
    ],
)
def test_where_a_file_comes_or_goes_only_rows_at_the_border_change_sides(draw: Splitter, border: int) -> None:
    rows = rows_of(997, label=[*"aab" * 332, "c"])
    before = draw(rows)
    for lost in range(0, 997, 97):
        rest = np.delete(np.arange(997), lost)
        assert (draw(rows.take(pa.array(rest))) != before[rest]).sum() <= border, lost


def shares_by_hand(fraction: float, sizes: list[int], total: int) -> list[int]:
    """Largest remainders, one seat after another."""
    shares = [int(fraction * size) for size in sizes]
    for at in sorted(range(len(sizes)), key=lambda i: shares[i] - fraction * sizes[i])[: total - sum(shares)]:
        shares[at] += 1
    return shares


@pytest.mark.parametrize("valid", [0.1, 0.2, 0.29, 0.5, 0.77])
@pytest.mark.parametrize("sizes", [(50, 50), (100, 200, 300), (1, 1, 98), (3, 7, 11, 29), (40, 1, 1, 1, 1)])
def test_stratified_gives_each_class_its_share_and_as_many_as_random_in_all(
    valid: float, sizes: tuple[int, ...]
) -> None:
    names = np.random.default_rng(0).permutation(np.repeat([*"edcba"][: len(sizes)], sizes)).tolist()
    n = len(names)
    sides = stratified(valid=valid, test=0.1, seed=1)(rows_of(n, label=names))
    assert Counter(sides)["valid"] == int(valid * n)
    assert Counter(sides)["test"] == int(0.1 * n)
    counts = Counter(name for name, side in zip(names, sides, strict=True) if side == "valid")
    order = sorted(set(names))
    assert [counts[name] for name in order] == shares_by_hand(valid, [names.count(c) for c in order], int(valid * n))


def test_a_row_is_drawn_once_where_both_sides_want_the_last_of_a_class() -> None:
    rows = rows_of(6, label=["a", "a", "b", "c", "d", "e"])
    for seed in range(20):
        counts = Counter(stratified(valid=0.5, test=0.4, seed=seed)(rows))
        assert counts == {"valid": 3, "test": 2, "train": 1}


def test_stratified_draws_within_a_class_at_random_by_the_seed() -> None:
    rows = rows_of(200, label=["a", "b"] * 100)
    one, same, other = (rows_on("valid", stratified(valid=0.1, seed=seed)(rows)) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    drawn = [i for seed in range(200) for i in rows_on("valid", stratified(valid=0.1, seed=seed)(rows))]
    times = np.bincount(drawn, minlength=200)  # each 20 times, give or take 4.2
    assert (times.min(), times.max()) > (4, 20)
    assert times.max() < 40


def test_several_labels_are_stratified_by_their_combination() -> None:
    tags = [["a", "b"], ["b", "a"], ["a"], ["a"], [], []] * 5
    sides = stratified(valid=0.5, seed=0)(rows_of(30, label=pa.array(tags)))
    counts = Counter("".join(sorted(tag)) for tag, side in zip(tags, sides, strict=True) if side == "valid")
    assert counts == {"ab": 5, "a": 5, "": 5}


def test_labels_that_are_no_classes_cannot_be_stratified_by() -> None:
    images = Table(rows_of(3), "/data")
    points = label(images, points_by_function(lambda row: [(1, 2)]))
    masks = label(images, mask_path("{stem}.png"), values=(0, 1))
    for table, message in ((points, "points are no classes"), (masks, r"each of the 3 labels is one image's alone")):
        with pytest.raises(SplitError, match=message):
            split(table, stratified(valid=0.4), verify=False)


@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize(("n", "k"), [(10, 5), (11, 5), (23, 2), (40, 7), (6, 6)])
def test_folds_are_disjoint_cover_all_and_are_of_one_size(n: int, k: int, stratify: bool) -> None:
    names = ["a", "a", "b"] * n
    rows = rows_of(n, label=names[:n])
    folds = [rows_on("valid", k_fold(k, fold, seed=2, stratify=stratify)(rows)) for fold in range(k)]
    assert sorted(itertools.chain(*folds)) == list(range(n))
    assert {len(fold) for fold in folds} <= {n // k, n // k + 1}
    if stratify:
        ones = [sum(names[row] == "b" for row in fold) for fold in folds]
        assert max(ones) - min(ones) <= 1
    else:
        assert folds[0] == sorted(by_hash(rows, 2)[: -(-n // k)])


def test_fractions_folds_and_seeds_out_of_range_are_told() -> None:
    for valid in (0, 1, -0.1, 1.5, float("nan")):
        for draw in (random_split, stratified):
            with pytest.raises(SplitError, match="not between 0 and 1"):
                draw(valid=valid)
    for test in (-0.1, 0.8, 1.0, float("nan")):
        with pytest.raises(SplitError, match=r"beside valid=0\.2 leaves nothing to train on"):
            random_split(valid=0.2, test=test)
    with pytest.raises(SplitError, match="seed=-1 is negative"):
        random_split(seed=-1)
    for k, fold in ((5, 5), (5, -1), (1, 0)):
        with pytest.raises(SplitError, match=f"there is no fold {fold} of {k}"):
            k_fold(k, fold)


# --- columns, folders, functions


def test_column_folder_and_function_pick_their_rows() -> None:
    rows = pa.table(
        {
            "path": ["valid/a", "x/valid/b", "valid", "invalid/c", "/valid/d", "x/test/e", "test/valid/f"],
            "word": ["Valid", " val ", "train", "NO", "1", "TEST", "true"],
            "three": pa.array(["valid", "valid", "train", "train", "valid", "test", "valid"]).dictionary_encode(),
        }
    )
    oracle = ["valid", "valid", "train", "train", "valid", "test", "valid"]
    for splitter in (
        splits.by_column("word"),
        splits.by_column("three"),
        splits.by_folder(),
        splits.by_function(lambda row: row["three"]),
    ):
        assert splitter(rows).tolist() == oracle
    two = [side == "valid" for side in oracle]
    named = ["valid" if yes else "train" for yes in two]
    flags = rows.append_column("flag", pa.array(two)).append_column("n", pa.array(two).cast(pa.int64()))
    for splitter in (
        splits.by_column("flag"),
        splits.by_column("n"),
        splits.by_folder(test=None),
        splits.by_function(lambda row: row["flag"]),
        splits.by_function(lambda row: [1] if row["flag"] else None),  # such as re.search answers
    ):
        assert splitter(flags).tolist() == named
    assert rows_on("valid", splits.by_folder("x")(rows)) == [1, 5]
    assert rows_on("test", splits.by_folder("x")(rows)) == [6]


def test_a_held_out_test_leaves_the_rest_to_the_other_splitter() -> None:
    rows = rows_of(12, side=["test", "train", "valid"] * 4, late=[i > 8 for i in range(12)])
    rest = [i for i in range(12) if i % 3]
    oracle = [rest[at] for at in by_hash(rows.take(pa.array(rest)), 0)[2:4]]
    sides = splits.hold_out(splits.by_column("side"), then=k_fold(4, 1, seed=0))(rows)
    assert rows_on("test", sides) == [0, 3, 6, 9]
    assert rows_on("valid", sides) == sorted(oracle)
    late = splits.hold_out(splits.by_column("late"), then=splits.by_function(lambda row: row["path"] == "0.jpg"))(rows)
    assert (rows_on("test", late), rows_on("valid", late)) == ([9, 10, 11], [0])


def test_split_mistakes_are_sentences() -> None:
    table = unlooked(4, side=["train", "maybe", "", "valid"], some=[[1]] * 4, half=["train", "test", "test", "train"])
    for splitter, message in (
        (splits.by_column("nope"), "no column 'nope' to split by; there are path, side, some, half, label"),
        (splits.by_column("side"), r"name no split \('maybe', ''\) in 2 rows"),
        (splits.by_column("some"), "column 'some' cannot split"),
        (splits.by_column("half"), r"leaves valid empty: all 4 .* \(2 train, 2 test\)"),
        (splits.by_folder("valid"), "leaves valid empty: all 4 usable images"),
        (splits.by_function(lambda row: True), "leaves train empty"),
        (random_split(valid=0.2), "leaves valid empty"),
        (splits.by_function(lambda row: row["x"]), r"failed with KeyError\('x'\)"),
        (splits.by_function(lambda row: "Valid"), r"returned 'Valid': a split is 'train', 'valid', 'test' or None"),
        (lambda rows: np.array([1, 0, 0, 0]), r"returned int64 of shape \(4,\) for 4 rows"),
        (lambda rows: np.array([True]), r"returned bool of shape \(1,\) for 4 rows"),
    ):
        with pytest.raises(SplitError, match=message):
            split(table, splitter, verify=False)
    with pytest.raises(SplitError, match="has no labels"):
        split(Table(table.rows.select(["path"]), table.root), random_split())


def test_null_in_a_split_column_names_no_side() -> None:
    rows = pa.table({"path": ["a", "b"], "side": pa.array([True, None])})
    with pytest.raises(SplitError, match=r"\(None\) in 1 rows"):
        splits.by_column("side")(rows)


# --- split


def test_plain_splitters_of_booleans_or_names_will_do() -> None:
    for answer in (np.array([False, True, False, True]), np.array(["train", "valid", "train", "valid"])):
        made = split(unlooked(4), lambda rows, answer=answer: answer, verify=False)  # type: ignore[misc]
        assert made.rows["split"].to_pylist() == ["train", "valid", "train", "valid"]


def test_bad_files_are_quarantined_with_their_reason_and_the_rest_is_split(tmp_path: Path) -> None:
    table = labelled(tmp_path, 10)
    (tmp_path / "cat" / "04.png").write_bytes(b"")
    (tmp_path / "dog" / "09.png").write_bytes(b"hello")
    manifest = split(table, random_split(valid=0.25, seed=3), max_bad=0.2)
    rows = manifest.rows.to_pylist()
    assert [row["id"] for row in rows] == list(range(10))
    assert [row["path"] for row in rows] == table.rows["path"].to_pylist()
    bad = {row["path"]: (row["status"], row["split"]) for row in rows if row["status"] != "ok"}
    assert bad == {"cat/04.png": ("empty file", None), "dog/09.png": ("not an image", None)}
    usable = [row for row in rows if row["status"] == "ok"]
    oracle = by_hash(pa.table({"path": [row["path"] for row in usable]}), 3)[:2]  # int(.25 * 8) of the usable rows
    assert [row["split"] for row in usable] == ["valid" if i in oracle else "train" for i in range(8)]


@pytest.mark.parametrize("held", [False, True])
def test_a_function_is_asked_for_each_row_once(tmp_path: Path, held: bool) -> None:
    table = labelled(tmp_path, 10)
    (tmp_path / "cat" / "04.png").write_bytes(b"")
    asked: list[str] = []

    def late(row: Row) -> bool:
        asked.append(row["path"])
        return row["path"] > "dog/04"

    splitter = splits.by_function(late)
    if held:
        splitter = splits.hold_out(random_split(valid=0.2, seed=1), then=splitter)
    manifest = split(table, splitter, max_bad=0.1)
    assert len(asked) == len(set(asked))
    picked = set(asked) if not held else set(asked) - {"cat/04.png"}
    for row in manifest.rows.to_pylist():
        expected = None if row["status"] != "ok" else "valid" if row["path"] > "dog/04" else "train"
        assert row["split"] == (expected if row["path"] in picked and row["split"] != "test" else row["split"])
    assert Counter(manifest.rows["split"].to_pylist())["test"] == (int(0.2 * 9) if held else 0)


@pytest.mark.parametrize(
    ("count", "bad", "max_bad", "fine"),
    [
        (10, 0, 0.0, True),
        (10, 1, 0.0, False),
        (10, 1, 0.01, True),
        (10, 2, 0.01, False),
        (20, 2, 0.1, True),
        (20, 3, 0.1, False),
        (10, 8, 1.0, True),
        (100, 8, 0.07, False),  # 0.07 * 100 is a little more than 7
    ],
)
def test_as_many_files_may_be_broken_as_the_share_rounded_up(
    tmp_path: Path, count: int, bad: int, max_bad: float, fine: bool
) -> None:
    table = replace(labelled(tmp_path, count), classes=("cat", "dog"))
    names = table.rows["path"].to_pylist()[:bad]
    for name in names:
        (tmp_path / name).unlink()
    splitter = splits.by_function(lambda row: "test")  # so that no side is empty
    if fine:
        assert split(table, splitter, max_bad=max_bad).quarantined()["path"].to_pylist() == names
        return
    with pytest.raises(QuarantineError, match=rf"^{bad} of {count} files .*: {bad} missing; the first are {names[0]}"):
        split(table, splitter, max_bad=max_bad)


def test_splitter_mistake_and_empty_side_show_before_any_file_is_opened(tmp_path: Path) -> None:
    seen: list[int] = []
    for splitter, message in ((splits.by_column("side"), "no column 'side'"), (splits.by_folder("x"), "valid empty")):
        with pytest.raises(SplitError, match=message):
            split(labelled(tmp_path, 4), splitter, progress=lambda done, total: seen.append(done))
    assert seen == []


def test_rows_left_out_stay_in_the_manifest_and_give_no_classes() -> None:
    sides = {"0.jpg": "valid", "1.jpg": None, "2.jpg": "train", "3.jpg": "test"}
    manifest = split(unlooked(4), splits.by_function(lambda row: sides[row["path"]]), verify=False)
    assert manifest.rows["split"].to_pylist() == ["valid", None, "train", "test"]
    assert manifest.quarantined().to_pylist() == [{"path": "1.jpg", "status": "left out by the split"}]
    assert manifest.classes == ("0", "2", "3")
    assert [len(manifest.subset(side)) for side in ("train", "valid", "test")] == [1, 1, 1]


def test_no_usable_file_and_one_usable_class_are_sentences(tmp_path: Path) -> None:
    table = labelled(tmp_path, 4)
    for name in ("dog/01.png", "dog/03.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SplitError, match=r"2 usable images show 1 classes \(cat\)"):
        split(table, random_split(valid=0.5), max_bad=0.5)
    for name in ("cat/00.png", "cat/02.png"):
        (tmp_path / name).unlink()
    with pytest.raises(SplitError, match=r"none of the 4 files in .*: cat/00\.png \(missing\); .*dog/01\.png \(empty"):
        split(table, random_split(valid=0.5))


def test_classes_cover_all_sides_sorted_or_are_the_given_ones() -> None:
    first = splits.by_function(lambda row: row["label"] == "0")
    assert split(unlooked(4), first, verify=False).classes == ("0", "1", "2", "3")
    fixed = label(Table(rows_of(2), "/data"), by_regex(r"\d"), classes=("1", "5", "0"))
    assert split(fixed, first, verify=False).classes == ("1", "5", "0")


def test_unverified_masks_need_their_values() -> None:
    table = Table(rows_of(4), "/data")
    with pytest.raises(SplitError, match="the values of unverified masks are unknown"):
        split(label(table, mask_path("{stem}.png")), random_split(valid=0.5), verify=False)
    made = split(label(table, mask_path("{stem}.png"), values=(3, 4)), random_split(valid=0.5), verify=False)
    assert (made.values, made.classes, made.rows["mask_hash"].null_count) == ((3, 4), ("3", "4"), 4)
