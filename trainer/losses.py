"""Which loss does a task have by default? One value per sample; the step averages."""

from thawline.trainer.errors import RecipeError
from thawline.trainer.settings import SMOOTHING
from thawline.trainer.step.step import LossFunction
from thawline.trainer.tasks import TASKS, record_of


def default_loss(task: str, *, label_smoothing: float = 0.0) -> LossFunction:
    """(outputs, targets) -> losses (N,) float32, whatever precision the outputs have, as the task's record has it.

    single_label: cross-entropy, targets (N,) int64, or (N, C) of shares that sum to 1, as MixUp makes them.
    multi_label: binary cross-entropy with logits, averaged over the C classes, targets (N, C) of zeros and ones.
    label_smoothing: the share of a single label's target that is spread evenly over all C classes.
    Raises RecipeError for a task without one, and for smoothing outside [0, 1) or of several labels.

    Source: Szegedy et al., Rethinking the Inception Architecture, 2016, for the smoothing.
    """
    record = record_of(task)
    if record.loss is None:
        known = " or ".join(name for name, each in TASKS.items() if each.loss)
        raise RecipeError(f"task={task!r} has no default loss: give {known}, or a loss of your own")
    SMOOTHING.check("label_smoothing", label_smoothing, RecipeError)
    if not label_smoothing:
        return record.loss
    if record.smoothed is None:
        raise RecipeError(
            f"label_smoothing={label_smoothing} with task={task!r}: its labels share no total that could be spread "
            "over the classes; give 0, or a loss of your own"
        )
    return record.smoothed(label_smoothing)
