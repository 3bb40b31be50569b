"""How far may a metric be trusted? Its interval over resamples of the samples (the bootstrap), in one pass.

A metric sums what it counts, or keeps every sample. So a resample's counts are the weighted sum of each sample's own,
and no resample is gone through by itself. A sample's weight is drawn from Poisson(1), as if with replacement.
Source: Hanley and MacGibbon, Creating non-parametric bootstrap samples using Poisson frequencies, 2006.
"""

import copy
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from thawline.trainer.metrics.meter import as_metrics_take

_MOST_KEPT = 1_000_000
"""Numbers that a metric may keep of all samples: computing it 400 times over more would take minutes."""


class Bootstrap:
    """Gathers what each sample adds to each metric; a CPU's work, some .1 ms a sample and metric."""

    def __init__(self, metrics: Mapping[str, Metric], *, task: str, resamples: int, seed: int = 0) -> None:
        """metrics: by column, as TaskMetrics has them; copies are used."""
        self.task, self.resamples = task, resamples
        self._random = np.random.default_rng(seed)
        self._weights: list[NDArray[np.float64]] = []
        self._metrics = {name: _Resampled(copy.deepcopy(metric).cpu(), resamples) for name, metric in metrics.items()}

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """One batch: the model's outputs and the task's targets, on any device."""
        taken, true = as_metrics_take(outputs.cpu(), targets.cpu(), task=self.task)
        weights = self._random.poisson(1.0, (self.resamples, len(true))).astype(np.float64)
        self._weights.append(weights)
        for metric in self._metrics.values():
            metric.update(taken, true, torch.from_numpy(weights))

    def intervals(self, share: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """The middle `share` of each metric's values over the resamples: (low, high) by column; None where there is
        none, since it keeps too much, or has no value in a resample."""
        weights = torch.from_numpy(np.concatenate(self._weights, 1))
        found: dict[str, tuple[float, float] | None] = {}
        for name, metric in self._metrics.items():
            values = metric.values(weights)
            found[name] = None
            if len(values) and np.isfinite(values).all():
                low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2]).tolist()
                found[name] = low, high
        return found


class _Resampled:
    """One metric's states over all resamples."""

    def __init__(self, metric: Metric, resamples: int) -> None:
        self.metric, self.resamples = metric, resamples
        self.sums: dict[str, Tensor] = {}
        """What is summed, (resamples, ...) float64."""
        self.kept: dict[str, list[Tensor]] = {}
        """What is kept, sample by sample."""
        self.types: dict[str, torch.dtype] = {}

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """weights: (resamples, n)."""
        added: dict[str, list[Tensor]] = {}
        for i in range(len(targets)):
            self.metric.reset()
            self.metric.update(outputs[i : i + 1], targets[i : i + 1])
            for name, state in self.metric.metric_state.items():
                if isinstance(state, Tensor):
                    added.setdefault(name, []).append(state)
                else:
                    self.kept.setdefault(name, []).append(torch.cat(state))
        for name, states in added.items():
            stacked = torch.stack(states)
            self.types[name] = stacked.dtype
            more = torch.tensordot(weights, stacked.double(), 1)
            self.sums[name] = self.sums[name] + more if name in self.sums else more

    def values(self, weights: Tensor) -> NDArray[np.float64]:
        """The metric over each resample, (resamples,); none where it keeps too much. weights: (resamples, N)."""
        kept = {name: torch.cat(states) for name, states in self.kept.items()}
        if sum(state.numel() for state in kept.values()) > _MOST_KEPT:
            return np.zeros(0)
        lengths = {name: torch.tensor([len(state) for state in states]) for name, states in self.kept.items()}
        values = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            for number in range(self.resamples):
                self.metric.reset()
                for name, sums in self.sums.items():
                    setattr(self.metric, name, sums[number].to(self.types[name]))
                for name, state in kept.items():
                    often = weights[number].long().repeat_interleave(lengths[name])
                    setattr(self.metric, name, [state.repeat_interleave(often, 0)])
                values.append(float(self.metric.compute()))
        return np.array(values)
