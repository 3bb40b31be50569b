"""What does a task ask of training? Its loss, its metrics, what the model's outputs say, what is written of a sample.

A record a task, in a plain dict under the name that dataio/table/tasks.py and models/heads.py have it by. N are
samples, C classes, K points. A task without a record trains, too: then loss and metrics are the user's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.trainer.losses import formulas as formulas
from thawline.trainer.metrics import masks, of_each
from thawline.trainer.metrics.names import IGNORED
from thawline.trainer.step.step import LossFunction

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class MetricKind:
    """How a metric is made."""

    made_by: type["Metric"]
    takes: Mapping[str, Any] = field(default_factory=dict)
    """What a text may give, in this order, and what it is otherwise; None: as made_by has it."""
    settled: Mapping[str, Any] = field(default_factory=dict)


def _as_they_are(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return outputs, targets


def _plain_answers(outputs: NDArray[Any], classes: Sequence[str], threshold: float | None = None) -> dict[str, Any]:
    return {"prediction": outputs.tolist()}


def _plain_rows(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    return {"target": targets.tolist(), **_plain_answers(outputs, classes)}


def _words(label: Any) -> str:
    if isinstance(label, list):
        return " ".join(map(_words, label))
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def _no_metrics() -> Mapping[str, MetricKind]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """How one kind of target is trained, measured and described."""

    loss: LossFunction | None = None
    """(outputs, targets) -> losses (N,) float32, whatever precision the outputs have; None: the first of `losses`."""
    losses: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    """By name; where they take them, they are given `label_smoothing`, `class_weights` and `scale`, see losses."""
    balanced: Callable[[NDArray[np.int64], int], NDArray[np.float64]] | None = None
    """(samples of each class (C,), samples) -> the weights that make up for how rare a class is, see class_weights."""
    metrics: tuple[str, ...] = ()
    """What is measured where nobody chose: texts, see metrics.names."""
    metrics_by_side: tuple[str, ...] = ()
    """The same, where it is known how many px the side of an image has."""
    own_metrics: Callable[[], Mapping[str, MetricKind]] = _no_metrics
    """The metrics that have a name of ours; called, since torchmetrics takes two seconds to import."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that every class of torchmetrics gets which takes them."""
    measured: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _as_they_are
    """Outputs and targets in the form that metrics read, see meter.as_metrics_take."""
    trial: Callable[[int], tuple[Tensor, Tensor]] | None = None
    """Four made-up samples of that many classes in the form that metrics take; no random state is touched."""
    probabilities: Callable[[Tensor], Tensor] = lambda outputs: outputs
    """Predictions from the outputs, see predictions.Predictions."""
    by_class: bool = False
    """Whether these are one for each class, so that one may ask for the most probable."""
    threshold: float | None = None
    """The probability above which a class is predicted, where one may choose it; None where the most probable is."""
    answered: Callable[[Tensor], Tensor] | None = None
    """What `answers` takes of outputs, where that is not their probabilities."""
    answers: Callable[[NDArray[Any], Sequence[str], float | None], dict[str, Any]] = _plain_answers
    """(probabilities, classes, threshold) -> those columns of `rows` that need no target: what a model says of images.
    threshold: in place of the task's own."""
    outputs_of: Callable[[Tensor], Tensor] | None = None
    """Outputs of which these are the probabilities, averaged over views; None where such a mean is meaningless."""
    brief: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """(outputs, targets) -> what is kept of both for `rows`, where they are too large to keep; None: themselves."""
    rows: Callable[[NDArray[Any], NDArray[Any], Sequence[str]], dict[str, Any]] = _plain_rows
    """(targets, probabilities, classes) -> the columns of a prediction table that are the task's own."""
    of_each: Callable[[NDArray[Any], NDArray[Any], Sequence[str]], list[dict[str, Any]]] | None = None
    """(targets, probabilities, classes) -> measures of each class, number or point, see metrics.of_each."""
    confusion: Callable[[NDArray[Any], NDArray[Any], Sequence[str]], NDArray[np.int64]] | None = None
    """The same -> (C, C) samples of a class that were predicted as another; None where a sample has not one of each."""
    pipeline_tag: str = ""
    """What the Hugging Face Hub calls it; empty where it has no such task."""
    title: Callable[[Mapping[str, Any]], str] = lambda row: f"{_words(row['prediction'])} / {_words(row['target'])}"
    """A row of that table in a few words, as a picture's title."""
    right: Callable[[Mapping[str, Any]], bool] | None = lambda row: row["prediction"] == row["target"]
    """Whether the prediction of such a row is right; None where it is more or less so."""


# Weights --------------------------------------------------------------------------------------------------


def _as_often(counts: NDArray[np.int64], samples: int) -> NDArray[np.float64]:
    """n / (classes x count), over the classes that occur. Source: scikit-learn's `compute_class_weight`."""
    occurs = counts > 0
    return np.where(occurs, samples / (occurs.sum() * np.maximum(counts, 1)), 1.0)


def _as_often_as_not(counts: NDArray[np.int64], samples: int) -> NDArray[np.float64]:
    """The same of each label's yes against its no: without / with it."""
    return np.where((counts > 0) & (counts < samples), (samples - counts) / np.maximum(counts, 1), 1.0)


# Metrics --------------------------------------------------------------------------------------------------

_MICRO = {"average": "micro"}
_AVERAGE = {"average": "macro"}
_THRESHOLD = 0.5
_CUT = {"threshold": _THRESHOLD, "average": "macro"}


def _metrics_of_one_label() -> Mapping[str, MetricKind]:
    from torchmetrics import classification as tm

    from thawline.trainer.metrics.states import ErrorRate, RocAuc

    return {
        "error_rate": MetricKind(ErrorRate, settled=_MICRO),
        "accuracy": MetricKind(tm.MulticlassAccuracy, settled=_MICRO),
        "top_k": MetricKind(tm.MulticlassAccuracy, {"top_k": 5}, _MICRO),
        "f_beta": MetricKind(tm.MulticlassFBetaScore, {"beta": 1.0, **_AVERAGE}),
        "precision": MetricKind(tm.MulticlassPrecision, _AVERAGE),
        "recall": MetricKind(tm.MulticlassRecall, _AVERAGE),
        "roc_auc": MetricKind(RocAuc),
    }


def _metrics_of_several_labels() -> Mapping[str, MetricKind]:
    from torchmetrics import classification as tm

    from thawline.trainer.metrics.states import RocAuc

    return {
        "accuracy_multi": MetricKind(tm.MultilabelAccuracy, {"threshold": _THRESHOLD}, _MICRO),
        "f_beta": MetricKind(tm.MultilabelFBetaScore, {"beta": 1.0, **_CUT}),
        "precision": MetricKind(tm.MultilabelPrecision, _CUT),
        "recall": MetricKind(tm.MultilabelRecall, _CUT),
        "roc_auc": MetricKind(RocAuc),
    }


def _metrics_of_numbers() -> Mapping[str, MetricKind]:
    from thawline.trainer.metrics.states import Explained, PointError

    return {
        "mae": MetricKind(PointError, settled={"power": 1}),
        "rmse": MetricKind(PointError, settled={"power": 2, "root": True}),
        "mse": MetricKind(PointError, settled={"power": 2}),
        "r2": MetricKind(Explained),
    }


def _metrics_of_points() -> Mapping[str, MetricKind]:
    from thawline.trainer.metrics.states import PointDistanceError, PointDistancePxError, PointError

    return {
        "mse": MetricKind(PointError, settled={"power": 2}),
        "mae": MetricKind(PointError, settled={"power": 1}),
        "point_error": MetricKind(PointDistanceError),
        "point_error_px": MetricKind(PointDistancePxError, {"side_px": None}),
    }


def _metrics_of_masks() -> Mapping[str, MetricKind]:
    from torchmetrics import classification as tm

    from thawline.trainer.metrics.states import ErrorRate

    return {
        "jaccard": MetricKind(tm.MulticlassJaccardIndex, _AVERAGE),
        "dice": MetricKind(tm.MulticlassF1Score, _AVERAGE),
        "accuracy": MetricKind(tm.MulticlassAccuracy, settled=_MICRO),
        "error_rate": MetricKind(ErrorRate, settled=_MICRO),
    }


def _scores(classes: int) -> Tensor:
    return torch.arange(4.0 * classes, dtype=torch.float64).mul(0.7).sin().reshape(4, classes)


def _tried_masks(classes: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(64).reshape(4, 4, 4)
    return labels % classes, torch.where(labels % 9 == 0, IGNORED, labels // 2 % classes)


# Rows of predictions --------------------------------------------------------------------------------------


def _names(classes: Sequence[str]) -> NDArray[np.object_]:
    return np.array(classes, dtype=object)


def _answers_of_one_label(
    probabilities: NDArray[Any], classes: Sequence[str], threshold: float | None = None
) -> dict[str, Any]:
    return {"prediction": list(_names(classes)[probabilities.argmax(1)]), "probability": probabilities.max(1)}


def _rows_of_one_label(targets: NDArray[Any], probabilities: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    return {"target": list(_names(classes)[targets]), **_answers_of_one_label(probabilities, classes)}


def _answers_of_several(
    probabilities: NDArray[Any], classes: Sequence[str], threshold: float | None = None
) -> dict[str, Any]:
    above = probabilities > (_THRESHOLD if threshold is None else threshold)
    return {"prediction": [list(_names(classes)[row]) for row in above], "probability": probabilities.max(1)}


def _rows_of_several(targets: NDArray[Any], probabilities: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    true = [list(_names(classes)[row > 0]) for row in targets]
    return {"target": true, **_answers_of_several(probabilities, classes)}


def _numbers(numbers: NDArray[Any]) -> Any:
    return numbers[:, 0] if numbers.shape[1] == 1 else pa.array(numbers.tolist(), pa.list_(pa.float32()))


def _answers_of_numbers(
    outputs: NDArray[Any], classes: Sequence[str], threshold: float | None = None
) -> dict[str, Any]:
    return {"prediction": _numbers(outputs)}


def _rows_of_numbers(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    return {
        "target": _numbers(targets),
        **_answers_of_numbers(outputs, classes),
        "error": _numbers(outputs - targets),
    }


def _answers_of_points(outputs: NDArray[Any], classes: Sequence[str], threshold: float | None = None) -> dict[str, Any]:
    return {"prediction": _points(outputs)}


def _rows_of_points(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    distance = np.hypot(*np.moveaxis(outputs - targets, -1, 0))
    named = [zip(row, classes, strict=True) for row in distance.tolist()]
    known = [[(d, name) for d, name in row if not np.isnan(d)] for row in named]
    far = pa.list_(pa.float32())
    return {
        "target": _points(targets),
        **_answers_of_points(outputs, classes),
        "distance": pa.array([[None if np.isnan(d) else d for d in row] for row in distance.tolist()], far),
        "mean_distance": pa.array([sum(d for d, _ in row) / len(row) if row else None for row in known], pa.float64()),
        "farthest": pa.array([max(row)[1] if row else None for row in known], pa.string()),
    }


def _points(points: NDArray[Any]) -> pa.Array:
    """Lists of [x, y], null for a point that is missing."""
    rows = [[None if np.isnan(x) or np.isnan(y) else [x, y] for x, y in row] for row in points.tolist()]
    return pa.array(rows, pa.list_(pa.list_(pa.float32())))


_TINY, _EPS = float(np.finfo(np.float32).tiny), 1e-12


def _of_each(losses: Callable[..., Tensor]) -> Mapping[str, Callable[..., Tensor]]:
    """What a difference may cost, by the field's names."""
    each = {"mse": formulas.squared, "l1": torch.abs, "huber": formulas.huber}
    return {name: partial(losses, formula) for name, formula in each.items()}


TASKS: dict[str, Task] = {
    "single_label": Task(
        pipeline_tag="image-classification",
        losses={
            "cross_entropy": formulas.cross_entropy,
            "bce": formulas.one_against_rest,
            "focal": formulas.focal_of_one,
        },
        balanced=_as_often,
        metrics=("error_rate", "accuracy"),
        own_metrics=_metrics_of_one_label,
        settled={"task": "multiclass"},
        measured=lambda outputs, targets: (outputs.double().softmax(1), targets),
        trial=lambda classes: (_scores(classes).softmax(1), torch.arange(4) % classes),
        probabilities=lambda outputs: outputs.softmax(1),
        by_class=True,
        outputs_of=lambda shares: shares.clamp(min=_TINY).log(),
        answers=_answers_of_one_label,
        rows=_rows_of_one_label,
        of_each=of_each.one_label,
        confusion=of_each.confusion,
    ),
    "multi_label": Task(
        pipeline_tag="image-classification",
        losses={
            "bce": formulas.binary_cross_entropy,
            "focal": formulas.focal_of_several,
            "asymmetric": formulas.asymmetric,
        },
        balanced=_as_often_as_not,
        metrics=("accuracy_multi",),
        own_metrics=_metrics_of_several_labels,
        settled={"task": "multilabel"},
        measured=lambda outputs, targets: (outputs.double().sigmoid(), (targets > 0.5).long()),
        trial=lambda classes: (_scores(classes).sigmoid(), (_scores(classes) > 0.2).long()),
        probabilities=lambda outputs: outputs.sigmoid(),
        by_class=True,
        threshold=_THRESHOLD,
        outputs_of=lambda shares: shares.clamp(_TINY, 1 - _EPS).logit(),
        answers=_answers_of_several,
        rows=_rows_of_several,
        of_each=of_each.several_labels,
    ),
    "number": Task(
        losses=_of_each(formulas.of_numbers),
        metrics=("mae", "rmse", "r2"),
        own_metrics=_metrics_of_numbers,
        measured=lambda outputs, targets: (outputs.double(), targets.double()),
        trial=lambda classes: (_scores(classes), _scores(classes + 1)[:, 1:]),
        outputs_of=lambda numbers: numbers,
        answers=_answers_of_numbers,
        rows=_rows_of_numbers,
        of_each=of_each.numbers,
        right=None,
    ),
    "points": Task(
        pipeline_tag="keypoint-detection",
        losses=_of_each(formulas.of_points),
        metrics=("mse", "point_error"),
        metrics_by_side=("point_error_px",),
        measured=lambda outputs, targets: (outputs, formulas.seen(targets)),
        own_metrics=_metrics_of_points,
        trial=lambda classes: (torch.arange(24.0).sin().reshape(4, 3, 2), torch.arange(24.0).cos().reshape(4, 3, 2)),
        answers=_answers_of_points,
        rows=_rows_of_points,
        of_each=of_each.points,
        title=lambda row: (
            "no point" if row["mean_distance"] is None else f"{row['mean_distance'] / 2:.1%} of the side off"
        ),
        right=None,
    ),
    "mask": Task(
        pipeline_tag="image-segmentation",
        losses={
            "cross_entropy": formulas.pixel_cross_entropy,
            "dice": formulas.dice,
            "cross_entropy_dice": formulas.cross_entropy_dice,
        },
        metrics=("jaccard", "accuracy"),
        own_metrics=_metrics_of_masks,
        settled={"task": "multiclass", "ignore_index": IGNORED, "input_format": "index"},
        measured=lambda outputs, targets: (outputs.argmax(1), targets.long()),
        trial=_tried_masks,
        probabilities=lambda outputs: outputs.softmax(1),
        answered=masks.classes_of,
        answers=masks.answers,
        brief=masks.counted,
        rows=masks.rows,
        of_each=of_each.masks,
        title=lambda row: "no class" if row["iou"] is None else f"IoU {row['iou']:.3f}",
        right=None,
    ),
}
"""By name, as loaders have it."""


def record_of(task: str) -> Task:
    """The record of a task; of one that has none, outputs are taken as they are, loss and metrics are the user's."""
    return TASKS.get(task, Task())
