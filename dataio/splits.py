"""Which images are for validation?

A splitter is a plain function from rows to booleans, True for valid. `split` runs it over the usable rows and
makes the manifest. Stratified and k-fold splits are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataio.errors import SplitError
from dataio.labels import Row
from dataio.manifest import Manifest, columns
from dataio.sources import Table
from dataio.verify import CHECKS, check_files

Splitter = Callable[[pa.Table], np.ndarray]

VALID_WORDS = ("true", "1", "1.0", "yes", "y", "t", "valid", "validation", "val", "test")
TRAIN_WORDS = ("false", "0", "0.0", "no", "n", "f", "train", "training")


def random_split(*, valid: float = 0.2, seed: int = 42) -> Splitter:
    """Draw exactly int(valid * n) of n rows, a function of (seed, n) alone.

    Raises: SplitError for a fraction outside (0, 1) or a negative seed.
    Source: the count is that of fastai's RandomSplitter; the draw is numpy's PCG64 permutation.
    """
    if not 0 < valid < 1:
        raise SplitError(f"valid={valid} is not between 0 and 1: one side would be empty; give a fraction such as 0.2")
    if seed < 0:
        raise SplitError(f"seed={seed} is negative: numpy's generator takes none; give 0 or more")

    def draw(rows: pa.Table) -> np.ndarray:
        mask = np.zeros(rows.num_rows, np.bool_)
        mask[np.random.default_rng(seed).permutation(rows.num_rows)[: int(valid * rows.num_rows)]] = True
        return mask

    return draw


def by_column(name: str) -> Splitter:
    """Read the side from a column: `VALID_WORDS` or `TRAIN_WORDS` in any case, booleans, 1 and 0.

    Raises (when called on rows): SplitError for a missing column or any other value.
    """

    def read(rows: pa.Table) -> np.ndarray:
        if name not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise SplitError(f"no column {name!r} to split by; there are {there}: name one of these")
        words = pc.utf8_lower(pc.utf8_trim_whitespace(rows[name].cast(pa.string()))).combine_chunks()
        mask = pc.is_in(words, pa.array(VALID_WORDS))
        unknown = pc.invert(pc.or_(mask, pc.is_in(words, pa.array(TRAIN_WORDS))))
        if pc.any(unknown).as_py():
            values = ", ".join(map(repr, rows[name].filter(unknown).unique().to_pylist()[:3]))
            raise SplitError(
                f"column {name!r} has values that name no side ({values}) in {pc.sum(unknown).as_py()} rows: "
                "write 'train' or 'valid' (or false and true)"
            )
        return mask.to_numpy(zero_copy_only=False)

    return read


def by_folder(name: str = "valid") -> Splitter:
    """Take for validation what lies in a folder called `name`, at any depth of its path."""

    def look(rows: pa.Table) -> np.ndarray:
        slashed = pc.binary_join_element_wise("", rows["path"], "/")
        return pc.match_substring(slashed, f"/{name}/").to_numpy()

    return look


def by_function(fn: Callable[[Row], Any]) -> Splitter:
    """Take for validation the rows ('path', 'label' and the source's columns) for which `fn` is true.

    Raises (when called on rows): SplitError when `fn` fails.
    """

    def ask(rows: pa.Table) -> np.ndarray:
        try:
            return np.array(
                [bool(fn(row)) for batch in rows.to_batches(max_chunksize=65_536) for row in batch.to_pylist()],
                np.bool_,
            )
        except Exception as error:
            raise SplitError(f"the split function failed with {error!r}: correct the function") from error

    return ask


def split(
    table: Table,
    splitter: Splitter,
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Check every file, divide the usable ones, and return the manifest.

    Files that cannot be used stay in it with the reason in `status` and no split. The splitter sees the
    usable rows only; it also runs once before the files are checked, so that its mistakes show before
    minutes of decoding. `verify=False` believes every file, and leaves sizes and hashes null.
    `progress(done, total)` counts files.

    Raises: SplitError for an unlabelled table, a side without images, no usable file, or fewer than two
    classes (single_label; one for multi_label) among the usable.
    """
    rows = table.rows
    if table.task is None or "label" not in rows.column_names:
        raise SplitError("the table has no labels: it cannot be split into a manifest; call label(table, ...) first")
    mask = _mask(splitter, rows)
    paths = rows["path"].to_pylist()
    checks = check_files(table.root, paths, progress=progress) if verify else _unchecked(len(paths))
    usable = pc.equal(checks["status"], "ok").to_numpy()
    if not usable.any():
        pairs = zip(paths[:3], checks["status"].slice(0, 3).to_pylist(), strict=True)
        reasons = "; ".join(f"{path} ({status})" for path, status in pairs)
        raise SplitError(f"none of the {len(paths)} files in {table.root} can be used: {reasons}; correct the source")
    if not usable.all():
        mask = _mask(splitter, rows.filter(usable))
    _check_sides(mask)
    labels = rows["label"].filter(usable)
    classes = _classes(labels, table.task)
    side = np.full(len(paths), None, object)
    side[usable] = np.where(mask, "valid", "train")
    ids = pa.array(np.arange(len(paths), dtype=np.int64))
    parts = [ids, rows["path"], rows["label"], pa.array(side, pa.string()), *checks.columns]
    return Manifest(pa.table(parts, columns(table.task)), table.root.absolute(), table.task, classes)


def _mask(splitter: Splitter, rows: pa.Table) -> np.ndarray:
    mask = np.asarray(splitter(rows))
    if mask.shape != (rows.num_rows,) or mask.dtype != np.bool_:
        raise SplitError(
            f"the splitter returned {mask.dtype} of shape {mask.shape} for {rows.num_rows} rows: it must "
            f"return ({rows.num_rows},) bool, True for valid"
        )
    return mask


def _check_sides(mask: np.ndarray) -> None:
    for side, count in (("valid", int(mask.sum())), ("train", int((~mask).sum()))):
        if count == 0:
            raise SplitError(
                f"the split leaves {side} empty: all {mask.size} usable images are on the other side; "
                "change the fraction, column or folder that divides them"
            )


def _classes(labels: pa.ChunkedArray, task: str) -> tuple[str, ...]:
    single = task == "single_label"
    classes = tuple(sorted((labels if single else pc.list_flatten(labels)).unique().to_pylist()))
    if len(classes) < 1 + single:
        raise SplitError(
            f"the {len(labels)} usable images show {len(classes)} classes ({', '.join(classes)}): there is "
            "nothing to learn; give usable images of more classes"
        )
    return classes


def _unchecked(count: int) -> pa.Table:
    ok = pa.array(["ok"] * count, pa.string())
    return pa.table([*(pa.nulls(count, kind) for kind in CHECKS.types[:-1]), ok], CHECKS)
