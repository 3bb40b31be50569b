"""How good is the model, over exactly N samples? Counts kept on the device, summed over the ranks once.

Ranks may hold uneven parts, even none. Nothing here is a mean of means, and nothing is padded.
"""

import warnings
from typing import Self

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from trainer.errors import RecipeError


class ErrorRate(MulticlassAccuracy):
    """The share of samples whose largest logit is another class's, divided in float64 from whole counts."""

    tp: Tensor
    fn: Tensor

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]; NaN over no samples."""
        return (self.fn.double() / (self.tp + self.fn)).squeeze()


class AccuracyMulti(Metric):
    """The share of all (sample, class) decisions that are right, a class being present above the threshold.

    Not torchmetrics' MultilabelAccuracy: that one takes a batch of logits that all lie in [0, 1] for
    probabilities, so a sample's verdict would depend on its neighbours.
    """

    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """logits (N, C) before the sigmoid; targets (N, C), one where the class is present."""
        self.right = self.right + ((logits.sigmoid() > self.threshold) == (targets > 0.5)).sum()
        self.total = self.total + targets.numel()

    def compute(self) -> Tensor:
        """A float64 scalar in [0, 1]; NaN over no samples."""
        return self.right.double() / self.total


def default_metrics(task: str, classes: int) -> MetricCollection:
    """single_label: error_rate, accuracy. multi_label: accuracy_multi. Raises RecipeError for others."""
    if task == "single_label":
        # An explicit compute group counts once for both, and spares the comparison of states on the host that
        # finds groups by itself; validate_args would read every batch back.
        return MetricCollection(
            {
                "error_rate": ErrorRate(classes, average="micro", validate_args=False),
                "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            },
            compute_groups=[["error_rate", "accuracy"]],
        )
    if task == "multi_label":
        return MetricCollection({"accuracy_multi": AccuracyMulti()}, compute_groups=False)
    raise RecipeError(f"task={task!r} has no default metrics: give single_label or multi_label, or your own metrics")


class Meter:
    """Metrics and the mean loss of one validation. Only `compute` waits for the device or for other ranks."""

    def __init__(self, metrics: MetricCollection) -> None:
        self.metrics = metrics
        # float64: a float32 sum stops counting at 2^24 samples. NaN must show, and looking for it would wait.
        self.loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)

    def to(self, device: torch.device) -> Self:
        """Count on this device."""
        self.metrics.to(device)
        self.loss.to(device)
        return self

    def update(self, logits: Tensor, targets: Tensor, losses: Tensor) -> None:
        """One batch of this rank, on the device: logits (N, C), targets as the task has them, losses (N,)."""
        self.metrics.update(logits, targets)
        self.loss.update(losses)

    def compute(self) -> dict[str, float]:
        """valid_loss and every metric, over all samples of all ranks, the same on each. Collective."""
        with warnings.catch_warnings():
            # More ranks than samples leaves some without any; their zeros are right.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            values = {"valid_loss": self.loss.compute(), **self.metrics.compute()}
        return {name: float(value) for name, value in values.items()}

    def reset(self) -> None:
        """Forget all samples."""
        self.metrics.reset()
        self.loss.reset()
