"""What happens in one training step? All of it: the only autocast, loss scaling and DDP details are here.

No line in `train_step` makes the host wait for the device: nothing is read back, nothing is synchronised.
Losses come back as device tensors; the learner reads their sum once a logging window.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataio.batch import Batch
from trainer import world
from trainer.errors import RecipeError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Precision:
    """How numbers are represented while the model runs. Weights and optimiser state are float32 throughout."""

    name: str
    autocast: torch.dtype | None
    scaled: bool
    """fp16's exponent is too short for gradients, so its loss is scaled; bf16's is float32's."""

    @property
    def input_dtype(self) -> torch.dtype:
        """What loaders should write: half the bytes where the first layer would round anyway."""
        return torch.float32 if self.autocast is None else torch.float16


def choose_precision(name: PrecisionName, device: torch.device) -> Precision:
    """auto: float32 on a CPU; on a GPU bfloat16 where it has it, else float16. Raises RecipeError."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise RecipeError("precision='fp16' on a CPU: its gradients cannot be scaled there; give fp32 or bf16")
    known = {
        "fp32": Precision("fp32", None, False),
        "bf16": Precision("bf16", torch.bfloat16, False),
        "fp16": Precision("fp16", torch.float16, True),
    }
    if name not in known:
        raise RecipeError(f"precision={name!r} is not known: give auto, {', '.join(known)}")
    return known[name]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The mixed-precision region of a forward pass."""
    return torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None)


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap for gradient averaging over the ranks; the model itself when there is one rank.

    DDP hooks the parameters that require gradients *now*: wrap anew after every freeze or unfreeze, or the
    newly thawed ones drift apart between ranks without a word.
    """
    if world.world_size() == 1:
        return model
    with warnings.catch_warnings():
        # torch 2.15's word for it, forward_sync_buffers, is unknown to 2.11.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # BatchNorm statistics are averaged where they are used: before evaluation
            gradient_as_bucket_view=True,
            static_graph=True,
        )


def train_step(
    model: nn.Module,
    batch: Batch,
    *,
    loss: LossFunction,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    share: float,
) -> Tensor:
    """One step: forward, loss, backward (DDP averages gradients meanwhile), update.

    share: global_batch / world_size. Dividing this rank's summed loss by it, and not by the rank's own count,
    makes DDP's mean over ranks the mean over the global batch even where parts differ by a sample.
    Returns the samples' losses, (N,) float32 on the device.
    """
    with autocast(precision, batch.images.device):
        logits = model(batch.images)
    losses = loss(logits, batch.targets)
    optimizer.zero_grad()
    scaler.scale(losses.sum() / share).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    return losses.detach()


@torch.inference_mode()
def eval_step(model: nn.Module, batch: Batch, *, loss: LossFunction, precision: Precision) -> tuple[Tensor, Tensor]:
    """Forward only, through the bare model, so that ranks may hold uneven parts.

    Returns (logits (N, C), losses (N,)), float32 on the device.
    """
    with autocast(precision, batch.images.device):
        logits = model(batch.images)
    return logits.float(), loss(logits, batch.targets)
