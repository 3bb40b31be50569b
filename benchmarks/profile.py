"""Where does a step's time go? torch's profiler over a few steps of real training, from JPEG to update.

On a GPU its kernels are listed, on a CPU the operators; what the profiler itself costs is in the figures, so the shares
tell more than the times. `waited` is what the step waited for data.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from thawline.benchmarks.harness import DeviceName, check_positive, open_device, report, say, synchronise, torch_threads
from thawline.benchmarks.step import defaults, prepared, stepping
from thawline.benchmarks.train import CLASSES, DataName, make_loader
from thawline.dataio.batch import Batch
from thawline.dataio.stream.renderer import default_threads
from thawline.trainer.settings import Compile, PrecisionName
from thawline.trainer.step.precision import choose_precision
from thawline.trainer.step.recovery import Stepper

QUESTION = "where does a step's time go?"
WARMUP = 3
_NAME = 70  # characters of a kernel's name


def main(
    *,
    device: DeviceName = "cpu",
    data: DataName = "digits",
    photos: int = 512,
    model: str = "",
    batch: int = 0,
    size_px: int = 0,
    steps: int = 0,
    precision: PrecisionName = "auto",
    compile: Compile = "off",  # torch's word
    top: int = 25,
    out: Path | None = None,
) -> dict[str, Any]:
    """List what takes longest, in milliseconds a step.

    Args:
        device: Where to train.
        data: As in `train`; photos too.
        photos: How many different photos to make.
        model: As in `step`; batch, size_px and steps too.
        batch: Images a step.
        size_px: Side of the images that the model sees.
        steps: Steps that are profiled.
        precision: As in a job.
        compile: As in a job.
        top: How many kernels or operators are listed.
        out: Also write the JSON here.
    """
    where = open_device(device)
    model, batch, size_px, steps = defaults(device, model, batch, size_px, steps)
    check_positive(photos=photos, top=top)
    chosen = choose_precision(precision, where)
    settings = {"device": device, "data": data, "model": model, "batch": batch, "size_px": size_px, "steps": steps}
    settings |= {"precision": chosen.name, "compile": compile}
    with tempfile.TemporaryDirectory() as folder, torch_threads(default_threads(1)):
        options: dict[str, Any] = {"global_batch": batch, "device": where, "dtype": chosen.input_dtype}
        samples = (WARMUP + steps) * batch
        loader = make_loader(Path(folder), data, photos=photos, samples=samples, size_px=size_px, **options)
        stream = loader.stream()
        network = prepared(model, len(CLASSES), device=where, size_px=size_px).train()
        stepper = stepping(network, next(stream), precision=chosen, compile=compile)
        say(f"profiling {steps} steps of {model}, batch {batch} at {size_px} px")
        results = _profiled(stepper, stream, where, steps=steps, top=top)
        loader.close()
    return report("profile", QUESTION, settings, results, out=out)


def _profiled(
    stepper: Stepper, stream: Iterator[Batch], device: torch.device, *, steps: int, top: int
) -> dict[str, dict[str, float]]:
    """After steps to warm up: the whole step, the waiting in it, all kernels, and the `top` of them."""
    for _ in range(WARMUP):
        stepper.step(lambda: next(stream), seed=0)
    synchronise(device)
    on_gpu = device.type == "cuda"
    began = perf_counter()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        waited_s = sum(stepper.step(lambda: next(stream), seed=0).data_wait_s for _ in range(steps))
        synchronise(device)
        took_s = perf_counter() - began
    rows = costs(profiler.key_averages(), steps=steps, took_s=took_s, on_gpu=on_gpu)
    total = {name: sum(row[name] for row in rows.values()) for name in ("ms", "share", "calls")}
    results = {
        "step": {"ms": 1000 * took_s / steps, "share": 1.0, "calls": 1.0},
        "waited": {"ms": 1000 * waited_s / steps, "share": waited_s / took_s, "calls": 1.0},
        "all kernels" if on_gpu else "all operators": total,
    }
    return results | {name: rows[name] for name in sorted(rows, key=lambda name: -rows[name]["ms"])[:top]}


def costs(
    events: Iterable[FunctionEventAvg], *, steps: int, took_s: float, on_gpu: bool
) -> dict[str, dict[str, float]]:
    """Of each kernel, or operator on the CPU, without what it calls: ms a step, share of the time, calls a step."""
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if event.device_type != kind:
            continue
        spent_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        row = found.setdefault(str(event.key)[:_NAME], {"ms": 0.0, "share": 0.0, "calls": 0.0})
        row["ms"] += spent_us / 1000 / steps
        row["share"] += spent_us / 1e6 / took_s
        row["calls"] += event.count / steps
    return found
