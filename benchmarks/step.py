"""How fast is a training step on fixed data? The ceiling of the loop: no loader, no schedule, no records.

One batch of noise lies on the device, channels_last, and goes through `trainer.step.recovery` again and again.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thawline.benchmarks.bodies import BODIES
from thawline.benchmarks.harness import (
    BenchmarkError,
    DeviceName,
    check_positive,
    measure,
    open_device,
    repeat,
    report,
    say,
    torch_threads,
)
from thawline.dataio.batch import Batch, ImageBatch
from thawline.dataio.stream.renderer import default_threads
from thawline.models.classifier import create
from thawline.models.folding import folded, in_two
from thawline.models.groups import freeze_to
from thawline.trainer.losses.named import default_loss
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.settings import Compile, PrecisionName
from thawline.trainer.step.precision import Precision, autocast, choose_precision, place
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.step import StepSettings, eval_step

QUESTION = "how fast is a training step on fixed data, the ceiling of the loop?"
CLASSES = 37
LR = 1e-3  # small enough for hundreds of steps on noise to stay finite
_DEFAULTS = {"cpu": ("resnet18", 64, 64, 4), "cuda": ("resnet50", 256, 224, 20)}


def main(
    *,
    device: DeviceName = "cpu",
    model: str = "",
    batch: int = 0,
    size_px: int = 0,
    steps: int = 0,
    precision: PrecisionName = "auto",
    compile: Compile = "off",  # torch's word
    frozen: bool = False,
    repeats: int = 5,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure forward, backward and update of one batch, and the forward pass alone.

    Args:
        device: Where the model lives.
        model: A torchvision ResNet, convnext_tiny or vit_small; resnet18 for the CPU, resnet50 for a GPU unless given.
        batch: Images a step; 64 for the CPU, 256 for a GPU unless given.
        size_px: Side of the images; 64 for the CPU, 224 for a GPU unless given.
        steps: Steps in a repeat; 4 for the CPU, 20 for a GPU unless given.
        precision: As in a job.
        compile: As in a job; the forward pass alone stays as it is.
        frozen: Also steps that train the head: with BatchNorm, with batch_norm = frozen, and on kept features.
        repeats: Measured repeats.
        out: Also write the JSON here.
    """
    where = open_device(device)
    model, batch, size_px, steps = defaults(device, model, batch, size_px, steps)
    chosen = choose_precision(precision, where)
    make = partial(prepared, model, CLASSES, device=where, size_px=size_px)
    data = noise(batch, size_px, CLASSES, device=where, dtype=chosen.input_dtype)
    calls: dict[str, Callable[[], object]] = {
        "train_step": training(make(), data, precision=chosen, compile=compile),
        "forward": forward(make().eval(), data, precision=chosen),
    }
    if frozen:
        calls |= frozen_steps(make, data, precision=chosen, compile=compile)
    results = {}
    with torch_threads(default_threads(1)):
        for name, call in calls.items():
            say(f"measuring {name} of {model}, batch {batch} at {size_px} px")
            several = partial(repeat, call, steps)
            timing = measure(several, images_per_call=steps * batch, device=where, repeats=repeats)
            results[name] = timing.summary()
    settings: dict[str, Any] = {"device": device, "model": model, "batch": batch, "size_px": size_px, "steps": steps}
    settings |= {"precision": chosen.name, "compile": compile, "frozen": frozen, "optimizer": "adamw"}
    return report("step", QUESTION, settings, results, out=out)


def defaults(device: DeviceName, model: str, batch: int, size_px: int, steps: int) -> tuple[str, int, int, int]:
    """What was given, and the device's own choice for what was not. Raises BenchmarkError for negative ones."""
    usual = _DEFAULTS[device]
    model, batch, size_px, steps = model or usual[0], batch or usual[1], size_px or usual[2], steps or usual[3]
    check_positive(batch=batch, size_px=size_px, steps=steps)
    return model, batch, size_px, steps


def prepared(name: str, classes: int, *, device: torch.device, size_px: int = 224) -> nn.Module:
    """The model as the learner holds it: random weights, on the device, channels_last, training."""
    network: nn.Module
    if name in BODIES:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = BODIES[name](classes, size_px)
    else:
        network = create(name, classes, weights="none", seed=0)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def noise(
    batch: int, size_px: int, classes: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> ImageBatch:
    """A batch as a loader makes it, of normal noise and random targets, on the device."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size_px, size_px, generator=random)
    return ImageBatch(
        inputs=images.to(device, dtype).contiguous(memory_format=torch.channels_last),
        targets=torch.randint(classes, (batch,), generator=random).to(device),
        ids=torch.arange(batch),
    )


def frozen_steps(
    make: Callable[[], nn.Module], data: ImageBatch, *, precision: Precision, compile: Compile
) -> dict[str, Callable[[], object]]:
    """Steps of a frozen phase, by what they spare themselves: on networks that `make` makes."""
    options: dict[str, Any] = {"precision": precision, "compile": compile}
    trains, still, kept = (frozen_to_the_head(make(), norms=norms) for norms in (True, False, False))
    place(kept, precision, data.inputs.device)
    front, head = in_two(folded(kept, -1))
    with torch.no_grad(), autocast(precision, data.inputs.device):
        features = Batch(front(data.inputs), data.targets, data.ids)
    return {
        "frozen, BatchNorm trains": training(trains, data, **options),
        "frozen, batch_norm = frozen": training(still, data, cheap=folded(still, -1), **options),
        "frozen, kept features": training(kept, features, cheap=head, **options),
    }


def frozen_to_the_head(network: nn.Module, *, norms: bool) -> nn.Module:
    """The network as in a frozen phase, in which its BatchNorm trains, or stands still."""
    freeze_to(network, -1, norms=norms)
    for layer in network.modules():
        layer.training = norms or not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return network


def training(
    network: nn.Module,
    data: Batch,
    *,
    precision: Precision,
    compile: Compile = "off",
    cheap: nn.Module | None = None,
) -> Callable[[], object]:
    """A function that takes one training step of everything on `data`, as the learner does.

    cheap: the network's twin, as models.folding makes it. The network is placed for `precision` at once. The function
    raises BenchmarkError when the batch does not fit: split, it would be another measurement.
    """
    stepper = stepping(network, data, precision=precision, compile=compile, cheap=cheap)
    return lambda: stepper.step(lambda: data, seed=0)


def stepping(
    network: nn.Module,
    data: Batch,
    *,
    precision: Precision,
    compile: Compile = "off",
    cheap: nn.Module | None = None,
) -> Stepper:
    """The learner's way of taking a step, at the rate LR, for batches like `data`."""

    def refuse(splits: int) -> None:
        raise BenchmarkError(
            f"a batch of {len(data.ids)} does not fit into {device}'s memory: in {splits} micro-batches it would be "
            "another measurement; give a smaller --batch"
        )

    device = data.targets.device
    settings = StepSettings(
        device=device,
        precision=precision,
        loss=default_loss("single_label"),
        optim_settings=OptimSettings(),
        global_batch=len(data.ids),
        compile=compile,
    )
    stepper = Stepper(place(network, precision, device), settings, network=cheap, splits=1, on_split=refuse)
    optim.set_hyper(stepper.optimizer, [LR] * len(stepper.parameters), 0.9)
    return stepper


def forward(network: nn.Module, data: ImageBatch, *, precision: Precision) -> Callable[[], object]:
    """A function that evaluates `data` once; the network, placed at once, should be in evaluation mode."""
    place(network, precision, data.inputs.device)
    loss = default_loss("single_label")
    return lambda: eval_step(network, data, loss=loss, precision=precision)
