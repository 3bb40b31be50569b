"""A sweep against plain numpy, threshold by threshold, and which threshold it picks."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.trainer.analysis.test_plots import drawn
from thawline.trainer.analysis.thresholds import FASTAI, sweep
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.predictions import Predictions

N, C = 211, 4


@pytest.fixture
def predictions() -> Predictions:
    """Of a model that gives every label too little, as one trained on rare labels does."""
    random = np.random.default_rng(4)
    targets = (random.uniform(size=(N, C)) < [0.5, 0.3, 0.1, 0.02]).astype(np.float32)
    probabilities = 1 / (1 + np.exp(-(2 * targets - 2 + random.normal(size=(N, C)))))
    return Predictions(np.arange(N), targets, probabilities.astype(np.float32), np.zeros(N, np.float32), "multi_label")


def counts(p: Predictions, threshold: float) -> tuple[NDArray[Any], ...]:
    """(tp, fp, fn) by label, in whole numbers."""
    yes, is_so = p.probabilities.astype(np.float64) > threshold, p.targets > 0
    return (yes & is_so).sum(0), (yes & ~is_so).sum(0), (~yes & is_so).sum(0)


def over(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


def by_hand(metric: str, p: Predictions, threshold: float) -> float:
    tp, fp, fn = counts(p, threshold)
    values = {
        "accuracy_multi": 1 - (fp + fn) / N,
        "precision": over(tp, tp + fp),
        "recall": over(tp, tp + fn),
        "f_beta(beta=2)": over(5 * tp, 5 * tp + 4 * fn + fp),
        "recall(average='micro')": np.array([tp.sum() / (tp.sum() + fn.sum())]),
        "MultilabelHammingDistance(average='micro')": (fp + fn) / N,
    }
    return float(values[metric].mean())


@pytest.mark.parametrize(
    "metric",
    [
        *("accuracy_multi", "precision", "recall", "f_beta(beta=2)", "recall(average='micro')"),
        "MultilabelHammingDistance(average='micro')",
    ],
)
def test_every_value_of_the_sweep_equals_a_numpy_count(metric: str, predictions: Predictions) -> None:
    found = sweep(predictions, metric)
    np.testing.assert_array_equal(found.thresholds, np.linspace(0.05, 0.95, 29))
    expected = np.array([by_hand(metric, predictions, threshold) for threshold in FASTAI])
    np.testing.assert_allclose(found.values, expected, atol=2e-7)
    best = expected.min() if "Distance" in metric else expected.max()
    assert by_hand(metric, predictions, found.best) == pytest.approx(best, abs=2e-7)


def test_of_equally_good_thresholds_the_middle_one_is_taken() -> None:
    targets = np.array([[1, 0], [0, 1]], np.float32)
    p = Predictions(np.arange(2), targets, 0.2 + 0.6 * targets, np.zeros(2, np.float32), "multi_label")
    assert sweep(p, thresholds=[0.9, 0.7, 0.5, 0.3, 0.1]).best == 0.5
    assert sweep(p, "f_beta", thresholds=[0.1, 0.4, 0.6, 0.9]).best == 0.4


def test_the_figure_shows_the_sweep_and_marks_the_best(predictions: Predictions) -> None:
    found = sweep(predictions, "f_beta(beta=2)")
    figure = found.plot()
    assert drawn(figure, "f_beta(beta=2)") == (found.thresholds.tolist(), found.values.tolist())
    assert drawn(figure, f"best at {found.best:.3g}")[0] == [found.best] * 2
    assert figure.axes[0].get_xlabel() == "threshold"


def test_what_cannot_be_swept_gets_a_sentence(predictions: Predictions) -> None:
    single = Predictions(
        np.arange(2), np.zeros(2, np.int64), np.ones((2, 3), np.float32), np.zeros(2, np.float32), "single_label"
    )
    with pytest.raises(RecipeError, match=r"targets of shape \(2,\) have no labels.*multi_label"):
        sweep(single)
    with pytest.raises(RecipeError, match=r"thresholds=\[\] leaves nothing"):
        sweep(predictions, thresholds=[])
    with pytest.raises(
        RecipeError, match=r"whether a higher 'MultilabelSpecificity' is better is not known: the worst"
    ):
        sweep(predictions, "MultilabelSpecificity")
    with pytest.raises(RecipeError, match=r"roc_auc does not take"):
        sweep(predictions, "roc_auc")
    with pytest.raises(RecipeError, match=r"threshold=1.5\)' cannot be made"):
        sweep(predictions, thresholds=[0.5, 1.5])
