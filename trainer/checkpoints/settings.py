"""How often is a checkpoint written, and which are kept? The [checkpoint] of a job; needs no torch."""

from dataclasses import dataclass
from typing import Annotated

from thawline.dataio.ranges import at_least


@dataclass(frozen=True)
class CheckpointSettings:
    """What a kill may cost."""

    every_s: Annotated[float, at_least(0, "it is a time between two checkpoints")] = 60.0
    """Seconds between checkpoints."""
    keep: Annotated[int, at_least(1, "a killed run could not resume")] = 3
    """Newest checkpoints to keep."""
    best: str = ""
    """Metric by which the best checkpoint is kept, too."""
