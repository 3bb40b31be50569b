"""Is fine-tuning worth it? A few labels of new classes: `fine_tune` from trained weights against training from scratch.

A network first learns the digits 0 to 4 from random weights. Then 5 to 9 are new: `labels` images of each to train
on, all others to be measured on. Both ways take as many steps of the same stream under the same new head, each by
fastai's recipe at its default rate; only the body's weights differ to begin with. The head that knew 0 to 4 stays
behind: it would fit 5 to 9 by its shape alone.

Which way is better depends on the budget of steps, so there are several: digits are easy, and given some tens of
steps a network from scratch learns them from a hundred images.

With `weights`, a file such as `thawline sample weights` writes, these are what is fine-tuned, and nothing is learned of
0 to 4. It says nothing of photographs: digits are what needs no download.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from thawline import dataio
from thawline.benchmarks.harness import (
    BenchmarkError,
    DeviceName,
    check_positive,
    open_device,
    report,
    say,
    torch_threads,
)
from thawline.dataio.samples import write_digits
from thawline.dataio.stream.loader import loaders
from thawline.dataio.stream.renderer import EngineName, default_threads
from thawline.dataio.table.draws import Splits, Splitter
from thawline.models.bodies.libraries import normalisation
from thawline.models.classifier import create
from thawline.trainer.learner import Learner
from thawline.trainer.settings import PrecisionName
from thawline.trainer.step.precision import choose_precision

QUESTION = "how many errors does fine-tuning make, and training from scratch, on few labels of new classes?"
KNOWN, NEW = "01234", "56789"
_HELD_OUT = 0.1
"""Share of the known digits that tells whether they were learned."""


def main(
    *,
    device: DeviceName = "cpu",
    model: str = "resnet18",
    weights: Path | None = None,
    size_px: int = 32,
    labels: int = 20,
    epochs: tuple[int, ...] = (5, 10),
    known_epochs: int = 5,
    batch: int = 20,
    seeds: int = 5,
    engine: EngineName = "auto",
    precision: PrecisionName = "auto",
    threads: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the error rates of both ways, seed by seed, in percent.

    Args:
        device: Where to train.
        model: As in a job.
        weights: Start from this file in place of what the digits 0 to 4 teach.
        size_px: Side of the images.
        labels: Training images of each new class.
        epochs: Of either way, one budget after another; the first of fine-tuning's trains the head alone.
        known_epochs: Of the training on 0 to 4.
        batch: Images a step.
        seeds: Repetitions, each with weights, labelled images and order of its own.
        engine: Who renders.
        precision: As in a job.
        threads: Of torch's operators on the CPU; 0 is one a core, at most 8. Give 1 where others use the cores.
        out: Also write the JSON here.
    """
    check_positive(size_px=size_px, labels=labels, known_epochs=known_epochs, batch=batch)
    if min(epochs, default=0) < 2 or seeds < 2:
        problem = "leave no epoch for the whole network, or no error of the mean"
        raise BenchmarkError(f"epochs={epochs} and seeds={seeds} {problem}: give 2 of each, or more")
    where = open_device(device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads or default_threads(1)):
        write_digits(folder, size_px=2 * size_px)
        setting = Setting(Path(folder), model, size_px, batch, where, engine, precision, weights)
        found = []
        for seed in range(seeds):
            found.append(one_seed(setting, seed, labels=labels, epochs=epochs, known_epochs=known_epochs))
            say(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in found[-1].items()))
    settings: dict[str, Any] = {"device": device, "model": model, "weights": weights and weights.name}
    settings |= {"size_px": size_px, "labels": labels, "epochs": epochs, "known_epochs": known_epochs, "batch": batch}
    settings |= {"seeds": seeds, "engine": engine, "precision": choose_precision(precision, where).name}
    settings["threads"] = threads or default_threads(1)
    return report("finetune", QUESTION, settings, summary(found), out=out)


@dataclass(frozen=True)
class Setting:
    """What all trainings have in common. folder: of the digits' files, and of the weights between."""

    folder: Path
    model: str
    size_px: int
    batch: int
    device: torch.device
    engine: EngineName
    precision: PrecisionName
    weights: Path | None = None
    """What is fine-tuned, in place of what the known digits teach."""


def one_seed(setting: Setting, seed: int, *, labels: int, epochs: Sequence[int], known_epochs: int) -> dict[str, float]:
    """Error rates in percent: of the known digits, and of the new ones from their body's weights and from scratch."""
    body, found = setting.weights or setting.folder / "body.pt", dict[str, float]()
    if setting.weights is None:
        found["known"] = trained(setting, KNOWN, held_out, fit=one_cycle(known_epochs), seed=seed, keep=body)
    for budget in epochs:
        new = partial(trained, setting, NEW, few(labels), seed=seed)
        tuned = found[f"{budget} epochs, fine_tune"] = new(fit=fine_tune(budget), weights=body)
        scratch = found[f"{budget} epochs, scratch"] = new(fit=one_cycle(budget))
        found[f"{budget} epochs, scratch - fine_tune"] = scratch - tuned
    return found


def fine_tune(epochs: int) -> Callable[[Learner], None]:
    """Train the head alone for one of the epochs, everything for the others."""
    return lambda learner: learner.fine_tune(epochs - 1, frozen_epochs=1)


def one_cycle(epochs: int) -> Callable[[Learner], None]:
    """Train everything."""
    return lambda learner: learner.fit_one_cycle(epochs)


def trained(
    setting: Setting,
    classes: str,
    training: Callable[[int], int],
    *,
    fit: Callable[[Learner], None],
    seed: int,
    weights: str | Path = "none",
    keep: Path | None = None,
) -> float:
    """Train on `training` images of each class's count, from these weights; the error rate on the others, in percent.

    keep: where the body's weights go afterwards, under torchvision's names.
    """
    files = sorted(file for file in setting.folder.glob("*.jpg") if file.name[0] in classes)
    table = dataio.from_lists(files, [file.name[0] for file in files], root=setting.folder)
    precision = choose_precision(setting.precision, setting.device)
    train, valid = loaders(
        dataio.split(table, by_class(training, seed)),
        dataio.ImageSpec.preset("digits", size_px=setting.size_px, presize_px=2 * setting.size_px, **pixels(setting)),
        global_batch=setting.batch,
        seed=seed,
        device=setting.device,
        dtype=precision.input_dtype,
        engine=setting.engine,
    )
    model = create(setting.model, len(classes), weights=weights, seed=seed, size_px=setting.size_px).to(setting.device)
    learner = Learner(model, train, valid, precision=setting.precision, seed=seed)
    fit(learner)
    learner.close()
    if keep is not None:
        torch.save(model.body.state_dict(), keep)
    return 100 * learner.recorder.last_metric("error_rate")


def pixels(setting: Setting) -> dict[str, Any]:
    """The normalisation that a file's weights expect; what has been trained here from random ones keeps the spec's."""
    if setting.weights is None:
        return {}
    mean, std = normalisation(setting.model)
    return {"mean": mean, "std": std}


# Which images ------------------------------------------------------------------------------------------------


def held_out(count: int) -> int:
    """All of a class but a share to look at."""
    return count - round(_HELD_OUT * count)


def few(labels: int) -> Callable[[int], int]:
    """`labels` of each class. The function raises BenchmarkError where nothing would be left to measure."""

    def training(count: int) -> int:
        if labels >= count:
            raise BenchmarkError(f"labels={labels} leaves nothing of a class's {count} images to measure: give fewer")
        return labels

    return training


def by_class(training: Callable[[int], int], seed: int) -> Splitter:
    """Of each class so many images as `training` says of their count, drawn by the seed; the others validate."""

    def draw(rows: pa.Table) -> Splits:
        labels = np.array(rows["label"].to_pylist())
        random, sides = np.random.default_rng(seed), np.full(len(labels), "valid", object)
        for name in np.unique(labels):
            drawn = random.permutation(np.flatnonzero(labels == name))
            sides[drawn[: training(len(drawn))]] = "train"
        return sides

    return draw


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By training: the mean over the seeds, the standard error of it, and each seed's; of differences, too."""
    rows = {}
    for name in found[0]:
        values = np.array([each[name] for each in found])
        error = values.std(ddof=1) / np.sqrt(len(values))
        seeds = {f"seed {seed}": float(value) for seed, value in enumerate(values)}
        rows[name] = {"mean_percent": float(values.mean()), "standard_error": float(error), **seeds}
    return rows
