"""What happens in one training step? `train_step`: fetch, forward, loss, backward, update, on one page.

No line of it makes the host wait for the device: nothing is read back, nothing is synchronised, unless the optimiser
has no fused kernels (see `update`). Losses stay on the device; their sum is read once a logging window (see window).
What happens when a rank fails, see recovery.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thawline.dataio.batch import Batch
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.settings import Compile
from thawline.trainer.step.ema import Ema
from thawline.trainer.step.guard import Guard
from thawline.trainer.step.precision import Precision, autocast, cast_inputs
from thawline.trainer.step.reduction import Reduction

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from step to step of a run."""

    device: torch.device
    precision: Precision
    loss: LossFunction
    optim_settings: OptimSettings
    global_batch: int
    clip: float | None = None
    """The largest norm of a step's gradients."""
    compile: Compile = "off"
    window: int = 10
    """Steps between two reads of the device."""


def train_step(
    fetch: Callable[[], Batch],
    *,
    settings: StepSettings,
    reduction: Reduction,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: Guard,
    seed: int = 0,
    micro_batches: int = 1,
    ema: Ema | None = None,
    agree: Callable[[], None] = lambda: None,
) -> Tensor:
    """One step on this rank's local batch: fetch, forward, loss, backward, update. Collective.

    Each rank divides its summed loss by the global batch, and not by its own count, so that the sum over ranks and
    micro-batches is the mean over the global batch, even where local batches differ by a sample.
    seed: of dropout. micro_batches: into how many the local batch is split, which go through the model one after the
    other, to need less memory. The gradients are those of the whole, unless a layer looks across samples: BatchNorm
    sees one micro-batch at a time. agree: called between backward and update, where all ranks go on or none does (see
    recovery).
    Returns the samples' losses, (N,) float32 on the device.
    """
    reduction.begin()
    optimizer.zero_grad()
    batch = fetch()
    torch.manual_seed(seed)
    losses = []
    for number, micro_batch in enumerate(batch.split(micro_batches), start=1):
        with contextlib.nullcontext() if number == micro_batches else reduction.local():
            with autocast(settings.precision, settings.device):
                outputs = reduction(*cast_inputs(micro_batch.arguments, settings.precision))
            sample_losses = settings.loss(outputs, micro_batch.targets)
            total = sample_losses.sum() / settings.global_batch
            # A loss can be infinite while its gradients are not: times NaN, every rank sees it in their sum.
            total = total * torch.where(total.detach().isfinite(), 1.0, torch.nan)
            scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        losses.append(sample_losses.detach())
    reduction.end()
    agree()
    update(optimizer, scaler=scaler, guard=guard, clip=settings.clip)
    if ema is not None:
        ema.update()
    return torch.cat(losses)


def update(
    optimizer: torch.optim.Optimizer, *, scaler: torch.amp.GradScaler, guard: Guard, clip: float | None = None
) -> None:
    """Turn the gradients into a step, unless they are not finite: then the optimiser skips it (see guard).

    clip: the largest norm that the gradients may have together. For an optimiser that cannot skip a step by itself (see
    optim.skips) the host reads the flag before each: that waits for a GPU, and costs nothing on a CPU.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    skip = guard.see(norm)
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    if optim.skips(optimizer):
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # what GradScaler.step would set
        optimizer.step()
    elif not bool(skip):
        optimizer.step()
    scaler.update()


@torch.inference_mode()
def eval_step(model: nn.Module, batch: Batch, *, loss: LossFunction, precision: Precision) -> tuple[Tensor, Tensor]:
    """Forward only, through the bare model, so that ranks may hold batches of different sizes.

    Returns (logits (N, C), losses (N,)), float32 on the device.
    """
    logits = forward(model, batch.arguments, precision=precision, device=batch.targets.device)
    return logits.float(), loss(logits, batch.targets)


@torch.inference_mode()
def forward(model: nn.Module, arguments: tuple[Tensor, ...], *, precision: Precision, device: torch.device) -> Tensor:
    """The outputs of a model in evaluation mode, as validation computes them, in whatever type they come."""
    with autocast(precision, device):
        outputs: Tensor = model(*cast_inputs(arguments, precision))
    return outputs
