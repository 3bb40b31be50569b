"""What did the model say of each validation sample? One row a sample, exactly once, in the order of the ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import world


@dataclass(frozen=True)
class Predictions:
    """Per-sample results over N samples, sorted by id."""

    ids: NDArray[np.int64]
    """(N,)"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """(N,) class indices or (N, C) one-hot."""
    probabilities: NDArray[np.float32]
    """(N, C): softmax for a single label, sigmoid for several."""
    losses: NDArray[np.float32]
    """(N,)"""

    def table(self, classes: Sequence[str]) -> pa.Table:
        """Columns id, target, prediction (class names, or lists of them at 0.5), probability of the top class, loss."""
        names = np.array(classes, dtype=object)
        top = self.probabilities.argmax(1)
        if self.targets.ndim == 1:
            target, prediction = list(names[self.targets]), list(names[top])
        else:
            target = [list(names[row > 0]) for row in self.targets]
            prediction = [list(names[row > 0.5]) for row in self.probabilities]
        return pa.table(
            {
                "id": self.ids,
                "target": target,
                "prediction": prediction,
                "probability": self.probabilities.max(1),
                "loss": self.losses,
            }
        )


def collect(kept: Sequence[tuple[Tensor, ...]], *, task: str) -> Predictions | None:
    """Bring (ids, targets, logits, losses) of every batch of every rank to rank 0. Collective; None elsewhere."""
    columns = [torch.cat(column) for column in zip(*kept, strict=True)]
    ranks = [rank for rank in world.gather_to_first(columns) if rank]  # one without samples sends none
    if not ranks:
        return None
    ids, targets, logits, losses = (torch.cat(column).cpu().numpy() for column in zip(*ranks, strict=True))
    order = np.argsort(ids, kind="stable")
    scores = torch.from_numpy(logits[order])
    probabilities = scores.softmax(1) if task == "single_label" else scores.sigmoid()
    return Predictions(ids[order], targets[order], probabilities.numpy(), losses[order])


def average(plain: Predictions, views: Sequence[Predictions], *, beta: float) -> Predictions:
    """The plain image's probabilities with weight `beta`, the mean of the views' with the rest; losses of the result.

    A sample that any of them lacks (its file broke in between) is left out.
    """
    ids = plain.ids
    for view in views:
        ids = np.intersect1d(ids, view.ids)
    first, *others = (p.probabilities[np.searchsorted(p.ids, ids)].astype(np.float64) for p in (plain, *views))
    mixed = beta * first + (1 - beta) * np.mean(others, axis=0) if others else first
    targets = plain.targets[np.searchsorted(plain.ids, ids)]
    tiny = np.finfo(np.float32).tiny
    if targets.ndim == 1:
        losses = -np.log(np.maximum(mixed[np.arange(len(ids)), targets], tiny))
    else:
        losses = -np.log(np.maximum(np.where(targets > 0.5, mixed, 1 - mixed), tiny)).mean(axis=1)
    return Predictions(ids, targets, mixed.astype(np.float32), losses.astype(np.float32))
