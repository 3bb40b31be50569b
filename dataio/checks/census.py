"""What do the labels of train, valid and test come to? Images of each class, numbers' moments, what training lacks.

Counted where labels are names of classes: what masks show is known only while the files are verified (masks.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thawline.dataio.errors import ManifestError
from thawline.dataio.labels.counts import Counts
from thawline.dataio.labels.numbers import Moments
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.subset import Subset
from thawline.dataio.table.tasks import TASKS


def count(manifest: Manifest) -> Counts:
    """Of a manifest's usable images; empty where labels are no names of classes."""
    if TASKS[manifest.task].names is None:
        return {}
    return {split: count_subset(manifest.subset(split), manifest.classes) for split in manifest.splits()}


def count_subset(subset: Subset, classes: Sequence[str]) -> NDArray[np.int64]:
    """Of one split's images, (C,); zeros where labels are no names of classes."""
    return np.bincount(class_indices(subset, classes), minlength=len(classes))


def class_indices(subset: Subset, classes: Sequence[str]) -> NDArray[np.int64]:
    """Of one split's labels, in order: one an image where it has one class, more or none where it has several.

    Empty where labels are no names of classes.
    """
    names = TASKS[subset.task].names
    if names is None:
        return np.zeros(0, np.int64)
    labels = subset.table["label"].chunk(0).take(pa.array(subset.rows))
    index: NDArray[np.int64] = pc.index_in(names(labels), pa.array(classes, pa.string())).drop_null().to_numpy()
    return index


def label_moments(manifest: Manifest) -> Moments | None:
    """What numbers are standardised by, of the training images alone; None where labels are no numbers.

    Raises ManifestError where a number is the same for all of them.
    """
    moments = TASKS[manifest.task].moments
    if moments is None:
        return None
    subset = manifest.subset("train")
    return moments(subset.table["label"].chunk(0).take(pa.array(subset.rows)), manifest.classes)


def check_splits(manifest: Manifest, valid: Manifest | None = None, *, names: Sequence[str]) -> None:
    """Raises ManifestError unless one manifest has images to train on, and it, or the other, to validate on.

    names: what the manifests are called in the sentence.
    """
    for split, of, name in (("train", manifest, names[0]), ("valid", valid or manifest, names[-1])):
        if split not in (there := of.splits()):
            raise ManifestError(
                f"{name} has images for {' and '.join(there) or 'no split'} alone, and training needs some for "
                f"{split}: index them again with --valid (0.2, say) and without --test all; show and explain work with "
                "it as it is"
            )
