"""Which manifests do tests of them share?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from thawline.dataio.labels.labels import by_parent, from_lists, label
from thawline.dataio.table.draws import random_split
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import Table, from_folder
from thawline.dataio.table.splits import by_function, split

FORMATS = ("parquet", "arrow")


def pictures(root: Path, count: int = 10) -> Table:
    """`count` small images on disk, alternately in cat/ and dog/, the i-th i + 8 px wide; labelled."""
    for index in range(count):
        path = root / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + index, 8), (index, 0, 0)).save(path)
    return label(from_folder(root), by_parent())


def unlooked(labels: list[Any], **options: Any) -> Manifest:
    """Images 0.jpg, 1.jpg, ... that do not exist, the last for validation."""
    last = f"{len(labels) - 1}.jpg"
    table = from_lists([f"{i}.jpg" for i in range(len(labels))], labels, root="/data", **options)
    return split(table, by_function(lambda row: row["path"] == last), verify=False)


TASKS: dict[str, Callable[[], Manifest]] = {
    "single_label": lambda: unlooked(["b", "a", "b", "c"]),
    "multi_label": lambda: unlooked([["b", "a"], [], ["c"], ["a", "a"]]),
    "points": lambda: unlooked([[(1, 2), (3, 4)], [], [None, (5, 6)], [(7, 8)]], task="points"),
    "mask": lambda: unlooked(["m/0.png", "m/1.png", "m/0.png", "m/3.png"], task="mask", values=(0, 7)),
}


def holey(root: Path) -> Manifest:
    """Checked images, two of ten broken."""
    table = pictures(root)
    (root / "cat" / "00.png").write_bytes(b"")
    (root / "dog" / "05.png").unlink()
    return split(table, random_split(valid=0.5, seed=1), max_bad=1)


def sized(manifest: Manifest) -> Manifest:
    """As if every image had been found to be 10 px wide and 20 high."""
    rows = manifest.rows
    for name, px in (("width", 10), ("height", 20)):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array([px] * len(rows), pa.int32()))
    return replace(manifest, rows=rows)
