"""Which counts does torchmetrics keep otherwise than needed here? Three metrics, counts by class, one gather for all.

All else is torchmetrics' own (see metrics.names). Updating one of these never waits for the device.
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
        found = (preds.argmax(1) if preds.ndim == target.ndim + 1 else preds).flatten()
        wanted, count = target.flatten(), torch.ones_like(found)
        if self.ignore_index is not None:  # counted as 0 and not cut out, for which the device would be waited for
            count = (wanted != self.ignore_index).to(found.dtype)
            wanted = wanted * count
        none = self.tp.new_zeros(self.tp.shape)
        hits = none.scatter_add(0, wanted, count * (found == wanted))
        is_found, is_wanted = none.scatter_add(0, found, count), none.scatter_add(0, wanted, count)
        self.tp = self.tp + hits
        self.fp = self.fp + is_found - hits
        self.fn = self.fn + is_wanted - hits
        self.tn = self.tn + count.sum() - is_found - is_wanted + hits


def _squares(metric: MulticlassStatScores) -> bool:
    """Whether torchmetrics' own update fills a matrix of classes by classes."""
    return metric.average != "micro" and metric.top_k == 1 and metric.multidim_average == "global"


def matrix_bytes(metric: Metric) -> int:
    """Of the matrix that a metric fills at every update and does not keep; 0 where it fills none.

    torchmetrics' classes for every task (F1Score) make one of another class of torchmetrics: `by_class` never sees it.
    """
    if isinstance(metric, MulticlassStatScores) and not isinstance(metric, _ByClass) and _squares(metric):
        return 8 * int(metric.num_classes or 0) ** 2
    return 0


@cache
def by_class(kind: type[Metric]) -> type[Metric]:
    """A class of torchmetrics; where it counts by class and by squares of them, one that counts in a line."""
    if not issubclass(kind, MulticlassStatScores) or issubclass(kind, ErrorRate):
        return kind
    return type(kind.__name__, (_ByClass, kind), {"__doc__": kind.__doc__})


class _OfEach:
    """Each class's recall in place of their mean."""

    tp: Tensor
    fn: Tensor

    def compute(self) -> Tensor:
        """(C,) float64: the share of each class's samples that were found, NaN where it has none."""
        return self.tp.double() / (self.tp + self.fn)


@cache
def of_each(recall: type[Metric]) -> type[Metric]:
    """A class of torchmetrics' recall, such that it gives each class's: see _OfEach."""
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
    """The mean of |difference| ** power over every coordinate that is there; a target of NaN is a point that is not.

    torchmetrics' regression metrics would answer NaN, and its MeanMetric drops weights under nan_strategy="disable".
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
        there = ~targets.isnan()
        off = torch.where(there, outputs.double() - targets.double(), 0.0)
        self.total = self.total + off.abs().pow(self.power).sum()
        self.count = self.count + there.sum()

    def compute(self) -> Tensor:
        """A float64 scalar, the square root of the mean where `root`; NaN over nothing."""
        mean = self.total / self.count
        return mean.sqrt() if self.root else mean


class PointDistanceError(PointError):
    """The mean distance of a point from where it is, over those that are there, in shares of the image's side."""

    side = 1.0

    def __init__(self) -> None:
        super().__init__(power=1)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs, targets: (N, K, 2), -1 and 1 at the edges of the image as the model sees it."""
        off = (outputs.double() - targets.double()).square().sum(-1).sqrt() * (self.side / 2)
        super().update(off, torch.where(off.isnan(), torch.nan, 0.0))


class PointDistancePxError(PointDistanceError):
    """The same in px of an image with this side."""

    def __init__(self, side_px: float) -> None:
        super().__init__()
        self.side = float(side_px)


class Explained(Metric):
    """R2: the share of the targets' variance that predictions explain, of each number, their mean. float64.

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
        off, wanted = outputs.double() - targets.double(), targets.double()
        told = [torch.ones_like(off), off.square(), wanted, wanted.square()]
        self.sums = self.sums + torch.stack([each.sum(0) for each in told])

    def compute(self) -> Tensor:
        """A float64 scalar, at most 1; not finite where the targets are all the same."""
        count, off, total, squares = self.sums
        return (1 - off / (squares - total.square() / count)).mean()


class RocAuc(Metric):
    """The area under each class's ROC curve (one class against the rest), exact, averaged over the classes.

    torchmetrics counts the curves. A class that no sample has, or that all have, has no curve: it is left out here,
    where torchmetrics' mean would take it for 0. Keeps every score: 8 bytes x N x C on the device.
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
        # Gathered over the ranks, a state is one tensor instead of a list.
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
    """Gather every state of every metric over the ranks at once, for a `compute` of each within. Collective.

    torchmetrics by itself gathers state by state, in three collectives each, and sends an empty rank's list of samples
    as a one-dimensional float32 tensor, whatever the others hold. Here ranks without samples are left out where others
    have some. A metric with a gather of its own keeps it.
    """
    plain = [m for m in metrics if m.dist_sync_fn is None and all(map(_summed_or_joined, _states(m), _reductions(m)))]
    sent = world.gather_tensors([_joined(state) for metric in plain for state in _states(metric)])
    states = zip(*(tensors for _, tensors in sent), strict=True)
    for metric in plain:
        # torchmetrics asks for each state in turn.
        own = itertools.islice(states, len(_states(metric)))
        answers = iter([[rank.to(metric.device) for rank in _filled(state)] for state in own])
        metric.dist_sync_fn = lambda state, group=None, answers=answers: next(answers)
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
