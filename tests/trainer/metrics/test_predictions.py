"""Does a prediction say what the model says, for every task? Against numpy alone."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kit.toy import SIDE_PX, learner, loader
from thawline.trainer.errors import RecipeError
from thawline.trainer.learner import Learner
from thawline.trainer.losses.named import named_loss
from thawline.trainer.metrics.predictions import Predictions, average
from thawline.trainer.schedule.phases import one_cycle_phases

N, K = 9, 2
NAMES = ("ape", "bee", "cat")
NAN = float("nan")


class Bare(nn.Module):
    """Images to masks (N, 3, 4, 4), or to points (N, K, 2)."""

    def __init__(self, *, points: bool) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 1)
        flat = (nn.Flatten(), nn.Linear(3 * SIDE_PX**2, 2 * K), nn.Unflatten(1, (K, 2)))
        self.head = nn.Sequential(*flat if points else ())

    def groups(self) -> list[list[nn.Module]]:
        return [[self.body], [self.head]]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def trained(task: str, targets: Tensor, loss: Any) -> tuple[Learner, np.ndarray]:
    """A learner over N images with these targets, and its model's bare outputs in float64."""
    torch.manual_seed(3)
    images = 3 * torch.randn(N, 3, SIDE_PX, SIDE_PX)
    options: dict[str, Any] = {"task": task}
    options["classes"] = NAMES if task == "mask" else NAMES[:K]
    train, valid = (loader(images, targets, train=train, **options) for train in (True, False))
    subject = learner(model=Bare(points=task == "points"), data=(train, valid), loss=loss)
    with torch.no_grad():
        return subject, subject.model.eval()(valid.inputs).double().numpy()


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=255).mean((1, 2))


def point_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().nanmean((1, 2)).nan_to_num()


def test_a_pixels_probabilities_are_a_softmax_over_its_classes() -> None:
    targets = torch.randint(3, (N, SIDE_PX, SIDE_PX), generator=torch.Generator().manual_seed(1))
    targets[0, :2], targets[1] = 255, 255
    subject, logits = trained("mask", targets, mask_loss)
    found = subject.predictions()
    assert found is not None
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4)
    rows = found.table(NAMES).to_pylist()
    for row, target, scores in zip(rows, targets.numpy(), logits, strict=True):
        right = [p == t for p, t in zip(scores.argmax(0).ravel(), target.ravel(), strict=True) if t != 255]
        assert row["accuracy"] == (pytest.approx(sum(right) / len(right)) if right else None)
        assert row["target"] == [NAMES[k] for k in range(3) if k in target]
        assert row["prediction"] == [NAMES[k] for k in range(3) if k in scores.argmax(0)]
        counts, said = target != 255, scores.argmax(0)
        each = [
            ((said == k) & (target == k))[counts].sum() / ((said == k) | (target == k))[counts].sum()
            for k in range(3)
            if ((said == k) | (target == k))[counts].any()
        ]
        assert row["iou"] == (pytest.approx(float(np.mean(each))) if each else None)
    told = subject.fit(one_cycle_phases(1, 1e-9), predict=True)  # which keeps counts, not masks
    assert told is not None
    assert told.probabilities.shape == (N, 3, 4)
    short = told.table(NAMES).drop_columns("loss").to_pylist()
    assert short == found.table(NAMES).drop_columns("loss").to_pylist()
    assert rows[1]["target"] == []
    counted = (targets != 255).sum((1, 2)).numpy()
    shares = np.array([row["accuracy"] or 0 for row in rows])
    assert (shares * counted).sum() / counted.sum() == pytest.approx(subject.validate()["accuracy"], abs=1e-6)


def test_points_are_coordinates_with_their_distances() -> None:
    targets = torch.randn(N, K, 2, generator=torch.Generator().manual_seed(1))
    targets[0, 1], targets[1] = NAN, NAN
    subject, outputs = trained("points", targets, point_loss)
    found = subject.predictions()
    assert found is not None
    np.testing.assert_allclose(found.probabilities, outputs, rtol=1e-4)
    rows = found.table(NAMES[:K]).to_pylist()
    for row, target, said in zip(rows, targets.double().numpy(), outputs, strict=True):
        far = [((x - u) ** 2 + (y - v) ** 2) ** 0.5 for (x, y), (u, v) in zip(target, said, strict=True)]
        known = [d for d in far if d == d]
        assert row["distance"] == [pytest.approx(d, rel=1e-4) if d == d else None for d in far]
        assert row["mean_distance"] == (pytest.approx(sum(known) / len(known), rel=1e-4) if known else None)
        assert row["farthest"] == (NAMES[far.index(max(known))] if known else None)
        assert row["target"] == [None if x != x else [pytest.approx(x), pytest.approx(y)] for x, y in target]
        assert row["prediction"] == [[pytest.approx(x, rel=1e-4), pytest.approx(y, rel=1e-4)] for x, y in said]
    assert rows[1]["distance"] == [None, None]


@pytest.mark.parametrize(("task", "shape"), [("points", (N, K, 2)), ("mask", (N, SIDE_PX, SIDE_PX))])
def test_views_of_what_lies_elsewhere_in_each_are_not_averaged(task: str, shape: tuple[int, ...]) -> None:
    targets = torch.zeros(shape, dtype=torch.float32 if task == "points" else torch.int64)
    subject, _ = trained(task, targets, point_loss if task == "points" else mask_loss)
    with pytest.raises(RecipeError, match=rf"^tta with task='{task}': each augmented view .* use predictions\(\)"):
        subject.tta()


def test_outputs_that_are_none_of_the_tasks_have_no_table() -> None:
    targets, heat = np.zeros((2, K, 2), np.float32), np.zeros((2, K, 7, 7), np.float32)
    found = Predictions(np.arange(2), targets, heat, np.zeros(2, np.float32), "points")
    with pytest.raises(RecipeError, match=r"^outputs of shape \(2, 2, 7, 7\) for targets of shape \(2, 2, 2\) and 2"):
        found.table(NAMES[:K])


def test_a_task_without_a_record_is_written_as_it_is() -> None:
    ratings, said = np.array([1.5, 4.0], np.float32), np.array([[2.0], [3.5]], np.float32)
    rows = Predictions(np.array([3, 7]), ratings, said, np.array([0.25, 0.25], np.float32), "rating").table(("stars",))
    assert rows.to_pylist() == [
        {"id": 3, "target": 1.5, "prediction": [2.0], "loss": 0.25},
        {"id": 7, "target": 4.0, "prediction": [3.5], "loss": 0.25},
    ]


def test_numbers_are_said_as_they_are_and_averaged_over_views() -> None:
    targets = np.array([[1.5], [4.0]], np.float32)
    said = [np.array([[2.0], [3.5]], np.float32), np.array([[4.0], [3.5]], np.float32)]
    plain, view = (Predictions(np.arange(2), targets, each, np.zeros(2, np.float32), "number") for each in said)
    expected = {"id": 0, "target": 1.5, "prediction": 2.0, "error": 0.5, "loss": 0.0}
    assert plain.table(("age",)).to_pylist()[0] == expected
    mixed = average(plain, [view], beta=0.25, loss=named_loss("l1", task="number", scale=(10.0,)))
    np.testing.assert_allclose(mixed.probabilities, [[3.5], [3.5]])
    np.testing.assert_allclose(mixed.losses, [0.2, 0.05], rtol=1e-6)
    ones = np.ones((1, 2), np.float32)
    pair = Predictions(np.arange(1), ones, np.zeros((1, 2), np.float32), ones[:, 0], "number")
    assert pair.table(("a", "b")).to_pylist()[0]["error"] == [-1.0, -1.0]
