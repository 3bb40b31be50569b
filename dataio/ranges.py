"""In which range does a setting lie? A `Range` stands beside its field, and `check` reads those of a whole dataclass.

    eps: Annotated[float, POSITIVE] = 1e-5

What two fields may not be together is their owner's to say.
"""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from math import inf
from typing import Any, get_type_hints

from thawline.dataio.errors import quoted


@dataclass(frozen=True)
class Range:
    """The values that a field may have. None always passes; of a tuple, each value must pass."""

    holds: Callable[[Any], bool]
    give: str
    """The remedy, such as "_ >= 1": _ stands for the field's name."""
    why: str
    """What would happen outside of the range, or what the value is."""

    def check(self, name: str, value: Any, error: type[Exception]) -> None:
        """Raises `error` for a value of the field `name` that lies outside."""
        values = value if isinstance(value, tuple) else (value,)
        if not all(part is None or self.holds(part) for part in values):
            give = self.give.replace("_", name, 1)
            raise error(f"{name}={quoted(repr(value))} is out of range: {self.why}; give {give}")


def between(low: float, high: float, why: str) -> Range:
    """low and high themselves pass."""
    return Range(lambda v: low <= v <= high, f"{low:g} <= _ <= {high:g}", why)


def at_least(low: float, why: str) -> Range:
    """`low` itself passes, infinity does not."""
    return Range(lambda v: low <= v < inf, f"_ >= {low:g}", why)


def above_zero(why: str, give: str = "a finite number above 0") -> Range:
    """Neither 0 nor infinity passes."""
    return Range(lambda v: 0 < v < inf, give, why)


def below_one(why: str) -> Range:
    """A share below 1."""
    return Range(lambda v: 0 <= v < 1, "0 <= _ < 1", why)


def given(give: str, why: str) -> Range:
    """Anything but empty."""
    return Range(bool, give, why)


def check(settings: Any, error: type[Exception], *, where: str = "") -> None:
    """Raises `error` for the first field whose value lies outside its range, in nested dataclasses too.

    where: what stands before the names of fields, such as "optim.".
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if is_dataclass(value):
            check(value, error, where=f"{where}{name}.")
            continue
        for i, part in enumerate(value if isinstance(value, tuple) else ()):
            if is_dataclass(part):
                check(part, error, where=f"{where}{name}[{i}].")
        for known in getattr(hint, "__metadata__", ()):
            if isinstance(known, Range):
                known.check(f"{where}{name}", value, error)
