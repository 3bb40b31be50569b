"""Which loss does a task want, unless told otherwise? A value per sample; averaging is the step's affair."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from thawline.trainer.errors import RecipeError
from thawline.trainer.step.step import LossFunction


def default_loss(task: str, *, label_smoothing: float = 0.0) -> LossFunction:
    """(logits (N, C), targets) -> losses (N,) float32, whatever precision the logits have.

    single_label: cross-entropy, targets (N,) int64, or (N, C) of shares that sum to 1, as MixUp makes them.
    multi_label: binary cross-entropy with logits, averaged over the C classes, targets (N, C) of zeros and ones.
    label_smoothing: the share of a single label's target that is spread evenly over all C classes.
    Raises RecipeError for another task, and for smoothing outside [0, 1) or of several labels.

    Source: Szegedy et al., Rethinking the Inception Architecture, 2016, for the smoothing.
    """
    losses: dict[str, LossFunction] = {
        "single_label": partial(_cross_entropy, label_smoothing),
        "multi_label": _binary_cross_entropy,
    }
    if task not in losses:
        raise RecipeError(f"task={task!r} has no default loss: give {' or '.join(losses)}, or a loss of your own")
    if not 0 <= label_smoothing < 1:
        raise RecipeError(
            f"label_smoothing={label_smoothing} is outside [0, 1): nothing of the labels would be left; give 0.1, say"
        )
    if label_smoothing and task != "single_label":
        raise RecipeError(
            f"label_smoothing={label_smoothing} with task={task!r}: its labels share no total that could be spread "
            "over the classes; give 0, or a loss of your own"
        )
    return losses[task]


def _cross_entropy(label_smoothing: float, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=1)
