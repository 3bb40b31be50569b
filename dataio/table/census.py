"""How many images has each class in train, valid and test, and what about that deserves a warning?

Classes of labels only: what masks and points hold is another question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thawline.dataio.errors import ManifestError, listed, quoted
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.part import Part

Counts = Mapping[str, NDArray[np.int64]]
"""By side, those that there are: images of each class, (C,)."""

TASKS = ("single_label", "multi_label")
"""Whose labels are classes."""

_SHOWN = 10  # largest and smallest classes of a table
_NAME = 40  # characters
_FEW = 3  # images a class below which a label rule is suspected


def count(manifest: Manifest) -> Counts:
    """Of a manifest's usable images; empty for points and masks."""
    if manifest.task not in TASKS:
        return {}
    return {side: count_part(manifest.part(side), manifest.classes) for side in manifest.sides()}


def count_part(part: Part, classes: Sequence[str]) -> NDArray[np.int64]:
    """Of one side's images, (C,)."""
    labels = part.table["label"].chunk(0).take(pa.array(part.rows))
    texts = labels.flatten() if part.task == "multi_label" else labels
    index = pc.index_in(texts, pa.array(classes, pa.string())).drop_null().to_numpy()
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


def table(counts: Counts, classes: Sequence[str]) -> list[str]:
    """A line a class, the largest first, its images on each side; of many the ten largest and the ten smallest."""
    if not counts:
        return []
    total = np.sum(list(counts.values()), axis=0)
    order = np.argsort(-total, kind="stable").tolist()
    more = len(order) - 2 * _SHOWN
    shown = order if more < 2 else [*order[:_SHOWN], *order[-_SHOWN:]]
    names = [_short(classes[i]) for i in shown]
    width = max(map(len, names))
    lines = [f"  {'':{width}}" + "".join(f"{side:>11}" for side in counts)]
    lines += [
        f"  {name:{width}}" + "".join(f"{int(n[i]):>11,}" for n in counts.values())
        for i, name in zip(shown, names, strict=True)
    ]
    return lines if more < 2 else [*lines[: _SHOWN + 1], f"  ... {more:,} more ...", *lines[_SHOWN + 1 :]]


def lacking(counts: Counts, classes: Sequence[str], *, stratify: bool = True) -> list[str]:
    """A warning for classes that training or validation would never see; a test alone needs neither.

    stratify: whether the images can be divided by class.
    """
    lines = []
    words = {"train": ("training", "cannot be learned"), "valid": ("validation", "are measured by no metric")}
    for side, (word, consequence) in words.items():
        if side not in counts or "train" not in counts:
            continue
        missing = np.flatnonzero(counts[side] == 0)
        if len(missing):
            total = np.sum([n[missing] for n in counts.values()], axis=0)
            remedy = (
                "divide by class (--valid stratified:0.2)"
                if stratify and total.min() >= 5
                else "give more images of them"
            )
            lines.append(
                f"WARNING: no {word} images of {len(missing):,} of {len(classes):,} classes "
                f"({_some([classes[i] for i in missing.tolist()])}): they {consequence}; {remedy}"
            )
    return lines


def too_many(counts: Counts, classes: Sequence[str]) -> list[str]:
    """A warning where there are about as many classes as images."""
    total = np.sum([*counts.values(), np.zeros(len(classes), np.int64)], axis=0)
    images, found = int(total.sum()), int((total > 0).sum())
    if found and (images == found or (found >= _SHOWN and images < _FEW * found)):
        return [
            f"WARNING: {images:,} images have {found:,} classes, {images / found:.1f} images a class: the rule of "
            "--label seems to tell images apart, not classes; correct it"
        ]
    return []


def _some(names: list[str]) -> str:
    return listed([_short(name) for name in names], most=5)


def _short(name: str) -> str:
    plain = quoted(name)
    return plain if len(plain) <= _NAME else f"{plain[: _NAME - 3]}..."
