"""What are the learning rates and the momentum at a step? Pure functions of progress; no torch, no state.

    lr, or its maximum: a number, a slice, a pair   spread -> one maximum per layer group
    OneCycle, FlatCos, Step, Constant               .at(step) -> learning rates, momentum

The words and the numbers are fastai's; which schedules make up a run is `schedule`'s to say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Literal, Protocol

from thawline.trainer.errors import RecipeError
from thawline.trainer.optimisers.settings import MOMENTUM

LearningRate = float | slice | Sequence[float]
"""One for all layer groups; slice(b), slice(a, b), or the pair [a, b], slice(a, b) as TOML writes it."""

Shape = Literal["one_cycle", "flat_cos", "step", "constant", "plateau"]
"""cosine is a flat_cos that is flat nowhere; plateau is constant as long as the validation gets better."""

Momenta = tuple[float, float, float]
"""At the start of a cycle, at the maximum of lr, at the end."""

MOMENTA: Momenta = (0.95, 0.85, 0.95)


def cosine(start: float, end: float, p: float) -> float:
    """From start (p = 0) to end (p = 1) along half a cosine.

    Source: Loshchilov and Hutter, SGDR, 2017; as fastai's SchedCos.
    """
    return end + (1 + math.cos(math.pi * p)) * (start - end) / 2


class Schedule(Protocol):
    """What a phase sets before each of its steps."""

    def at(self, step: int) -> tuple[tuple[float, ...], float | None]:
        """(lr of each layer group, momentum) at `step`, which counts from 0 within the phase.

        Momentum None: the optimiser keeps its own. Raises RecipeError for a step outside.
        """


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
    momenta: Momenta = MOMENTA

    def __post_init__(self) -> None:
        _check(self.lr, self.steps, div=self.div, div_final=self.div_final, pct_start=self.pct_start)
        MOMENTUM.check("momenta", self.momenta, RecipeError)
        if len(self.momenta) != 3:
            raise RecipeError(f"momenta={self.momenta} are not three: give (start, middle, end), as in {MOMENTA}")

    def at(self, step: int) -> tuple[tuple[float, ...], float]:
        """As `Schedule.at`; momentum is always a number."""
        p = _progress(step, self.steps)
        start, middle, end = self.momenta
        if p < self.pct_start:
            p /= self.pct_start
            return tuple(cosine(lr / self.div, lr, p) for lr in self.lr), cosine(start, middle, p)
        p = (p - self.pct_start) / (1 - self.pct_start)
        return tuple(cosine(lr, lr / self.div_final, p) for lr in self.lr), cosine(middle, end, p)


@dataclass(frozen=True)
class FlatCos:
    """At the maximum first, then down by a cosine. Raises RecipeError where a value makes no schedule.

    Source: fastai's fit_flat_cos; the warm-up is linear, as in Goyal et al., Accurate, Large Minibatch SGD, 2017.
    """

    lr: tuple[float, ...]
    """As OneCycle's, and so are `steps`, `div` and `div_final`."""
    steps: int
    div: float = 25.0
    div_final: float = 1e5
    pct_start: float = 0.75
    """The share of the steps before lr falls."""
    warmup: float = 0.0
    """The share of the steps, within pct_start, in which lr rises along a line."""

    def __post_init__(self) -> None:
        _check(self.lr, self.steps, div=self.div, div_final=self.div_final, pct_start=self.pct_start)
        _share("warmup", self.warmup)
        if self.warmup > self.pct_start:
            raise RecipeError(
                f"warmup={self.warmup} is more than pct_start={self.pct_start}: lr would fall before it has risen; "
                f"give warmup <= {self.pct_start}"
            )

    def at(self, step: int) -> tuple[tuple[float, ...], None]:
        """As `Schedule.at`; momentum is always None."""
        p = _progress(step, self.steps)
        if p < self.pct_start:
            return _warmed(self.lr, p, warmup=self.warmup, div=self.div), None
        p = (p - self.pct_start) / (1 - self.pct_start)
        return tuple(cosine(lr, lr / self.div_final, p) for lr in self.lr), None


MILESTONES = (0.5, 0.75)
"""Source: He et al., Deep Residual Learning, 2016, section 4.2: after 32,000 and 48,000 of 64,000 steps."""


@dataclass(frozen=True)
class Step:
    """At the maximum first, times `gamma` from each milestone on. Raises RecipeError where a value makes no schedule.

    Source: torch's MultiStepLR; the warm-up is linear.
    """

    lr: tuple[float, ...]
    """As Constant's, and so are `steps`, `div` and `warmup`."""
    steps: int
    div: float = 25.0
    warmup: float = 0.0
    milestones: tuple[float, ...] = MILESTONES
    """Shares of the steps, rising."""
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _check(self.lr, self.steps, div=self.div)
        _share("warmup", self.warmup)
        check_gamma(self.gamma)
        bounds = (self.warmup, *self.milestones)
        for before, milestone in pairwise(bounds):
            _share("milestones", milestone)
            if before > milestone:
                raise RecipeError(
                    f"milestones={list(self.milestones)} do not rise from warmup={self.warmup}: lr would fall before "
                    "it has risen; give rising shares of the steps, such as 0.5, 0.75"
                )

    def at(self, step: int) -> tuple[tuple[float, ...], None]:
        """As `Schedule.at`; momentum is always None."""
        p = _progress(step, self.steps)
        scale = self.gamma ** sum(p >= milestone for milestone in self.milestones)
        return tuple(lr * scale for lr in _warmed(self.lr, p, warmup=self.warmup, div=self.div)), None


@dataclass(frozen=True)
class Constant:
    """At the maximum, after a linear warm-up if there is one. Raises RecipeError where a value makes no schedule."""

    lr: tuple[float, ...]
    steps: int
    div: float = 25.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.steps, div=self.div)
        _share("warmup", self.warmup)

    def at(self, step: int) -> tuple[tuple[float, ...], None]:
        """As `Schedule.at`; momentum is always None."""
        return _warmed(self.lr, _progress(step, self.steps), warmup=self.warmup, div=self.div), None


def spread(lr: LearningRate, groups: int) -> tuple[float, ...]:
    """Discriminative learning rates: one per layer group, stem first.

    A number: the same for all. slice(a, b) or [a, b]: a geometric row from a to b. slice(b): b for the last
    group, b / 10 for the others. Raises RecipeError.

    Source: Howard and Ruder, ULMFiT, 2018; the slice rules are fastai's.
    """
    whole("groups", groups)
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


def check_gamma(value: object) -> None:
    """Raises RecipeError unless lr falls by this factor."""
    if positive("gamma", value, "give a factor such as 0.1") >= 1:
        raise RecipeError(f"gamma={value!r} is not below 1: lr would never fall; give a factor such as 0.1")


def positive(name: str, value: object, remedy: str = "give a positive number") -> float:
    """`value` as a float, if it is a finite number above 0. Raises RecipeError."""
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf:
        return float(value)
    raise RecipeError(f"{name}={value!r} is not a positive, finite number: nothing would be learned; {remedy}")


def whole(name: str, value: object) -> None:
    """Raises RecipeError unless `value` is a whole number from 1 up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(
            f"{name}={value!r} is not a whole number from 1 up: no schedule has such a length; give {name} >= 1"
        )


def _rate(value: object) -> float:
    return positive("lr", value, "give a positive number, such as 3e-3")


def _share(name: str, value: object) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise RecipeError(
            f"{name}={value!r} is not a share of the steps: the warm-up would have no end; "
            "give 0 (none of them) to 1 (all of them)"
        )


def _check(lrs: tuple[float, ...], steps: int, *, div: float, div_final: float = 1.0, pct_start: float = 0.0) -> None:
    whole("steps", steps)
    if not lrs:
        raise RecipeError("lr=() has no layer group: nothing would train; give one maximum per layer group")
    for lr in lrs:
        _rate(lr)
    positive("div", div)
    positive("div_final", div_final)
    _share("pct_start", pct_start)


def _progress(step: int, steps: int) -> float:
    if not 0 <= step < steps:
        raise RecipeError(
            f"step={step} lies outside this schedule of {steps} steps: no learning rate is there; "
            "count steps from the start of the phase"
        )
    return step / steps


def _warmed(lrs: tuple[float, ...], p: float, *, warmup: float, div: float) -> tuple[float, ...]:
    """The maxima after the warm-up; during it, on the line from lr / div to lr."""
    return lrs if p >= warmup else tuple(lr / div + (lr - lr / div) * p / warmup for lr in lrs)
