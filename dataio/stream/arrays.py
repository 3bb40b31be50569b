"""How do arrays become batches? Ratings, tables, features, small images: data that are in memory already.

The order, the local batches and the exact end of validation are those of images: a pure function of (seed, step).
Nothing is augmented, and there are no files that could break.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.dataio.batch import Batch, Inputs
from thawline.dataio.closing import Closing
from thawline.dataio.errors import SplitError
from thawline.dataio.hashing import hash64
from thawline.dataio.stream.plan import Once, Order, Training

Array = Tensor | NDArray[Any]


@dataclass(kw_only=True)
class ArrayLoader(Closing):
    """Batches of rows of tensors, for one rank: satisfies `dataio.batch.Loader`.

    Raises SplitError unless every tensor has `order.n` rows.
    """

    order: Order
    inputs: Inputs
    """Each (n, ...), on the device of the batches, of the types that the model takes."""
    targets: Tensor
    """(n, ...), on that device."""
    ids: Tensor
    """(n,) int64, on the CPU: names the rows in predictions and in the stream's hash."""
    task: str = ""
    """single_label, multi_label, ...: the task whose loss and metrics are the defaults; empty for none."""
    classes: tuple[str, ...] = ()
    """The vocabulary, where targets are indices into one."""

    def __post_init__(self) -> None:
        rows = [len(each) for each in (*self._inputs, self.targets, self.ids)]
        if set(rows) != {self.order.n}:
            raise SplitError(
                f"inputs, targets and ids have {', '.join(map(str, rows))} rows where the order has "
                f"{self.order.n}: they would not belong together; give arrays of one length"
            )

    @property
    def _inputs(self) -> tuple[Tensor, ...]:
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    @property
    def samples(self) -> int:
        """Samples in the split, over all ranks."""
        return self.order.n

    @property
    def global_batch(self) -> int:
        """Samples a step, over all ranks."""
        return self.order.global_batch

    def class_counts(self) -> NDArray[np.int64]:
        """See dataio.batch.Counted."""
        if self.targets.ndim == 1:
            return torch.bincount(self.targets.long(), minlength=len(self.classes)).cpu().numpy()
        return (self.targets > 0.5).sum(0).cpu().numpy()

    def steps(self, epochs: float) -> int:
        """Training steps that this many passes take."""
        return self.order.steps(epochs)

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        """Training: endless, from that step on. Validation: this rank's samples once, in order."""
        for _, positions in self.order.batches(first_step):
            _, index = self.order.at(positions)
            rows = torch.from_numpy(index)
            inputs = tuple(_take(each, rows) for each in self._inputs)
            several = isinstance(self.inputs, tuple)
            yield Batch(inputs if several else inputs[0], _take(self.targets, rows), self.ids[rows])

    def repeated(self, views: int) -> Self:
        """See dataio.batch.Repeatable: nothing is augmented, so this loader itself."""
        return self

    def planned(self, step: int) -> list[tuple[int, ...]]:
        """See dataio.batch.PlannedLoader."""
        _, positions = next(self.order.batches(step))
        _, index = self.order.at(positions)
        return [(number,) for number in self.ids[torch.from_numpy(index)].tolist()]

    @property
    def quarantined(self) -> Mapping[int, str]:
        """Nothing: what is in memory cannot turn out unusable."""
        return {}

    def quarantine(self, files: Mapping[int, str]) -> None:
        """Nothing to do: there are no files."""

    def close(self) -> None:
        """Nothing to do: the arrays are the caller's."""


def array_loaders(
    inputs: Array | tuple[Array, ...],
    targets: Array,
    *,
    ids: Array | None = None,
    valid: float | NDArray[np.bool_] = 0.2,
    global_batch: int = 64,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    task: str = "",
    classes: tuple[str, ...] = (),
) -> tuple[ArrayLoader, ArrayLoader]:
    """The training and the validation loader over arrays of n rows, numpy's or torch's, for one rank.

    inputs: one array, or a tuple of them for a model of several arguments. They keep their types: give float32 to
    models of float32, and int64 to embeddings. ids: (n,) integers, 0 to n - 1 when not given.
    valid: (n,) bool, the rows to validate on; or their share, in which case rows are chosen by a hash of (seed, id), so
    that only the few at the border change splits when rows are added.
    device: of the arrays, and so of the batches.
    Raises SplitError: different lengths, an empty split, batch sizes.
    """
    numbers = torch.arange(len(targets)) if ids is None else torch.as_tensor(ids).to(torch.int64).cpu()
    held_out = _held_out(numbers.numpy(), valid, seed) if isinstance(valid, float | int) else np.asarray(valid)
    tensors = [torch.as_tensor(each) for each in (*(inputs if isinstance(inputs, tuple) else (inputs,)), targets)]
    _check(held_out, [len(held_out), *(len(each) for each in tensors), len(numbers)])

    def loader(which: NDArray[np.bool_], kind: type[Order], **options: int) -> ArrayLoader:
        rows = torch.from_numpy(np.flatnonzero(which))
        shape = {"n": len(rows), "global_batch": global_batch, "rank": rank, "world_size": world_size}
        *taken, wanted = (_take(each, rows).to(device) for each in tensors)
        return ArrayLoader(
            order=kind(**shape, **options),
            inputs=tuple(taken) if isinstance(inputs, tuple) else taken[0],
            targets=wanted,
            ids=numbers[rows],
            task=task,
            classes=classes,
        )

    return loader(~held_out, Training, seed=seed), loader(held_out, Once)


def _held_out(ids: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """(n,) bool: exactly round(share * n) of the rows."""
    if not 0 < share < 1:
        raise SplitError(
            f"valid={share} is not a share of the rows: give one above 0 and below 1, such as 0.2, or a mask"
        )
    chosen = np.zeros(len(ids), np.bool_)
    chosen[np.argsort(hash64(seed, ids), kind="stable")[: round(share * len(ids))]] = True
    return chosen


def _check(held_out: NDArray[np.bool_], lengths: list[int]) -> None:
    """Raises SplitError for arrays of different lengths, and for an empty split."""
    if len(set(lengths)) > 1:
        raise SplitError(
            f"valid, inputs, targets and ids have {', '.join(map(str, lengths))} rows: they would not belong together; "
            "give arrays of one length"
        )
    if held_out.all() or not held_out.any():
        raise SplitError(
            f"{held_out.sum()} of {len(held_out)} rows are for validation: a split would be empty; give a share or a "
            "mask that leaves some for both"
        )


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows of a tensor, in its memory format; `rows` are on the CPU, and the host does not wait for the device."""
    if tensor.device.type == "cuda":
        rows = rows.pin_memory().to(tensor.device, non_blocking=True)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)
    return tensor[rows]
