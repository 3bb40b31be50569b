"""Does `thawline evaluate` measure what a plain count over the model's outputs gives, for every task?"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from tests.cluster.run.test_tasks import agreement, job_of, spoken_by_the_bundle
from tests.kit.runs import thawline
from thawline.cluster.errors import PredictError
from thawline.cluster.job.job import Job
from thawline.cluster.launch.launch import in_process
from thawline.cluster.serve.evaluation import (
    ALL,
    Evaluation,
    chosen_split,
    manifest_for,
    measure,
    most_confused,
    write,
)
from thawline.cluster.serve.evaluation import (
    job_of as job_beside,
)
from thawline.cluster.serve.predictor import Predictor, load
from thawline.dataio.errors import ManifestError
from thawline.dataio.shapes import SETS
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.errors import RecipeError

pytestmark = pytest.mark.slow  # trains a run of each task, once


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """By task, the job of a finished run."""
    folder = tmp_path_factory.mktemp("evaluate")
    jobs = {task: job_of(folder, task, fit={"epochs": 1}) for task in SETS}
    for job in jobs.values():
        in_process(job)
    return jobs


def run_of(job: Job) -> Path:
    return Path(job.storage, job.name)


@pytest.fixture
def predictors(runs: dict[str, Job]) -> Iterator[dict[str, Predictor]]:
    made = {task: load(run_of(job)) for task, job in runs.items()}
    yield made
    for predictor in made.values():
        predictor.close()


def measured(predictor: Predictor, manifest: Manifest, **options: Any) -> Evaluation:
    found, loader = measure(predictor, manifest, **{"split": "valid", "resamples": 0, "batch": 10, **options})
    loader.close()
    return found


def test_the_verb_measures_what_validation_did_and_writes_it_down(runs: dict[str, Job]) -> None:
    run = run_of(runs["single_label"])
    done = thawline("evaluate", run, "--batch", "10", "--metrics", "f_beta(beta=2)")
    assert done.returncode == 0, done.stderr
    said, result = json.loads(done.stdout), json.loads((run / "result.json").read_text())
    assert {name: said[name] for name in ("error_rate", "accuracy")} == {
        name: result["metrics"][name] for name in ("error_rate", "accuracy")
    }
    assert said["loss"] == result["metrics"]["valid_loss"]
    told = json.loads((run / "evaluation.json").read_text())
    assert (told["split"], told["samples"]) == ("valid", 10)
    assert {name: of["value"] for name, of in told["metrics"].items()} == said
    rate = told["metrics"]["error_rate"]
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    rows = pq.read_table(run / "valid.parquet").to_pylist()
    for one, counts in zip(told["classes"], told["confusion"], strict=True):
        for other, count in zip(told["classes"], counts, strict=True):
            assert count == sum((row["target"], row["prediction"]) == (one, other) for row in rows)
    page = (run / "evaluation.html").read_text()
    assert "Hardest validation images, 8" in page
    assert "Confusion" in page


@pytest.mark.parametrize("task", ["multi_label", "number", "points", "mask"])
def test_every_task_is_a_plain_count(runs: dict[str, Job], predictors: dict[str, Predictor], task: str) -> None:
    job = runs[task]
    found = measured(predictors[task], Manifest.load(job.manifest))
    ids, outputs, targets = spoken_by_the_bundle(job, run_of(job))
    assert found.outcomes["id"].to_pylist() == ids
    assert found.confusion is None
    expected: dict[str, float] = {}
    if task == "multi_label":
        true, shares = targets.numpy() > 0.5, outputs.double().sigmoid().numpy()
        expected["f_beta"] = float(f1_score(true, shares > 0.5, average="macro", zero_division=0))
        with_curve = true.any(0) & ~true.all(0)
        expected["roc_auc"] = float(roc_auc_score(true[:, with_curve], shares[:, with_curve]))
        assert [row["images"] for row in found.of_each] == true.sum(0).tolist()
    elif task == "mask":
        expected["jaccard"], expected["accuracy"] = agreement(outputs, targets)
    else:
        off = (outputs - targets).double().numpy()
        each = np.linalg.norm(off, axis=-1).mean(0) / 2 if task == "points" else np.abs(off).mean(0)
        name = "point_error" if task == "points" else "mae"
        expected[name] = float(each.mean())
        assert [row[name] for row in found.of_each] == pytest.approx(each.tolist(), rel=1e-4)
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert [row["name"] for row in found.of_each] == list(Manifest.load(job.manifest).classes)


def test_other_images_are_measured_by_the_classes_that_the_model_knows(
    runs: dict[str, Job], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    predictor, own = predictors["single_label"], Manifest.load(runs["single_label"].manifest)
    assert manifest_for(predictor.about, None, job_beside(run_of(runs["single_label"]) / "model")) == own
    turned = replace(own, classes=own.classes[::-1])
    turned.save(tmp_path / "turned.parquet")
    assert manifest_for(predictor.about, str(tmp_path / "turned.parquet"), None).classes == own.classes
    everything = measured(predictor, own, split=ALL)
    assert everything.samples == 40 > measured(predictor, own).samples
    by_hand = predictor.predict([Path(own.root, path) for path in own.rows["path"].to_pylist()])
    right = [each.prediction == label for each, label in zip(by_hand, own.rows["label"].to_pylist(), strict=True)]
    assert everything.metrics["accuracy"] == pytest.approx(np.mean(right))
    assert everything.outcomes["prediction"].to_pylist() == [each.prediction for each in by_hand]


def test_what_cannot_be_measured_gets_a_sentence(
    runs: dict[str, Job], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    predictor, own = predictors["single_label"], Manifest.load(runs["single_label"].manifest)
    replace(own, classes=("ufo", *own.classes)).save(tmp_path / "more.parquet")
    with pytest.raises(ManifestError, match=r"more.parquet has ufo, .*, and the model knows no ufo: a target would"):
        manifest_for(predictor.about, str(tmp_path / "more.parquet"), None)
    with pytest.raises(ManifestError, match=r"number.parquet is for number, and the model for single_label"):
        manifest_for(predictor.about, runs["number"].manifest, None)
    with pytest.raises(ManifestError, match=r"no manifest was given, and no job lies beside the bundle"):
        manifest_for(predictor.about, None, None)
    assert chosen_split(own, None) == "valid"
    with pytest.raises(ManifestError, match=r"has no test images \(it has train, valid\).*give --split valid"):
        chosen_split(own, "test")
    with pytest.raises(PredictError, match=r"resamples=-1, batch=64"):
        measure(predictor, own, split="valid", resamples=-1)
    with pytest.raises(RecipeError, match=r"'accurcy' is not known"):
        measure(predictor, own, split="valid", metrics=["accurcy"])
    (tmp_path / "file").touch()
    with pytest.raises(PredictError, match=r"cannot take evaluation.json .*give another folder with --out"):
        write(Root.of(str(tmp_path / "file")), {}, "")


def test_the_commonest_mistakes_come_first() -> None:
    assert most_confused([[9, 1, 0], [0, 9, 3], [2, 0, 9]], ("a", "b", "c")) == [
        ("b", "c", 3),
        ("c", "a", 2),
        ("a", "b", 1),
    ]
    assert most_confused([[1, 0], [0, 1]], ("a", "b")) == []
