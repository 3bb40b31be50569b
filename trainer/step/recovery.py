"""What if a step fails on some rank? All ranks take the step, or none does.

A rank that cannot compute its gradients (no memory, no batch, an error in a loss) contributes NaN to the others'
reduction, so that all of them reach the end of the step, where they compare one number each, on the host, while a GPU
works on. When one is out of memory, all split their local batches and repeat the step. Any other failure ends the run,
on every rank, with the error of the rank that failed.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from thawline.dataio.batch import Batch
from thawline.models import groups
from thawline.trainer.errors import MemoryLimitError
from thawline.trainer.optimisers import optim
from thawline.trainer.step import world
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.ema import Ema
from thawline.trainer.step.guard import FP16_IN_A_ROW, Guard
from thawline.trainer.step.reduction import Reduction
from thawline.trainer.step.step import StepSettings, train_step

_WELL, _NO_MEMORY, _FAILED = range(3)


@dataclass(frozen=True)
class StepResult:
    """What one step yielded on this rank."""

    batch: Batch
    losses: Tensor
    """(N,) on the device, computed before the update."""
    data_wait_s: float
    step_s: float
    """Without the wait for data."""


class _ElsewhereError(Exception):
    """This rank computed its gradients, and another could not."""

    def __init__(self, state: int) -> None:
        super().__init__(state)
        self.state = state


class _Once:
    """Fetches a batch, and returns the same one when the step is repeated."""

    def __init__(self, fetch: Callable[[], Batch]) -> None:
        self._fetch = fetch
        self.batch: Batch | None = None
        self.waited_s = 0.0

    def __call__(self) -> Batch:
        if self.batch is None:
            began = perf_counter()
            self.batch = self._fetch()
            self.waited_s = perf_counter() - began
        return self.batch


class Stepper:
    """Takes steps with the parameters that are trainable when it is made: one optimiser, one DDP wrapper.

    network: what runs in place of the model, with the model's own trainable layers (see models.folding).
    splits: micro-batches a step, doubled when some rank runs out of memory; on_split is then called, on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings,
        *,
        network: nn.Module | None = None,
        splits: int,
        on_split: Callable[[int], None],
        ema: Ema | None = None,
    ) -> None:
        self._network, self._settings, self._ema = network or model, settings, ema
        self.splits, self._on_split = splits, on_split
        self.parameters = groups.parameter_groups(model)
        # A fresh optimiser: what is frozen has changed, and moments of other gradients would mislead it.
        self.optimizer = optim.build(self.parameters, settings.optim_settings, device=settings.device)
        self.scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.precision.scaled)
        tolerated = FP16_IN_A_ROW if settings.precision.scaled else 0
        self.guard = Guard(model, settings.device, tolerated=tolerated, window=settings.window)
        self.busy = Busy(settings.device)
        self._reduction = self._wrap()
        self._is_through = False

    def step(self, fetch: Callable[[], Batch], *, seed: int) -> StepResult:
        """`train_step` on the batch that `fetch` returns, on every rank; smaller micro-batches if memory runs out.

        Collective. Raises on every rank the error of any of them; MemoryLimitError where two samples are too many.
        """
        self.guard.keep()
        began, once = perf_counter(), _Once(fetch)
        while True:
            self._is_through, worst, state, failure = False, None, _FAILED, None
            try:
                losses = train_step(
                    once,
                    settings=self._settings,
                    reduction=self._reduction,
                    optimizer=self.optimizer,
                    scaler=self.scaler,
                    guard=self.guard,
                    seed=seed,
                    micro_batches=self.splits,
                    ema=self._ema,
                    agree=self._agree,
                )
                assert once.batch is not None
                step_s = perf_counter() - began - once.waited_s
                return StepResult(once.batch, losses, data_wait_s=once.waited_s, step_s=step_s)
            except _ElsewhereError as elsewhere:
                worst = elsewhere.state
            except Exception as error:
                if self._is_through:  # in the agreement, or in the update that the others make: no way back
                    raise
                if is_memory(error):  # not kept: its traceback holds the tensors that there is no room for
                    state = _NO_MEMORY
                else:
                    failure = error
            if worst is None:
                self._reduction.shadow()
                worst = world.worst(state)
            if worst == _FAILED:
                raise world.common_error(failure)
            self._split(0 if once.batch is None else len(once.batch.ids))

    def _agree(self) -> None:
        """All ranks have finished their backward pass, or none goes on. Raises _ElsewhereError. Collective."""
        self._is_through = True
        worst = world.worst(_WELL)
        if worst != _WELL:
            raise _ElsewhereError(worst)

    def close(self) -> None:
        """Release the model."""
        self._reduction.close()

    def _wrap(self) -> Reduction:
        return Reduction(self._network, self._settings.device, busy=self.busy, compile=self._settings.compile)

    def _split(self, local_batch: int) -> None:
        """Use twice as many micro-batches on every rank, and go back to the beginning of the step."""
        smallest = min(world.gather(local_batch))
        if smallest < 4 * self.splits:  # BatchNorm cannot train on one image
            raise MemoryLimitError(
                f"out of memory with a local batch of {smallest} images in {self.splits} micro-batches: more of "
                "them would hold one image each; give a smaller data.size_px or model, lower precision or more workers"
            )
        self.splits *= 2
        self._reduction.close()
        self.optimizer.zero_grad()
        self.guard.again()
        self._on_split(self.splits)
        gc.collect()  # the failed step's graph, which its error held
        if self._settings.device.type == "cuda":
            torch.cuda.empty_cache()
        self._reduction = self._wrap()


def is_memory(error: Exception) -> bool:
    """torch has an error type for its own allocator; failures of the libraries' workspaces show in the message only."""
    words = (
        *("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "Unable to find a valid cuDNN algorithm"),
        "DefaultCPUAllocator: can't allocate memory",
    )
    by_message = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, torch.OutOfMemoryError) or by_message
