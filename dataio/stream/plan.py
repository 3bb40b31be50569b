"""Which ids make step s? The pure, infinite order of training and the exact order of validation.

The training stream is endless: epoch permutations end to end. Stream position i is sample
`permutation(seed, i // n)[i % n]`, so a batch may straddle two epochs, every batch has the same shape, and no
sample is left out or repeated within an epoch. The whole state of a run's data is one integer, the cursor:
samples consumed. Nothing here knows of files, threads or ranks' hardware.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.errors import SplitError
from thawline.dataio.hashing import hash64

_ROUNDS = 10  # 4 are enough in theory for large n; small n (tens of samples) need more to look uniform

_FAR = 2**40  # epochs


def permute(index: NDArray[np.int64], *, n: int, seed: int, epoch: NDArray[np.int64]) -> NDArray[np.int64]:
    """Map each index in [0, n) through the permutation of its epoch; computed, never stored.

    A generalised Feistel network on Z_a x Z_b with a*b >= n, walked along its cycle until it lands below n.
    O(len(index)) time and memory for any n. `index` and `epoch`: (k,) int64. Returns (k,) int64.
    Source: J. Black and P. Rogaway, "Ciphers with arbitrary finite domains" (2002), method 3.
    """
    a = int(np.ceil(np.sqrt(n)))
    b = -(-n // a)
    out = np.array(index, np.int64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = np.divmod(out[todo], b)
        for round_ in range(_ROUNDS):
            if round_ % 2 == 0:
                left = (left + _offset(seed, epoch[todo], round_, right, a)) % a
            else:
                right = (right + _offset(seed, epoch[todo], round_, left, b)) % b
        out[todo] = left * b + right
        todo = todo[out[todo] >= n]
    return out


def _offset(
    seed: int, epoch: NDArray[np.int64], round_: int, half: NDArray[np.int64], modulus: int
) -> NDArray[np.int64]:
    return (hash64(seed, epoch, round_, half) % np.uint64(modulus)).astype(np.int64)


def part_bounds(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part [lo, hi) of `count` things that a rank takes; parts differ by at most one."""
    return rank * count // world_size, (rank + 1) * count // world_size


@dataclass(frozen=True)
class Plan:
    """The order of training: n samples, global_batch a step, all of it a function of (seed, step)."""

    n: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.global_batch < 1:
            raise SplitError(
                f"n={self.n} samples in batches of {self.global_batch}: a plan needs at least one of each; "
                "check the split and global_batch"
            )

    def positions(self, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """Stream positions of a rank's part of a step: (batch,) int64, rising."""
        lo, hi = part_bounds(self.global_batch, rank, world_size)
        return np.arange(step * self.global_batch + lo, step * self.global_batch + hi, dtype=np.int64)

    def at(
        self, positions: NDArray[np.int64], attempts: NDArray[np.int64] | int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which sample stands at each stream position: (epochs, rows), both (k,) int64, rows in [0, n).

        Where that sample's file cannot be used, attempt 1, 2, ... names who takes its place, and with which
        augmentation: what stands there in epoch e + attempt * 2**40, which no run reaches. So a hole is filled in the
        same way by any rank of any world, and after any interruption.
        """
        epochs, index = np.divmod(positions, self.n)
        epochs = epochs + np.asarray(attempts, np.int64) * _FAR
        return epochs, permute(index, n=self.n, seed=self.seed, epoch=epochs)

    def steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take, to the nearest whole step, at least one."""
        return max(1, round(epochs * self.n / self.global_batch))
