"""Are the measures of each class those of scikit-learn, or of a plain count?"""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from thawline.trainer.metrics import of_each
from thawline.trainer.metrics.masks import counted
from thawline.trainer.metrics.names import IGNORED

NAMES = ("a", "b", "c", "d")
RANDOM = np.random.default_rng(5)


def test_classes_are_counted_as_scikit_learn_does() -> None:
    targets, probabilities = RANDOM.integers(0, 3, 50), RANDOM.dirichlet(np.ones(4), 50)
    probabilities[:, 3] = 0  # a class that nobody has, and nobody predicts
    predicted = probabilities.argmax(1)
    rows = of_each.one_label(targets, probabilities, NAMES)
    precision, recall, f1, support = precision_recall_fscore_support(
        targets, predicted, labels=range(4), zero_division=np.nan
    )
    for i, row in enumerate(rows):
        expected = {"images": support[i], "recall": recall[i], "precision": precision[i], "f1": f1[i]}
        assert {key: row[key] for key in expected} == pytest.approx(expected, nan_ok=True)
        assert row["name"] == NAMES[i]
    np.testing.assert_array_equal(
        of_each.confusion(targets, probabilities, NAMES), confusion_matrix(targets, predicted, labels=range(4))
    )


def test_several_labels_are_counted_one_by_one() -> None:
    targets, probabilities = RANDOM.integers(0, 2, (40, 4)).astype(np.float32), RANDOM.random((40, 4))
    precision, recall, f1, support = precision_recall_fscore_support(targets, probabilities > 0.5)
    rows = of_each.several_labels(targets, probabilities, NAMES)
    for column, expected in (("recall", recall), ("precision", precision), ("f1", f1), ("images", support)):
        np.testing.assert_allclose([row[column] for row in rows], expected)


def test_numbers_and_points_are_plain_means() -> None:
    targets, outputs = RANDOM.normal(2000, 5, (30, 4)).astype(np.float32), RANDOM.normal(2000, 5, (30, 4))
    rows = of_each.numbers(targets, outputs, NAMES)
    for i, row in enumerate(rows):
        errors = outputs[:, i] - targets[:, i]
        assert (row["mae"], row["rmse"]) == pytest.approx((np.abs(errors).mean(), np.sqrt((errors**2).mean())))
    places, said = RANDOM.uniform(-1, 1, (30, 4, 2)).astype(np.float32), RANDOM.uniform(-1, 1, (30, 4, 2))
    places[:10, 1] = np.nan  # not there
    places[5, 2] = (1.5, 0)  # outside the image as the model sees it
    places[:, 3] = np.nan
    rows = of_each.points(places, said, NAMES)
    assert [row["images"] for row in rows] == [30, 20, 29, 0]
    kept = [i for i in range(30) if i != 5]
    expected = [np.linalg.norm(said[k, i] - places[k, i], axis=1).mean() / 2 for i, k in ((0, slice(30)), (2, kept))]
    assert [rows[0]["point_error"], rows[2]["point_error"]] == pytest.approx(expected)
    assert np.isnan(rows[3]["point_error"])


def test_masks_are_counted_by_pixels() -> None:
    scores, masks = RANDOM.normal(size=(6, 4, 5, 7)), RANDOM.integers(0, 3, (6, 5, 7))
    masks[0, 0], masks[1] = IGNORED, 0
    counts, _ = counted(torch.from_numpy(scores), torch.from_numpy(masks))
    rows = of_each.masks(np.zeros(6), counts.numpy(), NAMES)
    valid, predicted = masks != IGNORED, scores.argmax(1)
    for i, row in enumerate(rows):
        true, said = (masks == i) & valid, (predicted == i) & valid
        assert row["images"] == sum(true.any((1, 2)))
        assert row["iou"] == pytest.approx((true & said).sum() / (true | said).sum())
        if i < 3:
            assert row["recall"] == pytest.approx((true & said).sum() / true.sum())
            assert row["precision"] == pytest.approx((true & said).sum() / said.sum())
    assert np.isnan(rows[3]["recall"])
