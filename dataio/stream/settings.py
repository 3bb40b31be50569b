"""How is the training stream drawn? A description that needs no numpy."""

from dataclasses import dataclass
from typing import Annotated

from thawline.dataio.ranges import between

POWER = between(0, 1, "it is a power of the inverse frequency: 0 is off, at 1 every class comes equally often")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a job says of the stream in [data]."""

    balance: Annotated[float, POWER] = 0.0
    """How far rare classes come more often in training: 0 = as they are, 1 = every class as often as any other."""
