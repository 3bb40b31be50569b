"""Which samples make step s? The pure, infinite order of training and the exact order of validation.

The training stream is endless: epoch permutations end to end. Stream position i is sample
`permutation(seed, i // n)[i % n]`, so a batch may straddle two epochs, every batch has the same shape, and no
sample is left out or repeated within an epoch. The whole state of a run's data is one integer, the cursor:
samples consumed. Nothing here knows of files, threads or hardware.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.errors import SplitError
from thawline.dataio.hashing import hash64

_ROUNDS = 10  # 4 are enough in theory for large n; small n (tens of samples) need more to look uniform

FAR = 2**40
"""Epochs that no run reaches: from there come those that fill holes."""


def permute(
    index: NDArray[np.int64],
    *,
    n: int | NDArray[np.int64],
    seed: int | NDArray[np.int64],
    epoch: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Map each index in [0, n) through the permutation of its epoch; computed, never stored.

    A generalised Feistel network on Z_a x Z_b with a*b >= n, walked along its cycle until it lands below n.
    O(len(index)) time and memory for any n. `index` and `epoch`: (k,) int64; `n` and `seed`, too, where each index has
    its own. Returns (k,) int64.
    Source: J. Black and P. Rogaway, "Ciphers with arbitrary finite domains" (2002), method 3.
    """
    out = np.array(index, np.int64)
    size, keys = np.broadcast_to(n, out.shape), np.broadcast_to(seed, out.shape)
    a = np.ceil(np.sqrt(size)).astype(np.int64)
    b = -(-size // a)
    todo = np.arange(len(out))
    while len(todo):
        of = (keys[todo], epoch[todo])
        left, right = np.divmod(out[todo], b[todo])
        for round_ in range(_ROUNDS):
            if round_ % 2 == 0:
                left = (left + _offset(of, round_, right, a[todo])) % a[todo]
            else:
                right = (right + _offset(of, round_, left, b[todo])) % b[todo]
        out[todo] = left * b[todo] + right
        todo = todo[out[todo] >= size[todo]]
    return out


def _offset(
    of: tuple[NDArray[np.int64], NDArray[np.int64]], round_: int, half: NDArray[np.int64], modulus: NDArray[np.int64]
) -> NDArray[np.int64]:
    return (hash64(*of, round_, half) % modulus.astype(np.uint64)).astype(np.int64)


def rank_bounds(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous range [lo, hi) of that many samples that a rank takes; sizes differ by at most one."""
    return rank * samples // world_size, (rank + 1) * samples // world_size


@dataclass(frozen=True, kw_only=True)
class Order(ABC):
    """Which samples this rank takes, and in which order; shared by loaders of images and of arrays.

    Raises SplitError where there is nothing to take.
    """

    n: int
    """Samples, over all ranks together."""
    global_batch: int
    """Samples a step, over all ranks together."""
    rank: int = 0
    world_size: int = 1

    endless: ClassVar[bool]
    """True for training, where another sample replaces one that cannot be used; else there is one sample less."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.global_batch < 1:
            raise SplitError(
                f"n={self.n} samples in batches of {self.global_batch}: an order needs at least one of each; "
                "check the split and global_batch"
            )
        if self.global_batch < self.world_size:
            raise SplitError(
                f"global_batch={self.global_batch} is smaller than world_size={self.world_size}: some ranks would "
                "have nothing to do; give a larger global_batch or fewer workers"
            )

    @property
    def local_batch(self) -> int:
        """The most samples that this rank takes at once."""
        return -(-self.global_batch // self.world_size)

    def steps(self, epochs: float) -> int:
        """Training steps that `epochs` passes take, to the nearest whole step, at least one."""
        return max(1, round(epochs * self.n / self.global_batch))

    @abstractmethod
    def batches(self, first_step: int = 0) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """From a step on: (step, this rank's stream positions at that step, ascending)."""

    @abstractmethod
    def at(
        self, positions: NDArray[np.int64], attempts: NDArray[np.int64] | int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sample at each stream position: (epochs, rows), both (k,) int64, rows in [0, n).

        attempts: for each position, how many samples in turn could not be used there.
        """


@dataclass(frozen=True, kw_only=True)
class Training(Order):
    """Epoch permutations end to end, forever: a function of (seed, step)."""

    seed: int
    endless: ClassVar[bool] = True

    def positions(self, step: int) -> NDArray[np.int64]:
        """Stream positions of this rank's local batch at a step: (local batch,) int64, ascending."""
        lo, hi = rank_bounds(self.global_batch, self.rank, self.world_size)
        return np.arange(step * self.global_batch + lo, step * self.global_batch + hi, dtype=np.int64)

    def batches(self, first_step: int = 0) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """See Order."""
        for step in count(first_step):
            yield step, self.positions(step)

    def at(
        self, positions: NDArray[np.int64], attempts: NDArray[np.int64] | int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See Order.

        Where a sample's file cannot be used, attempt 1, 2, ... gives its substitute and the substitute's augmentation:
        those of this position in epoch e + attempt * 2**40, which no run reaches. So every rank of any world, and a
        resumed run, choose the same substitute.
        """
        epochs, index = np.divmod(positions, self.n)
        epochs = epochs + np.asarray(attempts, np.int64) * FAR
        return epochs, permute(index, n=self.n, seed=self.seed, epoch=epochs)


@dataclass(frozen=True, kw_only=True)
class Once(Order):
    """Every sample once, in the order of rows: each rank takes a contiguous range, whose last batch may be short."""

    endless: ClassVar[bool] = False

    def batches(self, first_step: int = 0) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """See Order. All batches belong to the one step that training has reached."""
        lo, hi = rank_bounds(self.n, self.rank, self.world_size)
        for start in range(lo, hi, self.local_batch):
            yield first_step, np.arange(start, min(start + self.local_batch, hi), dtype=np.int64)

    def at(
        self, positions: NDArray[np.int64], attempts: NDArray[np.int64] | int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See Order: each position is its own row, in epoch 0."""
        return np.zeros_like(positions), positions
