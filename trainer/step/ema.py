"""Which weights lie behind the noise of the last steps? Their exponential moving average.

Not torch's AveragedModel, whose update reads a counter back from the device in every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of a model's parameters, of their own dtypes: ema += (1 - decay) (weight - ema), once a step.

    Buffers are not averaged: BatchNorm's are averages already.
    Source: Polyak and Juditsky, 1992, with exponential weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = dict(model.named_parameters())
        self._mean = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step was taken."""
        torch._foreach_lerp_(list(self._mean.values()), list(self._live.values()), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live.items():
            live.data, self._mean[name] = self._mean[name], live.data

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the parameters' names."""
        return self._mean

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take an average up again."""
        for name, mean in self._mean.items():
            mean.copy_(state[name])
