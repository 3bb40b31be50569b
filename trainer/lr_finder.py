"""Which learning rate suits? Smith's range test: the loss while the rate grows, and four readings of that curve.

    found = lr_find(learn)      found.valley, found.steep, found.minimum, found.slide; found.plot()

The steps are `Learner.rehearse`'s, which puts everything back afterwards, and makes the losses the same on all ranks;
from there on all is a function of those losses, so that all ranks stop together and read the same. The definitions
are fastai's, ties included.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
from torch import nn

from thawline.models import groups
from thawline.trainer.errors import RecipeError
from thawline.trainer.schedule.shapes import LearningRate, positive, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.98
DIVERGED = 4.0
"""Times the best smoothed loss: there the test ends."""
STEPS = 100
"""Of a test, at most."""
FEWEST = 23
"""Steps that leave a point more than slide's window when a tenth is dropped at the start and 5 at the end."""
_DROPPED_LAST = 5
_WINDOW, _GAP = 15, 0.005


class Rehearsing(Protocol):
    """What the finder needs of a Learner."""

    @property
    def model(self) -> nn.Module:
        """With `groups()`."""

    def rehearse(
        self,
        lrs: Callable[[int], Sequence[float]],
        *,
        stop: Callable[[float], bool],
        steps: int,
        freeze_to: int | None = None,
    ) -> list[float]:
        """The mean losses of up to `steps` steps; `stop` is asked after each. All is as before then."""


@dataclass(frozen=True)
class LrCurve:
    """The curve without its ends, and the rates read off it. Raises RecipeError if nothing can be read off it."""

    lrs: tuple[float, ...]
    """The rate that the ratios of the layer groups are multiplied with, step by step; rising."""
    losses: tuple[float, ...]
    """Smoothed."""
    raw: tuple[float, ...]
    """As they came, of the same steps."""

    def __post_init__(self) -> None:
        if len(self.losses) <= _WINDOW:
            raise RecipeError(
                f"the lr finder's loss diverged so soon that only {len(self.losses)} steps are left to read, and no "
                f"learning rate can be told from fewer than {_WINDOW + 1}; look with `thawline show` whether the "
                "labels belong to the images, and give a small rate of your own, --fit.lr 1e-5"
            )
        fall = self.losses[0] - min(self.losses)
        if fall <= 1e-6 * abs(self.losses[0]) or _descent(self.losses)[1] < 3:  # less is float32's rounding
            raise RecipeError(
                f"the lr finder's loss never falls between lr {self.lrs[0]:.1e} and {self.lrs[-1]:.1e} (it begins at "
                f"{self.losses[0]:.4g}), so no learning rate can be told; give a larger --data.global-batch, whose "
                "loss is less noisy, or a rate of your own, --fit.lr 1e-3; a model that is trained already needs none"
            )

    @property
    def valley(self) -> float:
        """About two thirds down the longest fall: of L steps, each lower than the one before, ending at step e,
        the rate of step e - L + L // 3 + L // 6. Of several as long, the one that ends first. fastai's default.
        """
        end, length = _descent(self.losses)
        return self.lrs[end - length + length // 3 + length // 6]

    @property
    def steep(self) -> float:
        """Where the loss falls fastest with log lr: the step before the steepest difference."""
        return self.lrs[int(np.argmin(np.diff(self.losses) / np.diff(np.log(self.lrs))))]

    @property
    def minimum(self) -> float:
        """A tenth of the rate with the lowest loss."""
        return self.lrs[int(np.argmin(self.losses))] / 10

    @property
    def slide(self) -> float:
        """From the right, a window of 15 steps slides left while the slopes at its two ends differ by more than .005
        a step; the rate at its left end, the last time that they did.
        """
        slope = np.gradient(self.losses)
        last = len(slope) - 1 - _WINDOW
        apart = np.abs(slope[_WINDOW:] - slope[: last + 1]) > _GAP
        moves = int(np.argmin(np.append(apart[::-1], False)))
        return self.lrs[last - max(0, moves - 1)]

    def suggestions(self) -> dict[str, float]:
        """All four by name."""
        return {"valley": self.valley, "steep": self.steep, "minimum": self.minimum, "slide": self.slide}

    def table(self) -> pa.Table:
        """Columns lr, loss (smoothed) and raw, float64, a row a step."""
        return pa.table({"lr": self.lrs, "loss": self.losses, "raw": self.raw})

    def plot(self) -> "Figure":
        """The loss over the learning rate, with the four suggestions."""
        from thawline.trainer.analysis.plots import (
            plot_lr_curve,  # matplotlib takes half a second that a search needs not
        )

        return plot_lr_curve(self.table(), self.suggestions())


def lr_find(
    learn: Rehearsing,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = STEPS,
    lr: LearningRate = 1.0,
    freeze_to: int | None = None,
) -> LrCurve:
    """Train for up to `steps` steps while lr grows from `start` towards `end`, take it all back, return the curve.

    lr: the ratios of the layer groups, as in a fit (slice(0.01, 1.0), say); what is found is in units of it.
    freeze_to: the first layer group that trains meanwhile; None for what the learner would train now. Collective.

    Raises RecipeError: no such sweep; a loss that diverges at once, or never falls.
    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017; the numbers are fastai's.
    """
    _check(start, end, steps)
    ratios = spread(lr, len(groups.parameter_groups(learn.model)))
    seen: list[float] = []

    def stop(loss: float) -> bool:
        seen.append(loss)
        smoothed = smooth(seen)
        return not math.isfinite(smoothed[-1]) or smoothed[-1] > DIVERGED * min(smoothed)

    def lrs(step: int) -> list[float]:
        return [ratio * rate(step, start=start, end=end, steps=steps) for ratio in ratios]

    raw = learn.rehearse(lrs, stop=stop, steps=steps, freeze_to=freeze_to)
    return read(raw, start=start, end=end, steps=steps)


def read(raw: Sequence[float], *, start: float, end: float, steps: int) -> LrCurve:
    """The curve of a sweep whose steps had these losses, without the first tenth of the steps that were asked for and
    the last 5 that were taken: there the mean has no past, or the loss no future. Raises RecipeError, as `LrCurve`.
    """
    kept = slice(steps // 10, max(0, len(raw) - _DROPPED_LAST))
    lrs = [rate(step, start=start, end=end, steps=steps) for step in range(len(raw))]
    return LrCurve(tuple(lrs[kept]), tuple(smooth(raw)[kept]), tuple(raw[kept]))


def rate(step: int, *, start: float, end: float, steps: int) -> float:
    """start (end / start)^(step / steps), for steps from 0."""
    return start * (end / start) ** (step / steps)


def smooth(losses: Sequence[float]) -> list[float]:
    """An exponential mean that forgets 2 % a step, without its bias towards the 0 that it begins with."""
    mean, smoothed = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**count))
    return smoothed


def _descent(losses: Sequence[float]) -> tuple[int, int]:
    """(index of its end, length) of the longest strictly falling subsequence; the first to end among equals."""
    lengths: list[int] = []
    for loss in losses:
        lengths.append(1 + max((n for n, other in zip(lengths, losses, strict=False) if other > loss), default=0))
    longest = max(lengths)
    return lengths.index(longest), longest


def _check(start: float, end: float, steps: int) -> None:
    if not positive("start", start) < positive("end", end):
        raise RecipeError(f"start={start} is not below end={end}: the learning rate would not grow; give start < end")
    if steps < FEWEST:
        raise RecipeError(
            f"steps={steps} leave fewer than {_WINDOW + 1} points of the curve, of which nothing can be read; "
            f"give steps >= {FEWEST}"
        )
