"""Which loss does a step have? The given one, or the one that a name means for its task. One value per sample."""

from collections.abc import Callable, Collection, Sequence
from functools import partial, wraps
from inspect import signature
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn

from thawline.dataio.batch import Loader
from thawline.dataio.errors import quoted
from thawline.models import code
from thawline.models.code import is_code
from thawline.models.errors import CodeError
from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.class_weights import ClassWeights, unclassed, weigh
from thawline.trainer.settings import SMOOTHING
from thawline.trainer.step.recovery import is_memory
from thawline.trainer.step.step import LossFunction
from thawline.trainer.tasks import TASKS, Task, record_of


def chosen_loss(
    given: LossFunction | str,
    train: Loader,
    device: torch.device,
    *,
    label_smoothing: float,
    class_weights: ClassWeights,
    scale: Sequence[float] | None = None,
) -> LossFunction:
    """The given loss, or the named one for the classes of `train`. Raises RecipeError, as named_loss and weigh do."""
    if not isinstance(given, str):
        if class_weights is not None:
            raise RecipeError(
                f"class_weights={quoted(class_weights)} beside a loss of your own, which does not know of them: "
                "nothing would be weighted; leave one of the two out"
            )
        return given
    weights = None
    if class_weights is not None:
        weights = torch.tensor(weigh(class_weights, train), dtype=torch.float32, device=device)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "class_weights": weights, "scale": scale}
    return named_loss(given, task=train.task, device=device, **options)


def default_loss(task: str, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> LossFunction:
    """What a task has where nobody chose: `named_loss("auto", ...)`."""
    return named_loss("auto", task=task, label_smoothing=label_smoothing, class_weights=class_weights)


def named_loss(
    name: str,
    *,
    task: str,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    scale: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> LossFunction:
    """(outputs, targets) -> losses (N,) float32, whatever precision the outputs have. auto: the first of these.

    single_label: cross_entropy, bce, focal; targets (N,) int64, or (N, C) of shares that sum to 1, as MixUp makes them.
    multi_label: bce, focal, asymmetric; targets (N, C) of zeros and ones. number: mse, l1, huber, of differences in
    units of `scale`. points: mse, l1, huber, over the points that the image shows. mask: cross_entropy, dice,
    cross_entropy_dice, over the pixels that have a class. python:MODULE:FUNCTION is the user's, see own_loss; it is
    imported here, and where it is a module it goes to `device`.
    label_smoothing: the share of a label's target that is spread evenly over all C classes, where labels have a total.
    class_weights: (C,) float32 on the outputs' device. A single label's losses are those of torch's `weight`, one a
    sample: the step's mean is over samples, not over weights, so no rank asks the others. Of several labels they weigh
    the ones, as torch's `pos_weight`.
    Raises RecipeError for a loss that the task does not have, for smoothing outside [0, 1), and for smoothing or
    weights that the loss does not know; CodeError for code that gives no loss.
    """
    record = record_of(task)
    losses = {name: own_loss(name, device)} if is_code(name) else _losses(record)
    if not losses:
        known = " or ".join(each for each, of in TASKS.items() if _losses(of))
        raise RecipeError(f"task={task!r} has no default loss: give {known}, or a loss of your own")
    chosen = next(iter(losses)) if name == "auto" else name
    if chosen not in losses:
        raise _others(chosen, task, list(losses))
    SMOOTHING.check("label_smoothing", label_smoothing, RecipeError)
    takes = _takes(losses[chosen])
    if label_smoothing and "label_smoothing" not in takes:
        raise RecipeError(
            f"label_smoothing={label_smoothing} with task={task!r} and loss {chosen}: its labels share no total that "
            "could be spread over the classes; give 0, or a loss of your own"
        )
    if class_weights is not None and "class_weights" not in takes:
        raise unclassed(task, chosen)
    given: dict[str, Any] = {"label_smoothing": label_smoothing or None, "class_weights": class_weights, "scale": scale}
    return partial(losses[chosen], **{key: value for key, value in given.items() if value is not None and key in takes})


def own_loss(name: str, device: torch.device | None = None) -> LossFunction:
    """A user's loss by `python:MODULE:NAME`: a function, a class that is called without arguments, or a module.

    It takes what the losses here take: outputs and targets, and `label_smoothing`, `class_weights` or `scale` where it
    has arguments called so. Raises CodeError, also when called, where it raises; and RecipeError where it gives not one
    loss a sample, or no gradients.
    """
    found = code.target(name)
    loss = code.called(name) if isinstance(found, type) else found
    if isinstance(loss, nn.Module):
        loss = loss.to(device)
    if not callable(loss):
        raise CodeError(f"{name} is a {type(loss).__name__} and no function: there is no loss to compute; name one")

    @wraps(loss.forward if isinstance(loss, nn.Module) else loss)
    def each(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        try:
            losses = loss(outputs, targets, **options)
        except Exception as error:
            if is_memory(error):
                raise
            *_, last = extract_tb(error.__traceback__)[:2]  # the first line of theirs
            raise CodeError(
                f"{name} raised {code.said(error)} ({last.filename}, line {last.lineno}): there is no loss to compute; "
                "mend it there, --debug shows all of it"
            ) from error
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape != (len(targets),):
            raise RecipeError(
                f"{name} gave {shape} for {len(targets)} samples: ranks and micro-batches could not be summed exactly; "
                f"return one loss a sample, ({len(targets)},): with reduction='none', and the mean over further axes"
            )
        if outputs.requires_grad and not losses.requires_grad:
            raise RecipeError(
                f"{name} gave losses without gradients, detached from the outputs: nothing would be learned; compute "
                "them with torch, and no detach() or no_grad()"
            )
        return losses.float()

    return each


def _others(name: str, task: str, losses: Sequence[str]) -> RecipeError:
    """What is said of a loss that the task does not have."""
    others = [each for each, of in TASKS.items() if name in of.losses]
    whose = f"is for task {' or '.join(others)}" if others else "is not known"
    return RecipeError(
        f"loss {quoted(name)!r} {whose} and this one is {task}: it would not measure what the model says; give "
        f"{', '.join(dict.fromkeys(['auto', *losses]))}, or a loss of your own"
    )


def _losses(record: Task) -> dict[str, Callable[..., Tensor]]:
    return {**({"auto": record.loss} if record.loss else {}), **record.losses}


def _takes(loss: Callable[..., object]) -> Collection[str]:
    try:
        return signature(loss).parameters
    except (TypeError, ValueError):  # written in C
        return ()
