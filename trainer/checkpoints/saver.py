"""How are checkpoints written while training goes on? From a copy in host memory, by one background thread.

The keeper decides when to save, and whether to wait for a write under way. A storage that refuses shows in
`Written.error`; the next save tries again.
"""

import copy
import functools
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.checkpoints.format import NO_ORIGIN, Origin, Parts
from thawline.trainer.errors import CheckpointError

_PLAIN = (int, float, str, bool, bytes, type(None))


@dataclass(frozen=True)
class Written:
    """A save that has ended. seconds: duration of the write, in the background. error: why nothing was written."""

    step: int
    seconds: float
    error: str | None


@dataclass(frozen=True)
class Appended:
    """A list whose items never change, so that a shallow copy is enough."""

    items: list[Any]


class Snapshot:
    """A copy of a checkpoint's parts in host memory, which nobody else changes."""

    def __init__(self, parts: Parts, events: list[torch.cuda.Event]) -> None:
        self._parts, self._events = parts, events

    @property
    def parts(self) -> Parts:
        """The copies; waits until they have arrived."""
        for event in self._events:
            event.synchronize()
        return self._parts


def snapshot(parts: Parts) -> Snapshot:
    """Copy tensors, lists and dictionaries as they are now; `Appended` is copied shallowly.

    Tensors on a GPU are copied in its stream, without waiting: what is queued there afterwards may change them.
    """
    devices = set[torch.device]()
    copied = {name: _copied(part, devices) for name, part in parts.items()}
    events = []
    for device in devices:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return Snapshot(copied, events)


def _copied(value: Any, devices: set[torch.device]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        source = value.detach()
        if source.device.type != "cuda":
            return source.clone()
        devices.add(source.device)
        return torch.empty_like(source, device="cpu", pin_memory=True).copy_(source, non_blocking=True)
    if isinstance(value, Appended):
        return list(value.items)
    if isinstance(value, dict):
        same = copy.copy(value)  # a state_dict keeps its versions in an attribute
        for key, item in value.items():
            same[key] = _copied(item, devices)
        return same
    if isinstance(value, list | tuple):
        items = [_copied(item, devices) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return copy.deepcopy(value)


class Saver:
    """Writes the checkpoints of one run, one at a time; on one rank only. Arguments as checkpoint.save's."""

    def __init__(
        self, root: str | Path | Root, *, keep: int, best: Best | None = None, origin: Origin = NO_ORIGIN
    ) -> None:
        self._save = functools.partial(checkpoint.save, Root.of(root), keep=keep, best=best, origin=origin)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: list[Future[Written]] = []
        self._refused: tuple[int, Snapshot, Mapping[str, float]] | None = None

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return not all(write.done() for write in self._writes)

    def save(self, step: int, parts: Parts, *, metrics: Mapping[str, float] | None = None) -> None:
        """Copy the parts and write them in the background. Waits for a write under way."""
        self.wait()
        self._refused = None
        self._writes.append(self._pool.submit(self._write, step, snapshot(parts), dict(metrics or {})))

    def again(self) -> None:
        """Repeat the write that the storage refused last, unchanged; does nothing if it refused none."""
        self.wait()
        if self._refused is not None:
            self._writes.append(self._pool.submit(self._write, *self._refused))

    def _write(self, step: int, copied: Snapshot, metrics: Mapping[str, float]) -> Written:
        began, error = time.monotonic(), None
        try:
            self._save(step, copied.parts, metrics=metrics)
            self._refused = None
        except CheckpointError as refused:
            error, self._refused = str(refused), (step, copied, metrics)
        return Written(step, time.monotonic() - began, error)

    def finished(self) -> list[Written]:
        """The writes that have ended, well or not, since the last call. Raises what is not the storage's fault."""
        done = [write for write in self._writes if write.done()]
        self._writes = [write for write in self._writes if write not in done]
        return [write.result() for write in done]

    def wait(self) -> None:
        """Until no write is under way."""
        wait(self._writes)

    def close(self) -> None:
        """Wait for a write under way, and end the thread. `finished` can still be called."""
        self._pool.shutdown()
