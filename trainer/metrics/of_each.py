"""How good is a model on each class, number or point? Counts over a whole split, by name, and what is taken for what.

N are samples, C classes, K points. A share over nothing is NaN.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from thawline.trainer.losses import formulas

Row = dict[str, Any]
"""`name`, `images` (those that have it), and measures that are the task's own."""


def one_label(targets: NDArray[Any], probabilities: NDArray[Any], classes: Sequence[str]) -> list[Row]:
    """targets: (N,) classes. probabilities: (N, C). Recall, precision and F1."""
    names = np.arange(len(classes))
    return _counted(targets[:, None] == names, probabilities.argmax(1)[:, None] == names, classes)


def several_labels(targets: NDArray[Any], probabilities: NDArray[Any], classes: Sequence[str]) -> list[Row]:
    """targets: (N, C) zeros and ones. probabilities: (N, C), a label is predicted above 0.5. As `one_label`."""
    return _counted(targets > 0.5, probabilities > 0.5, classes)


def _counted(true: NDArray[np.bool_], predicted: NDArray[np.bool_], classes: Sequence[str]) -> list[Row]:
    hits, images, predictions = (each.sum(0) for each in (true & predicted, true, predicted))
    with np.errstate(invalid="ignore", divide="ignore"):
        measures = {"recall": hits / images, "precision": hits / predictions, "f1": 2 * hits / (images + predictions)}
    return _rows(classes, images, measures)


def numbers(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> list[Row]:
    """targets, outputs: (N, C). The mean absolute error and the root of the mean squared one, in the numbers' units."""
    errors = outputs.astype(np.float64) - targets
    measures = {"mae": np.abs(errors).mean(0), "rmse": np.sqrt((errors**2).mean(0))}
    return _rows(classes, np.full(len(classes), len(targets)), measures)


def points(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> list[Row]:
    """targets, outputs: (N, K, 2). The mean distance in shares of the image's side, over the points that are shown."""
    true = formulas.seen(torch.from_numpy(targets)).numpy()
    distances = np.hypot(*np.moveaxis(outputs.astype(np.float64) - true, 2, 0)) / 2
    images = (~np.isnan(distances)).sum(0)
    with np.errstate(invalid="ignore"):
        return _rows(classes, images, {"point_error": np.nansum(distances, 0) / images})


def masks(targets: NDArray[Any], counts: NDArray[Any], classes: Sequence[str]) -> list[Row]:
    """counts: (N, C, 4) pixels, of metrics.masks.counted. IoU, recall, precision over all pixels together."""
    right, predicted, true = counts[..., :3].astype(np.int64).sum(0).T
    with np.errstate(invalid="ignore", divide="ignore"):
        measures = {"iou": right / (predicted + true - right), "recall": right / true, "precision": right / predicted}
    return _rows(classes, (counts[..., 2] > 0).sum(0), measures)


def _rows(classes: Sequence[str], images: NDArray[Any], measures: dict[str, NDArray[Any]]) -> list[Row]:
    columns = {"name": list(classes), "images": images.tolist(), **{k: v.tolist() for k, v in measures.items()}}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def confusion(targets: NDArray[Any], probabilities: NDArray[Any], classes: Sequence[str]) -> NDArray[np.int64]:
    """(C, C) samples of the row's class that were predicted as the column's."""
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (targets, probabilities.argmax(1)), 1)
    return counts
