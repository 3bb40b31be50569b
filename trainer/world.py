"""How do ranks agree? The few collectives that training needs outside DDP, each a no-op for one process.

They run on the host (gloo), so a GPU does not wait for them; all but `worst` only at window, epoch and checkpoint
ends, or when a rank has failed.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dataio.errors import DataError
from models.errors import ModelError
from trainer.errors import PeerError, TrainError

T = TypeVar("T")


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Every rank's picklable value, by rank, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # torch fills every place


def worst(state: int) -> int:
    """The largest of the ranks' numbers. Collective; a few tenths of a millisecond, in every step."""
    if world_size() == 1:
        return state
    flag = torch.tensor(state)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def told(failure: Exception | None) -> Exception:
    """The error that every rank raises once one has failed: the first such rank's, as itself where all can read it.

    Collective. failure: what this rank met; where it is no sentence of ours, it keeps its traceback, on this rank.
    """
    readable = isinstance(failure, DataError | ModelError | TrainError)
    mine = failure if readable or failure is None else f"{type(failure).__name__}: {failure}"
    for rank, words in enumerate(gather(mine)):
        if words is None:
            continue
        if failure is not None and not readable:
            return failure
        if isinstance(words, Exception):
            return words
        return PeerError(
            f"rank {rank} failed ({words}): no other rank can go on without it; its own traceback says where"
        )
    raise AssertionError("no rank has failed")


def gather_to_first(value: T) -> list[T]:
    """Every rank's picklable value on rank 0; an empty list elsewhere. Collective."""
    if world_size() == 1:
        return [value]
    first = dist.get_rank() == 0
    values: list[T | None] | None = [None] * world_size() if first else None
    dist.gather_object(value, values)
    return values or []  # type: ignore[return-value]


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the ranks. Collective.

    Each rank's statistics follow its own part of the batches. Running means are linear in what they saw, so
    averaging them now and then gives what averaging at the end would.
    """
    if world_size() == 1:
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.detach().flatten().float() for b in buffers])
    dist.all_reduce(flat)
    flat /= world_size()
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
