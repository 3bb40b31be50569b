"""From which probability on should a label be taken as present? A metric over a row of thresholds, and its best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics import names
from thawline.trainer.metrics.direction import direction
from thawline.trainer.metrics.predictions import Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FASTAI = np.linspace(0.05, 0.95, 29)
"""Source: fastai's course, lesson on multi-label classification."""


@dataclass(frozen=True)
class Sweep:
    """A metric over the same predictions at every threshold."""

    metric: str
    thresholds: NDArray[np.float64]
    """(T,), in rising order"""
    values: NDArray[np.float64]
    """(T,)"""
    best: float
    """The threshold with the best value; of several, the one in their middle, which is farthest from doing worse."""

    def plot(self) -> "Figure":
        """The metric by threshold, the best one marked."""
        from thawline.trainer.analysis.plots import (
            plot_sweep,  # matplotlib takes a second to import; a worker never draws
        )

        return plot_sweep(self.thresholds, self.values, best=self.best, metric=self.metric)


def sweep(
    predictions: Predictions,
    metric: str = "accuracy_multi",
    *,
    thresholds: Sequence[float] | NDArray[np.float64] = FASTAI,
) -> Sweep:
    """`metric` of multi-label predictions, with each threshold in place of its own.

    metric: accuracy_multi, f_beta(beta=2), precision, recall, or a torchmetrics class that takes a threshold (see
    metrics.names). A label is present where its probability is above the threshold.

    Raises:
        RecipeError: the predictions are not multi-label, there are none or no thresholds, or the metric takes none, or
            it is not known whether more of it is better.
    """
    if predictions.targets.ndim != 2 or not len(predictions.ids):
        raise RecipeError(
            f"predictions with targets of shape {predictions.targets.shape} have no labels to be cut at a threshold; "
            "give those of a multi_label validation, one row an image"
        )
    if not len(thresholds):
        raise RecipeError("thresholds=[] leaves nothing to choose from; give at least one between 0 and 1")
    from thawline.trainer.metrics import build  # torchmetrics takes two seconds to import

    asked = names.parse(metric)
    sign = 1 if direction(metric) else -1
    tried = np.sort(np.asarray(thresholds, dtype=np.float64))
    probabilities = torch.from_numpy(predictions.probabilities).double()
    targets = (torch.from_numpy(predictions.targets) > 0.5).long()
    values = []
    for threshold in tried.tolist():
        text = asked.also(threshold=threshold).call
        counted = build.one(text, task=predictions.task, classes=targets.shape[1])
        counted.update(probabilities, targets)
        values.append(float(counted.compute()))
    best = np.array(values) * sign
    (ties,) = np.nonzero(best == np.nanmax(best)) if np.isfinite(best).any() else (np.arange(1),)
    return Sweep(metric, tried, np.array(values), float(tried[ties[(len(ties) - 1) // 2]]))
