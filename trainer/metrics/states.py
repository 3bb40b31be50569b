"""Which metrics are not torchmetrics' own? Those whose counts differ; and how all are gathered over ranks at once.

Updating one of these never makes the host wait for the device.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores
from torchmetrics.functional.classification import multiclass_auroc, multilabel_auroc
from torchmetrics.utilities.data import dim_zero_cat

from thawline.trainer.step import world


class _ByClass(MulticlassStatScores):
    """True and false positives and negatives of every class, in memory and time linear in the classes.

    torchmetrics fills a matrix of classes x classes at every update: 53 GB for 81,000 of them.
    """

    tp: Tensor
    fp: Tensor
    tn: Tensor
    fn: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        """preds: (N, C, ...) scores or (N, ...) classes. target: (N, ...) classes, or `ignore_index`."""
        if not _squares(self):
            super().update(preds, target)
            return
        predicted = (preds.argmax(1) if preds.ndim == target.ndim + 1 else preds).flatten()
        true, count = target.flatten(), torch.ones_like(predicted)
        if self.ignore_index is not None:  # weight 0 instead of cutting them out, which would wait for the device
            count = (true != self.ignore_index).to(predicted.dtype)
            true = true * count
        zeros = self.tp.new_zeros(self.tp.shape)
        hits = zeros.scatter_add(0, true, count * (predicted == true))
        predicted_counts, true_counts = zeros.scatter_add(0, predicted, count), zeros.scatter_add(0, true, count)
        self.tp = self.tp + hits
        self.fp = self.fp + predicted_counts - hits
        self.fn = self.fn + true_counts - hits
        self.tn = self.tn + count.sum() - predicted_counts - true_counts + hits


def _squares(metric: MulticlassStatScores) -> bool:
    """Whether torchmetrics' own update fills a matrix of classes by classes."""
    return metric.average != "micro" and metric.top_k == 1 and metric.multidim_average == "global"


def matrix_bytes(metric: Metric) -> int:
    """Size of the matrix that a metric fills at every update and does not keep; 0 where it fills none.

    torchmetrics' classes for every task (F1Score) make an instance of another class, which `by_class` never sees.
    """
    if isinstance(metric, MulticlassStatScores) and not isinstance(metric, _ByClass) and _squares(metric):
        return 8 * int(metric.num_classes or 0) ** 2
    return 0


@cache
def by_class(kind: type[Metric]) -> type[Metric]:
    """A class of torchmetrics, or where it would fill a matrix of classes by classes, one that counts by class."""
    if not issubclass(kind, MulticlassStatScores) or issubclass(kind, ErrorRate):
        return kind
    return type(kind.__name__, (_ByClass, kind), {"__doc__": kind.__doc__})


class _OfEach:
    """The recall of each class in place of their mean."""

    tp: Tensor
    fn: Tensor

    def compute(self) -> Tensor:
        """(C,) float64: the share of each class's samples that were predicted as it, NaN where it has none."""
        return self.tp.double() / (self.tp + self.fn)


@cache
def of_each(recall: type[Metric]) -> type[Metric]:
    """A recall class of torchmetrics that returns the recall of each class: see _OfEach."""
    return type("RecallOfEach", (_OfEach, recall), {})


class ErrorRate(MulticlassAccuracy):
    """The share of samples (pixels) whose largest logit is another class's, divided in float64 from whole counts."""

    higher_is_better = False
    tp: Tensor
    fn: Tensor

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]; NaN over no samples."""
        return (self.fn.double() / (self.tp + self.fn)).squeeze()


class PointError(Metric):
    """The mean of |difference| ** power over all coordinates whose target is not NaN, which is a missing point.

    torchmetrics' regression metrics would return NaN, and its MeanMetric drops weights under nan_strategy="disable".
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, power: int, root: bool = False) -> None:
        super().__init__()
        self.power, self.root = power, root
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs, targets: of one shape."""
        present = ~targets.isnan()
        differences = torch.where(present, outputs.double() - targets.double(), 0.0)
        self.total = self.total + differences.abs().pow(self.power).sum()
        self.count = self.count + present.sum()

    def compute(self) -> Tensor:
        """A float64 scalar, the square root of the mean where `root`; NaN over nothing."""
        mean = self.total / self.count
        return mean.sqrt() if self.root else mean


class PointDistanceError(PointError):
    """The mean distance of predicted points from the true ones that are not missing, in shares of the image's side."""

    side = 1.0

    def __init__(self) -> None:
        super().__init__(power=1)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs, targets: (N, K, 2), -1 and 1 at the edges of the image as the model sees it."""
        distances = (outputs.double() - targets.double()).square().sum(-1).sqrt() * (self.side / 2)
        super().update(distances, torch.where(distances.isnan(), torch.nan, 0.0))


class PointDistancePxError(PointDistanceError):
    """The same in px of an image with this side."""

    def __init__(self, side_px: float) -> None:
        super().__init__()
        self.side = float(side_px)


class Explained(Metric):
    """R2: the share of the targets' variance that predictions explain, the mean over the numbers. float64.

    torchmetrics sums in float32, in which a number far from 0 (a year) has no variance left.
    """

    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, num_labels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs, targets: (N, C)."""
        errors, true = outputs.double() - targets.double(), targets.double()
        moments = [torch.ones_like(errors), errors.square(), true, true.square()]
        self.sums = self.sums + torch.stack([moment.sum(0) for moment in moments])

    def compute(self) -> Tensor:
        """A float64 scalar, at most 1; not finite where the targets are all the same."""
        count, errors, total, squares = self.sums
        return (1 - errors / (squares - total.square() / count)).mean()


class RocAuc(Metric):
    """The area under each class's ROC curve (one class against the rest), exact, averaged over the classes.

    torchmetrics computes the curves. A class that no sample has, or that all have, has no curve: it is left out here,
    where torchmetrics' mean would count it as 0. Keeps every score: 8 bytes x N x C on the device.
    """

    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """scores: (N, C) probabilities. targets: (N,) classes, or (N, C) zeros and ones, integers."""
        self.scores.append(scores)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """A scalar in [0, 1]; NaN where no class has a curve."""
        # Once gathered over the ranks, a state is one tensor instead of a list.
        scores, targets = (torch.cat(s) if isinstance(s, list) and s else s for s in (self.scores, self.targets))
        if not isinstance(scores, Tensor) or not isinstance(targets, Tensor) or not len(scores):
            return torch.tensor(math.nan)
        options: dict[str, Any] = {"average": "none", "validate_args": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets", category=UserWarning)
            if targets.ndim == 1:
                areas = multiclass_auroc(scores, targets, self.num_classes, **options)
                positive = torch.bincount(targets, minlength=self.num_classes)
            else:
                areas = multilabel_auroc(scores, targets, self.num_classes, **options)
                positive = targets.sum(0)
        return areas[(positive > 0) & (positive < len(targets))].double().mean()


@contextmanager
def gathered(metrics: Sequence[Metric]) -> Iterator[None]:
    """Gather every state of every metric over the ranks at once; within, `compute` of each uses them. Collective.

    torchmetrics by itself gathers state by state, in three collectives each, and sends the empty list of a rank without
    samples as a one-dimensional float32 tensor, whatever the others hold. Here such ranks are left out where others
    have samples. A metric with a gather of its own keeps it.
    """
    plain = [m for m in metrics if m.dist_sync_fn is None and all(map(_summed_or_joined, _states(m), _reductions(m)))]
    sent = world.gather_tensors([_joined(state) for metric in plain for state in _states(metric)])
    states = zip(*(tensors for _, tensors in sent), strict=True)
    for metric in plain:
        # torchmetrics asks for each state in turn.
        states_here = itertools.islice(states, len(_states(metric)))
        gathered_states = iter([[rank.to(metric.device) for rank in _filled(state)] for state in states_here])
        metric.dist_sync_fn = lambda state, group=None, gathered_states=gathered_states: next(gathered_states)
    try:
        yield
    finally:
        for metric in plain:
            metric.dist_sync_fn = None


def _states(metric: Metric) -> list[Tensor | list[Tensor]]:
    return [getattr(metric, name) for name in metric._reductions]


def _reductions(metric: Metric) -> list[Any]:
    return list(metric._reductions.values())


def _summed_or_joined(state: Tensor | list[Tensor], reduction: Any) -> bool:
    return isinstance(state, Tensor) or reduction is dim_zero_cat


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    return state if isinstance(state, Tensor) else dim_zero_cat(state) if state else torch.empty(0)


def _filled(ranks: Sequence[Tensor]) -> Sequence[Tensor]:
    return [state for state in ranks if state.numel()] or ranks[:1]
