"""Which loss does a task want, unless told otherwise? A value per sample; averaging is the step's affair."""

import torch.nn.functional as F
from torch import Tensor

from trainer.errors import RecipeError
from trainer.step import LossFunction


def default_loss(task: str) -> LossFunction:
    """(logits (N, C), targets) -> losses (N,) float32, whatever precision the logits have.

    single_label: cross-entropy, targets (N,) int64. multi_label: binary cross-entropy with logits, averaged
    over the C classes, targets (N, C) of zeros and ones. Raises RecipeError for another task.
    """
    losses = {"single_label": _cross_entropy, "multi_label": _binary_cross_entropy}
    if task not in losses:
        raise RecipeError(f"task={task!r} has no default loss: give {' or '.join(losses)}, or a loss of your own")
    return losses[task]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=1)
