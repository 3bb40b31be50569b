"""How do two optimisers step as one? Each has param groups of its own; state, rates and checkpoints are common."""

from collections.abc import Callable
from typing import Any

import torch


class Pair(torch.optim.Optimizer):
    """Two optimisers over different parameters, used and saved as if they were one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts read and write this optimiser's own state and param groups."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[first:last]
            first = last

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Both step, from the same gradients."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which makes new dictionaries."""
        super().load_state_dict(state_dict)
        self._share()
