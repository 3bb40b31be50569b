"""How far does a predicted mask agree with the true one, image by image? Counts of pixels, and the measures of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.trainer.metrics.names import IGNORED


def counted(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N, C, H, W) and classes (N, H, W) -> (N, C, 4) int64, and (N,) zeros in place of the masks.

    Of each class, over the pixels that have a true class: how many are predicted rightly, predicted as it, and truly
    it; and over all pixels, how many are predicted as it. An image is then 32 bytes a class, not scores and a mask.
    """
    predicted, true = outputs.argmax(1).flatten(1), targets.flatten(1).long()
    counts = (true != IGNORED).long()
    true = true * counts
    zeros = counts.new_zeros(len(outputs), outputs.shape[1])
    columns = (
        zeros.scatter_add(1, true, counts * (predicted == true)),
        zeros.scatter_add(1, predicted, counts),
        zeros.scatter_add(1, true, counts),
        zeros.scatter_add(1, predicted, torch.ones_like(predicted)),
    )
    return torch.stack(columns, 2), counts.new_zeros(len(outputs))


def classes_of(outputs: Tensor) -> Tensor:
    """Scores (N, C, H, W) -> the class of each pixel, (N, H, W) uint8."""
    return outputs.argmax(1).to(torch.uint8)  # a mask's value of no class is 255, so there are fewer


def answers(predicted: NDArray[Any], classes: Sequence[str], threshold: float | None = None) -> dict[str, Any]:
    """What a prediction table says without a true mask. predicted: of `classes_of`."""
    flat = predicted.reshape(len(predicted), -1)
    return {"prediction": _occurring(np.stack([(flat == c).any(1) for c in range(len(classes))], 1), classes)}


def _occurring(occurs: NDArray[np.bool_], classes: Sequence[str]) -> list[list[str]]:
    """The names of the classes that do, (N, C), for each image."""
    names = np.array(classes, dtype=object)
    return [list(names[row]) for row in occurs]


def rows(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    """The columns of a prediction table. outputs: of `counted`, or scores (N, C, H, W), with their targets."""
    if outputs.ndim == 4:
        counts, _ = counted(torch.from_numpy(outputs), torch.from_numpy(targets))
        outputs = counts.numpy()
    right, predicted, true, predicted_anywhere = np.moveaxis(outputs.astype(np.int64), 2, 0)
    union, pixels = predicted + true - right, true.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = right.sum(1) / pixels
        shares = np.where(union > 0, right / union, np.nan)
        occurring = (union > 0).sum(1)
        iou = np.nansum(shares, axis=1) / occurring
    return {
        "target": _occurring(true > 0, classes),
        "prediction": _occurring(predicted_anywhere > 0, classes),
        "accuracy": pa.array([float(a) if n else None for a, n in zip(accuracy, pixels, strict=True)], pa.float64()),
        "iou": pa.array([float(a) if n else None for a, n in zip(iou, pixels, strict=True)], pa.float64()),
    }
