"""Which rows does a draw pick? At random, by class, or in folds: a function of the seed and the rows' paths alone.

Rows are ordered by a hash of (seed, path), and each draw picks a stretch of that order. So shares are exact, and when a
few files are added or removed, only rows at the ends of the stretch change splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from thawline.dataio.errors import SplitError

Splits = NDArray[np.bool_] | NDArray[np.object_]
Splitter = Callable[[pa.Table], Splits]


@dataclass(frozen=True)
class Draw:
    """A splitter whose split of a row depends on the other rows, so that it is called again for the usable ones."""

    draw: Splitter

    def __call__(self, rows: pa.Table) -> Splits:
        """The split of each row."""
        return self.draw(rows)


def random_split(*, valid: float = 0.2, test: float = 0.0, seed: int = 42) -> Splitter:
    """Draw exactly int(valid * n) and int(test * n) of n rows, a function of the seed and the rows' paths alone.

    Rows are ordered by a hash of (seed, path); the first are for validation, the last for the test. So neither split
    depends on the other, and when a few files are added or removed, at most as many of the old rows change splits.

    Raises: SplitError for a fraction outside (0, 1), no rows left for training, or a negative seed.
    Source: the count is that of fastai's RandomSplitter.
    """
    _check_fractions(valid, test, seed)

    def draw(rows: pa.Table) -> Splits:
        n, order = rows.num_rows, _shuffled(rows, seed)
        return named(n, order[: int(valid * n)], order[n - int(test * n) :])

    return Draw(draw)


def stratified(*, valid: float = 0.2, test: float = 0.0, seed: int = 42) -> Splitter:
    """Draw as many rows as `random_split`, and of each class its share: largest remainders first.

    Classes are labels, or combinations of labels (multi_label). Within a class, rows are ordered as in `random_split`.

    Raises: as `random_split`; when called on rows, SplitError for labels that are not classes.
    Source: largest remainders, Hamilton's method of apportionment.
    """
    _check_fractions(valid, test, seed)

    def draw(rows: pa.Table) -> Splits:
        n, codes = rows.num_rows, _codes(rows)
        sizes = np.bincount(codes)
        validated = _shares(valid, sizes, int(valid * n), room=sizes)
        tested = _shares(test, sizes, int(test * n), room=sizes - validated)
        order, position = _class_by_class(codes, _shuffled(rows, seed))
        drawn = codes[order]
        return named(n, order[position < validated[drawn]], order[position >= (sizes - tested)[drawn]])

    return Draw(draw)


def k_fold(k: int, fold: int, *, seed: int = 42, stratify: bool = False) -> Splitter:
    """Validate on fold number `fold`, 0 to k - 1, of k: over all folds every row is in the valid split once.

    Folds differ by one row at most; with stratify, so do the rows of each class in them. Rows are ordered as in
    `random_split`, so that few change their fold when a few files are added or removed.

    Raises: SplitError for fewer than two folds, a fold that does not exist, or a negative seed.
    """
    if k < 2 or not 0 <= fold < k:
        raise SplitError(f"there is no fold {fold} of {k}: folds count from 0 and are two or more; give 0 to {k - 1}")
    _check_seed(seed)

    def draw(rows: pa.Table) -> Splits:
        n = rows.num_rows
        codes = _codes(rows) if stratify else np.zeros(n, np.int64)
        order, position = _class_by_class(codes, _shuffled(rows, seed))
        sizes = np.bincount(codes)
        ends = np.cumsum(sizes)
        # Rows of each class in each fold, (k, C): dealt out class after class, so that totals are even, too.
        dealt = _below(ends, k) - _below(ends - sizes, k)
        last = np.cumsum(dealt, axis=0)
        drawn = codes[order]
        return named(n, order[((last - dealt)[fold][drawn] <= position) & (position < last[fold][drawn])])

    return Draw(draw)


def _check_fractions(valid: float, test: float, seed: int) -> None:
    if not 0 < valid < 1:
        raise SplitError(f"valid={valid} is not between 0 and 1: one split would be empty; give a fraction such as 0.2")
    if not 0 <= test < 1 or valid + test >= 1:
        raise SplitError(
            f"test={test} beside valid={valid} leaves nothing to train on: give fractions that sum below 1"
        )
    _check_seed(seed)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise SplitError(f"seed={seed} is negative: the hash that draws takes none; give 0 or more")


def named(n: int, valid: NDArray[Any], test: NDArray[Any] | None = None) -> NDArray[np.object_]:
    """Splits of n rows, from row numbers or masks."""
    splits = np.full(n, "train", object)
    splits[valid] = "valid"
    if test is not None:
        splits[test] = "test"
    return splits


def _codes(rows: pa.Table) -> NDArray[np.int64]:
    """The class of each row, (n,), numbered in the sorted order of the classes."""
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
    """All rows, (n,), by a hash of the seed and each path: if one is added or removed, the others keep their order.

    10 million take 5 s.
    """
    paths = rows["path"].cast(pa.large_binary()).to_pylist()
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(path, seed) for path in paths), np.uint64, len(paths))
    return np.argsort(hashes, kind="stable")


def _class_by_class(codes: NDArray[np.int64], order: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All rows, one class after another, each class in this order; and the position of each in its class, from 0."""
    order = order[np.argsort(codes[order], kind="stable")]
    sizes = np.bincount(codes)
    return order, np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _below(ends: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """(k, C): how many of the numbers below each end have the remainders 0 to k - 1."""
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
