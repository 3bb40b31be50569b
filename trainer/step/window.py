"""What happened since the numbers were last read? A logging window, and the hash of the stream.

During a window each rank only collects: losses stay on the device, ids on the host. Closing it reads the device
once and gathers once; every rank gets the same numbers, so that decisions made from them are collective.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from thawline.trainer.checkpoints.saver import Written
from thawline.trainer.quarantine import merge_by_id
from thawline.trainer.records.rows import WindowNumbers
from thawline.trainer.step import world
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.guard import Guard, GuardReading


def extend_hash(digest: str, ids: NDArray[np.int64]) -> str:
    """Chain a step's ids, (global_batch,) int64 in stream order, onto the hash of all steps before it.

    SHA-256 of the previous digest's bytes followed by the ids in little-endian; the first digest is "".
    """
    return hashlib.sha256(bytes.fromhex(digest) + ids.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class _RankWindow:
    """What a rank sends the others about its window; all of it can be written as JSON."""

    loss_sum: float
    window_s: float
    data_wait_s: float
    busy_s: float
    stop: bool
    taken_at: float | None
    unusable: list[tuple[int, str]]
    """Pairs, since JSON has no integer keys."""
    written: list[dict[str, Any]]


@dataclass(frozen=True)
class Reading:
    """A closed window: the same on every rank."""

    steps: int
    images: int
    """Over all ranks."""
    loss: float
    """Mean over the window's samples."""
    window_s: float
    """Wall time of the slowest rank."""
    busy_s: list[float]
    """Seconds that each rank worked before it waited for the others (see busy)."""
    data_wait_s: float
    """Seconds that a rank waited for batches, mean over ranks."""
    ids: list[NDArray[np.int64]]
    """One (global_batch,) array a step, in stream order: as they arrived, not as they were planned."""
    stop: bool
    """Some rank was asked to stop."""
    taken_at: float | None
    """When the first of the ranks' machines will be taken away, unix seconds."""
    unusable: dict[int, str]
    """Files that some rank could not use: id -> file and reason, by id."""
    written: list[Written]
    """The checkpoints written since, and those that could not be; known to rank 0."""
    guard: GuardReading
    """The guard's reading on this rank; alike on all, since they see the same summed gradients."""

    def numbers(self) -> WindowNumbers:
        """What the recorder writes of it."""
        return {
            "loss": self.loss,
            "grad_norm": self.guard.grad_norm,
            "skipped": self.guard.skipped,
            "images": self.images,
            "window_s": self.window_s,
            "images_per_s": self.images / self.window_s,
            "data_wait_s": self.data_wait_s,
            "data_wait_fraction": min(1.0, self.data_wait_s / self.window_s),
            "busy_s": sum(self.busy_s) / len(self.busy_s),
            "busy_max_s": max(self.busy_s),
            "straggler": self.busy_s.index(max(self.busy_s)),
        }


@dataclass
class Window:
    """This rank's collection since the last close."""

    began: float = field(default_factory=time.perf_counter)
    ids: list[torch.Tensor] = field(default_factory=list)
    loss_sum: torch.Tensor | None = None
    data_wait_s: float = 0.0

    def add(self, *, ids: torch.Tensor, losses: torch.Tensor, data_wait_s: float) -> None:
        """One step. Nothing here waits for the device."""
        total = losses.sum(dtype=torch.float64 if losses.device.type == "cpu" else torch.float32)
        self.loss_sum = total if self.loss_sum is None else self.loss_sum + total
        self.ids.append(ids)
        self.data_wait_s += data_wait_s

    def __len__(self) -> int:
        return len(self.ids)

    def close(
        self,
        *,
        guard: Guard,
        busy: Busy,
        stop: bool,
        taken_at: float | None = None,
        unusable: Mapping[int, str] | None = None,
        written: Sequence[Written] = (),
    ) -> Reading:
        """Read the device, gather once, start over. Collective; the window must not be empty."""
        loss_sum = 0.0 if self.loss_sum is None else float(self.loss_sum)  # waits for the device; what follows does not
        guard_reading, busy_s = guard.read(), busy.read()
        own = _RankWindow(
            loss_sum=loss_sum,
            window_s=time.perf_counter() - self.began,
            data_wait_s=self.data_wait_s,
            busy_s=busy_s,
            stop=stop,
            taken_at=taken_at,
            unusable=[*(unusable or {}).items()],
            written=[asdict(each) for each in written],
        )
        sent = world.gather_tensors([torch.stack(self.ids)], asdict(own))
        together = torch.cat([ids for _, (ids,) in sent], 1).numpy()
        ranks = [_RankWindow(**window) for window, _ in sent]
        self.ids, self.loss_sum, self.data_wait_s = [], None, 0.0
        self.began = time.perf_counter()
        return Reading(
            steps=len(together),
            images=together.size,
            loss=sum(rank.loss_sum for rank in ranks) / together.size,
            window_s=max(rank.window_s for rank in ranks),
            data_wait_s=sum(rank.data_wait_s for rank in ranks) / len(ranks),
            ids=list(together),
            stop=any(rank.stop for rank in ranks),
            unusable=merge_by_id([dict(rank.unusable) for rank in ranks]),
            busy_s=[rank.busy_s for rank in ranks],
            written=[Written(**each) for each in ranks[0].written],
            taken_at=min((rank.taken_at for rank in ranks if rank.taken_at is not None), default=None),
            guard=guard_reading,
        )

    def restart_clock(self) -> None:
        """Exclude from the next window what was not training: an evaluation, a checkpoint."""
        self.began = time.perf_counter()
