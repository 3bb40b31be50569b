"""What does training receive? `Batch`, and the `Loader` protocol that the trainer knows instead of an engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    The ids come out of the engine beside the pixels: they say what was rendered, not what was planned.
    """

    images: torch.Tensor
    """(N, 3, H, W) float32 or float16, normalised, channels_last in memory, on the loader's device."""
    targets: torch.Tensor
    """single_label: (N,) int64 class indices. multi_label: (N, C) float32 one-hot. points: (N, K, 2) float32 x, y,
    -1 and 1 at the edges of the image as the model sees it, beyond them for a point that the crop or the augmentation
    left outside, NaN where there is none. mask: (N, H, W) int64 class indices, 255 where there is none. On the loader's
    device."""
    ids: torch.Tensor
    """(N,) int64 manifest ids, on the CPU."""


class Loader(Protocol):
    """A source of batches. `trainer` needs no more than this."""

    @property
    def task(self) -> str:
        """single_label, multi_label, points or mask."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The vocabulary, in the order of the target indices."""

    @property
    def samples(self) -> int:
        """Samples in the split, over all ranks together."""

    @property
    def global_batch(self) -> int:
        """Samples a step, over all ranks together."""

    @property
    def engine(self) -> str:
        """Who decodes: dali or reference."""

    def steps(self, epochs: float) -> int:
        """Training steps that this many passes take."""

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        """Training: endless, from that step on. Validation: this rank's part of the samples, once, in order, at the
        size that training has at that step."""

    def augmented(self, view: int) -> "Loader":
        """The validation samples in the same order under training's augmentation: other draws for each view."""

    @property
    def quarantined(self) -> Mapping[int, str]:
        """What turned out unusable since the manifest was made: id -> file and reason."""

    def quarantine(self, files: Mapping[int, str]) -> None:
        """Use these no more, whoever found them. Raises when they are more than the user allows."""

    def close(self) -> None:
        """Give back threads and memory. A closed loader cannot be used again."""
