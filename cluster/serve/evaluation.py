"""How good is a finished run's model on images that it has not seen? Every metric with its interval, and by class.

The images come through the data path of a validation, in the engine and precision of the run's. Of images without a
label, see predictor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from thawline.cluster.errors import PredictError
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Job
from thawline.cluster.run.folder import write_text
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.serve.predictor import Predictor
from thawline.cluster.words import as_json
from thawline.dataio.batch import Batch
from thawline.dataio.errors import ManifestError, listed
from thawline.dataio.store.files import why_refused
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader, split_loader
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.tasks import TASKS as KINDS
from thawline.models.bundle import FOLDER, Description
from thawline.models.code import is_code
from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.named import named_loss
from thawline.trainer.metrics.evaluation import Measured, evaluate
from thawline.trainer.metrics.intervals import Bootstrap
from thawline.trainer.metrics.meter import Meter, TaskMetrics, build
from thawline.trainer.metrics.predictions import Predictions
from thawline.trainer.tasks import record_of

ALL = "all"
"""In place of a split: every usable image of a manifest."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of a model on one split."""

    split: str
    samples: int
    metrics: dict[str, float]
    """By column; `loss` first, which is the mean."""
    intervals: dict[str, tuple[float, float] | None]
    """In which 95 % of a metric's values lie over resamples of the images; None for one that has none."""
    of_each: list[dict[str, Any]]
    """A row a class, number or point, see trainer.metrics.of_each."""
    confusion: list[list[int]] | None
    """Images of the row's class that were predicted as the column's; None where an image has not one class."""
    outcomes: pa.Table
    """A row an image, see Predictions.table."""
    unusable: tuple[str, ...]
    """Files that could not be read any more, and why."""


# What it is measured on -----------------------------------------------------------------------------------


def job_of(where: str | Path) -> Job | None:
    """The job of the run whose folder, or whose bundle's folder, this is; None for a bundle alone. Raises JobError."""
    folder = Path(where).expanduser()
    for place in (folder, folder.parent if folder.name == FOLDER else folder):
        if (place / "job.toml").is_file():
            return jobs.from_toml(place / "job.toml", trust_code=True)  # read here, not run: see `loss_of`
    return None


def manifest_for(about: Description, given: str | None, job: Job | None, *, root: str | None = None) -> Manifest:
    """The manifest to measure on: the given one, or the run's own, with the model's classes in their order.

    Raises: ManifestError where there is none, or its targets do not mean the model's.
    """
    if given is None and (job is None or not job.manifest):
        raise ManifestError("no manifest was given, and no job lies beside the bundle: give a MANIFEST to measure on")
    if given is None:
        assert job is not None
        loaded = Loaded(job)
        return _for_model(loaded.valid or loaded.manifest, about, name="the run's manifest")
    return _for_model(Manifest.load(given, root=root), about, name=given)


def _for_model(manifest: Manifest, about: Description, *, name: str) -> Manifest:
    if manifest.task != about.task:
        raise ManifestError(
            f"{name} is for {manifest.task}, and the model for {about.task}: there is nothing to compare; index the "
            "images again with that kind of labels"
        )
    if (manifest.classes, manifest.values) == (about.classes, about.values):
        return manifest
    unknown = [name for name in manifest.classes if name not in about.classes]
    # Labels are kept by name, so a set without one class, or in another order, means the same.
    if not unknown and KINDS[about.task].names is not None and not about.values:
        return replace(manifest, classes=about.classes)
    differ = f"knows no {listed(unknown)}" if unknown else f"has {listed(about.classes)} in this order"
    raise ManifestError(
        f"{name} has {listed(manifest.classes)}, and the model {differ}: a target would mean another thing to each; "
        "index the images again with the model's classes (--classes)"
    )


def loss_of(job: Job | None, *, trust_code: bool) -> str:
    """The run's loss by name; the task's own where there is no job, or where its code is not trusted."""
    if job is None or (is_code(job.fit.loss) and not trust_code):
        return "auto"
    return job.fit.loss


def chosen_split(manifest: Manifest, wanted: str | None) -> str:
    """The split that is asked for; test where nobody chose, or without one valid. Raises ManifestError."""
    there = manifest.splits()
    split = wanted or ("test" if "test" in there or "valid" not in there else "valid")
    if split != ALL and split not in there:
        raise ManifestError(
            f"the manifest has no {split} images (it has {listed(there)}): there is nothing to measure on; give "
            f"--split {there[-1] if there else ALL}, or another manifest"
        )
    return split


def _as_one_split(manifest: Manifest) -> Manifest:
    """Every usable image in `valid`, in the order of ids."""
    rows = manifest.rows
    index = rows.schema.get_field_index("split")
    field = rows.schema.field(index)
    words = pc.if_else(pc.equal(rows["status"].cast(pa.string()), "ok"), "valid", pa.scalar(None, pa.string()))
    return replace(manifest, rows=rows.set_column(index, field, words.cast(field.type)).combine_chunks())


# How ------------------------------------------------------------------------------------------------------


def measure(
    predictor: Predictor,
    manifest: Manifest,
    *,
    split: str,
    metrics: Sequence[str] = (),
    loss: str = "auto",
    resamples: int = 400,
    batch: int = 64,
    seed: int = 0,
) -> tuple[Evaluation, ImageLoader]:
    """Measure a model on one split, or on `ALL`; the loader is returned to draw images from, and to close.

    metrics: texts, beside those that the task has names for. resamples: of the bootstrap; 0 for no intervals.
    Raises: ManifestError, RecipeError, QuarantineError, EngineError.
    """
    if resamples < 0 or batch < 1:
        raise PredictError(f"resamples={resamples}, batch={batch}: give 0 or more resamples, a batch of at least 1")
    about = predictor.about
    loader = split_loader(
        _as_one_split(manifest) if split == ALL else manifest,
        predictor.spec,
        "valid" if split == ALL else split,
        global_batch=batch,
        device=predictor.device,
        dtype=predictor.precision.input_dtype,
        engine=predictor.engine.engine,  # type: ignore[arg-type]  # one of its names
    )
    try:
        meter = _Resampling(_every_metric(about, metrics, side_px=predictor.spec.size_px), resamples, seed)
        found = _measured(predictor, loader, meter, loss)
        return _evaluation(found, loader, split, meter.intervals()), loader
    except BaseException:
        loader.close()
        raise


def _measured(predictor: Predictor, loader: ImageLoader, meter: Meter, loss: str) -> Measured:
    scale = getattr(predictor.model, "scale", None)
    found = evaluate(
        predictor.model,
        loader,
        step=0,
        loss=named_loss(loss, task=predictor.about.task, scale=scale, device=predictor.device),
        precision=predictor.precision,
        meter=meter.to(predictor.device),
        keep=True,
        brief=True,
    )
    assert found is not None, "nobody interrupts"
    return found


def _evaluation(
    found: Measured, loader: ImageLoader, split: str, intervals: dict[str, tuple[float, float] | None]
) -> Evaluation:
    said, classes = found.predictions, loader.classes
    assert isinstance(said, Predictions)
    record = record_of(loader.task)
    values = {"loss": found.metrics["valid_loss"], **{k: v for k, v in found.metrics.items() if k != "valid_loss"}}
    return Evaluation(
        split=split,
        samples=len(said.ids),
        metrics=values,
        intervals=intervals,
        of_each=record.of_each(said.targets, said.probabilities, classes) if record.of_each else [],
        confusion=record.confusion(said.targets, said.probabilities, classes).tolist() if record.confusion else None,
        outcomes=said.table(classes),
        unusable=tuple(loader.quarantined.values()),
    )


def _every_metric(about: Description, more: Sequence[str], *, side_px: int) -> TaskMetrics:
    """Those of the task by name, as far as they fit, and `more`. Raises RecipeError for one of `more`."""
    made = dict[str, Any]()
    for text in (*record_of(about.task).own_metrics(), *more):
        try:
            made |= dict(build([text], task=about.task, classes=len(about.classes), side_px=side_px).items())
        except RecipeError:
            if text in more:
                raise
    return TaskMetrics(made, task=about.task)


class _Resampling(Meter):
    """A meter that also resamples what it sees."""

    def __init__(self, metrics: TaskMetrics, resamples: int, seed: int) -> None:
        super().__init__(metrics)
        self._bootstrap = (
            Bootstrap(dict(metrics.items()), task=metrics.task, resamples=resamples, seed=seed) if resamples else None
        )

    def update(self, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
        """See Meter."""
        super().update(outputs, targets, losses)
        if self._bootstrap is not None:
            self._bootstrap.update(outputs, targets)

    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """See Bootstrap."""
        return {} if self._bootstrap is None else self._bootstrap.intervals()


def outputs_of(predictor: Predictor) -> Callable[[Batch], Tensor]:
    """What the model puts out for a batch, float32 on the CPU: for pictures."""

    def outputs(batch: Batch) -> Tensor:
        assert isinstance(batch.inputs, Tensor)
        return predictor.outputs(batch.inputs.to(predictor.device)).cpu()

    return outputs


# What is said of it ---------------------------------------------------------------------------------------


def described(found: Evaluation, *, run: str, manifest: str, predictor: Predictor) -> dict[str, Any]:
    """What evaluation.json holds. manifest: its name."""
    about = predictor.about
    return {
        "run": run,
        "manifest": manifest,
        "split": found.split,
        "samples": found.samples,
        "unusable": list(found.unusable),
        "task": about.task,
        "classes": list(about.classes),
        "model": about.model,
        "step": about.step,
        "engine": predictor.engine.engine,
        "precision": predictor.precision.name,
        "device": str(predictor.device),
        "metrics": {
            name: {"value": value, **dict(zip(("low", "high"), found.intervals.get(name) or (None, None), strict=True))}
            for name, value in found.metrics.items()
        },
        "by_class": found.of_each,
        "confusion": found.confusion,
    }


def lines(found: Evaluation) -> list[str]:
    """The metrics for people, one a line."""
    width = max(map(len, found.metrics))
    said = []
    for name, value in found.metrics.items():
        interval = found.intervals.get(name)
        between = "" if interval is None else f"   95 % within {interval[0]:.4f} to {interval[1]:.4f}"
        number = f"{value:.4f}" if math.isfinite(value) else "no number"
        said.append(f"{name:<{width}}  {number:>9}{between}")
    return said


def folder_for(out: str | None, where: str) -> Root:
    """Where the evaluation is written: the given folder, or the run's. Raises SourceError."""
    if out:
        return Root.of(out)
    folder = Path(where).expanduser()
    return Root.of(str(folder.parent if folder.name == FOLDER and (folder.parent / "job.toml").exists() else folder))


def write(folder: Root, described: dict[str, Any], page: str) -> None:
    """Write evaluation.html, then evaluation.json. Raises PredictError where the folder takes no files."""
    try:
        write_text(folder, "evaluation.html", page)
        write_text(folder, "evaluation.json", as_json(described, indent=2) + "\n")
    except OSError as error:
        raise PredictError(
            f"{folder} cannot take evaluation.json ({why_refused(error)}): what was measured would be lost; give "
            "another folder with --out"
        ) from error


def most_confused(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], *, most: int = 20
) -> list[tuple[str, str, int]]:
    """(class, what it was taken for, images), the commonest first."""
    counts = np.array(confusion)
    np.fill_diagonal(counts, 0)
    pairs = np.argwhere(counts > 0)
    order = np.argsort(-counts[tuple(pairs.T)], kind="stable")[:20]
    return [(classes[i], classes[j], int(counts[i, j])) for i, j in pairs[order]]
