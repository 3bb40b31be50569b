"""How much does each class count in the loss? By name, or by how rare it is in training."""

import difflib
from collections.abc import Sequence
from inspect import signature
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.batch import Counted, Loader
from thawline.dataio.errors import quoted
from thawline.models.code import is_code
from thawline.trainer.errors import RecipeError
from thawline.trainer.tasks import TASKS, record_of

ClassWeights = Literal["balanced"] | dict[str, float] | None


def weigh(asked: Literal["balanced"] | dict[str, float], train: Loader) -> NDArray[np.float64]:
    """The weight of each class, (C,): see named.named_loss for what it weighs.

    balanced: n / (classes x count) for a single label, so that all classes weigh equally together and a sample weighs
    1 on average; for several labels, the images without one / those with it. A class that no training sample has, or
    all have, weighs 1. By name: 1 where a class is not named.
    Raises RecipeError: a task without classes, a class that is not there, data that cannot be counted.
    Source: scikit-learn's `compute_class_weight("balanced")`; of several labels, each against its absence.
    """
    check(asked, task=train.task, classes=train.classes)
    if not isinstance(asked, str):
        return np.array([asked.get(name, 1.0) for name in train.classes])
    balanced = record_of(train.task).balanced
    assert balanced is not None, "see `check`"
    if not isinstance(train, Counted):
        raise RecipeError(
            f"class_weights='balanced' for {type(train).__name__}, which does not count its classes: how rare they are "
            "is not known; give weights by name"
        )
    return balanced(train.class_counts(), train.samples)


def check(asked: ClassWeights, *, task: str, classes: Sequence[str]) -> None:
    """Raises RecipeError for a task whose loss has no weights by class, and for a class that is not there."""
    if asked is not None and record_of(task).balanced is None:
        raise unclassed(task)
    for name in asked if isinstance(asked, dict) else ():
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1) or [*classes[:1]]
            raise RecipeError(
                f"class_weights names {quoted(name)!r}, which is none of the {len(classes)} classes: nothing would be "
                f"weighted by it; did you mean {', '.join(map(quoted, near))!r}?"
            )


def unclassed(task: str, loss: str = "") -> RecipeError:
    """What is said of class weights where the loss, of this name, has no classes to weigh."""
    known = " or ".join(name for name, each in TASKS.items() if each.balanced)
    of = f"{task!r} and loss {loss}" if loss else repr(task)
    weighed = [name for name, each in record_of(task).losses.items() if "class_weights" in signature(each).parameters]
    other = f"give loss={weighed[0]!r}" if loss and weighed else f"train {known}"
    instead = "give it an argument class_weights" if is_code(loss) else other
    return RecipeError(
        f"class_weights with task={of}: its loss has no weights by class, so nothing would be balanced; leave them "
        f"out, or {instead}"
    )
