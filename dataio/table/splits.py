"""Which images are for training, which for validation, which for the test at the end?

A splitter is a function from rows to sides: booleans, True for valid, or the names 'train', 'valid' and 'test', None
for a row that is left out. `split` runs it over the usable rows and makes the manifest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from thawline.dataio.errors import QuarantineError, SplitError, kind_of, listed, quoted
from thawline.dataio.pixels import probe
from thawline.dataio.pixels.pictures import MAX_PIXELS
from thawline.dataio.table import masks
from thawline.dataio.table.labels import Row
from thawline.dataio.table.manifest import Manifest, build
from thawline.dataio.table.sources import Table
from thawline.dataio.table.tasks import TASKS, Meaning, Task
from thawline.dataio.table.verify import check_files

Sides = NDArray[np.bool_] | NDArray[np.object_]
Splitter = Callable[[pa.Table], Sides]


@dataclass(frozen=True)
class Draw:
    """A splitter whose answer for a row depends on which others there are, so that it draws anew among the usable."""

    draw: Splitter

    def __call__(self, rows: pa.Table) -> Sides:
        """The side of each row."""
        return self.draw(rows)


SIDES = ("train", "valid", "test")
WORDS = {
    "train": ("train", "training", "false", "0", "0.0", "no", "n", "f"),
    "valid": ("valid", "validation", "val", "true", "1", "1.0", "yes", "y", "t"),
    "test": ("test", "testing"),
}
"""What a column may call a side."""

UNASKED = (
    "DALI is not installed here, so nobody knows which images it shows as Pillow does: all are left to Pillow, and "
    "training with DALI would be slow; index again where DALI is"
)
LEFT_OUT = "left out by the split"


def random_split(*, valid: float = 0.2, test: float = 0.0, seed: int = 42) -> Splitter:
    """Draw exactly int(valid * n) and int(test * n) of n rows, a function of the seed and the rows' paths alone.

    Rows stand in the order of a hash of (seed, path); the first are for validation, the last for the test. So neither
    side depends on the other, and where a few files come or go, as many of the old rows change sides at most.

    Raises: SplitError for a fraction outside (0, 1), nothing left for training, or a negative seed.
    Source: the count is that of fastai's RandomSplitter.
    """
    _check_fractions(valid, test, seed)

    def draw(rows: pa.Table) -> Sides:
        n, order = rows.num_rows, _shuffled(rows, seed)
        return _named(n, order[: int(valid * n)], order[n - int(test * n) :])

    return Draw(draw)


def stratified(*, valid: float = 0.2, test: float = 0.0, seed: int = 42) -> Splitter:
    """Draw as many rows as `random_split`, and of each class its share: largest remainders first.

    The classes are labels, or combinations of labels (multi_label). Within a class, rows stand as in `random_split`.

    Raises: as `random_split`; when called on rows, SplitError for labels that are no classes.
    Source: largest remainders, Hamilton's method of apportionment.
    """
    _check_fractions(valid, test, seed)

    def draw(rows: pa.Table) -> Sides:
        n, codes = rows.num_rows, _codes(rows)
        sizes = np.bincount(codes)
        chosen = _shares(valid, sizes, int(valid * n), room=sizes)
        tested = _shares(test, sizes, int(test * n), room=sizes - chosen)
        order, place = _class_by_class(codes, _shuffled(rows, seed))
        drawn = codes[order]
        return _named(n, order[place < chosen[drawn]], order[place >= (sizes - tested)[drawn]])

    return Draw(draw)


def k_fold(k: int, fold: int, *, seed: int = 42, stratify: bool = False) -> Splitter:
    """Take for validation fold number `fold`, 0 to k - 1, of k: over all folds every row is on the valid side once.

    Folds differ by one row at most. With stratify, so do the rows of each class in them. Rows stand as in
    `random_split`, so that few change their fold where a few files come or go.

    Raises: SplitError for fewer than two folds, a fold that is not there, or a negative seed.
    """
    if k < 2 or not 0 <= fold < k:
        raise SplitError(f"there is no fold {fold} of {k}: folds count from 0 and are two or more; give 0 to {k - 1}")
    _check_seed(seed)

    def draw(rows: pa.Table) -> Sides:
        n = rows.num_rows
        codes = _codes(rows) if stratify else np.zeros(n, np.int64)
        order, place = _class_by_class(codes, _shuffled(rows, seed))
        sizes = np.bincount(codes)
        ends = np.cumsum(sizes)
        # Rows that each fold takes of each class, (k, C): dealt out class after class, so that totals are even, too.
        dealt = _below(ends, k) - _below(ends - sizes, k)
        last = np.cumsum(dealt, axis=0)
        drawn = codes[order]
        return _named(n, order[((last - dealt)[fold][drawn] <= place) & (place < last[fold][drawn])])

    return Draw(draw)


def by_column(name: str) -> Splitter:
    """Read the side from a column: `WORDS` in any case, booleans (True is valid), 1 and 0.

    Raises (when called on rows): SplitError for a missing column or any other value.
    """

    def read(rows: pa.Table) -> Sides:
        if name not in rows.column_names:
            raise SplitError(
                f"no column {quoted(repr(name))} to split by; there are {listed(rows.column_names)}: name one of these"
            )
        try:
            words = pc.utf8_lower(pc.utf8_trim_whitespace(rows[name].cast(pa.string())))
        except pa.ArrowException as error:
            raise SplitError(
                f"column {quoted(repr(name))} cannot split ({quoted(str(error))}): give one with 'train' and 'valid'"
            ) from error
        sides = np.full(rows.num_rows, None, object)
        for side, known in WORDS.items():
            sides[pc.is_in(words, pa.array(known)).to_numpy()] = side
        unknown = _is(sides, None)
        if unknown.any():
            values = listed([repr(it) for it in rows[name].filter(pa.array(unknown)).unique().to_pylist()], most=3)
            raise SplitError(
                f"column {quoted(repr(name))} has values that name no side ({values}) in {unknown.sum()} rows: "
                "write 'train', 'valid' or 'test' (or false and true)"
            )
        return sides

    return read


def by_folder(valid: str = "valid", *, test: str | None = "test") -> Splitter:
    """Take for validation what lies in a folder called `valid`, at any depth of its path, for the test what of the rest
    lies in one called `test`, and all else for training.
    """

    def look(rows: pa.Table) -> Sides:
        slashed = pc.binary_join_element_wise("", rows["path"], "/")
        inside, tested = (
            pc.match_substring(slashed, f"/{name}/").to_numpy() if name else np.zeros(rows.num_rows, np.bool_)
            for name in (valid, test)
        )
        return _named(rows.num_rows, inside, tested & ~inside)

    return look


def by_function(fn: Callable[[Row], Any]) -> Splitter:
    """Take for validation the rows ('path', 'label' and the source's columns) for which `fn` is true.

    Or `fn` answers with the side's name, 'train', 'valid' or 'test'; then None leaves a row out.

    Raises (when called on rows): SplitError when `fn` fails, or answers with another text.
    """

    def ask(rows: pa.Table) -> Sides:
        try:
            answers = [fn(row) for batch in rows.to_batches(max_chunksize=65_536) for row in batch.to_pylist()]
        except Exception as error:
            raise SplitError(f"the split function failed with {quoted(repr(error))}: correct the function") from error
        sides = np.full(len(answers), None, object)
        if any(isinstance(answer, str) for answer in answers):
            sides[:] = answers
        else:
            sides[:] = ["valid" if answer else "train" for answer in answers]
        return sides

    return ask


@dataclass(frozen=True)
class _HoldOut:
    test: Splitter
    then: Splitter

    def __call__(self, rows: pa.Table) -> Sides:
        sides = _sides(self.test, rows)
        picked = _is(sides, "test" if _is(sides, "test").any() else "valid")
        sides[picked] = "test"
        sides[~picked] = _sides(self.then, rows.filter(pa.array(~picked)))
        return sides


def hold_out(test: Splitter, then: Splitter) -> Splitter:
    """Keep for the test the rows that one splitter picks, and divide the others by another, such as a `k_fold`.

    Picked are those that `test` calls 'test', or if there are none, 'valid'.
    """
    return _HoldOut(test, then)


def once_a_row(splitter: Splitter) -> Splitter:
    """The splitter, which remembers what it said of a path and asks no function of the user's for that row again.

    Draws alone are drawn anew, also those within a `hold_out`.
    """
    if isinstance(splitter, Draw):
        return splitter
    if isinstance(splitter, _HoldOut):
        return _HoldOut(once_a_row(splitter.test), once_a_row(splitter.then))
    known, sides = pa.chunked_array([], pa.large_string()), np.zeros(0, object)

    def ask(rows: pa.Table) -> Sides:
        nonlocal known, sides
        paths = rows["path"].cast(known.type)
        new = pc.invert(pc.is_in(paths, known))
        if pc.any(new).as_py():
            sides = np.concatenate([sides, _sides(splitter, rows.filter(new))])
            known = pa.chunked_array([*known.chunks, *paths.filter(new).chunks])
        return sides[pc.index_in(paths, known).to_numpy()]

    return ask


def split(
    table: Table,
    splitter: Splitter,
    *,
    verify: bool = True,
    max_bad: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Check every file, divide the usable ones, and return the manifest.

    Files that cannot be used stay in it with the reason in `status` and no split; so do rows that the splitter leaves
    out. The splitter sees all rows before the files are checked, so that its mistakes show before minutes of decoding;
    draws are drawn again among the usable rows, any other splitter is asked for each row once.
    Of n files, `max_bad` * n may be unusable, rounded up: one of a few is forgiven, with 0 none is; images of more than
    `max_pixels` are. `verify=False` believes every file, and leaves sizes and hashes null.
    `progress(done, total)` counts files. A manifest has images for train and valid, or for test alone.

    Raises: QuarantineError for more unusable files; SplitError for an unlabelled table, a side without images, no
        usable file, or fewer than two classes (single_label, mask; one for the others) among the usable.
    """
    rows = table.rows
    if table.task is None or "label" not in rows.column_names:
        raise SplitError("the table has no labels: it cannot be split into a manifest; call label(table, ...) first")
    if not max_bad >= 0:  # NaN, too
        raise SplitError(f"max_bad={max_bad} is no share of the files: give 0 for none to 1 for any")
    splitter = once_a_row(splitter)
    _check_sides(_sides(splitter, rows))
    task = TASKS[table.task]
    checks = _checks(table, task, verify=verify, max_pixels=max_pixels, progress=progress)
    status = _status(table, task, checks)
    usable = status == "ok"
    _check_quarantine(table, status, max_bad)
    sides = np.full(rows.num_rows, None, object)
    sides[usable] = _sides(splitter, rows if usable.all() else rows.filter(pa.array(usable)))
    _check_sides(sides[usable])
    status[usable & _is(sides, None)] = LEFT_OUT
    used = pa.array(status == "ok")
    values = table.values
    if task.masks and values is None:
        values = masks.found_values(checks.filter(used))
    classes = table.classes or _classes(rows["label"].filter(used), task, values)
    if len(classes) < task.least_classes:
        raise SplitError(
            f"the {pc.sum(used).as_py()} usable images show {len(classes)} classes ({listed(classes)}): there is "
            "nothing to learn; give usable images of more classes"
        )
    columns = {"id": np.arange(rows.num_rows), "path": rows["path"], "label": rows["label"], "split": sides}
    columns = {**dict(zip(checks.column_names, checks.columns, strict=True)), **columns, "status": status}
    unasked = (UNASKED,) if verify and not probe.installed() else ()
    made = build(columns, root=table.root, task=table.task, classes=classes, values=values or (), swap=table.swap)
    meaning = Meaning(made.classes, made.values, made.swap, table.counted)
    remarks = task.remarks(made.rows.filter(used), checks.filter(used), meaning)
    return replace(made, notes=(*table.notes, *remarks, *unasked))


# Drawing --------------------------------------------------------------------------------------------------


def _check_fractions(valid: float, test: float, seed: int) -> None:
    if not 0 < valid < 1:
        raise SplitError(f"valid={valid} is not between 0 and 1: one side would be empty; give a fraction such as 0.2")
    if not 0 <= test < 1 or valid + test >= 1:
        raise SplitError(
            f"test={test} beside valid={valid} leaves nothing to train on: give fractions that sum below 1"
        )
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise SplitError(f"seed={seed} is negative: the hash that draws takes none; give 0 or more")


def _named(n: int, valid: NDArray[Any], test: NDArray[Any] | None = None) -> NDArray[np.object_]:
    """Sides of n rows, from row numbers or masks."""
    sides = np.full(n, "train", object)
    sides[valid] = "valid"
    if test is not None:
        sides[test] = "test"
    return sides


def _codes(rows: pa.Table) -> NDArray[np.int64]:
    """The class of each row, (n,), numbered as the classes sort."""
    labels = rows["label"]
    if pa.types.is_list(labels.type) and pa.types.is_string(labels.type.value_type):
        labels = pa.chunked_array([["\0".join(sorted(set(tags))) for tags in labels.to_pylist()]], pa.string())
    elif not pa.types.is_string(labels.type):
        raise SplitError(
            "points are no classes: they cannot be stratified by; draw with random_split, or split by column"
        )
    names = sorted(labels.unique().to_pylist())
    if len(names) == rows.num_rows:
        raise SplitError(
            f"each of the {len(names)} labels is one image's alone (as masks are): they cannot be stratified by; draw "
            "with random_split, or split by column"
        )
    codes: NDArray[np.int64] = pc.index_in(labels, pa.array(names, pa.string())).to_numpy().astype(np.int64)
    return codes


def _shuffled(rows: pa.Table, seed: int) -> NDArray[np.int64]:
    """All rows, (n,), by a hash of the seed and each one's path: where one comes or goes, the others keep their order.

    10 million take 5 s.
    """
    paths = rows["path"].cast(pa.large_binary()).to_pylist()
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(path, seed) for path in paths), np.uint64, len(paths))
    return np.argsort(hashes, kind="stable")


def _class_by_class(codes: NDArray[np.int64], order: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All rows, one class after another, each class's in this order; and each one's place in its class, from 0."""
    order = order[np.argsort(codes[order], kind="stable")]
    sizes = np.bincount(codes)
    return order, np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _below(ends: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """(k, C): how many of the numbers from 0 to below each end leave the remainders 0 to k - 1."""
    return (ends - np.arange(k)[:, None] + k - 1) // k


def _shares(fraction: float, sizes: NDArray[np.int64], total: int, *, room: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole numbers near fraction * sizes that sum to total, none above room."""
    quotas = fraction * sizes
    shares = np.minimum(np.floor(quotas).astype(np.int64), room)
    by_remainder = np.argsort(shares - quotas, kind="stable")
    while (lacking := total - int(shares.sum())) > 0:
        open_classes = by_remainder[shares[by_remainder] < room[by_remainder]]
        shares[open_classes[:lacking]] += 1
    shares[by_remainder[::-1][: -lacking or 0]] -= 1  # floating point: floor(f * n) may exceed its share of int(f * N)
    return shares


# Checking -------------------------------------------------------------------------------------------------


def _sides(splitter: Splitter, rows: pa.Table) -> NDArray[np.object_]:
    """What the splitter says, by name."""
    sides = np.asarray(splitter(rows))
    if sides.dtype.kind == "U":
        sides = sides.astype(object)
    if sides.shape != (rows.num_rows,) or sides.dtype not in (np.bool_, np.object_):
        raise SplitError(
            f"the splitter returned {sides.dtype} of shape {sides.shape} for {rows.num_rows} rows: it must "
            f"return ({rows.num_rows},) bool, True for valid, or the sides' names as objects"
        )
    if sides.dtype == np.bool_:
        return _named(rows.num_rows, sides)
    strange = set(sides.tolist()) - {*SIDES, None}
    if strange:
        raise SplitError(
            f"the splitter returned {quoted(repr(strange.pop()))}: a side is 'train', 'valid', 'test' or None"
        )
    return sides.astype(object)


def _is(sides: NDArray[np.object_], side: str | None) -> NDArray[np.bool_]:
    return np.equal(sides, np.array(side, object)).astype(np.bool_)


def _check_sides(sides: NDArray[np.object_]) -> None:
    counts = Counter(sides.tolist())
    if counts["test"] == len(sides):
        return
    for side in ("valid", "train"):
        if counts[side] == 0:
            others = ", ".join(f"{count} {name or 'left out'}" for name, count in counts.items())
            raise SplitError(
                f"the split leaves {side} empty: all {len(sides)} usable images are on the other side ({others}); "
                "change the fraction, column or folder that divides them"
            )


def _checks(
    table: Table, task: Task, *, verify: bool, max_pixels: int, progress: Callable[[int, int], None] | None
) -> pa.Table:
    paths = table.rows["path"].to_pylist()
    drawn = table.rows["label"].to_pylist() if task.masks else None
    if verify:
        return check_files(table.root, paths, masks=drawn, max_pixels=max_pixels, progress=progress)
    if drawn is not None and table.values is None:
        raise SplitError("unverified masks do not tell which values they have: give label(..., values=), or verify")
    names = ("width", "height", "bytes", "hash", "format", "orientation", "codec", "mask_hash", "mask_values")
    return pa.table({**{name: pa.nulls(len(paths)) for name in names}, "status": ["ok"] * len(paths)})


def _status(table: Table, task: Task, checks: pa.Table) -> NDArray[np.object_]:
    """Why each file cannot be used, or 'ok'; a mask without a pixel of any class teaches nothing."""
    status: NDArray[np.object_] = checks["status"].to_numpy().astype(object)
    if task.masks and table.values is not None and checks["mask_values"].null_count < len(status):
        names, wanted = table.rows["label"], ", ".join(map(str, table.values))
        for row in np.flatnonzero(~masks.showing(checks, table.values) & (status == "ok")):
            status[row] = f"its mask {names[int(row)].as_py()}: no pixel has one of the values {wanted}"
    return status


def _check_quarantine(table: Table, status: NDArray[np.object_], max_bad: float) -> None:
    bad = np.flatnonzero(status != "ok")
    paths = table.rows["path"]
    named = "; ".join(f"{quoted(paths[int(row)].as_py())} ({quoted(status[row])})" for row in bad[:3])
    if len(bad) == len(status):
        lost = all(status[row] == "missing" for row in bad)
        remedy = "give --root, the folder where these paths start, or correct them" if lost else "correct the source"
        raise SplitError(f"none of the {len(bad)} files in {table.root} can be used: {named}; {remedy}")
    share, allowed = len(bad) / len(status), math.ceil(max_bad * len(status) - 1e-9)
    if len(bad) > allowed:
        reasons = Counter(kind_of(status[row]) for row in bad).most_common(5)
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        enough = math.ceil(1000 * share) / 1000
        raise QuarantineError(
            f"{len(bad):,} of {len(status):,} files ({share:.1%}) cannot be used, and at most {allowed:,} may "
            f"({max_bad:.1%}): {counted}; the first are {named}; mend or remove them, or allow more with "
            f"max_bad={enough:g} (--max-bad {enough:g}): the manifest then lists every one with its reason"
        )


def _classes(labels: pa.ChunkedArray, task: Task, values: tuple[int, ...] | None) -> tuple[str, ...]:
    """The vocabulary that occurs: class names, sorted, or a mask's values by their numbers."""
    if task.names is None:
        return tuple(map(str, values or ()))
    return tuple(sorted(task.names(labels.combine_chunks()).unique().to_pylist()))
