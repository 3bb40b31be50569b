"""When has a phase trained enough, and with which weights does it end? What its epochs measured decides.

All of it is a function of recorded rows, which are the same on every rank and in every checkpoint: there is no state,
and a resumed run decides as the unbroken one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from thawline.dataio import ranges
from thawline.dataio.ranges import at_least, given
from thawline.trainer.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """By which metric a phase is watched, and what comes of it; counted anew in every phase.

    Source: fastai's EarlyStoppingCallback and SaveModelCallback, which count anew in every fit.
    """

    patience: Annotated[int | None, at_least(1, "every phase would end with its first epoch")] = None
    """End a phase after so many epochs in a row without a new best; None = never."""
    monitor: Annotated[str, given("a metric such as 'valid_loss'", "nothing is called so")] = "valid_loss"
    """Metric of the validation by which patience, restore_best and the recipe plateau go."""
    restore_best: bool = False
    """End each phase with the weights of its best epoch."""

    def check(self) -> Self:
        """Itself. Raises RecipeError for a value out of range."""
        ranges.check(self, RecipeError)
        return self


def best_epoch(values: Sequence[float], *, higher: bool) -> int | None:
    """The index of the best value, the first of equals; None where none is a number."""
    sign = 1 if higher else -1
    numbers = [(sign * value, -epoch) for epoch, value in enumerate(values) if not math.isnan(value)]
    return -max(numbers)[1] if numbers else None


def since_best(values: Sequence[float], *, higher: bool) -> int:
    """How many epochs have ended since the best one; all of them where no value is a number."""
    best = best_epoch(values, higher=higher)
    return len(values) if best is None else len(values) - 1 - best


def falls(values: Sequence[float], *, higher: bool, wait: int) -> int:
    """How often `wait` epochs in a row had no new best: so often lr falls. After a fall it is counted anew.

    Source: fastai's ReduceLROnPlateau with min_delta 0.
    """
    best, waited, fallen = -math.inf, 0, 0
    for value in values:
        signed = value if higher else -value
        if signed > best:  # never so for NaN
            best, waited = signed, 0
            continue
        waited += 1
        if waited == wait:
            waited, fallen = 0, fallen + 1
    return fallen


def phase_rows(rows: Sequence[Mapping[str, Any]], *, start: int | None = None) -> list[Mapping[str, Any]]:
    """The "valid" rows of the phase that began with the step `start`; None: of the last phase that has one."""
    valid = [row for row in rows if row["kind"] == "valid"]
    if start is None and valid:
        start = valid[-1]["step"] - valid[-1]["phase_step"]
    return [row for row in valid if row["step"] - row["phase_step"] == start]


def course(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """A metric's values in these rows; NaN where it came to no number."""
    return [math.nan if (value := row.get(metric)) is None else float(value) for row in rows]
