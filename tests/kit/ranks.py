"""How do tests run several ranks? A scenario in 1, 2 and 3 processes (gloo, on the CPU), and each rank's outcome."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from tests.kit.forked import preloaded
from tests.kit.toy import ToyLoader, Watched, learner, loaders
from thawline.trainer.learner import Learner

GLOBAL_BATCH = 7  # local batches of 3 and 4, of 2, 2 and 3
VALID = 13
Outcome = dict[str, Any]


@dataclass
class Here:
    """This process, and the folder that it may write to."""

    rank: int
    size: int
    folder: Path

    @property
    def last(self) -> bool:
        """Whether this is the last rank."""
        return self.rank == self.size - 1

    def data(self, **options: Any) -> tuple[ToyLoader, ToyLoader]:
        """Toy loaders for this rank."""
        options = {"valid": VALID, "global_batch": GLOBAL_BATCH, **options}
        return loaders(rank=self.rank, world_size=self.size, **options)

    def learner(self, name: str, *, stop_at_ask: int = 0, run_dir: Path | None = None, **options: Any) -> Learner:
        """A toy learner for this rank, on a run folder of that name."""
        context = Watched(
            rank=self.rank, world_size=self.size, run_dir=run_dir or self.folder / name, stop_at_ask=stop_at_ask
        )
        return learner(**{"context": context, "data": self.data(), **options})


def exact_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in the logits' own precision."""
    return F.cross_entropy(logits, targets, reduction="none")


def _process(rank: int, folder: str, scenario: Callable[[Here], Outcome], sizes: Sequence[int]) -> None:
    """One process for several world sizes: importing torch takes most of the time."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for size in sizes:
        if rank < size:
            here = Here(rank, size, Path(folder, str(size)))
            here.folder.mkdir(exist_ok=True)
            dist.init_process_group("gloo", init_method=f"file://{here.folder}/store", rank=rank, world_size=size)
            torch.save(scenario(here), here.folder / f"{rank}.pt")
            dist.destroy_process_group()


def processes(call: Callable[..., None], *arguments: Any, number: int) -> None:
    """Run call(rank, *arguments) in `number` processes, forked from one that has done their imports."""
    preloaded()
    start_processes(call, arguments, nprocs=number, start_method="forkserver")  # type: ignore[no-untyped-call]


def worlds_of(
    scenario: Callable[[Here], Outcome], folder: Path, *, sizes: Sequence[int] = (3, 2, 1)
) -> dict[int, list[Outcome]]:
    """The outcome of every rank: world size -> outcomes by rank. sizes: descending; 1 is this process."""
    several = [size for size in sizes if size > 1]
    processes(_process, str(folder), scenario, several, number=several[0])
    outcomes = {1: [scenario(Here(0, 1, folder / "1"))]} if 1 in sizes else {}
    for size in several:
        outcomes[size] = [torch.load(folder / f"{size}/{rank}.pt", weights_only=False) for rank in range(size)]
    return outcomes
