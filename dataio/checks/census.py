"""What are the labels of train, valid and test in total? Images of each class, moments of numbers, missing splits.

Only names of classes are counted: the values of masks are known only while the files are verified (masks.py).
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
    """The usable images of each class, by split; empty if labels are not names of classes."""
    if TASKS[manifest.task].names is None:
        return {}
    return {split: count_subset(manifest.subset(split), manifest.classes) for split in manifest.splits()}


def count_subset(subset: Subset, classes: Sequence[str]) -> NDArray[np.int64]:
    """The images of each class in one split, (C,); zeros if labels are not names of classes."""
    return np.bincount(class_indices(subset, classes), minlength=len(classes))


def class_indices(subset: Subset, classes: Sequence[str]) -> NDArray[np.int64]:
    """The classes of one split's labels, in order: one an image for a single label, any number for several labels.

    Empty if labels are not names of classes.
    """
    names = TASKS[subset.task].names
    if names is None:
        return np.zeros(0, np.int64)
    labels = subset.table["label"].chunk(0).take(pa.array(subset.rows))
    index: NDArray[np.int64] = pc.index_in(names(labels), pa.array(classes, pa.string())).drop_null().to_numpy()
    return index


def label_moments(manifest: Manifest) -> Moments | None:
    """Mean and deviation of the training images' numbers, to standardise by; None if labels are not numbers.

    For a manifest that continues another, they are those of the first: the model has learnt in these units.
    Raises ManifestError if a number is the same for all images.
    """
    moments = TASKS[manifest.task].moments
    if moments is None or manifest.moments is not None:
        return manifest.moments
    subset = manifest.subset("train")
    return moments(subset.table["label"].chunk(0).take(pa.array(subset.rows)), manifest.classes)


def check_splits(manifest: Manifest, valid: Manifest | None = None, *, names: Sequence[str]) -> None:
    """Raises ManifestError unless `manifest` has training images, and `valid`, or else it, has validation images.

    names: of the manifests, for the message.
    """
    for split, source, name in (("train", manifest, names[0]), ("valid", valid or manifest, names[-1])):
        if split not in (splits := source.splits()):
            raise ManifestError(
                f"{name} has images for {' and '.join(splits) or 'no split'} alone, and training needs some for "
                f"{split}: index them again with --valid (0.2, say) and without --test all; show and explain work with "
                "it as it is"
            )
