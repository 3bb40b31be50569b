"""The default losses against their closed forms in plain numpy, with hard, mixed and smoothed labels."""

from typing import Any

import numpy as np
import pytest
import torch

from thawline.trainer.errors import RecipeError
from thawline.trainer.losses import default_loss

# ../shared/fastai.md's check values.
LOGITS = [[0.6734, 0.2576], [0.4689, 0.4607], [-2.2457, -0.3727], [4.4164, -1.2760], [0.9233, 0.5347], [1.0698, 1.6187]]
TARGETS = [0, 1, 0, 1, 1, 0]
PER_ITEM = [0.5067, 0.6973, 2.0160, 5.6958, 0.9062, 1.0048]
CLASSES = 7


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def drawn(count: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits (N, C) float32, hard targets (N,), soft targets (N, C) of two classes a sample)."""
    draw = np.random.default_rng(3)
    hard, other, share = draw.integers(CLASSES, size=count), draw.integers(CLASSES, size=count), draw.random((count, 1))
    soft = share * np.eye(CLASSES)[hard] + (1 - share) * np.eye(CLASSES)[other]
    return 3 * draw.normal(size=(count, CLASSES)).astype(np.float32), hard, soft


def smoothed(logits: np.ndarray, soft: np.ndarray, share: float) -> np.ndarray:
    """Cross-entropy with targets (1 - share) y + share / C, float64."""
    targets = (1 - share) * soft + share / logits.shape[1]
    return -(targets * log_softmax(logits.astype(np.float64))).sum(axis=1)


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_gives_fastais_check_values(soft: bool) -> None:
    targets = torch.eye(2)[TARGETS] if soft else torch.tensor(TARGETS)
    losses = default_loss("single_label")(torch.tensor(LOGITS), targets)
    np.testing.assert_allclose(losses, PER_ITEM, atol=1e-4)  # the logits are rounded to four digits
    assert losses.mean().item() == pytest.approx(1.8045, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_smoothed_cross_entropy_equals_the_closed_form(share: float) -> None:
    logits, hard, soft = drawn()
    loss = default_loss("single_label", label_smoothing=share)
    one = loss(torch.from_numpy(logits), torch.from_numpy(hard))
    assert one.shape == (40,)
    np.testing.assert_allclose(one, smoothed(logits, np.eye(CLASSES)[hard], share), rtol=1e-5)
    other = loss(torch.from_numpy(logits), torch.from_numpy(soft.astype(np.float32)))
    np.testing.assert_allclose(other, smoothed(logits, soft, share), rtol=1e-5)


def test_smoothing_of_the_check_values_is_worked_out_by_hand() -> None:
    """Two classes: 0.9 of the label's loss and 0.05 of either class's more, from softmax alone."""
    (a, b), share = LOGITS[0], 0.1
    p = np.exp(a) / (np.exp(a) + np.exp(b))
    expected = -(0.95 * np.log(p) + 0.05 * np.log(1 - p))
    losses = default_loss("single_label", label_smoothing=share)(torch.tensor(LOGITS), torch.tensor(TARGETS))
    assert losses[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smoothed_losses_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, hard, _ = drawn()
    half, loss = torch.from_numpy(logits).to(dtype), default_loss("single_label", label_smoothing=0.1)
    losses = loss(half, torch.from_numpy(hard))
    assert losses.dtype == torch.float32
    assert torch.equal(losses, loss(half.float(), torch.from_numpy(hard)))


@pytest.mark.parametrize(
    ("task", "share", "told"),
    [
        ("single_label", 1.0, r"label_smoothing=1\.0 is out of range: .*give 0 <= label_smoothing < 1"),
        ("single_label", -0.1, r"label_smoothing=-0\.1 is out of range"),
        ("single_label", float("nan"), "label_smoothing=nan is out of range"),
        ("multi_label", 0.1, r"label_smoothing=0\.1 with task='multi_label'.*give 0"),
        ("points", 0.0, r"task='points' has no default loss"),
    ],
)
def test_a_loss_that_cannot_be_gets_a_sentence(task: str, share: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        default_loss(task, label_smoothing=share)
