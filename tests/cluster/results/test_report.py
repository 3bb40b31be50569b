"""What does the page of a run say? Its numbers, every metric, and the diagnosis where there is one."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.images import flat_manifest
from thawline.cluster.results.report import _by_class, write_report
from thawline.dataio.batch import Batch
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import loaders
from thawline.trainer.metrics.predictions import Predictions
from thawline.trainer.records.recorder import to_table

CLASSES = ("under_$50", "over_$50", r"\frac{$x")
"""To matplotlib, text between two $ is a formula, which these are not."""


def nothing(batch: Batch) -> torch.Tensor:
    """Rows of labels have all of a prediction."""
    raise AssertionError


def page_of(folder: Path, *, slope: float) -> str:
    """The text of a report over three validation images and five epochs whose training loss goes this way."""
    manifest = flat_manifest(folder / "images", train=4, valid=3)
    train, valid = loaders(manifest, ImageSpec(size_px=16), batch=2, engine="reference")
    rows: list[dict[str, Any]] = []
    for epoch in range(1, 6):
        loss = 2.0 + slope * epoch
        rows.append({"kind": "train", "epoch": float(epoch), "loss": loss, "lr": 1e-3, "momentum": 0.9})
        row = {"kind": "valid", "epoch": float(epoch), "train_loss": loss, "valid_loss": loss, "valid_s": 1.0}
        rows.append(
            {
                **row,
                "error_rate": 1 - epoch / 10,
                "f_beta_beta_2": epoch / 8 if epoch > 1 else None,
                "auroc_$1_$": math.nan,
            }
        )
    metrics = {"valid_loss": loss, "error_rate": 0.5, "f_beta_beta_2": 0.625, "auroc_$1_$": None}
    numbers = {"images_per_s": 100.0, "data_wait_fraction": 0.01, "wall_s": 5.0, "world_size": 1, "epochs": 5}
    words = {"name": "pets", "model": "resnet18", "status": "finished", "engine": "reference", "device": "cpu"}
    more = {"precision": "fp32", "seed": 1, "steps": 5, "samples_seen": 10, "stream_hash": "ab", "commit": "cd"}
    result = {**numbers, **words, **more, "metrics": metrics, "valid_samples": 3, "versions": {}, "hardware": {}}
    ids = valid.subset.ids
    eye = [[0.8, 0.1, 0.1]] * len(ids)
    zeros, losses = np.zeros(len(ids), np.int64), np.full(len(ids), 0.2, np.float32)
    outcomes = Predictions(ids, zeros, np.array(eye, np.float32), losses, "single_label").table(CLASSES)
    write_report(Root.of(folder), result, to_table(rows), outcomes, valid, outputs_of=nothing)
    train.close()
    valid.close()
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("slope", [1.0, -0.3])
def test_the_page_tells_every_metric_and_a_diagnosis_where_there_is_one(tmp_path: Path, slope: float) -> None:
    page = page_of(tmp_path, slope=slope)
    assert re.findall(r"<tr><th>epoch</th>(.*)</tr>", page) == [
        "".join(
            f"<th>{name}</th>" for name in ("train_loss", "valid_loss", "error_rate", "auroc_$1_$", "f_beta_beta_2")
        )
    ]
    assert "<td>0.900000</td><td>nan</td><td></td>" in page, "the first epoch has no f_beta"
    assert "<b>0.6250</b><span>f_beta_beta_2, over 3 images" in page
    assert "<b>no number</b><span>auroc_$1_$, over 3 images" in page
    assert page.count("data:image/png;base64,") == 9
    alts = re.findall(r'<img src="[^"]*" alt="([^"]*)"', page)
    assert alts[0].startswith(f"Loss by epoch: training from {2 + slope:.3g} to {2 + 5 * slope:.3g} (between ")
    assert alts[2] == "Validation metric by epoch: error_rate from 0.9 to 0.5 (between 0.5 and 0.9)"
    assert alts[7] == "Evenly spaced validation images, 3, each titled prediction / truth: 3 right, 0 wrong"
    assert len(set(alts)) == page.count("<img ") == 9, "every picture says what it shows"
    found = re.findall(r"<li><b>(.*?)</b> (.*?)\. <i>", page)
    expected = [("The learning rate was too high.", "Training loss began at 3 and rose to 6.5 (limit 4.5)")]
    assert found == (expected if slope > 0 else [])
    assert ("What the curves show" in page) == (slope > 0)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_recall_by_class_is_a_plain_count(task: str) -> None:
    ids, classes = np.arange(4), ("cat", "dog", "owl")
    said = np.array([[0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.1, 0.7, 0.0], [0.9, 0.2, 0.0]], np.float32)
    single = task == "single_label"
    targets = np.array([0, 1, 1, 0]) if single else np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]], np.float32)
    outcomes = Predictions(ids, targets, said, np.zeros(4, np.float32), task).table(classes)
    expected = [("dog", 2, 1), ("cat", 2, 2)] if single else [("dog", 3, 2), ("cat", 3, 3)]
    assert _by_class(outcomes) == expected
