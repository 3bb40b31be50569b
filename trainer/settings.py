"""How is a step computed, besides its schedule and its optimiser? A description that needs no torch."""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal, Self, get_args

from thawline.dataio import ranges
from thawline.dataio.ranges import Range, above_zero, at_least, below_one
from thawline.models.code import is_code
from thawline.trainer.errors import RecipeError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "pure_bf16"]
Compile = Literal["off", "default", "max-autotune-no-cudagraphs", "reduce-overhead"]
LossName = Literal[
    "auto", "cross_entropy", "bce", "focal", "asymmetric", "dice", "cross_entropy_dice", "mse", "l1", "huber"
]
_LOSS = Range(
    lambda v: v in get_args(LossName) or is_code(v),
    f"one of {', '.join(get_args(LossName))}, or your own as python:MODULE:FUNCTION",
    "no loss is called so",
)
BatchNorms = Literal["train", "sync", "frozen"]
SMOOTHING = below_one("at 1 no label would be left; 0 is none")
_WEIGHTS = Range(
    lambda v: isinstance(v, str) or all(0 < weight < inf for weight in v.values()),
    "'balanced', or finite numbers above 0 by class",
    "a class would not be learned",
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a Learner is told of a step besides its optimiser, and a job in [fit]."""

    precision: PrecisionName = "auto"
    """Number format of the forward and backward pass."""
    accumulate: Annotated[int, at_least(1, "a step has at least one micro-batch; 1 is the whole")] = 1
    """Micro-batches into which a worker splits its images of a step, to save memory."""
    clip: Annotated[float | None, above_zero("no gradient would be left, or none be clipped")] = None
    """Largest norm of all gradients together; None = no limit."""
    ema: Annotated[float, below_one("at 1 the average would never move; 0 is none")] = 0.0
    """Decay of an average of the weights, which is then what is measured; 0 = none."""
    loss: Annotated[LossName | str, _LOSS] = "auto"
    """Loss by name, of those that the task has; auto: the task's own; or yours as python:MODULE:FUNCTION."""
    label_smoothing: Annotated[float, SMOOTHING] = 0.0
    """Share of every label that is spread over all classes."""
    class_weights: Annotated[Literal["balanced"] | dict[str, float] | None, _WEIGHTS] = None
    """Weight of each class in the loss, 1 where not named; balanced = by how rare it is; None = all alike."""
    compile: Compile = "off"
    """Mode of torch.compile."""
    batch_norm: BatchNorms = "train"
    """BatchNorm's statistics: each worker's own, of all workers (sync), or unchanged, frozen layers fast (frozen)."""

    cache_features: Annotated[int, at_least(0, "it counts views; 0 is none")] = 0
    """Augmentations of each image of which a frozen body's features are kept in memory; needs batch_norm = frozen."""

    def check(self) -> Self:
        """Itself. Raises RecipeError for a value out of range."""
        ranges.check(self, RecipeError)
        return self
