"""What helps a rare class? Its recall with class weights in the loss, with balanced drawing, and with neither.

One digit is a class, all others are the other one: for each of `labels` images of it training has `ratio` of those. All
others validate. All ways take as many steps, from the same random weights, over the same images.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from thawline import dataio
from thawline.benchmarks.finetune import Setting, summary
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
from thawline.dataio.stream.renderer import default_threads
from thawline.dataio.table.draws import Splits, Splitter
from thawline.dataio.table.manifest import Manifest
from thawline.models.classifier import create
from thawline.trainer.learner import Learner
from thawline.trainer.metrics.meter import Meter, default_metrics, recalls
from thawline.trainer.step.precision import choose_precision

QUESTION = "what is the recall of a rare class with class weights, with balanced drawing, and with neither?"
WAYS: Mapping[str, tuple[float, bool]] = {
    "neither": (0.0, False),
    "class_weights": (0.0, True),
    "balance .5": (0.5, False),
    "balance 1": (1.0, False),
}
"""data.balance, and whether the loss is weighted."""
RARE, OTHER = "rare", "other"


def main(
    *,
    device: DeviceName = "cpu",
    model: str = "resnet18",
    size_px: int = 32,
    rare: str = "8",
    labels: int = 10,
    ratio: int = 100,
    epochs: int = 5,
    batch: int = 32,
    seeds: int = 3,
    threads: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the recall of the rare digit and of the others, and the error rate, seed by seed, in percent.

    Args:
        device: Where to train.
        model: A torchvision ResNet.
        size_px: Side of the images.
        rare: The digit that is rare.
        labels: Training images of it.
        ratio: Training images of the others for each of them.
        epochs: Of one cycle.
        batch: Images a step.
        seeds: Repetitions, each with weights, images and order of its own.
        threads: Of torch's operators on the CPU; 0 is one a core, at most 8. Give 1 where others use the cores.
        out: Also write the JSON here.
    """
    check_positive(size_px=size_px, labels=labels, ratio=ratio, epochs=epochs, batch=batch)
    if rare not in [*"0123456789"] or labels >= 170 or labels * ratio >= 1600 or seeds < 2:
        raise BenchmarkError(
            f"rare={rare}, labels={labels}, ratio={ratio}, seeds={seeds}: there are 180 images of a digit, 1,600 of "
            "the others, and one seed has no error of its mean; give a digit, fewer images, and 2 seeds or more"
        )
    where = open_device(device)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads or default_threads(1)):
        write_digits(folder, size_px=2 * size_px)
        setting = Setting(Path(folder), model, size_px, batch, where, "auto", "auto")
        for seed in range(seeds):
            manifest = uneven(setting.folder, rare, labels=labels, ratio=ratio, seed=seed)
            found.append({})
            for name, (balance, weighted) in WAYS.items():
                measures = measured(setting, manifest, balance, weighted, epochs=epochs, seed=seed)
                found[-1] |= {f"{name}, {what}": value for what, value in measures.items()}
            say(f"seed {seed}: " + ", ".join(f"{what} {value:.1f}" for what, value in found[-1].items()))
    settings: dict[str, Any] = {"device": device, "model": model, "size_px": size_px, "rare": rare, "labels": labels}
    settings |= {"ratio": ratio, "epochs": epochs, "batch": batch, "seeds": seeds}
    return report("imbalance", QUESTION, settings, summary(found), out=out)


def uneven(folder: Path, rare: str, *, labels: int, ratio: int, seed: int) -> Manifest:
    """A manifest of two classes, in training one of them `ratio` times as large as the other."""
    files = sorted(folder.glob("*.jpg"))
    table = dataio.from_lists(files, [RARE if file.name[0] == rare else OTHER for file in files], root=folder)
    return dataio.split(table, by_class({RARE: labels, OTHER: labels * ratio}, seed))


def by_class(training: Mapping[str, int], seed: int) -> Splitter:
    """Of each class so many images, drawn by the seed; the others validate."""

    def draw(rows: pa.Table) -> Splits:
        names = np.array(rows["label"].to_pylist())
        random, sides = np.random.default_rng(seed), np.full(len(names), "valid", object)
        for name, count in training.items():
            sides[random.permutation(np.flatnonzero(names == name))[:count]] = "train"
        return sides

    return draw


def measured(
    setting: Setting, manifest: Manifest, balance: float, weighted: bool, *, epochs: int, seed: int
) -> dict[str, float]:
    """Train one way; the recall of the rare class, that of the other, and the error rate, in percent."""
    precision, classes = choose_precision(setting.precision, setting.device), len(manifest.classes)
    train, valid = loaders(
        manifest,
        dataio.ImageSpec.preset("digits", size_px=setting.size_px, presize_px=2 * setting.size_px),
        global_batch=setting.batch,
        seed=seed,
        balance=balance,
        device=setting.device,
        dtype=precision.input_dtype,
        engine=setting.engine,
    )
    learner = Learner(
        create(setting.model, classes, weights="none", seed=seed).to(setting.device),
        train,
        valid,
        precision=setting.precision,
        class_weights="balanced" if weighted else None,
        meter=Meter(default_metrics("single_label", classes), recalls=recalls("single_label", classes)),
        seed=seed,
    )
    learner.fit_one_cycle(epochs)
    learner.close()
    recall = {each["name"]: 100 * (each["recall"] or 0.0) for each in learner.recorder.of_kind("valid")[-1]["recalls"]}
    error = 100 * learner.recorder.last_metric("error_rate")
    return {"recall of the rare": recall[RARE], "recall of the others": recall[OTHER], "error": error}
