"""What did the model predict for each validation sample? One row a sample, exactly once, in the order of the ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.named import default_loss
from thawline.trainer.step import world
from thawline.trainer.step.step import LossFunction
from thawline.trainer.tasks import record_of


@dataclass(frozen=True)
class Predictions:
    """Per-sample results over N samples, sorted by id."""

    ids: NDArray[np.int64]
    """(N,)"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """(N,) class indices, (N, C) one-hot or numbers, (N, K, 2) points, or (N, H, W) class indices of masks."""
    probabilities: NDArray[np.float32]
    """(N, C): softmax for a single label, sigmoid for several, numbers as they are. mask: (N, C, H, W), softmax over
    the C classes of each pixel; from a fit, counts of pixels, see metrics.masks. points: (N, K, 2), the predicted
    coordinates, which have no probability."""
    losses: NDArray[np.float32]
    """(N,)"""
    task: str

    def table(self, classes: Sequence[str]) -> pa.Table:
        """One row a sample: id, target, prediction, columns of the task's own, loss.

        Labels: class names, or lists of them at 0.5; `probability` of the top class. Numbers: as they are, lists where
        they are several, and the `error`, prediction minus target. points: lists of [x, y], null for a point that is
        missing; `distance` of each, `mean_distance`, and the name of the `farthest`, in the units of the targets (2 is
        the side of the image that the model sees). mask: the names of the classes that occur; `accuracy`, the share of
        pixels predicted rightly among those with a class, and `iou`, the mean over the classes of either mask; null
        where the mask has none.
        Raises: RecipeError for outputs whose shape is not the task's.
        """
        try:
            columns = record_of(self.task).rows(self.targets, self.probabilities, classes)
        except (KeyError, IndexError, ValueError) as error:
            raise RecipeError(
                f"outputs of shape {self.probabilities.shape} for targets of shape {self.targets.shape} and "
                f"{len(classes)} classes do not fit the task: no table can be made; use ids, targets and "
                "probabilities themselves"
            ) from error
        return pa.table({"id": self.ids, **columns, "loss": self.losses})


def as_predicted(outputs: Tensor, *, task: str) -> Tensor:
    """A model's outputs as predictions: see `Predictions.probabilities`. An unknown task's stay as they are."""
    return record_of(task).probabilities(outputs)


def check_averaged(task: str) -> None:
    """Raises RecipeError for a task whose augmented views cannot be averaged: things lie elsewhere in each."""
    if record_of(task).outputs_of is None:
        raise RecipeError(
            f"tta with task={task!r}: each augmented view may show the target elsewhere, so their mean would be "
            "right for none; use predictions() or validate(), which see the plain images"
        )


def collect(batches: Sequence[tuple[Tensor, ...]], *, task: str, brief: bool = False) -> Predictions | None:
    """Bring (ids, targets, logits, losses) of every batch of every rank to rank 0. Collective; None elsewhere.

    brief: targets and logits were shortened by the task's record.
    """
    columns = [torch.cat(column) for column in zip(*batches, strict=True)]
    ranks = [rank for rank in world.gather_to_first(columns) if rank]  # a rank without samples sends none
    if not ranks:
        return None
    ids, targets, logits, losses = (torch.cat(column).numpy() for column in zip(*ranks, strict=True))
    order = np.argsort(ids, kind="stable")
    predictions = torch.from_numpy(logits[order])
    if not (brief and record_of(task).brief):
        predictions = as_predicted(predictions, task=task)
    return Predictions(ids[order], targets[order], predictions.numpy(), losses[order], task)


def mean_of_views(
    plain: NDArray[np.float32], views: Sequence[NDArray[np.float32]], *, beta: float
) -> NDArray[np.float64]:
    """The plain image's probabilities with weight `beta`, the mean of the augmented views' with the rest."""
    if not views:
        return plain.astype(np.float64)
    return beta * plain.astype(np.float64) + (1 - beta) * np.mean(np.stack(views).astype(np.float64), axis=0)


def average(
    plain: Predictions,
    views: Sequence[Predictions],
    *,
    beta: float,
    loss: LossFunction | None = None,
    device: torch.device | str = "cpu",
) -> Predictions:
    """The plain image's probabilities with weight `beta`, the mean of the views' with the rest; losses of the result.

    loss: of the plain images, on `device`; the task's own when not given. For labels and numbers, see
    `check_averaged`. A sample that any of them lacks (its file broke in between) is left out.
    """
    ids = plain.ids
    for view in views:
        ids = np.intersect1d(ids, view.ids)
    first, *augmented = (p.probabilities[np.searchsorted(p.ids, ids)] for p in (plain, *views))
    mixed = mean_of_views(first, augmented, beta=beta)
    targets = plain.targets[np.searchsorted(plain.ids, ids)]
    outputs_of = record_of(plain.task).outputs_of
    assert outputs_of is not None, "see `check_averaged`"
    outputs = outputs_of(torch.from_numpy(mixed)).to(device)
    losses = (loss or default_loss(plain.task))(outputs, torch.from_numpy(targets).to(device)).cpu()
    return Predictions(ids, targets, mixed.astype(np.float32), losses.float().numpy(), plain.task)
