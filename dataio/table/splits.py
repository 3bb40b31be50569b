"""Which images are for training, which for validation, which for the test at the end?

A splitter is a function from rows to splits: booleans, True for valid, or the names 'train', 'valid' and 'test', None
for a row that is left out. Random draws are in draws.py. `split` checks the files, divides the usable ones and returns
the manifest.
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
from numpy.typing import NDArray

from thawline.dataio.checks.verify import check_files
from thawline.dataio.errors import QuarantineError, SplitError, kind_of, listed, quoted
from thawline.dataio.labels import masks
from thawline.dataio.labels.labels import Row
from thawline.dataio.pixels import probe
from thawline.dataio.pixels.pictures import MAX_PIXELS
from thawline.dataio.table.draws import Draw, Splits, Splitter, named
from thawline.dataio.table.manifest import Manifest, build
from thawline.dataio.table.schema import SPLITS
from thawline.dataio.table.sources import Table
from thawline.dataio.table.tasks import TASKS, Meaning, Task

WORDS = {
    "train": ("train", "training", "false", "0", "0.0", "no", "n", "f"),
    "valid": ("valid", "validation", "val", "true", "1", "1.0", "yes", "y", "t"),
    "test": ("test", "testing"),
}
"""The names of splits that a column may have."""

WITHOUT_DALI = (
    "DALI is not installed here, so it is unknown which images it decodes as Pillow does: Pillow decodes all, and "
    "training with DALI would be slow; index again where DALI is installed"
)
LEFT_OUT = "left out by the split"


def by_column(name: str) -> Splitter:
    """Read the split from a column: `WORDS` in any case, booleans (True is valid), 1 and 0.

    Raises (when called on rows): SplitError for a missing column or any other value.
    """

    def read(rows: pa.Table) -> Splits:
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
        splits = np.full(rows.num_rows, None, object)
        for split, words_of_split in WORDS.items():
            splits[pc.is_in(words, pa.array(words_of_split)).to_numpy()] = split
        unknown = _is(splits, None)
        if unknown.any():
            values = listed(
                [repr(value) for value in rows[name].filter(pa.array(unknown)).unique().to_pylist()], most=3
            )
            raise SplitError(
                f"column {quoted(repr(name))} has values that name no split ({values}) in {unknown.sum()} rows: "
                "write 'train', 'valid' or 'test' (or false and true)"
            )
        return splits

    return read


def by_folder(valid: str = "valid", *, test: str | None = "test") -> Splitter:
    """Validate on images with a folder named `valid` anywhere in their path, test on others with one named `test`.

    All other images are for training.
    """

    def read(rows: pa.Table) -> Splits:
        slashed = pc.binary_join_element_wise("", rows["path"], "/")
        inside, tested = (
            pc.match_substring(slashed, f"/{name}/").to_numpy() if name else np.zeros(rows.num_rows, np.bool_)
            for name in (valid, test)
        )
        return named(rows.num_rows, inside, tested & ~inside)

    return read


def by_function(fn: Callable[[Row], Any]) -> Splitter:
    """Validate on the rows ('path', 'label' and the source's columns) for which `fn` is true.

    `fn` may return the name of the split instead, 'train', 'valid' or 'test'; None then leaves a row out.

    Raises (when called on rows): SplitError when `fn` fails, or returns another text.
    """

    def divide(rows: pa.Table) -> Splits:
        try:
            results = [fn(row) for batch in rows.to_batches(max_chunksize=65_536) for row in batch.to_pylist()]
        except Exception as error:
            raise SplitError(f"the split function failed with {quoted(repr(error))}: correct the function") from error
        splits = np.full(len(results), None, object)
        if any(isinstance(result, str) for result in results):
            splits[:] = results
        else:
            splits[:] = ["valid" if result else "train" for result in results]
        return splits

    return divide


@dataclass(frozen=True)
class _HoldOut:
    test: Splitter
    then: Splitter

    def __call__(self, rows: pa.Table) -> Splits:
        splits = _assigned(self.test, rows)
        picked = _is(splits, "test" if _is(splits, "test").any() else "valid")
        splits[picked] = "test"
        splits[~picked] = _assigned(self.then, rows.filter(pa.array(~picked)))
        return splits


def hold_out(test: Splitter, then: Splitter) -> Splitter:
    """Keep the rows that one splitter picks for the test, and divide the others by another, such as a `k_fold`.

    The first picks those of its split 'test', or if there are none, 'valid'.
    """
    return _HoldOut(test, then)


def once_a_row(splitter: Splitter) -> Splitter:
    """The splitter with a memory of each path's split, so that a user's function is called once for each row.

    Draws are drawn anew, also those within a `hold_out`.
    """
    if isinstance(splitter, Draw):
        return splitter
    if isinstance(splitter, _HoldOut):
        return _HoldOut(once_a_row(splitter.test), once_a_row(splitter.then))
    known_paths, splits = pa.chunked_array([], pa.large_string()), np.zeros(0, object)

    def remembered(rows: pa.Table) -> Splits:
        nonlocal known_paths, splits
        paths = rows["path"].cast(known_paths.type)
        new = pc.invert(pc.is_in(paths, known_paths))
        if pc.any(new).as_py():
            splits = np.concatenate([splits, _assigned(splitter, rows.filter(new))])
            known_paths = pa.chunked_array([*known_paths.chunks, *paths.filter(new).chunks])
        return splits[pc.index_in(paths, known_paths).to_numpy()]

    return remembered


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
    out. The splitter gets all rows before the files are checked, so that its mistakes show before minutes of decoding;
    draws are drawn again among the usable rows, any other splitter is called once for each row.
    Of n files, `max_bad` * n may be unusable, rounded up, so that one of a few is tolerated; with 0 none is. Images of
    more than `max_pixels` are unusable. `verify=False` trusts every file, and leaves sizes and hashes null.
    `progress(done, total)` counts files. A manifest has images for train and valid, or for test alone.

    Raises: QuarantineError for more unusable files; SplitError for an unlabelled table, a split without images, no
        usable file, or fewer than two classes (single_label, mask; one for the others) among the usable.
    """
    rows = table.rows
    if table.task is None or "label" not in rows.column_names:
        raise SplitError("the table has no labels: it cannot be split into a manifest; call label(table, ...) first")
    if not max_bad >= 0:  # NaN, too
        raise SplitError(f"max_bad={max_bad} is no share of the files: give 0 for none to 1 for any")
    splitter = once_a_row(splitter)
    _check_splits(_assigned(splitter, rows))
    task = TASKS[table.task]
    checks = _checks(table, task, verify=verify, max_pixels=max_pixels, progress=progress)
    status = _status(table, task, checks)
    usable = status == "ok"
    _check_quarantine(table, status, max_bad)
    splits = np.full(rows.num_rows, None, object)
    splits[usable] = _assigned(splitter, rows if usable.all() else rows.filter(pa.array(usable)))
    _check_splits(splits[usable])
    status[usable & _is(splits, None)] = LEFT_OUT
    manifest = _manifest(table, task, checks, splits, status)
    return manifest if probe.installed() or not verify else replace(manifest, notes=(*manifest.notes, WITHOUT_DALI))


def _manifest(
    table: Table, task: Task, checks: pa.Table, splits: NDArray[np.object_], status: NDArray[np.object_]
) -> Manifest:
    """The manifest of images that were checked and divided. Raises SplitError for too few classes to learn."""
    rows, used = table.rows, pa.array(status == "ok")
    values = table.values
    if task.masks and values is None:
        values = masks.occurring_values(checks.filter(used))
    classes = table.classes or _classes(rows["label"].filter(used), task, values)
    if len(classes) < task.least_classes:
        raise SplitError(
            f"the {pc.sum(used).as_py()} usable images show {len(classes)} classes ({listed(classes)}): there is "
            "nothing to learn; give usable images of more classes"
        )
    columns = {"id": np.arange(rows.num_rows), "path": rows["path"], "label": rows["label"], "split": splits}
    columns = {**dict(zip(checks.column_names, checks.columns, strict=True)), **columns, "status": status}
    assert table.task is not None
    manifest = build(columns, root=table.root, task=table.task, classes=classes, values=values or (), swap=table.swap)
    meaning = Meaning(manifest.classes, manifest.values, manifest.swap, table.counted)
    remarks = task.remarks(manifest.rows.filter(used), checks.filter(used), meaning)
    return replace(manifest, notes=(*table.notes, *remarks))


# Checking -------------------------------------------------------------------------------------------------


def _assigned(splitter: Splitter, rows: pa.Table) -> NDArray[np.object_]:
    """The splitter's result as names of splits."""
    splits = np.asarray(splitter(rows))
    if splits.dtype.kind == "U":
        splits = splits.astype(object)
    if splits.shape != (rows.num_rows,) or splits.dtype not in (np.bool_, np.object_):
        raise SplitError(
            f"the splitter returned {splits.dtype} of shape {splits.shape} for {rows.num_rows} rows: it must "
            f"return ({rows.num_rows},) bool, True for valid, or the splits' names as objects"
        )
    if splits.dtype == np.bool_:
        return named(rows.num_rows, splits)
    strange = set(splits.tolist()) - {*SPLITS, None}
    if strange:
        raise SplitError(
            f"the splitter returned {quoted(repr(strange.pop()))}: a split is 'train', 'valid', 'test' or None"
        )
    return splits.astype(object)


def _is(splits: NDArray[np.object_], split: str | None) -> NDArray[np.bool_]:
    return np.equal(splits, np.array(split, object)).astype(np.bool_)


def _check_splits(splits: NDArray[np.object_]) -> None:
    counts = Counter(splits.tolist())
    if counts["test"] == len(splits):
        return
    for split in ("valid", "train"):
        if counts[split] == 0:
            others = ", ".join(f"{counts[name]} {name or 'left out'}" for name in (*SPLITS, None) if counts[name])
            raise SplitError(
                f"the split leaves {split} empty: all {len(splits)} usable images are in others ({others}); "
                "change the fraction, column or folder that divides them"
            )


def _checks(
    table: Table, task: Task, *, verify: bool, max_pixels: int, progress: Callable[[int, int], None] | None
) -> pa.Table:
    paths = table.rows["path"].to_pylist()
    mask_paths = table.rows["label"].to_pylist() if task.masks else None
    if verify:
        return check_files(table.root, paths, masks=mask_paths, max_pixels=max_pixels, progress=progress)
    if mask_paths is not None and table.values is None:
        raise SplitError("the values of unverified masks are unknown: give label(..., values=), or verify")
    names = ("width", "height", "bytes", "hash", "format", "orientation", "codec", "mask_hash", "mask_values")
    return pa.table({**{name: pa.nulls(len(paths)) for name in names}, "status": ["ok"] * len(paths)})


def _status(table: Table, task: Task, checks: pa.Table) -> NDArray[np.object_]:
    """Why each file cannot be used, or 'ok'; a mask without a pixel of any class cannot be learnt from."""
    status: NDArray[np.object_] = checks["status"].to_numpy().astype(object)
    if task.masks and table.values is not None and checks["mask_values"].null_count < len(status):
        names, values = table.rows["label"], ", ".join(map(str, table.values))
        for row in np.flatnonzero(~masks.showing(checks, table.values) & (status == "ok")):
            status[row] = f"its mask {names[int(row)].as_py()}: no pixel has one of the values {values}"
    return status


def _check_quarantine(table: Table, status: NDArray[np.object_], max_bad: float) -> None:
    bad = np.flatnonzero(status != "ok")
    paths = table.rows["path"]
    examples = "; ".join(f"{quoted(paths[int(row)].as_py())} ({quoted(status[row])})" for row in bad[:3])
    if len(bad) == len(status):
        all_missing = all(status[row] == "missing" for row in bad)
        remedy = (
            "give --root, the folder where these paths start, or correct them" if all_missing else "correct the source"
        )
        raise SplitError(f"none of the {len(bad)} files in {table.root} can be used: {examples}; {remedy}")
    share, allowed = len(bad) / len(status), math.ceil(max_bad * len(status) - 1e-9)
    if len(bad) > allowed:
        reasons = Counter(kind_of(status[row]) for row in bad).most_common(5)
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        sufficient = math.ceil(1000 * share) / 1000
        raise QuarantineError(
            f"{len(bad):,} of {len(status):,} files ({share:.1%}) cannot be used, and at most {allowed:,} may "
            f"({max_bad:.1%}): {counted}; the first are {examples}; mend or remove them, or allow more with "
            f"max_bad={sufficient:g} (--max-bad {sufficient:g}): the manifest then lists every one with its reason"
        )


def _classes(labels: pa.ChunkedArray, task: Task, values: tuple[int, ...] | None) -> tuple[str, ...]:
    """The vocabulary that occurs: class names, sorted, or a mask's values as numbers."""
    if task.names is None:
        return tuple(map(str, values or ()))
    return tuple(sorted(task.names(labels.combine_chunks()).unique().to_pylist()))
