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


def rows(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    """The columns of a prediction table. outputs: of `counted`, or scores (N, C, H, W), with their targets."""
    if outputs.ndim == 4:
        counts, _ = counted(torch.from_numpy(outputs), torch.from_numpy(targets))
        outputs = counts.numpy()
    names = np.array(classes, dtype=object)
    right, predicted, true, predicted_anywhere = np.moveaxis(outputs.astype(np.int64), 2, 0)
    union, pixels = predicted + true - right, true.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = right.sum(1) / pixels
        shares = np.where(union > 0, right / union, np.nan)
        occurring = (union > 0).sum(1)
        iou = np.nansum(shares, axis=1) / occurring
    return {
        "target": [list(names[row > 0]) for row in true],
        "prediction": [list(names[row > 0]) for row in predicted_anywhere],
        "accuracy": pa.array([float(a) if n else None for a, n in zip(accuracy, pixels, strict=True)], pa.float64()),
        "iou": pa.array([float(a) if n else None for a, n in zip(iou, pixels, strict=True)], pa.float64()),
    }
