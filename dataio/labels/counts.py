"""How are counts of images by class and split shown, and which deserve a warning? Numbers in, sentences out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.errors import listed, quoted

Counts = Mapping[str, NDArray[np.int64]]
"""By split that occurs: images of each class, (C,)."""

_MOST = 10  # largest and smallest classes of a table
_NAME = 40  # characters
_FEW = 3  # images a class below which a label rule is suspected


def table(counts: Counts, classes: Sequence[str]) -> list[str]:
    """A line a class with its images in each split, the largest first; of many the ten largest and ten smallest."""
    if not counts:
        return []
    total = np.sum(list(counts.values()), axis=0)
    order = np.argsort(-total, kind="stable").tolist()
    more = len(order) - 2 * _MOST
    listed_classes = order if more < 2 else [*order[:_MOST], *order[-_MOST:]]
    names = [_short(classes[i]) for i in listed_classes]
    width = max(map(len, names))
    lines = [f"  {'':{width}}" + "".join(f"{split:>11}" for split in counts)]
    lines += [
        f"  {name:{width}}" + "".join(f"{int(n[i]):>11,}" for n in counts.values())
        for i, name in zip(listed_classes, names, strict=True)
    ]
    return lines if more < 2 else [*lines[: _MOST + 1], f"  ... {more:,} more ...", *lines[_MOST + 1 :]]


def lacking(counts: Counts, classes: Sequence[str], *, stratify: bool = True) -> list[str]:
    """A warning for classes without training or validation images; none for a manifest with a test alone.

    stratify: whether the images can be divided by class.
    """
    lines = []
    words = {"train": ("training", "cannot be learned"), "valid": ("validation", "are measured by no metric")}
    for split, (word, consequence) in words.items():
        if split not in counts or "train" not in counts:
            continue
        missing = np.flatnonzero(counts[split] == 0)
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
    """A warning if there are about as many classes as images."""
    total = np.sum([*counts.values(), np.zeros(len(classes), np.int64)], axis=0)
    images, occurring = int(total.sum()), int((total > 0).sum())
    if occurring and (images == occurring or (occurring >= _MOST and images < _FEW * occurring)):
        return [
            f"WARNING: {images:,} images have {occurring:,} classes, {images / occurring:.1f} images a class: the rule "
            "of --label seems to tell images apart, not classes; correct it"
        ]
    return []


def _some(names: list[str]) -> str:
    return listed([_short(name) for name in names], most=5)


def _short(name: str) -> str:
    plain = quoted(name)
    return plain if len(plain) <= _NAME else f"{plain[: _NAME - 3]}..."
