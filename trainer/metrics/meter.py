"""How good is the model, over exactly N samples? Counts kept on the device, summed over the ranks once.

Ranks may hold different numbers of samples, even none. Nothing here is a mean of means, and nothing is padded. None of
the house's metrics reads the device in `update`, but for a mask's jaccard, accuracy and error_rate: torchmetrics counts
them by `torch.bincount` or cuts out ignored pixels, for which CUDA waits once a validation batch. torchmetrics' classes
behave as torchmetrics has them, but count by class where it would fill a matrix of classes by classes only to sum it.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassStatScores, MultilabelStatScores

from thawline.dataio.errors import quoted
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.build import one, recall_of_each
from thawline.trainer.metrics.names import parse
from thawline.trainer.metrics.states import gathered
from thawline.trainer.tasks import TASKS, record_of


def as_metrics_take(outputs: Tensor, targets: Tensor, *, task: str) -> tuple[Tensor, Tensor]:
    """A task's outputs and targets in a form that torchmetrics need not guess.

    torchmetrics treats a batch of logits that happens to lie within [0, 1] as probabilities, so that a sample's result
    would depend on its neighbours: it never sees logits here. In float64 the probabilities of a confident model stay
    apart where float32 rounds them to 1.

    single_label: (N, C) logits -> softmax, float64; targets (N,). multi_label: (N, C) logits -> sigmoid, float64;
    targets (N, C) -> int64, one above 0.5. mask: (N, C, H, W) logits -> (N, H, W) classes; targets (N, H, W) -> int64.
    points, and a task without a record: as they are.
    """
    return record_of(task).measured(outputs, targets)


class TaskMetrics(MetricCollection):
    """Metrics of one task, updated with the model's outputs. Of metrics that keep the same counts, one counts."""

    def __init__(self, metrics: Mapping[str, Metric], *, task: str) -> None:
        groups: dict[Any, list[str]] = {}
        for name, metric in metrics.items():
            groups.setdefault(_counts(metric) or name, []).append(name)
        # Given, not detected: torchmetrics detects groups by reading states back at the first update, so that a rank
        # without samples would detect none, and its gathers would not match the others'.
        super().__init__(dict(metrics), compute_groups=list(groups.values()))
        self.task = task
        self._order = list(metrics)

    def update(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]  # torchmetrics' own sin
        """One batch of this rank, which `as_metrics_take` converts."""
        super().update(*as_metrics_take(outputs, targets, task=self.task))

    def compute(self) -> dict[str, Tensor]:
        """Each metric's value by its column, in the order in which they were requested. Collective."""
        values = super().compute()
        return {name: values[name] for name in self._order}


def _counts(metric: Metric) -> tuple[Any, ...] | None:
    """What a metric's counts depend on, where they are torchmetrics' tp, fp, tn and fn; None for others."""
    if not isinstance(metric, MulticlassStatScores | MultilabelStatScores):
        return None
    settings = ("num_classes", "num_labels", "top_k", "threshold", "ignore_index", "multidim_average")
    return (metric.average == "micro", *(getattr(metric, name, None) for name in settings))


def build(names: Sequence[str], *, task: str, classes: int, side_px: int | None = None) -> TaskMetrics:
    """The metrics that these texts name (see metrics.names), by column; with no texts, the task's own.

    side_px: of the images as the model sees them, for metrics in px.

    single_label: error_rate, accuracy, top_k(k=5), f_beta(beta=1, average="macro"), precision, recall, roc_auc.
    multi_label: accuracy_multi(threshold=0.5), f_beta(beta=1, threshold=0.5, average="macro"), precision, recall,
    roc_auc. number: mae, rmse, mse, in the numbers' own units (with several, the mean over all), r2. points: mse, mae,
    over the coordinates of points that the image shows, 2 its side; point_error, the mean distance, 1 its side,
    point_error_px(side_px=...). mask: jaccard, dice (averaged over the classes that occur), accuracy, error_rate, over
    the pixels that are not names.IGNORED. Any task: a torchmetrics class by its name, with keyword arguments;
    num_classes and the like are filled in.

    Raises:
        RecipeError: a text that names no metric, or one that does not fit the task; two of the same column.
    """
    if task not in TASKS:
        tasks = ", ".join(TASKS)
        raise RecipeError(f"task={task!r} has no default metrics: give {tasks}, or your own metrics")
    metrics: dict[str, Metric] = {}
    record = TASKS[task]
    for text in names or (*record.metrics, *(record.metrics_by_side if side_px else ())):
        column = parse(text).column
        if column in metrics:
            raise RecipeError(
                f"metric {quoted(text)!r} comes twice as column {quoted(column)}: one would hide the other; leave one "
                "out"
            )
        metrics[column] = one(text, task=task, classes=classes, side_px=side_px)
    return TaskMetrics(metrics, task=task)


def recalls(task: str, classes: int) -> TaskMetrics | None:
    """The recall of each class; None for a task without recall."""
    recall = recall_of_each(task, classes)
    return None if recall is None else TaskMetrics({"recall": recall}, task=task)


def default_metrics(task: str, classes: int) -> TaskMetrics:
    """The metrics of a task by default; none for an empty one. Raises RecipeError for an unknown one."""
    return build((), task=task, classes=classes) if task else TaskMetrics({}, task=task)


class Meter:
    """Metrics and the mean loss of one validation. Only `compute` waits for the device or for other ranks."""

    def __init__(self, metrics: MetricCollection, *, recalls: TaskMetrics | None = None) -> None:
        """recalls: of `recalls`, where the recall of each class is requested, too."""
        self.metrics, self.recalls = metrics, recalls
        # float64: a float32 sum stops counting at 2^24 samples. NaN must show, and looking for it would
        # make the host wait.
        self.loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

    def to(self, device: torch.device) -> Self:
        """Move the counts to this device."""
        self.metrics.to(device)
        if self.recalls is not None:
            self.recalls.to(device)
        self.loss.to(device)
        return self

    def update(self, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
        """One batch of this rank, on the device: the model's outputs, the task's targets, losses (N,)."""
        self.metrics.update(outputs, targets)
        if self.recalls is not None:
            self.recalls.update(outputs, targets)
        self.loss.update(losses)

    def compute(self) -> dict[str, float]:
        """valid_loss and every metric, over all samples of all ranks, the same on each. Collective."""
        with warnings.catch_warnings(), gathered([self.loss, *self.metrics.values()]):
            # More ranks than samples leaves some without any; their zeros are right.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            values = {"valid_loss": self.loss.compute(), **self.metrics.compute()}
        numbers = torch.stack([value.double().squeeze() for value in values.values()]).tolist()  # one read for all
        return dict(zip(values, numbers, strict=True))

    def compute_recalls(self) -> list[float] | None:
        """The recall of each class, NaN where no sample has it, the same on every rank; None if not requested.

        Collective.
        """
        if self.recalls is None:
            return None
        with warnings.catch_warnings(), gathered([*self.recalls.values()]):
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            values: list[float] = self.recalls.compute()["recall"].tolist()
        return values

    def reset(self) -> None:
        """Forget all samples."""
        self.metrics.reset()
        if self.recalls is not None:
            self.recalls.reset()
        self.loss.reset()
