"""How is a step taken, whatever goes wrong on whichever rank? Together, or not at all.

A rank that cannot do its part (no memory, no batch, an error in a loss) answers the others' reduction with NaN, so
that all of them come to the end of the step, and there they ask one another: one number, on the host, while a GPU
goes on with what it has been given. Out of memory, all split their parts and take the step again. Anything else ends
the run, on every rank, in the words of the rank that failed.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from thawline.dataio.batch import Batch
from thawline.models import groups
from thawline.trainer import optim
from thawline.trainer.ema import Ema
from thawline.trainer.errors import MemoryLimitError
from thawline.trainer.step import world
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.guard import FP16_IN_A_ROW, Guard
from thawline.trainer.step.reduction import Compile, Reduction
from thawline.trainer.step.step import LossFunction, Precision, backward, update

_WELL, _NO_MEMORY, _FAILED = range(3)


@dataclass(frozen=True)
class How:
    """What stays the same from step to step of a run."""

    device: torch.device
    precision: Precision
    loss: LossFunction
    recipe: optim.Recipe
    global_batch: int
    clip: float | None = None
    compile: Compile = "off"
    window: int = 10
    """Steps between two reads of the guard."""


@dataclass(frozen=True)
class Taken:
    """What one step gave on this rank."""

    batch: Batch
    losses: Tensor
    waited_s: float
    step_s: float


class Stepper:
    """Takes steps with what is trainable in `model` as this is made: one optimiser, one wrapping for the ranks.

    `splits`: micro-batches a step, doubled when some rank runs out of memory; `on_split` is then told, on every rank.
    """

    def __init__(
        self, model: nn.Module, how: How, *, splits: int, on_split: Callable[[int], None], ema: Ema | None = None
    ) -> None:
        self._model, self._how, self._ema = model, how, ema
        self.splits, self._on_split = splits, on_split
        self.parameters = groups.parameter_groups(model)
        # A fresh optimiser: what is frozen has changed, and moments of other gradients would mislead it.
        self.optimizer = optim.build(self.parameters, how.recipe, device=how.device)
        self.scaler = torch.amp.GradScaler(how.device.type, enabled=how.precision.scaled)
        tolerated = FP16_IN_A_ROW if how.precision.scaled else 0
        self.guard = Guard(model, how.device, tolerated=tolerated, window=how.window)
        self.busy = Busy(how.device)
        self._reduction = self._wrap()

    def take(self, fetch: Callable[[], Batch], *, seed: int) -> Taken:
        """Fetch a batch and take a step on it. Collective.

        seed: of dropout, which so is a function of (seed, step, rank), and a resumed run needs no random state.
        Raises on every rank what any of them met; MemoryLimitError where a single pair of samples is too much.
        """
        self.guard.keep()
        began, waited, batch = perf_counter(), 0.0, None
        while True:
            self._reduction.begin()
            self.optimizer.zero_grad()
            state, failure, losses = _WELL, None, None
            try:
                if batch is None:
                    batch = fetch()
                    waited = perf_counter() - began
                torch.manual_seed(seed)
                losses = self._backward(batch)
            except Exception as error:
                if _is_memory(error):  # not kept: its traceback holds the tensors that there is no room for
                    state = _NO_MEMORY
                else:
                    state, failure = _FAILED, error
            if state != _WELL:
                self._reduction.answer()
            worst = world.worst(state)
            if worst == _WELL:
                break
            losses = None
            if worst == _FAILED:
                raise world.told(failure)
            self._split(0 if batch is None else len(batch.ids))
        assert batch is not None
        assert losses is not None
        update(self.optimizer, scaler=self.scaler, guard=self.guard, clip=self._how.clip)
        if self._ema is not None:
            self._ema.update()
        return Taken(batch, losses, waited, perf_counter() - began - waited)

    def close(self) -> None:
        """Let go of the model."""
        self._reduction.close()

    def _backward(self, batch: Batch) -> Tensor:
        how = self._how
        return backward(
            self._reduction,
            batch,
            loss=how.loss,
            scaler=self.scaler,
            precision=how.precision,
            global_batch=how.global_batch,
            micro_batches=self.splits,
        )

    def _wrap(self) -> Reduction:
        return Reduction(self._model, self._how.device, busy=self.busy, compile=self._how.compile)

    def _split(self, part: int) -> None:
        """Twice as many micro-batches on every rank, and back to the step's begin."""
        smallest = min(world.gather(part))
        if smallest < 4 * self.splits:  # BatchNorm cannot train on one image
            raise MemoryLimitError(
                f"out of memory with {self.splits} micro-batches of a part of {smallest} images: splitting further "
                "would leave pieces of one; give a smaller data.size_px or model, a lower precision, or more workers"
            )
        self.splits *= 2
        self._reduction.close()
        self.optimizer.zero_grad()
        self.guard.again()
        self._on_split(self.splits)
        gc.collect()  # the failed step's graph, which its error held
        if self._how.device.type == "cuda":
            torch.cuda.empty_cache()
        self._reduction = self._wrap()


def _is_memory(error: Exception) -> bool:
    """torch has a type for what its own allocator refuses, and only words for the libraries' workspaces."""
    words = (
        *("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "Unable to find a valid cuDNN algorithm"),
        "DefaultCPUAllocator: can't allocate memory",
    )
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, torch.OutOfMemoryError) or told
