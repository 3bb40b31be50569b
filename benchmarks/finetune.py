"""Is fine-tuning worth it? A few labels of new classes: `fine_tune` from trained weights against training from scratch.

A network first learns the digits 0 to 4 from random weights. Then 5 to 9 are new: `labels` images of each to train
on, all others to be measured on. Both ways take as many steps of the same stream under the same new head, each by
fastai's recipe at its default rate; only the body's weights differ to begin with. The head that knew 0 to 4 stays
behind: it would fit 5 to 9 by its shape alone.

It says nothing of ImageNet's weights, nor of photographs: digits are what needs no download.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import dataio
from benchmarks.harness import BenchmarkError, DeviceName, check_positive, open_device, report, say, torch_threads
from dataio.loader import EngineName, default_threads, loaders
from dataio.samples import write_digits
from dataio.splits import Sides, Splitter
from models.backbones import create
from trainer.learner import Learner
from trainer.step import PrecisionName, choose_precision

QUESTION = "how many errors does fine-tuning make, and training from scratch, on few labels of new classes?"
KNOWN, NEW = "01234", "56789"
_HELD_OUT = 0.1
"""Share of the known digits that tells whether they were learned."""


def main(
    *,
    device: DeviceName = "cpu",
    model: str = "resnet18",
    size_px: int = 32,
    labels: int = 20,
    epochs: int = 10,
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
        model: A torchvision ResNet.
        size_px: Side of the images.
        labels: Training images of each new class.
        epochs: Of either way; the first of fine-tuning's trains the head alone.
        known_epochs: Of the training on 0 to 4.
        batch: Images a step.
        seeds: Repetitions, each with weights, labelled images and order of its own.
        engine: Who renders.
        precision: As in a job.
        threads: Of torch's operators on the CPU; 0 is one a core, at most 8. Give 1 where others use the cores.
        out: Also write the JSON here.
    """
    check_positive(size_px=size_px, labels=labels, known_epochs=known_epochs, batch=batch)
    if epochs < 2 or seeds < 2:
        raise BenchmarkError(
            f"epochs={epochs} and seeds={seeds} leave no epoch for the whole network, or no error of the mean: give 2 "
            "of each, or more"
        )
    where = open_device(device)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads or default_threads(1)):
        write_digits(folder, size_px=2 * size_px)
        setting = Setting(Path(folder), model, size_px, batch, where, engine, precision)
        found = []
        for seed in range(seeds):
            found.append(one_seed(setting, seed, labels=labels, epochs=epochs, known_epochs=known_epochs))
            say(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in found[-1].items()))
    settings = {
        "device": device,
        "model": model,
        "size_px": size_px,
        "labels": labels,
        "epochs": epochs,
        "known_epochs": known_epochs,
        "batch": batch,
        "seeds": seeds,
        "engine": engine,
        "precision": choose_precision(precision, where).name,
        "threads": threads or default_threads(1),
    }
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


def one_seed(setting: Setting, seed: int, *, labels: int, epochs: int, known_epochs: int) -> dict[str, float]:
    """Error rates in percent: of the known digits, and of the new ones from their body's weights and from scratch."""
    body = setting.folder / "body.pt"
    numbers = {
        "known_percent": trained(
            setting, held_out(seed), lambda learner: learner.fit_one_cycle(known_epochs), seed=seed, keep=body
        )
    }
    ways: dict[str, tuple[str | Path, Callable[[Learner], None]]] = {
        "fine_tune_percent": (body, lambda learner: learner.fine_tune(epochs - 1, frozen_epochs=1)),
        "scratch_percent": ("none", lambda learner: learner.fit_one_cycle(epochs)),
    }
    for name, (weights, fit) in ways.items():
        numbers[name] = trained(setting, few_labels(labels, seed), fit, seed=seed, weights=weights)
    return numbers | {"difference_percent": numbers["scratch_percent"] - numbers["fine_tune_percent"]}


def trained(
    setting: Setting,
    splitter: Splitter,
    fit: Callable[[Learner], None],
    *,
    seed: int,
    weights: str | Path = "none",
    keep: Path | None = None,
) -> float:
    """Train on what the splitter leaves in, from these weights; the validation's error rate at the end, in percent.

    keep: where the body's weights go afterwards, under torchvision's names.
    """
    table = dataio.label(dataio.from_folder(setting.folder), dataio.by_regex(r"^(\d)_"))
    manifest = dataio.split(table, splitter)
    precision = choose_precision(setting.precision, setting.device)
    train, valid = loaders(
        manifest,
        dataio.ImageSpec.preset("digits", size_px=setting.size_px, presize_px=2 * setting.size_px),
        global_batch=setting.batch,
        seed=seed,
        device=setting.device,
        dtype=precision.input_dtype,
        engine=setting.engine,
    )
    model = create(setting.model, len(manifest.classes), weights=weights, seed=seed).to(setting.device)
    learner = Learner(model, train, valid, precision=setting.precision, seed=seed)
    fit(learner)
    learner.close()
    if keep is not None:
        torch.save(model.body.state_dict(), keep)
    return 100 * float(learner.recorder.of_kind("valid")[-1]["error_rate"] or 0)


# Which images ------------------------------------------------------------------------------------------------


def held_out(seed: int) -> Splitter:
    """The known digits: all for training but every class's share to look at."""
    return _by_class(KNOWN, seed, lambda count: count - round(_HELD_OUT * count))


def few_labels(labels: int, seed: int) -> Splitter:
    """The new digits: `labels` of each class for training, and all the rest for validation.

    Raises BenchmarkError (when called on rows) for more labels than images.
    """

    def training(count: int) -> int:
        if labels >= count:
            raise BenchmarkError(f"labels={labels} leaves nothing of a class's {count} images to measure: give fewer")
        return labels

    return _by_class(NEW, seed, training)


def _by_class(classes: str, seed: int, training: Callable[[int], int]) -> Splitter:
    """Of each of these classes, so many of its images as `training` says, drawn by the seed; the others validate."""

    def draw(rows: pa.Table) -> Sides:
        labels = np.array(rows["label"].to_pylist())
        random, sides = np.random.default_rng(seed), np.full(len(labels), None, object)
        for name in classes:
            drawn = random.permutation(np.flatnonzero(labels == name))
            sides[drawn] = "valid"
            sides[drawn[: training(len(drawn))]] = "train"
        return sides

    return draw


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """A row a seed, their mean, and the standard error of it: of the difference, too, as it is seed by seed."""
    columns = {name: np.array([each[name] for each in found]) for name in found[0]}
    rows = {f"seed {seed}": dict(each) for seed, each in enumerate(found)}
    rows["mean"] = {name: float(values.mean()) for name, values in columns.items()}
    rows["standard error"] = {
        name: float(values.std(ddof=1) / np.sqrt(len(values))) for name, values in columns.items()
    }
    return rows
