"""How are the ranks' gradients summed? In DDP's buckets, by a hook that a rank in trouble can shadow.

A rank that fails in a step (no batch, no memory) leaves the others waiting in a collective. `Reduction.shadow` joins
what they still reduce, with NaN, so that every rank reaches the end of the step, where they can agree.
"""

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from thawline.dataio.store.private import use_compile_cache
from thawline.trainer.settings import Compile
from thawline.trainer.step import world
from thawline.trainer.step.busy import Busy


@dataclass
class _Sent:
    """What the hook has done in this step. Apart from `Reduction`, whose DDP would otherwise own itself."""

    busy: Busy
    buckets: int = 0

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Sum a bucket over the ranks. The loss is divided by the global batch, so nothing is left to divide here."""
        self.buckets += 1
        if bucket.is_last():
            self.busy.stop()
        return _sum(bucket.buffer())


class Reduction:
    """`model` wrapped for the ranks as its parameters are now: wrap anew after every freeze or unfreeze.

    DDP hooks the parameters that require gradients when it is made; those thawed later would silently drift apart
    between ranks. In one process it is the model itself.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, busy: Busy, compile: Compile = "off") -> None:
        self._sent = _Sent(busy)
        self._ddp = None if world.world_size() == 1 else _wrap(model, device, self._sent)
        self._entered = False
        self._forward: Callable[..., Tensor] = self._ddp or model
        if compile != "off":
            # Outside DDP: dynamo then cuts the graph where buckets end, and they are reduced while backward goes on.
            use_compile_cache()
            self._forward = torch.compile(self._ddp or model, mode=compile)

    def begin(self) -> None:
        """A step begins."""
        self._sent.buckets, self._entered = 0, False
        self._sent.busy.start()

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The model's forward pass."""
        self._entered = True
        return self._forward(*arguments)

    def local(self) -> AbstractContextManager[Any]:
        """A context in which gradients add up on this rank alone: for all micro-batches of a step but the last."""
        return contextlib.nullcontext() if self._ddp is None else self._ddp.no_sync()

    def end(self) -> None:
        """The backward pass is over; in one process, that is when the work is done."""
        if self._ddp is None:
            self._sent.busy.stop()

    def shadow(self) -> None:
        """Contribute NaN to every bucket that the others reduce in this step. Collective with their backward.

        Source: `DistributedDataParallel.join`, which shadows so for ranks that have run out of data.
        """
        if self._ddp is None:
            return
        reducer = self._ddp.reducer
        if not self._entered:
            reducer._rebuild_buckets()  # the others did so on entering their forward pass: once, and it is collective
        works = []
        for bucket in reducer._get_zeros_like_grad_buckets()[self._sent.buckets :]:
            bucket.buffer().fill_(torch.nan)
            works.append(reducer._run_comm_hook(bucket))
        for work in works:
            work.wait()

    def close(self) -> None:
        """Remove the hooks: a wrapper that failed in the middle of a step must not see another."""
        if self._ddp is not None:
            self._ddp.reducer._remove_autograd_hooks()
            self._ddp = None


def _wrap(model: nn.Module, device: torch.device, sent: _Sent) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.15's word for it, forward_sync_buffers, is unknown to 2.11.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        ddp = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # BatchNorm statistics are averaged once a window
            gradient_as_bucket_view=True,
        )
    ddp.register_comm_hook(sent, _Sent.reduce)
    return ddp


def _sum(buffer: Tensor) -> torch.futures.Future[Tensor]:
    if buffer.device.type != "cpu" or world.world_size() == 2:
        future = dist.all_reduce(buffer, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])
    # gloo adds up in an order that depends on where in its bucket a number lies, and DDP lays its buckets out anew
    # after its first step: from three ranks on, a resumed run would differ from the unbroken one in the last bits.
    buffers = [torch.empty_like(buffer) for _ in range(world.world_size())]
    future = dist.all_gather(buffers, buffer, async_op=True).get_future()
    return future.then(lambda _: _add(buffers))


def _add(buffers: list[Tensor]) -> Tensor:
    total = buffers[0]
    for other in buffers[1:]:
        total += other
    return total
