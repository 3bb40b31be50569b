"""What must a training process know of the world around it? `RunContext`, and the one for a single process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

from thawline.trainer.records.rows import Recorded, Row


class RunContext(Protocol):
    """Who this process is. Plain values, so that nothing below needs to know who launched it."""

    @property
    def rank(self) -> int:
        """0 .. world_size - 1; rank 0 writes."""

    @property
    def world_size(self) -> int:
        """Processes that train together."""

    @property
    def local_rank(self) -> int:
        """This process among those of its machine."""

    @property
    def device(self) -> "torch.device":
        """Where the model lives: "cpu", or "cuda" with its index."""

    @property
    def restarts(self) -> int:
        """How often this run's processes have been started again, by whoever watches over them."""

    @property
    def run_dir(self) -> str | Path:
        """The run's folder, or its URI (see dataio.store.root); the same storage for every rank."""

    def should_stop(self) -> bool:
        """Has somebody asked this process to end early? Cheap: asked once a window, and once a batch in an evaluation
        between two epochs; decided by all ranks."""

    def taken_at(self) -> float | None:
        """When this run's machines, or some of them, will be taken away (unix seconds); None where nobody said so.

        Cheap: asked once a window; the earliest that any rank has heard of counts.
        """

    def publish(self, rows: Sequence[Row]) -> None:
        """Show rows to whoever watches. Called by rank 0; must neither block nor fail."""


class Sink(Protocol):
    """Where rows go besides the recorder: a Prometheus endpoint, a console."""

    def step(self, *, images: int, step_s: float, data_wait_s: float) -> None:
        """After every step on every rank. Must take microseconds."""

    def busy(self, *, busy_s: float) -> None:
        """After every window on every rank: how long this one was at work before it waited for the others."""

    def observe(self, row: Recorded) -> None:
        """After every recorded row, on every rank."""


def _cpu() -> "torch.device":
    import torch  # seconds, for which whoever only reads rows need not wait

    return torch.device("cpu")


@dataclass
class LocalContext:
    """One process by itself: a notebook, or `thawline train` in process."""

    run_dir: str | Path = "runs/notebook"
    device: "torch.device" = field(default_factory=_cpu)
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    stop_requested: bool = False
    restarts: int = 0

    def request_stop(self) -> None:
        """Ask for an end at the next window (from a signal handler, say)."""
        self.stop_requested = True

    def should_stop(self) -> bool:
        """Has `request_stop` been called?"""
        return self.stop_requested

    def taken_at(self) -> float | None:
        """Never known here: whoever ends a process on this machine sends it a signal."""
        return None

    def publish(self, rows: Sequence[Row]) -> None:
        """Nobody watches."""
