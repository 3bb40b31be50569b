"""Does every task go through a whole job: trained, measured, written, told, kept in a bundle, and gone on with?"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.dataio.test_shapes import indexed
from tests.kit.runs import ranks
from thawline import models
from thawline.cluster.errors import LaunchError
from thawline.cluster.job import job as jobs
from thawline.cluster.launch.launch import in_process
from thawline.cluster.run.folder import inspect
from thawline.dataio import ImageSpec, Manifest
from thawline.dataio.stream.loader import loaders
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.direction import direction


def job_of(folder: Path, task: str, **tables: dict[str, Any]) -> jobs.Job:
    if not (folder / f"{task}.parquet").exists():
        indexed(folder / task, task, count=40).save(folder / f"{task}.parquet")
    table: dict[str, Any] = {
        "manifest": str(folder / f"{task}.parquet"),
        "storage": str(folder / "runs"),
        "name": task,
        "data": {"size_px": 32, "presize_px": 64, "global_batch": 10, "engine": "reference"},
        "augment": {"preset": "plain"},
        "model": {"name": "tiny", "weights": "none"},
        "fit": {"recipe": "one_cycle", "epochs": 2},
        "metrics": {"port": 0},
        "device": "cpu",
    }
    for name, values in tables.items():
        table[name] = {**table.get(name, {}), **values}
    return jobs.from_dict(table)


def spoken_by_the_bundle(job: jobs.Job, run: Path) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """(ids, what the bundle's model puts out for the validation images, their targets)."""
    model, about = models.load(run)
    image: dict[str, Any] = dict(about.image)
    _, valid = loaders(Manifest.load(job.manifest), ImageSpec(**image), batch=10, engine="reference")
    with valid, torch.no_grad():
        batches = list(valid.stream())
        outputs = torch.cat([model(batch.inputs) for batch in batches])
    return torch.cat([b.ids for b in batches]).tolist(), outputs, torch.cat([b.targets for b in batches])


def agreement(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """(mIoU, accuracy) of masks, by counting pixels."""
    found, wanted = outputs.argmax(1).numpy(), targets.numpy()
    shares = [
        ((found == c) & (wanted == c)).sum() / ((found == c) | (wanted == c)).sum()
        for c in range(outputs.shape[1])
        if ((found == c) | (wanted == c)).any()
    ]
    return float(np.mean(shares)), float((found == wanted).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "decoder"), [("number", "unet"), ("points", "unet"), ("mask", "unet"), ("mask", "smp:FPN")]
)
def test_a_job_trains_writes_and_bundles_its_task(tmp_path: Path, task: str, decoder: str) -> None:
    if decoder != "unet":
        pytest.importorskip("segmentation_models_pytorch", reason="the extra smp is not installed")
    job = job_of(tmp_path, task, model={"decoder": decoder})
    result = in_process(job)
    told = re.search(r"tiny( under smp:FPN)?, 2 epochs", (tmp_path / "runs" / task / "report.html").read_text())
    assert (result.get("decoder", "unet"), told and told[1]) == (
        decoder,
        " under smp:FPN" * (decoder != "unet") or None,
    )
    run = tmp_path / "runs" / task
    rows = pq.read_table(run / "valid.parquet").to_pylist()
    ids, outputs, targets = spoken_by_the_bundle(job, run)
    assert [row["id"] for row in rows] == ids
    if task == "mask":
        overlap, right = agreement(outputs, targets)
        assert result["metrics"]["jaccard"] == pytest.approx(overlap, rel=1e-4)
        assert np.mean([row["accuracy"] for row in rows]) == pytest.approx(right, rel=1e-4)
        assert set(rows[0]) == {"id", "target", "prediction", "accuracy", "iou", "loss"}, "no masks"
        page = (run / "report.html").read_text()
        assert "validation images, 8, areas are predicted, lines are true" in page
        return
    said = np.array([row["prediction"] for row in rows], np.float32).reshape(outputs.shape)
    np.testing.assert_allclose(said, outputs, rtol=1e-4, atol=1e-5)
    off = (outputs - targets).double().numpy()
    far = np.linalg.norm(off, axis=-1).mean() / 2
    expected = {
        "number": {"mae": np.abs(off).mean(), "rmse": np.sqrt((off**2).mean())},
        "points": {"point_error": far, "point_error_px": far * 32},
    }[task]
    assert {name: result["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    page = (run / "report.html").read_text()
    how = {"number": "each titled", "points": "discs are predicted, crosses are true"}[task]
    assert f"validation images, 8, {how}" in page
    assert json.loads((run / "model/model.json").read_text())["task"] == task


@pytest.mark.slow
def test_numbers_are_said_in_their_units_from_the_first_step_and_within_a_range(tmp_path: Path) -> None:
    """Untrained, a model says about the mean of the training images, whatever that is; never beyond y_range."""
    job = job_of(tmp_path, "number", model={"y_range": [10.0, 30.0]})
    in_process(job)
    _, outputs, _ = spoken_by_the_bundle(job, tmp_path / "runs" / "number")
    assert outputs.min() > 10
    assert outputs.max() < 30
    model = models.create("tiny", 1, task="number", weights="none", seed=0, label_mean=[2026.0], label_std=[5.0])
    with torch.no_grad():
        said = model.eval()(torch.randn(8, 3, 32, 32))
        half = model.bfloat16()(torch.randn(8, 3, 32, 32).bfloat16())
    assert abs(said - 2026).max() < 25
    assert half.dtype == torch.float32
    assert len(half.unique()) == 8, "in half precision, too, years are apart"


@pytest.mark.parametrize(
    ("task", "tables", "error", "told"),
    [
        ("points", {"augment": {"mixup": 0.2}}, LaunchError, "augment.mixup=0.2 with task points.*give augment.mixup"),
        (
            "number",
            {"augment": {"cutmix": 1.0}},
            LaunchError,
            "cutmix=1.0 with task number.*single_label or multi_label",
        ),
        ("mask", {"augment": {"cutmix": 1.0}}, LaunchError, "augment.cutmix=1.0 with task mask.*give augment.cutmix"),
        ("mask", {"fit": {"loss": "focal"}}, RecipeError, "'focal' is for task single_label or multi_label and this"),
        (
            "mask",
            {"model": {"name": "vit_b_32"}, "data": {"size_px": 224, "presize_px": 224}},
            models.ModelError,
            "one",
        ),
        ("number", {"fit": {"loss": "bce"}}, RecipeError, "'bce' is for task single_label or multi_label and this one"),
        ("points", {"model": {"y_range": [0.0, 1.0]}}, models.ModelError, "y_range=.*task='points'.*it is for number"),
        ("number", {"model": {"y_range": [1.0, 1.0]}}, models.ModelError, "y_range=.* has no inside"),
        ("number", {"fit": {"class_weights": "balanced"}}, RecipeError, "class_weights with task='number'"),
    ],
)
def test_what_does_not_fit_a_task_is_told_before_anything_is_trained(
    tmp_path: Path, task: str, tables: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        in_process(job_of(tmp_path, task, **tables))
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))


def test_what_is_chosen_by_knows_which_way_is_better() -> None:
    names = ("mae", "rmse", "r2", "point_error", "point_error_px", "jaccard", "dice")
    assert [name for name in names if direction(name)] == ["r2", "jaccard", "dice"]


@pytest.mark.slow
def test_numbers_mix_and_train_with_every_option_of_a_job(tmp_path: Path) -> None:
    """Two phases, micro-batches, an average of the weights, MixUp, Huber; then the finished run is known again."""
    phases: tuple[dict[str, Any], ...] = (
        {"recipe": "constant", "epochs": 1, "freeze_to": -1},
        {"recipe": "one_cycle", "epochs": 1},
    )
    options = {"accumulate": 2, "ema": 0.5, "loss": "huber", "lr": 3e-3}
    job = job_of(tmp_path, "number", augment={"mixup": 0.3}, fit={"recipe": "fine_tune", "epochs": 5, **options})
    job = replace(job, phases=tuple(jobs.PhaseJob(**phase) for phase in phases))
    result = in_process(job)
    assert result["steps"] == 6
    assert inspect(job) == result


@pytest.mark.slow
@pytest.mark.parametrize("task", ["number", "points", "mask"])
def test_two_ranks_train_a_task_as_one_does(tmp_path: Path, task: str) -> None:
    """BatchNorm stands still and nothing is dropped, so that a rank's part of a batch does not matter."""
    still: dict[str, dict[str, Any]] = {"fit": {"batch_norm": "frozen"}, "model": {"dropout": 0.0}}
    one = in_process(job_of(tmp_path, task, **still))
    job = replace(job_of(tmp_path, task, **still), name="two", workers=2)
    (tmp_path / "two.toml").write_text(jobs.to_toml(job))
    ranks(2, "train", tmp_path / "two.toml")
    two = json.loads((tmp_path / "runs/two/result.json").read_text())
    assert two["world_size"] == 2
    assert two["stream_hash"] == one["stream_hash"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    ids = [pq.read_table(tmp_path / "runs" / name / "valid.parquet")["id"].to_pylist() for name in (task, "two")]
    assert ids[0] == ids[1]
