"""How good is a model on one split, over exactly its samples? Nothing is collective until every rank is through."""

from collections.abc import Callable

import torch
from torch import nn

from dataio.batch import Loader
from trainer import world
from trainer.metrics import Meter
from trainer.predictions import Predictions, collect
from trainer.step import LossFunction, Precision, eval_step


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    step: int,
    loss: LossFunction,
    precision: Precision,
    meter: Meter,
    keep: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], Predictions | None] | None:
    """The metrics over all ranks' samples, and with `keep` one prediction a sample on rank 0. Collective.

    None on every rank when `interrupted`, asked before each batch, said yes on any of them.
    """
    model.eval()
    meter.reset()
    kept: list[tuple[torch.Tensor, ...]] = []
    broken = False
    for batch in loader.stream(step):
        if broken := interrupted():
            break
        outputs, losses = eval_step(model, batch, loss=loss, precision=precision)
        meter.update(outputs, batch.targets, losses)
        if keep:
            kept.append((batch.ids, batch.targets, outputs, losses))
    if any(world.gather(broken)):
        return None
    return meter.compute(), collect(kept, task=loader.task) if keep else None
