"""The default losses against their closed forms in plain numpy, with hard, mixed and smoothed labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.own_code import forget, write_nets
from thawline.models.errors import CodeError
from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.named import default_loss, named_loss

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
        ("points", 0.1, r"label_smoothing=0\.1 with task='points' and loss mse"),
        ("boxes", 0.0, r"task='boxes' has no default loss"),
    ],
)
def test_a_loss_that_cannot_be_gets_a_sentence(task: str, share: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        default_loss(task, label_smoothing=share)


# By name --------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits.astype(np.float64)))


def of_one_label(name: str, logits: np.ndarray, soft: np.ndarray) -> np.ndarray:
    if name == "focal":
        return -(soft * (1 - softmax(logits)) ** 2 * log_softmax(logits.astype(np.float64))).sum(1)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return -(soft * np.log(p) + (1 - soft) * np.log(1 - p)).mean(1)


@pytest.mark.parametrize("name", ["focal", "bce"])
def test_losses_of_one_label_take_indices_shares_and_smoothing(name: str) -> None:
    logits, hard, soft = drawn()
    loss = named_loss(name, task="single_label")
    one = loss(torch.from_numpy(logits), torch.from_numpy(hard))
    np.testing.assert_allclose(one, of_one_label(name, logits, np.eye(CLASSES)[hard]), rtol=2e-5, atol=1e-6)
    mixed = loss(torch.from_numpy(logits), torch.from_numpy(soft.astype(np.float32)))
    np.testing.assert_allclose(mixed, of_one_label(name, logits, soft), rtol=2e-5, atol=1e-6)
    smooth = named_loss(name, task="single_label", label_smoothing=0.1)(
        torch.from_numpy(logits), torch.from_numpy(hard)
    )
    spread = 0.9 * np.eye(CLASSES)[hard] + 0.1 / CLASSES
    np.testing.assert_allclose(smooth, of_one_label(name, logits, spread), rtol=2e-5, atol=1e-6)


def test_losses_of_several_labels_equal_their_papers() -> None:
    """Focal: Lin et al., eq. 5 with alpha .25 and gamma 2. Asymmetric: Ben-Baruch et al., eq. 7, gammas 4 and 1."""
    logits, hard, _ = drawn()
    y = np.eye(CLASSES)[hard]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    shifted = np.maximum(p - 0.05, 0)
    expected = {
        "focal": -(0.25 * y * (1 - p) ** 2 * np.log(p) + 0.75 * (1 - y) * p**2 * np.log(1 - p)),
        "asymmetric": -(y * (1 - p) * np.log(p) + (1 - y) * shifted**4 * np.log(1 - shifted)),
    }
    for name, losses in expected.items():
        found = named_loss(name, task="multi_label")(torch.from_numpy(logits), torch.from_numpy(y))
        np.testing.assert_allclose(found, losses.mean(1), rtol=2e-5, atol=1e-6)


DIFFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mse": lambda x: x**2,
    "l1": abs,
    "huber": lambda x: np.where(abs(x) < 1, x**2 / 2, abs(x) - 0.5),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_losses_of_numbers_do_not_depend_on_their_units(name: str) -> None:
    draw = np.random.default_rng(2)
    outputs, targets = draw.normal(size=(9, 2)), draw.normal(size=(9, 2))
    expected = DIFFERENCES[name](outputs - targets).mean(1)
    units, offset = np.array([1000.0, 0.5]), np.array([20000.0, -3.0])
    loss = named_loss(name, task="number", scale=(1000.0, 0.5))
    found = loss(*(torch.from_numpy((each * units + offset).astype(np.float32)) for each in (outputs, targets)))
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    with pytest.raises(RecipeError, match=r"label_smoothing=0\.1 with task='number' and loss"):
        named_loss(name, task="number", label_smoothing=0.1)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_points_that_the_image_does_not_show_cost_nothing(name: str) -> None:
    """One is not there, one was left outside by the crop; of a sample that shows none, the loss is 0."""
    outputs = torch.tensor([[[0.5, -0.5], [0.2, 0.1], [0.9, 0.9]], [[0.1, 0.1]] * 3], requires_grad=True)
    nowhere = [float("nan"), float("nan")]
    targets = torch.tensor([[[0.25, -2 / 3], nowhere, [1.56, 0.9]], [nowhere] * 3])
    losses = named_loss(name, task="points")(outputs, targets)
    assert losses.tolist() == pytest.approx([DIFFERENCES[name](np.array([0.25, 1 / 6])).mean(), 0.0], rel=1e-5)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert (outputs.grad != 0).nonzero().tolist() == [[0, 0, 0], [0, 0, 1]]


def test_losses_of_masks_count_the_pixels_that_have_a_class() -> None:
    draw = np.random.default_rng(4)
    logits, mask = draw.normal(size=(3, 4, 5, 6)).astype(np.float32), draw.integers(0, 3, (3, 5, 6))
    mask[0, :2], mask[2] = 255, 255
    p, entropy, overlap = softmax(logits), list[float](), list[float]()
    for scores, wanted in zip(p, mask, strict=True):
        kept = wanted != 255
        each = [-np.log(scores[wanted[at], *at]) for at in zip(*np.nonzero(kept), strict=True)]
        entropy.append(float(np.mean(each)) if each else 0.0)
        shares = []
        for c in np.unique(wanted[kept]):
            said, true = scores[c][kept], wanted[kept] == c
            shares.append(1 - 2 * said[true].sum() / (said.sum() + true.sum()))
        overlap.append(float(np.mean(shares)) if shares else 0.0)
    assert entropy[2] == overlap[2] == 0
    both = [a + b for a, b in zip(entropy, overlap, strict=True)]
    for name, expected in {"cross_entropy": entropy, "dice": overlap, "cross_entropy_dice": both}.items():
        found = named_loss(name, task="mask")(torch.from_numpy(logits), torch.from_numpy(mask))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("dice", "single_label", "'dice' is for task mask and this one is single_label.*give auto, cross_entropy, bce"),
        ("cross_entropy", "multi_label", "is for task single_label or mask and this one is multi_label"),
        ("l2", "number", "'l2' is not known and this one is number: .*give auto, mse, l1, huber"),
    ],
)
def test_a_loss_that_is_not_the_tasks_gets_a_sentence(name: str, task: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        named_loss(name, task=task)


def test_an_own_loss_that_raises_or_teaches_nothing_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad_losses.py").write_text(
        "def wrong(outputs, targets):\n    return outputs @ targets\n\n"
        "def detached(outputs, targets):\n    return outputs.detach().sum(1)\n\n"
        'def full(outputs, targets):\n    raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")\n'
    )
    outputs, targets = torch.ones(2, 3, requires_grad=True), torch.zeros(2)

    def call(name: str) -> None:
        named_loss(f"python:bad_losses:{name}", task="single_label")(outputs, targets)

    with pytest.raises(
        CodeError, match=r"raised RuntimeError: size mismatch.*bad_losses\.py, line 2\): .*mend it there"
    ):
        call("wrong")
    with pytest.raises(RecipeError, match="detached gave losses without gradients"):
        call("detached")
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):  # the step is taken again in smaller pieces
        call("full")


def test_ones_own_loss_is_checked_and_given_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    write_nets(tmp_path)
    logits, hard, _ = drawn()
    outputs, targets = torch.from_numpy(logits), torch.from_numpy(hard)
    ours = named_loss("cross_entropy", task="single_label", label_smoothing=0.1)(outputs, targets)
    own = named_loss("python:nets:loss", task="single_label", label_smoothing=0.1)
    assert torch.equal(own(outputs, targets), ours)
    device = torch.device("cpu")
    twice = named_loss("python:nets:Weighted", task="a task of one's own", device=device)(outputs, targets)
    assert torch.equal(twice, 2 * named_loss("cross_entropy", task="single_label")(outputs, targets))
    for name, options, error, said in (
        ("nets:one_number", {}, RecipeError, rf"gave \(\) for {len(targets)} samples: .*one loss a sample"),
        ("nets:Weighted", {"label_smoothing": 0.1}, RecipeError, "label_smoothing=0.1"),
        (
            "nets:loss",
            {"class_weights": torch.ones(3)},
            RecipeError,
            "no weights by class.* give it an argument class_weights",
        ),
        ("nets:los", {}, CodeError, "did you mean 'loss'"),
        ("math:pi", {}, CodeError, "is a float and no function"),
    ):
        with pytest.raises(error, match=said):
            named_loss(f"python:{name}", task="single_label", **options)(outputs, targets)
