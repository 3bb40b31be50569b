"""What does training receive? A `Batch` from a `Loader`, a protocol that is all the trainer knows of data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Inputs = Tensor | tuple[Tensor, ...]
"""What a model is called with: model(inputs), or model(*inputs) for a tuple; each (N, ...)."""


@dataclass(frozen=True)
class Batch:
    """One rank's local batch of a step.

    Targets and ids belong to the samples that were rendered, substitutes of broken files included. They stay outside
    the engine, which returns batches in the order in which it gets them.
    """

    inputs: Inputs
    """On the loader's device."""
    targets: Tensor
    """single_label: (N,) int64 class indices. multi_label: (N, C) float32 one-hot. number: (N, C) float32, in their own
    units. points: (N, K, 2) float32 x, y, -1 and 1 at the edges of the image as the model sees it, beyond them for a
    point that the crop or the augmentation left outside, NaN where there is none. mask: (N, H, W) int64 class indices,
    255 where there is none. On the loader's device."""
    ids: Tensor
    """(N,) int64 ids of the samples (of a manifest, say), on the CPU."""

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What the model is called with: model(*arguments)."""
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    def split(self, pieces: int) -> "list[Batch]":
        """Micro-batches, in order; their sizes differ by at most one sample."""
        inputs = zip(*(each.tensor_split(pieces) for each in self.arguments), strict=True)
        targets, ids = self.targets.tensor_split(pieces), self.ids.tensor_split(pieces)
        return [Batch(*piece) for piece in zip(inputs, targets, ids, strict=True)]


@dataclass(frozen=True)
class ImageBatch(Batch):
    """A batch of images: one input."""

    inputs: Tensor
    """(N, 3, H, W) float32 or float16, normalised, channels_last in memory, on the loader's device."""


class Loader(Protocol):
    """A source of batches, of images or of anything else. `trainer` needs no more than this."""

    @property
    def task(self) -> str:
        """single_label, multi_label, ...: the task whose loss and metrics are the defaults; empty for none."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The vocabulary, in the order of the target indices; empty where targets are not indices."""

    @property
    def samples(self) -> int:
        """Samples in the split, over all ranks together."""

    @property
    def global_batch(self) -> int:
        """Samples a step, over all ranks together."""

    def steps(self, epochs: float) -> int:
        """Training steps that this many passes take."""

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        """Training: endless, from that step on. Validation: this rank's samples once, in order, at the size that
        training has at that step."""

    @property
    def quarantined(self) -> Mapping[int, str]:
        """Files that turned out unusable since the manifest was made: id -> file and reason."""

    def quarantine(self, files: Mapping[int, str]) -> None:
        """Stop using these files. Raises when more are unusable than the user allows."""

    def close(self) -> None:
        """Release threads and memory. A closed loader cannot be used again."""


@runtime_checkable
class Augmented(Protocol):
    """A loader with augmented views of its samples: what test-time augmentation needs besides `Loader`."""

    def augmented(self, view: int) -> Loader:
        """The validation samples in the same order under training's augmentation, drawn anew for each view."""


@runtime_checkable
class Counted(Protocol):
    """A loader whose samples have classes: what balanced class weights need besides `Loader`."""

    def class_counts(self) -> NDArray[np.int64]:
        """Samples of the split, over all ranks, that have each class, (C,)."""


@runtime_checkable
class Repeatable(Protocol):
    """A training loader that knows what it will load: what keeping what a model says of it needs besides `Loader`."""

    def repeated(self, views: int) -> "PlannedLoader":
        """The same stream, its augmentations those of the first `views` epochs again and again."""


class PlannedLoader(Loader, Protocol):
    """A loader of a stream that repeats."""

    def planned(self, step: int) -> list[tuple[int, ...]]:
        """For each sample of this rank's local batch, all that decides its inputs and target, its id last."""
