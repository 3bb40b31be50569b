"""Which images are the same file twice, and do the copies lie in different splits?

Equal means equal bytes, by the hash of verify.py. Different files of pictures that look alike are not found.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from thawline.dataio.errors import quoted
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.schema import SPLITS
from thawline.dataio.table.tasks import TASKS

_MOST = 3


def duplicates(manifest: Manifest) -> pa.Table:
    """The usable images that have copies: group (int64, from 0), id, path, split.

    Images of one group have equal content; groups are ordered by their first images, images by id. Files that were not
    verified have no hash and are in no group.
    """
    rows = manifest.rows.select(["id", "path", "split", "hash", "bytes"])
    verified = rows["hash"].is_valid().to_numpy()
    hashes, sizes = (rows[name].fill_null(0).to_numpy() for name in ("hash", "bytes"))
    numbers = np.flatnonzero(verified & manifest.usable())
    order = numbers[np.lexsort((numbers, sizes[numbers], hashes[numbers]))]
    same = (hashes[order][1:] == hashes[order][:-1]) & (sizes[order][1:] == sizes[order][:-1])
    start = np.concatenate([[True], ~same])[: len(order)]  # where a content begins
    first = order[start][np.cumsum(start) - 1] if len(order) else order
    copied = ~start | np.concatenate([same, [False]])[: len(order)]  # like the one before, or the one after
    order, first = order[copied], first[copied]
    by_group = np.lexsort((order, first))
    copies = rows.select(["id", "path", "split"]).take(pa.array(order[by_group]))
    group = np.unique(first[by_group], return_inverse=True)[1].astype(np.int64)
    return copies.add_column(0, "group", pa.array(group)).set_column(3, "split", copies["split"].cast(pa.string()))


def report(manifest: Manifest) -> str:
    """A few lines for people, '' without copies; warnings for copies in another split, or with another label."""
    copies = duplicates(manifest)
    if copies.num_rows == 0:
        return ""
    groups: dict[int, dict[str, list[str]]] = {}
    for row in copies.to_pylist():
        groups.setdefault(row["group"], {}).setdefault(row["split"], []).append(row["path"])
    lines = [_contradictions(manifest, copies)]
    lines += [_across(list(groups.values()), first, second) for first, second in combinations(SPLITS, 2)]
    extra = Counter(dict.fromkeys(SPLITS, 0))
    for splits in groups.values():
        extra.update({split: len(paths) - 1 for split, paths in splits.items()})
    within = ", ".join(f"{count:,} in {split}" for split, count in extra.items() if count)
    return "\n".join([*filter(None, lines), *([f"copies within one split: {within}"] if within else [])])


def _contradictions(manifest: Manifest, copies: pa.Table) -> str:
    """A warning about equal files with different labels; '' if there are none."""
    task = TASKS[manifest.task]
    rows = manifest.rows.select(["id", task.content])
    rows = rows.filter(pc.is_in(rows["id"], copies["id"].combine_chunks()))
    labels = {row["id"]: _as_text(row[task.content]) for row in rows.to_pylist()}
    first: dict[int, dict[str, str]] = {}
    different: dict[int, dict[str, str]] = {}
    for row in copies.to_pylist():
        first.setdefault(row["group"], row)
        if labels[row["id"]] != labels[first[row["group"]]["id"]]:
            different.setdefault(row["group"], row)
    if not different:
        return ""
    pairs = [(first[group], row) for group, row in list(different.items())[:_MOST]]
    examples = ", ".join(
        " = ".join(quoted(row["path"]) + (f" ({quoted(labels[row['id']])})" if task.names else "") for row in pair)
        for pair in pairs
    )
    return (
        f"WARNING: {len(different):,} files have copies with different {task.labels_word} "
        f"({examples}{', ...' if len(different) > _MOST else ''}): they teach and test both; keep the right one of each"
    )


def _as_text(label: Any) -> str:
    """A label as a text that is equal for equal labels, NaN and lists in another order included."""
    if isinstance(label, list):
        return ", ".join(map(str, sorted(label) if all(isinstance(item, str) for item in label) else label))
    return str(label)


def _across(groups: list[dict[str, list[str]]], first: str, second: str) -> str:
    """A warning about copies in two splits; '' if there are none."""
    both = [group for group in groups if first in group and second in group]
    if not both:
        return ""
    count = sum(len(group[second]) for group in both)
    examples = ", ".join(f"{quoted(group[second][0])} = {quoted(group[first][0])}" for group in both[:_MOST])
    return (
        f"WARNING: {count:,} images of {second} are also in {first} "
        f"({examples}{', ...' if len(both) > _MOST else ''}): the metrics would flatter; remove them, or "
        "split by a column or folder that keeps copies together"
    )
