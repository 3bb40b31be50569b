"""Which images are the same file twice, and does one of them test what the other taught?

Equal means equal bytes, by the hash that verify.py took. Pictures that look alike in different files are not found.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa

from dataio.manifest import Manifest
from dataio.splits import SIDES

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
    """A few lines for people, '' if no image is there twice: loud where a copy is on another side of the split."""
    found = duplicates(manifest)
    if found.num_rows == 0:
        return ""
    groups: dict[int, dict[str, list[str]]] = {}
    for row in found.to_pylist():
        groups.setdefault(row["group"], {}).setdefault(row["split"], []).append(row["path"])
    lines = [_loud(list(groups.values()), one, other) for one, other in combinations(SIDES, 2)]
    extra = Counter(dict.fromkeys(SIDES, 0))
    for sides in groups.values():
        extra.update({side: len(paths) - 1 for side, paths in sides.items()})
    within = ", ".join(f"{count:,} in {side}" for side, count in extra.items() if count)
    return "\n".join([*filter(None, lines), *([f"copies within one side of the split: {within}"] if within else [])])


def _loud(groups: list[dict[str, list[str]]], one: str, other: str) -> str:
    """What to say of copies on two sides; '' if there are none."""
    both = [group for group in groups if one in group and other in group]
    if not both:
        return ""
    count = sum(len(group[other]) for group in both)
    named = ", ".join(f"{group[other][0]} = {group[one][0]}" for group in both[:_NAMED])
    return (
        f"WARNING: {count:,} images of {other} are also in {one} ({named}{', ...' if len(both) > _NAMED else ''}): the "
        "metrics would flatter; remove them, or split by a column or folder that keeps copies together"
    )
