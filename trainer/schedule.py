"""What are the learning rates and the momentum at a step? Pure functions of progress; no torch, no state.

    lr, or its maximum: a number, a slice, a pair        spread -> one maximum per layer group
    one_cycle_phases, fine_tune_phases -> Phase, ...     OneCycle.at(step) -> learning rates, momentum

The words and the numbers are fastai's; how many steps a phase takes is the loader's to say, not ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from trainer.errors import RecipeError

LearningRate = float | slice | Sequence[float]
"""One for all layer groups; slice(b), slice(a, b), or the pair [a, b], slice(a, b) as TOML writes it."""


def cosine(start: float, end: float, p: float) -> float:
    """From start (p = 0) to end (p = 1) along half a cosine.

    Source: Loshchilov and Hutter, SGDR, 2017; as fastai's SchedCos.
    """
    return end + (1 + math.cos(math.pi * p)) * (start - end) / 2


@dataclass(frozen=True)
class OneCycle:
    """Warm up, then anneal, by cosines; momentum goes the other way.

    Source: Smith and Topin, Super-Convergence, 2018; the cosine form is fastai's fit_one_cycle.
    Raises RecipeError where a value makes no schedule.
    """

    lr: tuple[float, ...]
    """The maximum of each layer group, stem first."""
    steps: int
    """How many, over all epochs of the phase."""
    div: float = 25.0
    """Starts at lr / div."""
    div_final: float = 1e5
    """Ends at lr / div_final."""
    pct_start: float = 0.25
    """The share of the steps that warms up."""
    momenta: tuple[float, float, float] = (0.95, 0.85, 0.95)
    """At the start, at the maximum of lr, at the end."""

    def __post_init__(self) -> None:
        _whole("steps", self.steps)
        if not self.lr:
            raise RecipeError("lr=() has no layer group: nothing would train; give one maximum per layer group")
        for lr in self.lr:
            _rate(lr)
        _shape(self.div, self.div_final, self.pct_start)
        if len(self.momenta) != 3 or not all(0 <= m < 1 for m in self.momenta):
            raise RecipeError(
                f"momenta={self.momenta} are not three numbers in [0, 1): the moments would never settle; "
                "give (start, middle, end), as in (0.95, 0.85, 0.95)"
            )

    def at(self, step: int) -> tuple[tuple[float, ...], float]:
        """(lr of each layer group, momentum) to set before `step`, which counts from 0 within the phase."""
        if not 0 <= step < self.steps:
            raise RecipeError(
                f"step={step} lies outside this schedule of {self.steps} steps: no learning rate is there; "
                "count steps from the start of the phase"
            )
        p = step / self.steps
        start, middle, end = self.momenta
        if p < self.pct_start:
            p /= self.pct_start
            return tuple(cosine(lr / self.div, lr, p) for lr in self.lr), cosine(start, middle, p)
        p = (p - self.pct_start) / (1 - self.pct_start)
        return tuple(cosine(lr, lr / self.div_final, p) for lr in self.lr), cosine(middle, end, p)


def spread(lr: LearningRate, groups: int) -> tuple[float, ...]:
    """Discriminative learning rates: one per layer group, stem first.

    A number: the same for all. slice(a, b) or [a, b]: a geometric row from a to b. slice(b): b for the last
    group, b / 10 for the others. Raises RecipeError.

    Source: Howard and Ruder, ULMFiT, 2018; the slice rules are fastai's.
    """
    _whole("groups", groups)
    if isinstance(lr, slice):
        if lr.step is not None or lr.stop is None:
            raise RecipeError(f"lr={lr} is not a range of learning rates: give slice(low, high) or slice(high)")
        last = _rate(lr.stop)
        if lr.start is None:
            return (last / 10,) * (groups - 1) + (last,)
        first = _rate(lr.start)
        if groups == 1:
            return (last,)
        return (*(first * (last / first) ** (i / (groups - 1)) for i in range(groups - 1)), last)
    if isinstance(lr, Sequence) and not isinstance(lr, str):
        if len(lr) != 2:
            raise RecipeError(
                f"lr={list(lr)} has {len(lr)} numbers: layer groups are spread between two; "
                "give [low, high], or one number for all groups"
            )
        return spread(slice(lr[0], lr[1]), groups)
    return (_rate(lr),) * groups


@dataclass(frozen=True)
class Phase:
    """One cycle of a recipe: what is trainable meanwhile, and the shape of its schedule."""

    name: str
    epochs: int
    freeze_to: int
    """The first trainable layer group: 0 for all of them, -1 for the last alone."""
    lr: LearningRate
    """As the user gave it; `spread` makes one of it per layer group."""
    div: float = 25.0
    div_final: float = 1e5
    pct_start: float = 0.25

    def __post_init__(self) -> None:
        _whole("epochs", self.epochs)
        spread(self.lr, 1)
        _shape(self.div, self.div_final, self.pct_start)


def one_cycle_phases(
    epochs: int,
    lr: LearningRate,
    *,
    div: float = 25.0,
    div_final: float = 1e5,
    pct_start: float = 0.25,
) -> tuple[Phase, ...]:
    """fit_one_cycle: a single phase over all layer groups. Raises RecipeError."""
    return (Phase("one_cycle", epochs, 0, lr, div, div_final, pct_start),)


def fine_tune_phases(
    epochs: int,
    base_lr: LearningRate = 2e-3,
    *,
    frozen_epochs: int = 1,
    lr_mult: float = 100.0,
    pct_start: float = 0.3,
    div: float = 5.0,
) -> tuple[Phase, ...]:
    """fastai's fine_tune: the head alone, then all layers at half the rate, the stem lr_mult times slower.

    frozen_epochs=0 leaves the first phase out. Raises RecipeError.
    """
    if not isinstance(base_lr, Real):
        raise RecipeError(
            f"lr={base_lr} with fine_tune, which makes its own slices of one number: give lr = 3e-3, say, "
            "or the one_cycle recipe"
        )
    base_lr = _rate(base_lr)
    _positive("lr_mult", lr_mult)
    half = base_lr / 2
    phases = [Phase("unfrozen", epochs, 0, slice(half / lr_mult, half), div, pct_start=pct_start)]
    if frozen_epochs != 0:
        _whole("frozen_epochs", frozen_epochs, least=0)
        phases.insert(0, Phase("frozen", frozen_epochs, -1, slice(base_lr), pct_start=0.99))
    return tuple(phases)


def _rate(value: object) -> float:
    return _positive("lr", value, "give a positive number, such as 3e-3")


def _positive(name: str, value: object, remedy: str = "give a positive number") -> float:
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf:
        return float(value)
    raise RecipeError(f"{name}={value!r} is not a positive, finite number: nothing would be learned; {remedy}")


def _whole(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RecipeError(
            f"{name}={value!r} is not a whole number from {least} up: no schedule has such a length; "
            f"give {name} >= {least}"
        )


def _shape(div: float, div_final: float, pct_start: float) -> None:
    _positive("div", div)
    _positive("div_final", div_final)
    if not isinstance(pct_start, Real) or not 0 <= float(pct_start) <= 1:
        raise RecipeError(
            f"pct_start={pct_start!r} is not a share of the steps: the warm-up would have no end; "
            "give 0 (no warm-up) to 1 (nothing else)"
        )
