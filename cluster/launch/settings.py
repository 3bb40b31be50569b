"""What do workers get from a Ray cluster, and how long do they wait? The [cluster] of a job."""

from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Literal

from thawline.dataio.ranges import Range, above_zero, at_least

_PATIENCE = at_least(1, "nothing would be given the time to answer")


@dataclass(frozen=True)
class Cluster:
    """What the workers get from a Ray cluster, and how long they wait for one another."""

    cpus_per_worker: Annotated[float, above_zero("nothing would feed the worker", "_ > 0")] = 1.0
    """Cores set aside for each worker, its decoding threads included."""
    resources: Annotated[
        dict[str, float],
        Range(lambda v: all(0 < n < inf for n in v.values()), "numbers above 0", "none would be taken"),
    ] = field(default_factory=dict)
    """Custom resources of Ray's that each worker takes."""
    accelerator_type: str = ""
    """Accelerator that each worker needs, as Ray calls it, such as H100; empty = any."""
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How the workers are placed onto machines."""
    wait_s: Annotated[float, at_least(0, "it is a time")] = 0.0
    """Seconds that a cluster that is too small may take to grow."""
    start_s: Annotated[float, _PATIENCE] = 30.0
    """Seconds that workers may take to be placed before it is tried again."""
    resize_s: Annotated[float, _PATIENCE] = 30.0
    """Seconds between two checks, of an elastic job, whether there is room for more workers."""
    first_step_s: Annotated[float, _PATIENCE] = 1800.0
    """Seconds that ranks wait for one another until the first step is done."""
    hang_s: Annotated[float, _PATIENCE] = 180.0
    """Seconds that ranks wait for one another afterwards."""
