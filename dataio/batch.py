"""What does training receive? `Batch`, and the `Loader` protocol that the trainer knows instead of an engine."""

from collections.abc import Iterator
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
    """(N,) int64 class indices, or (N, C) float32 one-hot; on the loader's device."""
    ids: torch.Tensor
    """(N,) int64 manifest ids, on the CPU."""


class Loader(Protocol):
    """A source of batches. `trainer` needs no more than this."""

    @property
    def task(self) -> str:
        """single_label or multi_label."""

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
        """Training: endless, from that step on. Validation: this rank's part of the samples, once, in order."""

    def close(self) -> None:
        """Give back threads and memory. A closed loader cannot be used again."""
