"""How far does a predicted mask agree with the true one, image by image? Counts of pixels, and what they come to."""

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

    Of each class the pixels that are right, that are taken for it, and that are it, of those that have a class; and all
    that are taken for it. 32 bytes a class are kept of an image, not its scores and its mask.
    """
    found, wanted = outputs.argmax(1).flatten(1), targets.flatten(1).long()
    counts = (wanted != IGNORED).long()
    wanted = wanted * counts
    none = counts.new_zeros(len(outputs), outputs.shape[1])
    columns = (
        none.scatter_add(1, wanted, counts * (found == wanted)),
        none.scatter_add(1, found, counts),
        none.scatter_add(1, wanted, counts),
        none.scatter_add(1, found, torch.ones_like(found)),
    )
    return torch.stack(columns, 2), counts.new_zeros(len(outputs))


def rows(targets: NDArray[Any], outputs: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    """The columns of a prediction table. outputs: as `counted` has them, or scores (N, C, H, W), with their targets."""
    if outputs.ndim == 4:
        counts, _ = counted(torch.from_numpy(outputs), torch.from_numpy(targets))
        outputs = counts.numpy()
    names = np.array(classes, dtype=object)
    right, found, wanted, taken = np.moveaxis(outputs.astype(np.int64), 2, 0)
    union, pixels = found + wanted - right, wanted.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = right.sum(1) / pixels
        shares = np.where(union > 0, right / union, np.nan)
        shown = (union > 0).sum(1)
        iou = np.nansum(shares, axis=1) / shown
    return {
        "target": [list(names[row > 0]) for row in wanted],
        "prediction": [list(names[row > 0]) for row in taken],
        "accuracy": pa.array([float(a) if n else None for a, n in zip(accuracy, pixels, strict=True)], pa.float64()),
        "iou": pa.array([float(a) if n else None for a, n in zip(iou, pixels, strict=True)], pa.float64()),
    }
