"""Is a task a record on every floor, and nothing more? One of boxes comes from outside, with no edit to the package."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from tests.kit.images import PLAIN
from thawline.dataio import show
from thawline.dataio.labels.labels import by_column, label
from thawline.dataio.labels.targets import View
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.dataio.table import tasks as kinds
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_table
from thawline.dataio.table.splits import by_function, split
from thawline.models import heads
from thawline.models.classifier import create
from thawline.trainer import tasks as training
from thawline.trainer.learner import Learner
from thawline.trainer.metrics.direction import direction

ROOT = Path(__file__).parents[2]
SIDE = 32


def test_every_task_has_its_record_on_each_floor() -> None:
    assert list(kinds.TASKS) == list(heads.TASKS) == list(training.TASKS) == list(show.DRAWINGS)


def asked_by_name(source: str) -> Iterator[int]:
    """Lines that compare something called task with a name written there, alone or in brackets."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.Match):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.subject]
            words = [side.id if isinstance(side, ast.Name) else getattr(side, "attr", "") for side in sides]
            named = any(isinstance(part, ast.Constant) and part.value in kinds.TASKS for part in ast.walk(node))
            if named and "task" in words:
                yield node.lineno


def test_nobody_asks_for_a_task_by_its_name() -> None:
    planted = "if of.task != 'mask' or task in ('points', other): pass"
    assert list(asked_by_name(planted)) == [1, 1]
    asked = {
        f"{file.relative_to(ROOT)}:{line}"
        for folder in ("dataio", "models", "trainer", "cluster", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        for line in asked_by_name(file.read_text(encoding="utf-8"))
    }
    assert asked == set()


# Boxes: the records ----------------------------------------------------------------------------------------


def read_boxes(labels: kinds.Labels) -> kinds.Column:
    return labels.values, ("box",), ()


def wrong_boxes(labels: pa.Array, classes: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([box is None or len(box) != 4 for box in labels.to_pylist()])


def placed_boxes(labels: pa.Array, view: View) -> NDArray[np.float32]:
    """x0, y0, x1, y1 in px of the image -> in [-1, 1] of what the model sees, (n, 4)."""
    x0, y0, x1, y1 = np.array(labels.to_pylist(), np.float64).T
    corners = np.stack([np.stack([x, y], -1) for x in (x0, x1) for y in (y0, y1)], 1)
    placed = view.geometry.place(corners, size_px=view.size_px)
    return np.concatenate([placed.min(1), placed.max(1)], 1).astype(np.float32)


def box_head(features: int, outputs: int, *, dropout: float = 0.5) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 4 * outputs))


def box_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(outputs.float(), targets, reduction="none").mean(1)


class Overlap(Metric):
    """The mean intersection over union."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        size = torch.minimum(outputs[:, 2:], targets[:, 2:]) - torch.maximum(outputs[:, :2], targets[:, :2])
        both = size.clamp(min=0).prod(1)
        area = (outputs[:, 2:] - outputs[:, :2]).prod(1) + (targets[:, 2:] - targets[:, :2]).prod(1)
        self.total = self.total + (both / (area - both)).sum()
        self.count = self.count + len(targets)

    def compute(self) -> Tensor:
        return self.total / self.count


def box_words(target: Any, classes: tuple[str, ...], size_px: int) -> str:
    return " ".join(f"{at:.1f}" for at in (target + 1) / 2 * size_px)


def draw_box(axes: Axes, target: Any, classes: int) -> None:
    x0, y0, x1, y1 = (target + 1) / 2 * SIDE - 0.5
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False))


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    record = kinds.Task(
        column=pa.list_(pa.float32()),
        read=read_boxes,
        wrong=wrong_boxes,
        targets=placed_boxes,
        option="boxes-column",
        labels_word="boxes",
    )
    monkeypatch.setitem(kinds.TASKS, "boxes", record)
    monkeypatch.setitem(show.DRAWINGS, "boxes", show.Drawing(box_words, draw_box))
    monkeypatch.setitem(heads.TASKS, "boxes", box_head)
    overlap = training.MetricKind(Overlap)
    learned = training.Task(loss=box_loss, metrics=("overlap",), own_metrics=lambda: {"overlap": overlap})
    monkeypatch.setitem(training.TASKS, "boxes", learned)


# Boxes: what they come to ----------------------------------------------------------------------------------


def indexed(folder: Path, *, count: int = 10) -> tuple[Manifest, NDArray[np.float64]]:
    """Black pictures of 64 x 48 px with a white box each, through a file; and the boxes in px."""
    draw = np.random.default_rng(0)
    corners = np.sort(draw.uniform(0, 1, (count, 2, 2)) * (32, 24), axis=1).round() + np.array([[0, 0], [16, 12]])
    rows = []
    for i, ((x0, y0), (x1, y1)) in enumerate(corners.astype(int)):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[y0:y1, x0:x1] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"path": f"{i}.png", "box": [x0, y0, x1, y1]})
    table = label(from_table(pa.Table.from_pylist(rows), root=folder), by_column("box"), task="boxes")
    split(table, by_function(lambda row: row["path"] > "6.png")).save(folder / "m.parquet")
    return Manifest.load(folder / "m.parquet"), corners.reshape(count, 4)


def pair(manifest: Manifest) -> tuple[ImageLoader, ImageLoader]:
    spec = ImageSpec(size_px=SIDE, presize_px=SIDE, **PLAIN, presize="squish")
    return loaders(manifest, spec, batch=7, engine="reference")


@pytest.mark.usefixtures("boxes")
def test_boxes_are_indexed_seen_and_drawn(tmp_path: Path) -> None:
    manifest, corners = indexed(tmp_path)
    assert (manifest.task, manifest.classes) == ("boxes", ("box",))
    assert "1 classes (boxes): box" in manifest.summary()
    _, valid = pair(manifest)
    (batch,) = valid.stream()
    expected = corners[7:] / (64, 48, 64, 48) * 2 - 1
    np.testing.assert_allclose(batch.targets, expected, atol=1e-6)
    x0, y0, x1, y1 = expected[0] * SIDE / 2 + SIDE / 2
    assert f"target     {x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f}\n" in show.explain(valid)
    (drawn,) = show.show_batch(valid, rows=1, cols=1).axes[0].patches
    assert isinstance(drawn, Rectangle)
    np.testing.assert_allclose(drawn.get_xy(), [x0 - 0.5, y0 - 0.5], atol=1e-4)
    np.testing.assert_allclose([drawn.get_width(), drawn.get_height()], [x1 - x0, y1 - y0], atol=1e-4)


@pytest.mark.usefixtures("boxes")
def test_boxes_are_trained_measured_and_written(tmp_path: Path) -> None:
    manifest, corners = indexed(tmp_path)
    train, valid = pair(manifest)
    learner = Learner(create("tiny", 1, task="boxes", weights="none", seed=0), train, valid)
    before = learner.validate()
    learner.fit_one_cycle(8, 1e-2)
    found = learner.predictions()
    assert found is not None
    targets = (corners[7:] / (64, 48, 64, 48) * 2 - 1).astype(np.float32)
    said = found.table(manifest.classes).to_pylist()
    np.testing.assert_allclose([row["target"] for row in said], targets, atol=1e-6)
    outputs = np.array([row["prediction"] for row in said])
    np.testing.assert_allclose(found.losses, np.abs(outputs - targets).mean(1), rtol=1e-4)
    size = np.minimum(outputs[:, 2:], targets[:, 2:]) - np.maximum(outputs[:, :2], targets[:, :2])
    both = np.clip(size, 0, None).prod(1)
    union = (outputs[:, 2:] - outputs[:, :2]).prod(1) + (targets[:, 2:] - targets[:, :2]).prod(1) - both
    after = learner.validate()
    assert after["overlap"] == pytest.approx((both / union).mean(), rel=1e-4)
    assert after["valid_loss"] < before["valid_loss"]
    assert direction("overlap") is True
