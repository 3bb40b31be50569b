"""Are a metric's intervals those of resamples that were gone through one by one?"""

from typing import Any

import numpy as np
import pytest
import torch

from thawline.trainer.metrics.intervals import Bootstrap
from thawline.trainer.metrics.meter import TaskMetrics, build
from thawline.trainer.tasks import TASKS

RESAMPLES, BATCHES = 30, [5, 8, 1, 20]


def samples(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """34 outputs of a model with three classes, and targets."""
    made, n = torch.Generator().manual_seed(1), sum(BATCHES)
    scores = torch.randn(n, 3, generator=made)
    if task == "single_label":
        return scores, torch.randint(0, 3, (n,), generator=made)
    if task == "multi_label":
        return scores, torch.randint(0, 2, (n, 3), generator=made).float()
    if task == "mask":
        return torch.randn(n, 3, 4, 4, generator=made), torch.randint(0, 3, (n, 4, 4), generator=made)
    targets = scores + 0.3 * torch.randn(n, 3, generator=made)
    if task == "number":
        return scores, targets
    return torch.stack([scores, targets], 2), torch.stack([targets, scores], 2) / 4


def every(task: str) -> TaskMetrics:
    return build([*(TASKS[task].own_metrics().keys() - {"top_k"})], task=task, classes=3, side_px=32)


@pytest.mark.parametrize("task", TASKS)
def test_they_are_those_of_metrics_over_the_samples_drawn(task: str) -> None:
    outputs, targets = samples(task)
    bootstrap = Bootstrap(dict(every(task).items()), task=task, resamples=RESAMPLES, seed=3)
    random, weights = np.random.default_rng(3), list[Any]()
    for some, true in zip(torch.split(outputs, BATCHES), torch.split(targets, BATCHES), strict=True):
        bootstrap.update(some, true)
        weights.append(random.poisson(1.0, (RESAMPLES, len(true))))
    values: dict[str, list[float]] = {}
    metrics = every(task)
    for often in np.concatenate(weights, 1):
        drawn = np.repeat(np.arange(len(often)), often)
        metrics.reset()
        metrics.update(outputs[drawn], targets[drawn])
        for name, value in metrics.compute().items():
            values.setdefault(name, []).append(float(value))
    found = bootstrap.intervals(share=0.8)
    assert found.keys() == values.keys()
    for name, interval in found.items():
        assert interval == pytest.approx(tuple(np.quantile(values[name], [0.1, 0.9])), rel=1e-6), name
        assert interval is not None
        assert interval[0] < interval[1], name


def test_what_has_no_value_in_a_resample_has_no_interval() -> None:
    """One sample is often not drawn at all."""
    bootstrap = Bootstrap(dict(every("number").items()), task="number", resamples=20)
    bootstrap.update(torch.ones(1, 3), torch.zeros(1, 3))
    assert set(bootstrap.intervals().values()) == {None}
