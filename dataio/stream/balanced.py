"""How does training see rare classes more often? An order of shares by class, each class in its own permutations.

Still a pure function of the stream position, which stays the whole state. A position has a class; how often that
class stood before it is computed, and says which of its samples stands there.

Positions come in windows of 1,000, whose places are a circle in a fixed shuffled order. The classes lie along the
circle as long as their shares are, and it turns by an irrational part of a place from window to window: in each, every
class stands within one of its exact share, and the smallest share has its turn in time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.errors import SplitError
from thawline.dataio.hashing import hash64
from thawline.dataio.stream.plan import FAR, Training, permute
from thawline.dataio.stream.settings import POWER
from thawline.dataio.table.tasks import TASKS

WINDOW = 1000
_PLACE = 1 << 24
"""Steps of a place: shares are exact to 6e-11."""
_CIRCLE = WINDOW * _PLACE
_TURN = 6_408_327
"""Steps that the circle turns from window to window: .382 of a place, the golden section, which spreads best. Odd, so
that every step has its turn."""
_OWN = 10
"""Attempts to fill a hole from its own class, before any sample will do: all files of a class may be gone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Balanced(Training):
    """As Training, but classes come as often as `bounds` says: see `balanced`, which makes it.

    A sample comes again when all others of its class have come as often.
    """

    index: NDArray[np.int32]
    """(n,) rows, class by class."""
    starts: NDArray[np.int64]
    """(C + 1,) where each class begins in it."""
    bounds: NDArray[np.int64]
    """(C + 1,) where each class begins on the circle, in steps."""
    places: NDArray[np.int64]
    """(WINDOW,) which place of the circle each position of a window has."""

    def at(
        self, positions: NDArray[np.int64], attempts: NDArray[np.int64] | int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See Order; the epoch of a sample is how often it came before. A hole is filled from its own class first."""
        tries = np.broadcast_to(np.asarray(attempts, np.int64), positions.shape)
        windows, place = np.divmod(positions, WINDOW)
        known, which = np.unique(windows, return_inverse=True)
        classes = self._classes(known)
        kind = classes[which, place]
        times = _before(self.bounds[kind + 1], windows) - _before(self.bounds[kind], windows)
        times += _occurrences(classes)[which, place]
        sizes = np.diff(self.starts)[kind]
        epochs, index = np.divmod(times, sizes)
        epochs += tries * FAR
        keys = hash64(self.seed, kind).view(np.int64)
        rows = self.index[self.starts[kind] + permute(index, n=sizes, seed=keys, epoch=epochs)].astype(np.int64)
        if (far := tries > _OWN).any():
            epochs[far], rows[far] = super().at(positions[far], tries[far])
        return epochs, rows

    def shares(self) -> NDArray[np.float64]:
        """Which part of the stream each class is, (C,)."""
        return np.diff(self.bounds) / _CIRCLE

    def _classes(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The class of each position of these windows, (k, WINDOW)."""
        turned = (windows % _CIRCLE * _TURN)[:, None] + self.places * _PLACE
        return np.searchsorted(self.bounds[1:], turned % _CIRCLE, side="right")


def balanced(classes: NDArray[np.int64], *, power: float, count: int, seed: int, **shape: Any) -> Balanced:
    """An order in which a class of m samples comes in proportion to m^(1 - power): to m (1 / m)^power.

    classes: (n,) of each sample, in [0, count). shape: as Training takes it. Raises SplitError.
    """
    POWER.check("balance", power, SplitError)
    sizes = np.bincount(classes, minlength=count)
    weights = np.where(sizes > 0, np.maximum(sizes, 1) ** (1.0 - power), 0.0)
    ends = np.cumsum(weights) / weights.sum()
    bounds = np.rint(np.concatenate([[0.0], ends]) * _CIRCLE).astype(np.int64)
    bounds[-1] = _CIRCLE
    return Balanced(
        index=np.argsort(classes, kind="stable").astype(np.int32),  # of ten million rows half the memory
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        bounds=bounds,
        places=permute(np.arange(WINDOW), n=WINDOW, seed=seed, epoch=np.full(WINDOW, -1)),
        seed=seed,
        **shape,
    )


def check(power: float, *, task: str) -> None:
    """Raises SplitError for a power out of range, and for a task whose samples have no one class."""
    POWER.check("balance", power, SplitError)
    if power and not TASKS[task].one_class:
        known = " or ".join(name for name, each in TASKS.items() if each.one_class)
        raise SplitError(
            f"balance={power:g} with task={task!r}: a sample has no one class there by which it could be drawn; give "
            f"0, or weights by class in the loss (fit.class_weights) for several labels; balance is for {known}"
        )


def _occurrences(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each place of each row, how often its class stands before it in the row; the same shape."""
    order = np.argsort(classes, axis=1, kind="stable")
    run = np.take_along_axis(classes, order, axis=1)
    place = np.broadcast_to(np.arange(classes.shape[1]), classes.shape)
    begins = np.where(np.diff(run, axis=1, prepend=-1) != 0, place, 0)
    counted = np.empty_like(classes)
    np.put_along_axis(counted, order, place - np.maximum.accumulate(begins, axis=1), axis=1)
    return counted


def _before(bounds: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many positions of all earlier windows lie on the circle before these bounds, (k,)."""
    places, rest = np.divmod(bounds, _PLACE)
    rounds, windows_left = np.divmod(windows, _PLACE)  # after so many windows the circle stands as it did
    # In a window that has turned by o of a place, one more place begins before the bound where o < rest.
    late = _floor_sum(windows_left, _PLACE - rest) - _floor_sum(windows_left, np.zeros_like(rest))
    return places * windows + rounds * rest + windows_left - late


def _floor_sum(n: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum over i < n of floor((i _TURN + b) / _PLACE), for each of (k,), in O(log n).

    Source: Graham, Knuth and Patashnik, Concrete Mathematics, 3.5: the lattice points under a line, by Euclid's steps.
    """
    n, b = n.copy(), b.copy()
    m, a = np.full_like(n, _PLACE), np.full_like(n, _TURN)
    total = np.zeros_like(n)
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if not (top >= m).any():
            return total
        n, b = np.divmod(top, m)  # of those that are through, n is 0 from here on, and adds nothing
        m, a = np.where(a > 0, a, 1), m
