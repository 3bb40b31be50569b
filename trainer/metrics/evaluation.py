"""How good is a model on one split, over exactly its samples? Nothing is collective until every rank has finished."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from thawline.dataio.batch import Loader
from thawline.trainer.metrics.predictions import Predictions, collect
from thawline.trainer.step import world
from thawline.trainer.step.precision import Precision
from thawline.trainer.step.step import LossFunction, eval_step
from thawline.trainer.tasks import record_of

if TYPE_CHECKING:
    from thawline.trainer.metrics.meter import Meter


@dataclass(frozen=True)
class Measured:
    """The results of one pass over a split."""

    metrics: dict[str, float]
    """The same on every rank."""
    predictions: Predictions | None = None
    """One a sample, on rank 0, if they were requested."""
    recalls: list[float] | None = None
    """Of each class, see Meter.compute_recalls."""


_THROUGH, _INTERRUPTED, _FAILED = range(3)


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    step: int,
    loss: LossFunction,
    precision: Precision,
    meter: "Meter",
    keep: bool = False,
    brief: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> Measured | None:
    """The metrics over all ranks' samples, and with `keep` one prediction a sample on rank 0. Collective.

    brief: keep only what rows of predictions need of outputs and targets, for tasks whose outputs are large.

    None on every rank if `interrupted`, called before each batch, returned True on any. Raises on every rank the error
    of any of them.
    """
    model.eval()
    meter.reset()
    batches, shorten = list[tuple[torch.Tensor, ...]](), record_of(loader.task).brief
    state, failure = _THROUGH, None
    try:
        for batch in loader.stream(step):
            if interrupted():
                state = _INTERRUPTED
                break
            outputs, losses = eval_step(model, batch, loss=loss, precision=precision)
            meter.update(outputs, batch.targets, losses)
            if keep:
                outputs, targets = shorten(outputs, batch.targets) if brief and shorten else (outputs, batch.targets)
                batches.append((batch.ids, targets, outputs, losses))
    except Exception as error:
        state, failure = _FAILED, error
    worst = world.worst(state)
    if worst == _FAILED:
        raise world.common_error(failure)
    if worst == _INTERRUPTED:
        return None
    metrics, recalls = meter.compute(), meter.compute_recalls()
    return Measured(metrics, collect(batches, task=loader.task, brief=brief) if keep else None, recalls)
