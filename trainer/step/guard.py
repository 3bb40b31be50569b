"""Are the gradients finite? Checked on the device before the optimiser's step; reported when the window is read.

A gradient that is not finite must not reach the weights, and reading the device would make the host wait in every step.
So a flag stays on the device. From the first bad step on, the optimiser skips every step until the host reads the flag:
the weights are still those from before it. (An optimiser that cannot read a flag on the device is then not called; for
it the host reads the flag in every step.) BatchNorm's statistics, which the forward pass spoils, are restored from a
copy.

fp16 skips a step now and then by design, when its loss is scaled too high: there, only many in a row are bad.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FP16_IN_A_ROW = 20
"""The scale starts at 2^16 and halves at each skipped step: after 17 it is below one, so it was not too high."""
_MOST_COPIES = 64


@dataclass(frozen=True)
class GuardReading:
    """What the device recorded since the last read."""

    bad: int | None
    """The first bad step, counted from 0 since the last read; None where there is none."""
    skipped: int
    """Steps that fp16 skipped."""
    grad_norm: float
    """The last step's, before clipping."""


class Guard:
    """Watches the steps of one phase. tolerated: how many bad steps in a row are allowed."""

    def __init__(self, model: nn.Module, device: torch.device, *, tolerated: int = 0, window: int = 10) -> None:
        self._tolerated = tolerated
        self._streak, self._stuck, self._good, self._skipped, self._norm = torch.zeros(5, device=device).unbind()
        self._steps = 0
        self._depth = min(window, _MOST_COPIES)
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            by_kind.setdefault(buffer.dtype, []).append(buffer)
        self._live = list(by_kind.values())
        self._copies: list[list[list[Tensor]]] = []

    @torch.no_grad()
    def keep(self) -> None:
        """A step begins: copy the model's buffers."""
        slot = self._steps % self._depth
        if slot == len(self._copies):
            self._copies.append([[b.clone() for b in kind] for kind in self._live])
            return
        for copy, live in zip(self._copies[slot], self._live, strict=True):
            torch._foreach_copy_(copy, live)

    def see(self, norm: Tensor) -> Tensor:
        """Of the norm of the gradients, a scalar: 1 where the optimiser must skip this step, else 0; float32, ()."""
        bad = norm.isfinite().logical_not().float()
        self._streak.add_(1).mul_(bad)
        torch.maximum(self._stuck, (self._streak > self._tolerated).float(), out=self._stuck)
        self._skipped.add_(bad * (1 - self._stuck))
        self._good.add_(1 - self._stuck)
        self._norm.copy_(norm)
        self._steps += 1
        return torch.maximum(bad, self._stuck)

    def read(self) -> GuardReading:
        """What happened since the last read. Waits for the device; call it where its other numbers are read."""
        good, stuck, skipped, norm = torch.stack([self._good, self._stuck, self._skipped, self._norm]).tolist()
        self._good.zero_()
        self._skipped.zero_()
        return GuardReading(bad=int(good) if stuck else None, skipped=int(skipped), grad_norm=norm)

    @torch.no_grad()
    def undo(self, steps: int) -> bool:
        """Restore the buffers of `steps` steps ago; False if there is no copy of them any more."""
        if not 1 <= steps <= min(self._steps, self._depth):
            return False
        for copy, live in zip(self._copies[(self._steps - steps) % self._depth], self._live, strict=True):
            torch._foreach_copy_(live, copy)
        return True

    @torch.no_grad()
    def again(self) -> None:
        """The step under way is repeated: restore the buffers of its beginning."""
        for copy, live in zip(self._copies[self._steps % self._depth], self._live, strict=True):
            torch._foreach_copy_(live, copy)
