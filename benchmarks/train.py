"""How much of the ceiling does a real run reach? The loader alone, the step alone, and both in the Learner's loop.

The files are read from a temporary folder, over and over: what a cold disk costs is not measured. One epoch is as long
as the measurement, so that no validation falls into it, and no checkpoint is written.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thawline.benchmarks.harness import (
    DeviceName,
    Timing,
    check_positive,
    measure,
    open_device,
    repeat,
    report,
    say,
    spread,
    torch_threads,
)
from thawline.benchmarks.photos import write_photos
from thawline.benchmarks.step import LR, defaults, noise, prepared, training
from thawline.dataio.checks.verify import check_files
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.samples import write_digits
from thawline.dataio.stream.loader import ImageLoader, split_loader
from thawline.dataio.stream.plan import Once
from thawline.dataio.stream.renderer import EngineName, default_threads
from thawline.dataio.table.manifest import Manifest, build
from thawline.trainer.learner import Learner
from thawline.trainer.records.rows import Recorded
from thawline.trainer.settings import PrecisionName
from thawline.trainer.step.precision import choose_precision

QUESTION = "how much of the ceiling does a real run reach?"
CLASSES = tuple("0123456789")
DataName = Literal["digits", "photos"]
WARMUP = 2
_DIGIT_PX = 96
_PHOTO_PX = (500, 375)


def main(
    *,
    device: DeviceName = "cpu",
    data: DataName = "digits",
    photos: int = 512,
    model: str = "",
    batch: int = 0,
    size_px: int = 0,
    steps: int = 0,
    engine: EngineName = "auto",
    precision: PrecisionName = "auto",
    threads: int = 0,
    repeats: int = 5,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure images/s of loader, step and run, and the run's share of the slower of the two.

    Args:
        device: Where to train.
        data: scikit-learn's digits at 96 px, or photo-like JPEGs of 500 x 375.
        photos: How many different photos to make.
        model: As in `step`; batch, size_px and steps too.
        batch: Images a step.
        size_px: Side of the images that the model sees.
        steps: Steps in a repeat.
        engine: Who renders.
        precision: As in a job.
        threads: Decoding threads; 0 is one a core, at most 8.
        repeats: Measured repeats.
        out: Also write the JSON here.
    """
    where = open_device(device)
    model, batch, size_px, steps = defaults(device, model, batch, size_px, steps)
    check_positive(photos=photos)
    chosen = choose_precision(precision, where)
    with tempfile.TemporaryDirectory() as folder, torch_threads(default_threads(1)):
        samples = (WARMUP + repeats) * steps * batch
        options: dict[str, Any] = {"global_batch": batch, "device": where, "dtype": chosen.input_dtype}
        options |= {"engine": engine, "threads": threads}
        loader = make_loader(Path(folder), data, photos=photos, samples=samples, size_px=size_px, **options)
        timings, waits = _timings(loader, model, precision=precision, steps=steps, repeats=repeats)
    results = {name: timing.summary() for name, timing in timings.items()}
    results["run"] |= {"data_wait": spread(waits), **_shares(timings)}
    settings: dict[str, Any] = {"device": device, "model": model, "batch": batch, "size_px": size_px, "steps": steps}
    settings |= {"data": data, "engine": loader.engine, "precision": chosen.name}
    settings["threads"] = threads or default_threads(1)
    return report("train", QUESTION, settings, results, out=out)


def make_loader(
    folder: Path, data: DataName, *, photos: int, samples: int, size_px: int, **options: Any
) -> ImageLoader:
    """The training loader over `samples` images whose files are made in `folder`; options as split_loader has them."""
    # The demo's presize for digits, fastai's proportion for photos.
    presize_px = round(size_px * (1.25 if data == "digits" else 460 / 224))
    manifest = _manifest(folder, data, photos, samples=samples)
    return split_loader(manifest, ImageSpec(size_px=size_px, presize_px=presize_px), "train", **options)


def _first(loader: ImageLoader) -> ImageLoader:
    """A batch of the loader's samples to validate on, with its engine and files."""
    order = Once(n=min(loader.samples, loader.global_batch), global_batch=loader.global_batch)
    subset = replace(loader.subset, rows=loader.subset.rows[: order.n])
    return replace(loader, order=order, source=replace(loader.source, order=order, subset=subset), borrowed=True)


def _timings(
    loader: ImageLoader, model: str, *, precision: PrecisionName, steps: int, repeats: int
) -> tuple[dict[str, Timing], list[float]]:
    """Of "loader", "step" and "run"; and the run's share of waiting for data, one a repeat."""
    device, batch, classes = loader.renderer.device, loader.global_batch, len(loader.classes)

    def timed(call: Callable[[], object]) -> Timing:
        calls = partial(repeat, call, steps)
        return measure(calls, images_per_call=steps * batch, device=device, warmup=WARMUP, repeats=repeats)

    def alone() -> Timing:
        stream = loader.stream()
        return timed(lambda: next(stream))

    say(f"measuring the loader ({loader.engine}: {loader.renderer.choice.reason})")
    timings = {"loader": alone()}
    say(f"measuring the step ({model}, batch {batch} at {loader.spec.size_px} px)")
    data = noise(batch, loader.spec.size_px, classes, device=device, dtype=loader.renderer.dtype)
    network = prepared(model, classes, device=device, size_px=loader.spec.size_px)
    timings["step"] = timed(training(network, data, precision=choose_precision(precision, device)))
    say("measuring the run")
    learner = Learner(
        prepared(model, classes, device=device, size_px=loader.spec.size_px),
        loader,
        _first(loader),
        precision=precision,
        log_every=steps,
        sinks=[clock := _Clock()],
    )
    learner.fit_one_cycle(1, LR)
    learner.close()
    return timings | {"run": clock.timing(images=steps * batch, repeats=repeats)}, clock.waits[-repeats:]


@dataclass
class _Clock:
    """A sink that notes what each training window took. See trainer.context.Sink."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def step(self, *, images: int, step_s: float, data_wait_s: float) -> None:
        """Windows are enough."""

    def busy(self, *, busy_s: float) -> None:
        """The windows tell enough."""

    def observe(self, row: Recorded) -> None:
        """Keep a training window, and the CPU time of the process at its end."""
        if row["kind"] == "train":
            self.wall_s.append(row["window_s"])
            self.waits.append(row["data_wait_fraction"])
            self.cpu_s.append(time.process_time())

    def timing(self, *, images: int, repeats: int) -> Timing:
        """The last `repeats` windows, of `images` each."""
        return Timing(images, tuple(self.wall_s[-repeats:]), tuple(np.diff(self.cpu_s)[-repeats:].tolist()))


def _shares(timings: Mapping[str, Timing]) -> dict[str, float]:
    """of_ceiling: of the slower of loader and step. of_shared: of what they reach in turns, on the same cores."""
    loader, step, run = (timings[name].images_per_s for name in ("loader", "step", "run"))
    return {"of_ceiling": run / min(loader, step), "of_shared": run * (1 / loader + 1 / step)}


def _manifest(folder: Path, data: str, photos: int, *, samples: int) -> Manifest:
    """A training split of `samples` images: the files made in `folder`, in turn, as often as it takes."""
    say(f"writing {data}")
    if data == "digits":
        write_digits(folder, size_px=_DIGIT_PX)
        files = sorted(folder.glob("*.jpg"))
    else:
        files = [folder / f"{i % len(CLASSES)}_{i:05d}.jpg" for i in range(photos)]
        for file, jpeg in zip(
            files, write_photos(photos, width=_PHOTO_PX[0], height=_PHOTO_PX[1], seed=0), strict=True
        ):
            file.write_bytes(jpeg.tobytes())
    checks = check_files(str(folder), [file.name for file in files])
    chosen = np.arange(samples) % len(files)
    names = [file.name for file in files]
    columns = {
        **{name: checks[name].take(chosen) for name in checks.column_names},
        "id": np.arange(samples),
        "path": [names[i] for i in chosen],
        "label": [names[i][0] for i in chosen],
        "split": ["train"] * samples,
    }
    return build(columns, root=str(folder), task="single_label", classes=CLASSES)
