"""Which loss does a step have? The given one, or its task's. One value per sample; the step averages."""

import torch
from torch import Tensor

from thawline.dataio.batch import Loader
from thawline.dataio.errors import quoted
from thawline.trainer.class_weights import ClassWeights, unclassed, weigh
from thawline.trainer.errors import RecipeError
from thawline.trainer.settings import SMOOTHING
from thawline.trainer.step.step import LossFunction
from thawline.trainer.tasks import TASKS, record_of


def chosen_loss(
    given: LossFunction | None,
    train: Loader,
    device: torch.device,
    *,
    label_smoothing: float,
    class_weights: ClassWeights,
) -> LossFunction:
    """The given loss, or the task's for the classes of `train`. Raises RecipeError, as default_loss and weigh do."""
    if class_weights is None:
        return given or default_loss(train.task, label_smoothing=label_smoothing)
    if given is not None:
        raise RecipeError(
            f"class_weights={quoted(class_weights)} beside a loss of your own, which does not know of them: nothing "
            "would be weighted; leave one of the two out"
        )
    weights = torch.tensor(weigh(class_weights, train), dtype=torch.float32, device=device)
    return default_loss(train.task, label_smoothing=label_smoothing, class_weights=weights)


def default_loss(task: str, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> LossFunction:
    """(outputs, targets) -> losses (N,) float32, whatever precision the outputs have, as the task's record has it.

    single_label: cross-entropy, targets (N,) int64, or (N, C) of shares that sum to 1, as MixUp makes them.
    multi_label: binary cross-entropy with logits, averaged over the C classes, targets (N, C) of zeros and ones.
    label_smoothing: the share of a single label's target that is spread evenly over all C classes.
    class_weights: (C,) float32 on the outputs' device. A single label's losses are those of torch's `weight`, one a
    sample: the step's mean is over samples, not over weights, so no rank asks the others. Of several labels they weigh
    the ones, as torch's `pos_weight`.
    Raises RecipeError for a task without one, and for smoothing outside [0, 1) or of several labels, and for weights
    where the task has no classes.

    Source: Szegedy et al., Rethinking the Inception Architecture, 2016, for the smoothing.
    """
    record = record_of(task)
    if record.loss is None:
        known = " or ".join(name for name, each in TASKS.items() if each.loss)
        raise RecipeError(f"task={task!r} has no default loss: give {known}, or a loss of your own")
    SMOOTHING.check("label_smoothing", label_smoothing, RecipeError)
    if label_smoothing and record.smoothed is None:
        raise RecipeError(
            f"label_smoothing={label_smoothing} with task={task!r}: its labels share no total that could be spread "
            "over the classes; give 0, or a loss of your own"
        )
    if class_weights is not None:
        if record.weighted is None:
            raise unclassed(task)
        return record.weighted(label_smoothing, class_weights)
    return record.smoothed(label_smoothing) if label_smoothing and record.smoothed else record.loss
