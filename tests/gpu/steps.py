"""What do tests of the training step on a GPU share? Steppers, batches, and a host that may not wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thawline.dataio.batch import ImageBatch
from thawline.models import create
from thawline.trainer.losses.named import default_loss
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.settings import PrecisionName
from thawline.trainer.step.ema import Ema
from thawline.trainer.step.precision import choose_precision, place
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.step import StepSettings

CUDA = torch.device("cuda", 0)
SINGLE = default_loss("single_label")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Plain(nn.Module):
    """A small model without BatchNorm or dropout, so that two halves of a batch make the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def groups(self) -> list[list[nn.Module]]:
        return [[self.body], [self.head]]


def plain() -> Plain:
    torch.manual_seed(3)
    return Plain()


def resnet(*, dropout: float = 0.5) -> nn.Module:
    return create("resnet18", 10, dropout=dropout, weights="none", seed=0)


def how(precision: PrecisionName, **options: Any) -> StepSettings:
    defaults = {"loss": SINGLE, "optim_settings": OptimSettings(), "global_batch": 16}
    return StepSettings(device=CUDA, precision=choose_precision(precision, CUDA), **{**defaults, **options})


def make_stepper(
    precision: PrecisionName, *, model: nn.Module | None = None, splits: int = 1, ema: float = 0.0, **options: Any
) -> Stepper:
    """A stepper over a ResNet-18 on the GPU, in training mode; options as StepSettings has them."""
    settings = how(precision, **options)
    model = place(resnet() if model is None else model, settings.precision, CUDA).train()
    average = Ema(model, ema) if ema else None
    stepper = Stepper(model, settings, splits=splits, on_split=lambda splits: None, ema=average)
    optim.set_hyper(stepper.optimizer, [1e-3] * 3, 0.9)
    return stepper


def random_batch(precision: PrecisionName, count: int = 16, *, side_px: int = 64) -> ImageBatch:
    dtype = choose_precision(precision, CUDA).input_dtype
    draw = torch.Generator().manual_seed(1)
    images = torch.randn((count, 3, side_px, side_px), generator=draw)
    images = images.to(CUDA, dtype, memory_format=torch.channels_last)
    return ImageBatch(images, torch.arange(count, device=CUDA) % 10, torch.arange(count))


def taking(stepper: Stepper, batch: ImageBatch, *, seed: int = 7) -> Tensor:
    """The losses of a step."""
    return stepper.step(lambda: batch, seed=seed).losses


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
