"""Does what was exported say what the model says? Numbers beside numbers, and the most probable class."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

TOLERANCE = 1e-4
"""Of probabilities, and of a number above 1 as a share of it: float32 in another order of summing."""
_TIED = 1e-5
"""Probabilities no further apart than this are of no order."""


class Difference(NamedTuple):
    """Between what a model says and what its export says."""

    largest: float
    """Of all numbers, those above 1 as a share of the model's."""
    why: str
    """Why that is too much; empty where it is not."""


def difference(expected: Sequence[Tensor], said: Sequence[Tensor], *, tolerance: float = TOLERANCE) -> Difference:
    """How far apart the outputs of the same images are. Probabilities are the last of two."""
    if [each.shape for each in expected] != [each.shape for each in said]:
        return Difference(float("inf"), f"its outputs are {_shapes(said)}, the model's {_shapes(expected)}")
    parts = [((a - b).abs() / a.abs().clamp(min=1)).max().item() for a, b in zip(expected, said, strict=True)]
    largest = max(parts)
    if not largest <= tolerance:  # NaN is none
        return Difference(largest, f"its outputs differ by up to {largest:.2g}, and {tolerance:g} is allowed")
    if len(expected) == 2 and (others := _other_first(expected[1], said[1])):
        return Difference(largest, f"another class is the most probable in {others} places")
    return Difference(largest, "")


def _other_first(expected: Tensor, said: Tensor) -> int:
    """Where another class comes first, though the model's first is ahead."""
    if expected.shape[1] < 2:
        return 0
    first, second = expected.topk(2, dim=1).values.unbind(1)
    return int(((expected.argmax(1) != said.argmax(1)) & (first - second > _TIED)).sum())


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(each.shape)) for each in outputs)
