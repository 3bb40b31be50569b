"""How do we get random numbers that need no state? A counter-based hash, vectorised over numpy.

Every random choice of the data path is `hash64(seed, ..., id, which)`: no generator to save, to fork or to
advance, so a worker that holds sample 17 draws for it what any other worker would have drawn.
Not for cryptography.

Source: the finaliser is the 64-bit variant 13 of D. Stafford, as used by SplitMix64 (Steele et al. 2014).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


def _finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def hash64(*keys: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers (each a scalar or an array; they broadcast) to uint64 of the broadcast shape."""
    state = np.zeros((1,), np.uint64)
    for key in keys:  # 1-D throughout: array arithmetic wraps silently, scalar arithmetic would warn
        word = np.atleast_1d(np.asarray(key)).astype(np.uint64)
        state = _finalise((state ^ word) * _M1 + _GOLDEN)
    return state if any(np.ndim(key) for key in keys) else state.reshape(())


def uniforms(*keys: ArrayLike) -> NDArray[np.float64]:
    """Uniform float64 in [0, 1) from integer keys: the top 53 bits of `hash64`."""
    return (hash64(*keys) >> _S11).astype(np.float64) * 2.0**-53
