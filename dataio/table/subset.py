"""Which images of a manifest does one split hold? Row numbers only: everything else is read when it is needed.

A batch takes time and memory for its own samples, whatever the manifest's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """The columns of n samples of a manifest."""

    numbers: NDArray[np.int64]
    """(n,) rows of the manifest."""
    ids: NDArray[np.int64]
    """(n,)"""
    paths: list[str]
    """Relative to the manifest's root, or absolute."""
    labels: pa.Array
    """n labels, typed by the task."""
    widths: NDArray[np.int32]
    """(n,) px after EXIF orientation; 0 where the file was not verified."""
    heights: NDArray[np.int32]
    """(n,)"""
    hashes: NDArray[np.uint64]
    """(n,) xxh3_64 of the file's bytes; 0 where the file was not verified."""
    sizes: NDArray[np.int64]
    """(n,) bytes of the file; 0 where it was not verified."""
    pillow: NDArray[np.bool_]
    """(n,) whether only Pillow can decode it, and not DALI."""
    mask_hashes: NDArray[np.uint64]
    """(n,) xxh3_64 of the mask's file; zeros for other tasks."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Subset:
    """The usable rows of one split, in rising order of id; loaders call `take`.

    `table` has one chunk a column (see manifest.Manifest.rows) and `rows` (N,) are those of the subset.
    """

    table: pa.Table
    rows: NDArray[np.int64]
    task: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> NDArray[np.int64]:
        """All ids, (N,) int64, rising."""
        ids: NDArray[np.int64] = self.table["id"].to_numpy()[self.rows]
        return ids

    def take(self, index: NDArray[np.int64]) -> Rows:
        """The samples at these positions of the subset, (n,) in [0, N), in this order."""
        numbers = self.rows[index]
        indices = pa.array(numbers)

        def column(name: str) -> pa.Array:
            return self.table[name].chunk(0).take(indices)

        def filled(name: str) -> NDArray[Any]:
            return column(name).fill_null(0).to_numpy(zero_copy_only=False).copy()  # torch wants it writable

        hashes = filled("hash")
        return Rows(
            numbers=numbers,
            ids=filled("id"),
            paths=column("path").to_pylist(),
            labels=column("label"),
            widths=filled("width"),
            heights=filled("height"),
            hashes=hashes,
            sizes=filled("bytes"),
            pillow=holds(column("codec"), "pillow"),
            mask_hashes=filled("mask_hash") if "mask_hash" in self.table.column_names else np.zeros_like(hashes),
        )


def holds(words: pa.DictionaryArray, word: str) -> NDArray[np.bool_]:
    """Which of the words equal `word`: compared by number, since texts would cost more than all other columns."""
    dictionary = words.dictionary.to_pylist()
    equal: NDArray[np.bool_] = words.indices.fill_null(-1).to_numpy() == (
        dictionary.index(word) if word in dictionary else -2
    )
    return equal
