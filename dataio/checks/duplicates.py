"""Which images are the same file twice, and does one of them test what the other taught?

Equal means equal bytes, by the hash that verify.py took. Pictures that look alike in different files are not found.
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

_NAMED = 3


def duplicates(manifest: Manifest) -> pa.Table:
    """The usable images whose content another one has too, side by side: group (int64, from 0), id, path, split.

    Images of one group have equal content; groups come in the order of their first images, images in that of ids. Files
    that were not verified have no hash and are in no group.
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
    shown = np.lexsort((order, first))
    taken = rows.select(["id", "path", "split"]).take(pa.array(order[shown]))
    group = np.unique(first[shown], return_inverse=True)[1].astype(np.int64)
    return taken.add_column(0, "group", pa.array(group)).set_column(3, "split", taken["split"].cast(pa.string()))


def report(manifest: Manifest) -> str:
    """A few lines for people, '' if no image is there twice: loud where a copy is in another split, or labelled
    otherwise.
    """
    copies = duplicates(manifest)
    if copies.num_rows == 0:
        return ""
    groups: dict[int, dict[str, list[str]]] = {}
    for row in copies.to_pylist():
        groups.setdefault(row["group"], {}).setdefault(row["split"], []).append(row["path"])
    lines = [_contradictions(manifest, copies)]
    lines += [_loud(list(groups.values()), one, other) for one, other in combinations(SPLITS, 2)]
    extra = Counter(dict.fromkeys(SPLITS, 0))
    for splits in groups.values():
        extra.update({split: len(paths) - 1 for split, paths in splits.items()})
    within = ", ".join(f"{count:,} in {split}" for split, count in extra.items() if count)
    return "\n".join([*filter(None, lines), *([f"copies within one split: {within}"] if within else [])])


def _contradictions(manifest: Manifest, copies: pa.Table) -> str:
    """What to say of equal files that are labelled differently; '' if there are none."""
    task = TASKS[manifest.task]
    rows = manifest.rows.select(["id", task.content])
    rows = rows.filter(pc.is_in(rows["id"], copies["id"].combine_chunks()))
    labels = {row["id"]: _as_text(row[task.content]) for row in rows.to_pylist()}
    first: dict[int, dict[str, str]] = {}
    other: dict[int, dict[str, str]] = {}
    for row in copies.to_pylist():
        first.setdefault(row["group"], row)
        if labels[row["id"]] != labels[first[row["group"]]["id"]]:
            other.setdefault(row["group"], row)
    if not other:
        return ""
    pairs = [(first[group], row) for group, row in list(other.items())[:_NAMED]]
    named = ", ".join(
        " = ".join(quoted(row["path"]) + (f" ({quoted(labels[row['id']])})" if task.names else "") for row in pair)
        for pair in pairs
    )
    return (
        f"WARNING: {len(other):,} files are there under different {task.labels_word} "
        f"({named}{', ...' if len(other) > _NAMED else ''}): they teach and test both; keep the right one of each"
    )


def _as_text(label: Any) -> str:
    """A label as a text that is equal for equal ones, NaN and the order of a list included."""
    if isinstance(label, list):
        return ", ".join(map(str, sorted(label) if all(isinstance(part, str) for part in label) else label))
    return str(label)


def _loud(groups: list[dict[str, list[str]]], one: str, other: str) -> str:
    """What to say of copies in two splits; '' if there are none."""
    both = [group for group in groups if one in group and other in group]
    if not both:
        return ""
    count = sum(len(group[other]) for group in both)
    named = ", ".join(f"{quoted(group[other][0])} = {quoted(group[one][0])}" for group in both[:_NAMED])
    return (
        f"WARNING: {count:,} images of {other} are also in {one} ({named}{', ...' if len(both) > _NAMED else ''}): the "
        "metrics would flatter; remove them, or split by a column or folder that keeps copies together"
    )
