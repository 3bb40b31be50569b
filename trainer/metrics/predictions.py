"""What did the model say of each validation sample? One row a sample, exactly once, in the order of the ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.names import IGNORED
from thawline.trainer.step import world


@dataclass(frozen=True)
class Predictions:
    """Per-sample results over N samples, sorted by id."""

    ids: NDArray[np.int64]
    """(N,)"""
    targets: NDArray[np.int64] | NDArray[np.float32]
    """(N,) class indices, (N, C) one-hot, (N, K, 2) points, or (N, H, W) class indices of masks."""
    probabilities: NDArray[np.float32]
    """(N, C): softmax for a single label, sigmoid for several. mask: (N, C, H, W), softmax over the C classes of each
    pixel. points: (N, K, 2), the coordinates that the model puts out, which have no probability."""
    losses: NDArray[np.float32]
    """(N,)"""

    def table(self, classes: Sequence[str]) -> pa.Table:
        """One row a sample: id, target, prediction, columns of the task's own, loss.

        Labels: class names, or lists of them at 0.5; `probability` of the top class. points: lists of [x, y], null
        where there is none; `distance` of each, `mean_distance`, and the name of the `farthest`, in the units of the
        targets (2 is the side of the image that the model sees). mask: the names of the classes that occur; `accuracy`,
        the share of its pixels with a class that are right, null where it has none.
        Raises: RecipeError for outputs whose shape is not the task's.
        """
        told = {1: self._labels, 2: self._labels, 3: self._points if self._are_points else self._masks}
        try:
            columns = told[self.targets.ndim](classes)
        except (KeyError, IndexError, ValueError) as error:
            raise RecipeError(
                f"outputs of shape {self.probabilities.shape} for targets of shape {self.targets.shape} and "
                f"{len(classes)} classes are not what the task asks for: no table can be made; use ids, targets and "
                "probabilities themselves"
            ) from error
        return pa.table({"id": self.ids, **columns, "loss": self.losses})

    @property
    def _are_points(self) -> bool:
        return np.issubdtype(self.targets.dtype, np.floating)

    def _labels(self, classes: Sequence[str]) -> dict[str, Any]:
        names = np.array(classes, dtype=object)
        top = self.probabilities.argmax(1)
        if self.targets.ndim == 1:
            target, prediction = list(names[self.targets]), list(names[top])
        else:
            target = [list(names[row > 0]) for row in self.targets]
            prediction = [list(names[row > 0.5]) for row in self.probabilities]
        return {"target": target, "prediction": prediction, "probability": self.probabilities.max(1)}

    def _points(self, classes: Sequence[str]) -> dict[str, Any]:
        distance = np.hypot(*np.moveaxis(self.probabilities - self.targets, -1, 0))
        named = [zip(row, classes, strict=True) for row in distance.tolist()]
        known = [[(d, name) for d, name in row if not np.isnan(d)] for row in named]
        places, far = pa.list_(pa.list_(pa.float32())), pa.list_(pa.float32())
        return {
            "target": pa.array(_points_or_null(self.targets), places),
            "prediction": pa.array(_points_or_null(self.probabilities), places),
            "distance": pa.array([[None if np.isnan(d) else d for d in row] for row in distance.tolist()], far),
            "mean_distance": pa.array(
                [sum(d for d, _ in row) / len(row) if row else None for row in known], pa.float64()
            ),
            "farthest": pa.array([max(row)[1] if row else None for row in known], pa.string()),
        }

    def _masks(self, classes: Sequence[str]) -> dict[str, Any]:
        names = np.array(classes, dtype=object)
        columns: dict[str, Any] = {"target": [], "prediction": [], "accuracy": []}
        for target, scores in zip(self.targets, self.probabilities, strict=True):
            predicted, counts = scores.argmax(0), target != IGNORED
            columns["target"].append(list(names[np.unique(target[counts])]))
            columns["prediction"].append(list(names[np.unique(predicted)]))
            columns["accuracy"].append(float((predicted == target)[counts].mean()) if counts.any() else None)
        return {**columns, "accuracy": pa.array(columns["accuracy"], pa.float64())}


def _points_or_null(points: NDArray[Any]) -> list[list[list[float] | None]]:
    return [[None if np.isnan(x) or np.isnan(y) else [x, y] for x, y in row] for row in points.tolist()]


def as_predicted(outputs: Tensor, *, task: str) -> Tensor:
    """What a model's outputs say: see `Predictions.probabilities`. Of a task that is not known here, the outputs."""
    if task in ("single_label", "mask"):
        return outputs.softmax(1)
    return outputs.sigmoid() if task == "multi_label" else outputs


def check_averaged(task: str) -> None:
    """Raises RecipeError for a task of which augmented views cannot be averaged: what they show lies elsewhere."""
    if task in ("points", "mask"):
        raise RecipeError(
            f"tta with task={task!r}: each augmented view of an image shows them elsewhere, so their mean would be "
            "true of none; use predictions() or validate(), which see the plain images"
        )


def collect(kept: Sequence[tuple[Tensor, ...]], *, task: str) -> Predictions | None:
    """Bring (ids, targets, logits, losses) of every batch of every rank to rank 0. Collective; None elsewhere."""
    columns = [torch.cat(column) for column in zip(*kept, strict=True)]
    ranks = [rank for rank in world.gather_to_first(columns) if rank]  # one without samples sends none
    if not ranks:
        return None
    ids, targets, logits, losses = (torch.cat(column).numpy() for column in zip(*ranks, strict=True))
    order = np.argsort(ids, kind="stable")
    said = as_predicted(torch.from_numpy(logits[order]), task=task)
    return Predictions(ids[order], targets[order], said.numpy(), losses[order])


def average(plain: Predictions, views: Sequence[Predictions], *, beta: float) -> Predictions:
    """The plain image's probabilities with weight `beta`, the mean of the views' with the rest; losses of the result.

    Of labels, see `check_averaged`. A sample that any of them lacks (its file broke in between) is left out.
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
