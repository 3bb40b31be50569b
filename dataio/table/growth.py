"""How does a manifest continue an older one? Old rows keep ids and splits, old classes their order; new ones follow.

So a model that was trained on the old manifest can go on with the new one: images that it was validated on never train
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from thawline.dataio.checks.census import label_moments
from thawline.dataio.errors import ManifestError, listed
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.schema import in_order
from thawline.dataio.table.tasks import TASKS


@dataclass(frozen=True)
class Grown:
    """A manifest that continues an older one."""

    manifest: Manifest
    images: dict[str, int]
    """How many of its usable images are new, by split."""
    gone: int
    """How many images of the older manifest are missing."""
    replaced: int
    """How many have other bytes under their old path, or a mask that has."""
    classes: tuple[str, ...]
    """The new ones: the last of its classes."""

    def __str__(self) -> str:
        """One line for people."""
        counts = ", ".join(f"{count:,} {split}" for split, count in self.images.items() if count) or "0"
        sentences = [f"{counts} images are new"]
        sentences += [f"{self.gone:,} are gone"] if self.gone else []
        sentences += [f"{self.replaced:,} have other files under their names"] if self.replaced else []
        sentences += [f"{len(self.classes)} classes are new: {listed(self.classes)}"] if self.classes else []
        return "; ".join(sentences)


def grow(old: Manifest, new: Manifest) -> Grown:
    """`new` as the continuation of `old`: rows are the same if their paths are, or else their files' contents.

    The same rows keep their id and split; a copy of an old file gets that file's split, too, under any path.
    Labels are the new ones. Classes are the old ones in their order, then the new ones. Numbers are standardised as in
    `old`.
    Raises ManifestError where the two mean different things: another task, other points, other values of a mask.
    """
    _check_same_meaning(old, new)
    classes = tuple(name for name in new.classes if name not in old.classes)
    old_columns = old.rows.select(["id", "path", "hash", "split"]).to_pydict()
    masks_before, masks = (_masks(each) for each in (old, new))
    by_path = {path: row for row, path in enumerate(old_columns["path"])}
    by_hash = {digest: row for row, digest in enumerate(old_columns["hash"]) if digest}
    new_columns = new.rows.select(["path", "hash", "split", "status"]).to_pydict()
    paths = {*new_columns["path"]}
    ids, splits, added, kept = [], list[str | None](), dict.fromkeys(("train", "valid", "test"), 0), set[int]()
    replaced = sum(path in masks_before and masks_before[path] != digest for path, digest in masks.items())
    next_id = max(old_columns["id"], default=-1) + 1
    for path, digest, split, status in zip(*new_columns.values(), strict=True):
        row = by_path.get(path)
        if digest and (row is None or old_columns["hash"][row] != digest):
            replaced += row is not None
            row = by_hash.get(digest, row)
        before = None if row is None else old_columns["split"][row]
        splits.append(split if before is None or status != "ok" else before)
        # A copy of a file that is still where it was is a new row of the same split.
        same = (
            row is not None
            and row not in kept
            and (old_columns["path"][row] == path or old_columns["path"][row] not in paths)
        )
        if same and row is not None:
            kept.add(row)
            ids.append(old_columns["id"][row])
            continue
        ids.append(next_id)
        next_id += 1
        if status == "ok" and splits[-1] is not None:
            added[splits[-1]] += 1
    rows = _with_columns(new.rows, ids, splits)
    manifest = replace(new, rows=in_order(rows), classes=(*old.classes, *classes), moments=label_moments(old))
    return Grown(manifest, added, len(old_columns["path"]) - len(kept), replaced, classes)


def _masks(manifest: Manifest) -> dict[str, int]:
    """The hash of the mask of each image; empty where there are no masks."""
    if not TASKS[manifest.task].masks:
        return {}
    return dict(zip(*manifest.rows.select(["path", "mask_hash"]).to_pydict().values(), strict=True))


def _check_same_meaning(old: Manifest, new: Manifest) -> None:
    """Raises ManifestError where their targets mean different things."""
    if (old.task, old.values, old.swap) != (new.task, new.values, new.swap) or (
        TASKS[old.task].names is None and old.classes != new.classes
    ):
        raise ManifestError(
            f"the new manifest is for {new.task} with {listed(new.classes)}, the run's own for {old.task} with "
            f"{listed(old.classes)}: what was learnt means something else there; index the images as before"
        )


def _with_columns(rows: pa.Table, ids: Sequence[int], splits: Sequence[str | None]) -> pa.Table:
    """The rows with these ids and splits."""
    for name, values in (("id", np.array(ids, np.int64)), ("split", splits)):
        index, kind = rows.schema.get_field_index(name), rows.schema.field(name)
        column = pa.array(values, kind.type.value_type if pa.types.is_dictionary(kind.type) else kind.type)
        rows = rows.set_column(index, kind, column.cast(kind.type))
    return rows
