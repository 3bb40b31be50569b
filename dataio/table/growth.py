"""What of a new manifest was there before? Rows keep ids and sides, classes their places; what is new comes after.

So a model that was trained on the old one can go on with the new one: what it was measured on was not, and will not be,
trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from thawline.dataio.errors import ManifestError, listed
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.schema import in_order
from thawline.dataio.table.tasks import TASKS


@dataclass(frozen=True)
class Grown:
    """A manifest that continues an older one."""

    manifest: Manifest
    images: dict[str, int]
    """How many of its usable images are new, by side."""
    gone: int
    """How many of the older one's images it has no more."""
    classes: tuple[str, ...]
    """Those that are new: the last of its classes."""

    def __str__(self) -> str:
        """One line for people."""
        sides = ", ".join(f"{count:,} {side}" for side, count in self.images.items() if count) or "0"
        parts = [f"{sides} images are new"]
        parts += [f"{self.gone:,} are gone"] if self.gone else []
        parts += [f"{len(self.classes)} classes are new: {listed(self.classes)}"] if self.classes else []
        return "; ".join(parts)


def grow(old: Manifest, new: Manifest) -> Grown:
    """`new` as the continuation of `old`: a row is the same where its path is, or else its file's content.

    The same rows keep their id, and the side that they were on; a copy of an old file goes to that file's side, too.
    Labels are the new ones. Classes are the old ones in their order, then those that are new.
    Raises ManifestError where the two mean different things: another task, other points, other values of a mask.
    """
    if (old.task, old.values, old.swap) != (new.task, new.values, new.swap) or (
        TASKS[old.task].names is None and old.classes != new.classes
    ):
        raise ManifestError(
            f"the new manifest is for {new.task} with {listed(new.classes)}, the run's own for {old.task} with "
            f"{listed(old.classes)}: what was learnt means something else there; index the images as before"
        )
    classes = tuple(name for name in new.classes if name not in old.classes)
    known = old.rows.select(["id", "path", "hash", "split"]).to_pydict()
    by_path = {path: row for row, path in enumerate(known["path"])}
    by_hash = {number: row for row, number in enumerate(known["hash"]) if number}
    given = new.rows.select(["path", "hash", "split", "status"]).to_pydict()
    paths = {*given["path"]}
    ids, sides, fresh, taken = [], list[str | None](), dict.fromkeys(("train", "valid", "test"), 0), set[int]()
    following = max(known["id"], default=-1) + 1
    for path, number, side, status in zip(*given.values(), strict=True):
        row = by_path.get(path, by_hash.get(number) if number else None)
        before = None if row is None else known["split"][row]
        sides.append(side if before is None or status != "ok" else before)
        # A copy of a file that is still in its place is a new row on that file's side.
        same = row is not None and row not in taken and (known["path"][row] == path or known["path"][row] not in paths)
        if same and row is not None:
            taken.add(row)
            ids.append(known["id"][row])
            continue
        ids.append(following)
        following += 1
        if status == "ok" and sides[-1] is not None:
            fresh[sides[-1]] += 1
    rows = new.rows
    for name, values in (("id", np.array(ids, np.int64)), ("split", sides)):
        at, kind = rows.schema.get_field_index(name), rows.schema.field(name)
        column = pa.array(values, kind.type.value_type if pa.types.is_dictionary(kind.type) else kind.type)
        rows = rows.set_column(at, kind, column.cast(kind.type))
    manifest = replace(new, rows=in_order(rows), classes=(*old.classes, *classes))
    return Grown(manifest, fresh, len(known["path"]) - len(taken), classes)
