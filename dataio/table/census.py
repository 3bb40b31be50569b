"""How many images has each class in train, valid and test? And are there images for both that training needs?

Counted where labels are names of classes: what masks show is known only while the files are verified (masks.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thawline.dataio.errors import ManifestError
from thawline.dataio.table.counts import Counts
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.part import Part
from thawline.dataio.table.tasks import TASKS


def count(manifest: Manifest) -> Counts:
    """Of a manifest's usable images; empty where labels are no names of classes."""
    if TASKS[manifest.task].names is None:
        return {}
    return {side: count_part(manifest.part(side), manifest.classes) for side in manifest.sides()}


def count_part(part: Part, classes: Sequence[str]) -> NDArray[np.int64]:
    """Of one side's images, (C,); zeros where labels are no names of classes."""
    names = TASKS[part.task].names
    if names is None:
        return np.zeros(len(classes), np.int64)
    labels = part.table["label"].chunk(0).take(pa.array(part.rows))
    index = pc.index_in(names(labels), pa.array(classes, pa.string())).drop_null().to_numpy()
    return np.bincount(index, minlength=len(classes))


def check_sides(manifest: Manifest, valid: Manifest | None = None, *, names: Sequence[str]) -> None:
    """Raises ManifestError unless one manifest has images to train on, and it, or the other, to validate on.

    names: what the manifests are called in the sentence.
    """
    for side, of, name in (("train", manifest, names[0]), ("valid", valid or manifest, names[-1])):
        if side not in (there := of.sides()):
            raise ManifestError(
                f"{name} has images for {' and '.join(there) or 'no side'} alone, and training needs some for {side}: "
                "index them again with --valid (0.2, say) and without --test all; show and explain work as it is"
            )
