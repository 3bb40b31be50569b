"""What happened since the numbers were last read? A logging window, and the hash of the stream.

During a window each rank only collects: losses stay on the device, ids on the host. Closing it reads the device
once and gathers once; every rank gets the same answer, so that decisions made from it are collective.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trainer import world
from trainer.quarantine import together_by_id


def extend_hash(digest: str, ids: NDArray[np.int64]) -> str:
    """Chain a step's ids, (global_batch,) int64 in stream order, onto the hash of all steps before it.

    SHA-256 of the previous digest's bytes followed by the ids in little-endian; the first digest is "".
    """
    return hashlib.sha256(bytes.fromhex(digest) + ids.astype("<i8").tobytes()).hexdigest()


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
    data_wait_s: float
    """Time a rank stood waiting for a batch, mean over ranks."""
    ids: list[NDArray[np.int64]]
    """One (global_batch,) array a step, in stream order: what arrived, not what was planned."""
    stop: bool
    """Some rank was asked to stop."""
    save_due: bool
    """Rank 0's clock says that a checkpoint is due."""
    lost: dict[int, str]
    """Files that some rank found unusable: id -> file and reason, by id."""


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

    def close(self, *, stop: bool, save_due: bool, lost: Mapping[int, str]) -> Reading:
        """Read the device once, gather once, start over. Collective; the window must not be empty."""
        loss_sum = 0.0 if self.loss_sum is None else float(self.loss_sum)  # the one synchronisation
        ids = torch.stack(self.ids).numpy()
        mine = (ids, loss_sum, time.perf_counter() - self.began, self.data_wait_s, stop, save_due, dict(lost))
        ranks = world.gather(mine)
        together = np.concatenate([rank[0] for rank in ranks], axis=1)
        self.ids, self.loss_sum, self.data_wait_s = [], None, 0.0
        self.began = time.perf_counter()
        return Reading(
            steps=len(together),
            images=together.size,
            loss=sum(rank[1] for rank in ranks) / together.size,
            window_s=max(rank[2] for rank in ranks),
            data_wait_s=sum(rank[3] for rank in ranks) / len(ranks),
            ids=list(together),
            stop=any(rank[4] for rank in ranks),
            save_due=ranks[0][5],
            lost=together_by_id([rank[6] for rank in ranks]),
        )

    def restart_clock(self) -> None:
        """Leave out of the next window what was not training: an evaluation, a checkpoint."""
        self.began = time.perf_counter()
