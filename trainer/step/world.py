"""How do ranks agree? The few collectives that training needs outside DDP, each a no-op for one process.

They run on the host (gloo), so a GPU does not wait for them; all but `worst` only at window, epoch and checkpoint
ends, or when a rank has failed. What they send is JSON and the plain bytes of tensors, never pickled objects: a
stranger who joins in a rank's place could otherwise run code on all others.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thawline.trainer.errors import PeerError
from thawline.trainer.step.sentences import KINDS, Kinds, Sentence

T = TypeVar("T")

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank. Collective.

    value: what JSON can hold: numbers (NaN and infinities too), strings, None, lists, dictionaries with strings as
    keys. A tuple comes back as a list, also in a world of one.
    """
    return [value for value, _ in _exchange(value, ())]


def gather_tensors(tensors: Sequence[Tensor], value: Any = None) -> list[tuple[Any, list[Tensor]]]:
    """Every rank's value (see `gather`) and tensors, which may differ in number and shape, on the host. Collective."""
    return _exchange(value, tensors)


def gather_to_first(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Every rank's tensors, on rank 0's host; an empty list elsewhere. Collective."""
    return [sent for _, sent in _exchange(None, tensors, everywhere=False)]


def mean(values: Tensor) -> float:
    """The mean of all ranks' values, (N,) on each. Collective; waits for the device."""
    sent = gather({"sum": float(values.sum(dtype=torch.float64)), "count": len(values)})
    return sum(rank["sum"] for rank in sent) / sum(rank["count"] for rank in sent)


def worst(state: int) -> int:
    """The largest of the ranks' numbers. Collective; a few tenths of a millisecond, in every step."""
    if world_size() == 1:
        return state
    flag = torch.tensor(state)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def together(make: Callable[[], T], kinds: Kinds = KINDS) -> T:
    """Call on every rank; if any rank fails in a way that a user can mend, all raise that. Collective.

    kinds: the types of errors that a user can mend; others pass, on this rank alone.
    """
    failure: Exception | None = None
    try:
        value = make()
    except tuple(kinds.values()) as error:
        failure = error
    if any(gather(failure is not None)):
        raise common_error(failure, kinds)
    return value


def common_error(failure: Exception | None, kinds: Kinds = KINDS) -> Exception:
    """The error that every rank raises once one has failed: that of the first such rank, or PeerError.

    Collective. failure: this rank's error; where it is none of `kinds`, this rank raises it with its traceback.
    """
    own = None if failure is None else Sentence.of(failure, kinds)
    for rank, sent in enumerate(gather(None if own is None else asdict(own))):
        if sent is None:
            continue
        first = Sentence(**sent)
        if failure is not None and own is not None and (own == first or not own.kind):
            return failure
        return first.error(kinds) or PeerError(
            f"rank {rank} failed ({first.text}): no other rank can go on without it; its own traceback says where"
        )
    raise AssertionError("no rank has failed")


def _exchange(value: Any, tensors: Sequence[Tensor], *, everywhere: bool = True) -> list[tuple[Any, list[Tensor]]]:
    """Every rank's JSON and tensors, by rank; not `everywhere`: on rank 0 alone. Two collectives."""
    text = json.dumps([value, [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors]]).encode()
    own = [tensor.detach().cpu() for tensor in tensors]
    if world_size() == 1:
        return [(json.loads(text)[0], own)]
    chunks = [torch.frombuffer(bytearray(text), dtype=torch.uint8)]
    chunks += [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in own]
    size = torch.tensor([len(text), sum(map(len, chunks))])
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(lengths[1]) for lengths in sizes)
    padded = torch.cat([*chunks, torch.zeros(longest - int(size[1]), dtype=torch.uint8)])
    receives = everywhere or dist.get_rank() == 0
    sent = [torch.empty_like(padded) for _ in sizes] if receives else []
    if everywhere:
        dist.all_gather(sent, padded)
    else:
        dist.gather(padded, sent if receives else None)
    return [_read(data, int(lengths[0])) for data, lengths in zip(sent, sizes, strict=False)]


def _read(data: Tensor, text_bytes: int) -> tuple[Any, list[Tensor]]:
    """The value and the tensors in a rank's bytes, (bytes,) uint8, of which the first `text` are JSON."""
    value, kinds = json.loads(data[:text_bytes].numpy().tobytes())
    tensors, start = list[Tensor](), text_bytes
    for name, shape in kinds:
        dtype = _DTYPES[name]
        end = start + torch.Size(shape).numel() * dtype.itemsize
        tensors.append(data[start:end].clone().view(dtype).reshape(shape))  # a copy, for its address must be aligned
        start = end
    return value, tensors


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the ranks. Collective.

    Each rank's statistics follow its own local batches. Running means are linear in what they saw, so averaging them
    now and then gives what averaging at the end would.
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
