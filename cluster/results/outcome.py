"""What does a run write when it has ended? Rows, predictions, the bundle, result and report, by rank 0."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace

import pyarrow as pa
from torch import Tensor

from thawline.cluster.errors import StorageError, last_line
from thawline.cluster.job.job import Job, code_of
from thawline.cluster.job.model import Model
from thawline.cluster.machine import provenance
from thawline.cluster.observe.console import diagnosis_lines
from thawline.cluster.results.decoding import by_pillow
from thawline.cluster.run.folder import Result, write_text
from thawline.cluster.words import as_json, finite
from thawline.dataio.batch import Batch
from thawline.dataio.pixels.spec import Augmentation
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write, sweep
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader
from thawline.models.bundle import FOLDER, Description, packed
from thawline.models.classifier import Classifier
from thawline.models.code import fingerprints
from thawline.models.lora import merged
from thawline.trainer.analysis.diagnosis import diagnose
from thawline.trainer.context import RunContext
from thawline.trainer.learner import Learner
from thawline.trainer.metrics.predictions import Predictions
from thawline.trainer.records.recorder import write_parquet
from thawline.trainer.step.step import forward


def outcome(job: Job, context: RunContext, learner: Learner, predictions: Predictions | None) -> Result:
    """The result of a run that has ended, the same on every rank; rank 0 writes it into the run's folder.

    predictions: of the validation images by the final weights, on rank 0. Raises StorageError, on rank 0 alone.
    """
    if learner.stopped:
        result = _result(job, context, learner, status="stopped", metrics={})
    else:
        result = _result(job, context, learner, status="finished", metrics=_last_metrics(learner))
        for note in result["notes"]:
            learner.note(note)
    if context.rank == 0:
        folder = Root.of(context.run_dir)
        outcomes = _write(folder, job, learner, result, predictions)
        if outcomes is not None:
            _picture(folder, learner, result, outcomes)
    return result


def _write(
    folder: Root, job: Job, learner: Learner, result: Result, predictions: Predictions | None
) -> pa.Table | None:
    """The files of a run that has ended; `result.json` last, so that where it exists, the run is complete.

    Returns a row a validation image, of `Predictions.table`; None for a run that was stopped.
    """
    try:
        write_parquet(learner.recorder.table(), folder.full("rows.parquet"))
        if predictions is None:
            return None
        outcomes = predictions.table(learner.valid.classes)
        write_parquet(outcomes, folder.full("valid.parquet"))
        sweep(folder.child(FOLDER))
        about = replace(_described(job, learner, result), pillow=_by_pillow(learner))
        for name, data in packed(_measured(learner), about).items():
            with atomic_write(folder.child(FOLDER), name) as sink:
                sink.write(data)
        write_text(folder, "result.json", as_json(result, indent=2) + "\n")
        return outcomes
    except OSError as error:
        raise StorageError(
            f"{folder} cannot take the results ({files.why_refused(error)}): the weights are in its last checkpoint; "
            "make room and start the run again, which then writes the results alone"
        ) from error


def _measured(learner: Learner) -> dict[str, Tensor]:
    """The final weights: the averaged ones, where there are any; adapters merged."""
    parts = learner.session.weights()
    return merged(learner.model, {**parts["model"], **parts.get("ema", {})})


def _described(job: Job, learner: Learner, result: Result) -> Description:
    """The bundle's description of its model, with the images of the last validation, whatever their stage."""
    valid, model = learner.valid, learner.model
    assert isinstance(valid, ImageLoader)
    assert isinstance(model, Classifier)
    spec = asdict(valid.spec)
    augmented = [each.name for each in fields(Augmentation)]  # which validation leaves out, and views of it do not
    image = {name: spec[name] for name in ("presize_px", "presize", "mean", "std", *augmented)}
    return Description(
        model=job.model.name,
        options=model.options,
        outputs=len(valid.classes),
        task=valid.task,
        classes=tuple(valid.classes),
        values=valid.source.manifest.values,
        image={"size_px": valid.size_px(learner.progress.step), **image},
        engine=str(result["engine"]),
        precision=str(result["precision"]),
        step=learner.session.described()["step"],
        metrics=result["metrics"],
        code=fingerprints([job.model.name]),
    )


def _by_pillow(learner: Learner) -> dict[str, float]:
    """What Pillow's pixels change; a run does not fail for want of it."""
    assert isinstance(learner.valid, ImageLoader)
    try:
        return by_pillow(learner.valid, outputs_of(learner), step=learner.progress.step)
    except Exception as error:  # a file that has gone, memory
        learner.note(f"what Pillow's pixels would change is not known ({last_line(error)}): the bundle does not say it")
        return {}


def _picture(folder: Root, learner: Learner, result: Result, outcomes: pa.Table) -> None:
    """Report findings, and draw the report. If any of it fails, the run has its result already."""
    assert isinstance(learner.valid, ImageLoader)
    try:
        for line in diagnosis_lines(diagnose(learner.recorder.table())):
            learner.note(line)
        from thawline.cluster.results.report import write_report  # brings matplotlib, which training does not need

        write_report(folder, result, learner.recorder.table(), outcomes, learner.valid, outputs_of=outputs_of(learner))
    except Exception as error:  # a font, a name, a full disk
        why = f"{type(error).__name__}: {last_line(error)}"
        learner.note(f"report.html could not be made ({why}): the result stands without it")


def outputs_of(learner: Learner) -> Callable[[Batch], Tensor]:
    """What the final weights put out for a batch on the CPU, float32, there too. Not collective."""
    session = learner.session

    def outputs(batch: Batch) -> Tensor:
        assert isinstance(batch.inputs, Tensor)
        session.model.eval()
        device, precision = learner.context.device, learner.precision
        with contextlib.nullcontext() if session.ema is None else session.ema.in_place():
            return forward(session.model, (batch.inputs.to(device),), precision=precision, device=device).float().cpu()

    return outputs


def _whose_weights(learner: Learner) -> dict[str, float]:
    """The epoch and step of the final weights: the last, or the best of the last phase."""
    row = learner.session.described()
    return {"weights_epoch": row["epoch"], "weights_step": row["step"]}


def _last_metrics(learner: Learner) -> dict[str, float]:
    """The metrics of the final weights; NaN where one has no value."""
    names = ["train_loss", "valid_loss", *learner.meter.metrics]
    row = learner.session.described()
    return {name: math.nan if row[name] is None else float(row[name]) for name in names}


def _result(job: Job, context: RunContext, learner: Learner, *, status: str, metrics: Mapping[str, float]) -> Result:
    assert isinstance(learner.train, ImageLoader)
    windows = learner.recorder.of_kind("train")
    total = {key: sum(float(row[key] or 0) for row in windows) for key in ("images", "window_s", "data_wait_s")}
    progress = learner.progress
    return {
        "name": job.name,
        "status": status,
        "seed": job.seed,
        "world_size": context.world_size,
        "engine": learner.train.engine,
        "device": str(context.device),
        "precision": learner.precision.name,
        "model": job.model.name,
        **({"decoder": job.model.decoder} if job.model.decoder != Model.decoder else {}),
        **({"code": fingerprints(code_of(job).values())} if code_of(job) else {}),
        "epochs": progress.epochs,
        "appended": len(job.appended),
        "steps": progress.step,
        **({} if learner.stopped else _whose_weights(learner)),
        "checkpoint": learner.keeper.place(progress.step),
        "global_batch": learner.train.global_batch,
        "samples_seen": progress.step * learner.train.global_batch,
        "valid_samples": learner.valid.samples - len(learner.valid.quarantined),
        "quarantined": [str(row["reason"]) for row in learner.recorder.of_kind("quarantine")],
        "metrics": finite(metrics),
        "notes": [
            f"{name} is {value}, which is no number: null in result.json; perhaps no image has a class or point"
            for name, value in metrics.items()
            if not math.isfinite(value)
        ],
        "images_per_s": total["images"] / total["window_s"] if windows else 0.0,
        "data_wait_fraction": total["data_wait_s"] / total["window_s"] if windows else 0.0,
        "train_s": total["window_s"],
        "wall_s": progress.elapsed_s,
        "stream_hash": progress.stream_hash,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "commit": provenance.commit(),
    }
