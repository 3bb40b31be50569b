"""What would a run's model say if Pillow decoded in place of DALI? Measured once, for whoever has no DALI later.

DALI and Pillow decode JPEGs with other libraries, whose pixels differ by a few levels of 255.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.dataio.batch import Batch
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.stream.loader import ImageLoader
from thawline.trainer.tasks import Task, record_of

MOST = 200
"""Validation images that are looked at, evenly spaced."""
_AT_ONCE = 16


def by_pillow(valid: ImageLoader, outputs_of: Callable[[Batch], Tensor], *, step: int) -> dict[str, float]:
    """How far what is said differs: `images`, `largest`, `mean`, and `agreement`; nothing where DALI did not validate.

    Largest and mean are of the probabilities; of numbers and points themselves. agreement is the share of images with
    the same prediction, or of a mask's pixels; numbers and points have none. step: of the last validation.
    """
    if valid.engine != "dali":
        return {}
    record = record_of(valid.task)
    largest, total, values, same, judged, images = 0.0, 0.0, 0, 0, 0, 0
    for dali, pillow in _pairs(valid, outputs_of, step=step):
        one, other = (record.probabilities(outputs).double() for outputs in (dali, pillow))
        off = (one - other).abs()
        largest, total, values = max(largest, float(off.max())), total + float(off.sum()), values + off.numel()
        equal = _equal(record, dali, pillow, valid.classes)
        same, judged, images = same + int(equal.sum()), judged + equal.size, images + len(dali)
    if not images:
        return {}
    told = {"images": float(images), "largest": largest, "mean": total / values}
    return {**told, "agreement": same / judged} if judged else told


def _pairs(valid: ImageLoader, outputs_of: Callable[[Batch], Tensor], *, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model puts out for the same images by DALI and by Pillow."""
    rows = np.unique(np.linspace(0, len(valid.subset) - 1, min(len(valid.subset), MOST)).round().astype(np.int64))
    renderer, mend = valid.renderer, valid.source.mend
    with ReferenceEngine(
        valid.spec, device=torch.device("cpu"), dtype=renderer.dtype, threads=renderer.threads
    ) as reference:
        for part in np.array_split(rows, -(-len(rows) // min(_AT_ONCE, renderer.local_batch))):
            work = valid.source.work(part, size_px=valid.size_px(step))
            found = [[*renderer.batches(iter([work]), mend)], [*reference.run(iter([work]), mend)]]
            if all(found) and torch.equal(found[0][0].ids, found[1][0].ids):
                yield outputs_of(found[0][0]), outputs_of(found[1][0])


def _equal(record: Task, one: Tensor, other: Tensor, classes: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which predictions are the same: of each image, or of each pixel of masks; none of what is no choice."""
    if record.answered is not None:
        return (record.answered(one) == record.answered(other)).numpy()
    if not record.by_class:
        return np.zeros(0, np.bool_)
    said = [record.answers(record.probabilities(each).numpy(), classes, None)["prediction"] for each in (one, other)]
    return np.array([a == b for a, b in zip(*said, strict=True)])
