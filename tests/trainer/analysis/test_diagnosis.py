"""Does each rule speak on the curves that it is for, and only there? Synthetic curves, and trainings on digits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

from thawline.trainer.analysis.diagnosis import Finding, diagnose
from thawline.trainer.records.recorder import to_table

WINDOWS = 10  # an epoch
Curve = Callable[[NDArray[Any]], NDArray[Any]]
HIGH, LOW = "the learning rate was too high", "the learning rate was too low"
FEW, MANY = "the run ended too early (underfitting)", "the run had too many epochs (overfitting)"
NOT_FINITE, WAITING = "the loss is not finite", "training waited for data"


def healthy(x: NDArray[Any]) -> NDArray[Any]:
    return 0.2 + 2.1 * np.exp(-6 * x)


def rows_of(
    train: Curve = healthy,
    valid: Curve | None = None,
    error: Curve | None = None,
    *,
    epochs: int = 10,
    noise: float = 0.05,
    waiting: float = 0.02,
) -> list[dict[str, Any]]:
    """Rows of a run whose curves are these functions of progress in (0, 1]; windows scatter, validations do not."""
    random = np.random.default_rng(5)
    x = np.arange(1, epochs * WINDOWS + 1) / (epochs * WINDOWS)
    losses = train(x) * (1 + noise * random.normal(size=len(x)))
    ends = np.arange(1, epochs + 1) / epochs
    checks = (valid or (lambda x: 1.1 * healthy(x)))(ends)
    errors = (error or (lambda x: 0.05 + 0.85 * np.exp(-6 * x)))(ends)
    rows: list[dict[str, Any]] = []
    for i, loss in enumerate(losses):
        row = {"kind": "train", "epoch": epochs * x[i], "loss": loss, "lr": 1e-3, "momentum": 0.9}
        rows.append({**row, "window_s": 2.0, "data_wait_s": 2 * waiting, "grad_norm": 1.0})
        if i % WINDOWS == WINDOWS - 1:
            at = i // WINDOWS
            mean = losses[at * WINDOWS : i + 1].mean()
            more = {"valid_loss": checks[at], "error_rate": errors[at], "valid_samples": 1000, "valid_s": 1.0}
            rows.append({"kind": "valid", "epoch": at + 1.0, "train_loss": mean, **more})
    return rows


def whats(rows: list[dict[str, Any]]) -> list[str]:
    return [finding.what for finding in diagnose(to_table(rows))]


CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "rises": (HIGH, rows_of(lambda x: 2.3 + 4 * x, noise=0.2)),
    "a peak in the middle": (HIGH, rows_of(lambda x: healthy(x) + 6 * np.exp(-100 * (x - 0.3) ** 2), noise=0.2)),
    "validation jumps": (HIGH, rows_of(lambda x: 2.3 + 0 * x + 0.4 * (x > 0.02), lambda x: np.where(x < 0.2, 48, 2.4))),
    "learns, then loses it": (HIGH, rows_of(lambda x: np.where(x < 0.4, 2.3 - 4 * x, 2.3), lambda x: 2.3 + 0 * x)),
    "blown up by the first step": (
        HIGH,
        rows_of(lambda x: 2.3 + 30 * np.exp(-20 * x), lambda x: 2.4 + 0 * x, lambda x: 0.9 + 0.01 * np.cos(x)),
    ),
    "hardly moves": (LOW, rows_of(lambda x: 2.3 - 0.15 * x, lambda x: 2.3 - 0.15 * x, lambda x: 0.9 - 0.1 * x)),
    "does not move": (LOW, rows_of(lambda x: 2.3 - 0.001 * x, lambda x: 2.3 + 0 * x, lambda x: 0.9 + 0 * x)),
    "still falling": (
        FEW,
        rows_of(lambda x: 2.5 - 1.6 * x, lambda x: 2.3 - 1.6 * x, lambda x: 0.9 - 0.5 * x, epochs=4),
    ),
    "metric gets worse": (
        MANY,
        rows_of(
            lambda x: 2.3 * np.exp(-8 * x),
            lambda x: 0.5 + np.exp(-8 * x),
            lambda x: 0.2 + 2 * (x - 0.4) ** 2,
            epochs=20,
        ),
    ),
    "loss gets worse, metric stays": (
        MANY,
        rows_of(
            lambda x: 2.3 * np.exp(-8 * x),
            lambda x: 0.5 + np.exp(-12 * x) + x**2,
            lambda x: 0.2 + 0.7 * np.exp(-20 * x),
            epochs=20,
        ),
    ),
    "waits": (WAITING, rows_of(waiting=0.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_trouble_is_named_and_nothing_else(case: str) -> None:
    what, rows = CASES[case]
    assert whats(rows) == [what]


HEALTHY: dict[str, list[dict[str, Any]]] = {
    "a plain run": rows_of(),
    "one epoch": rows_of(epochs=1),
    "very noisy windows": rows_of(noise=0.4, epochs=40),
    "dropout: training loss above validation loss": rows_of(valid=lambda x: 0.6 * healthy(x)),
    "a first validation that jumps": rows_of(valid=lambda x: healthy(x) + 9 * (x < 0.15)),
    "good weights to begin with": rows_of(
        lambda x: 0.1 - 0.005 * x, lambda x: 0.12 - 0.005 * x, lambda x: 0.03 + 0 * x
    ),
    "settled at what noisy labels allow": rows_of(
        lambda x: 2.15 + 0.15 * np.exp(-30 * x), lambda x: 2.2 + 0 * x, lambda x: 0.6 + 0 * x, noise=0.01
    ),
    "validation loss rises while the metric gains": rows_of(
        lambda x: 2.3 * np.exp(-8 * x),
        lambda x: 0.5 + np.exp(-12 * x) + x**2,
        lambda x: 0.4 - 0.3 * x,
        epochs=20,
    ),
    "waits in the first window only": [
        {**row, "data_wait_s": 500.0, "window_s": 500.0} if i == 0 else row for i, row in enumerate(rows_of())
    ],
    "so few images that chance hides a gain": [
        {**row, "valid_samples": 12} if row["kind"] == "valid" else row
        for row in rows_of(lambda x: 2.6 - 1.3 * x, lambda x: 1.4 + 0 * x, lambda x: 0.83 - 0.25 * x)
    ],
    "another class joins": rows_of(lambda x: np.where(x < 0.6, 2.7 - 0.7 * x, 3.2), lambda x: 2 + 0 * x),
    "no rows": [],
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_gets_no_word(case: str) -> None:
    assert whats(HEALTHY[case]) == []


def test_an_accuracy_that_falls_is_an_error_that_rises() -> None:
    rows = [
        {
            **{k: v for k, v in row.items() if k != "error_rate"},
            **({"accuracy": 1 - row["error_rate"]} if "error_rate" in row else {}),
        }
        for row in CASES["metric gets worse"][1]
    ]
    (finding,) = diagnose(to_table(rows))
    assert finding.what == MANY
    assert "accuracy was 0.79" in finding.rule


def test_the_published_pets_run_is_healthy() -> None:
    """Twelve unfrozen epochs at slice(1e-6, 1e-4): the error goes up and down by less than its standard error."""
    errors = [0.0717, 0.0677, 0.0670, 0.0717, 0.0710, 0.0663, 0.0697, 0.0677, 0.0710, 0.0704, 0.0683, 0.0690]
    at = np.arange(1, 13) / 12
    rows = rows_of(
        lambda x: 0.5 - 0.25 * x, lambda x: 0.24 - 0.03 * x, lambda x: np.interp(x, at, errors), epochs=12, noise=0.1
    )
    assert whats(rows) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_before_all_else(value: float) -> None:
    rows = rows_of(lambda x: 2.3 + 4 * x)
    rows[-2]["loss"] = value
    (finding,) = diagnose(to_table(rows))
    assert finding.what == NOT_FINITE
    assert finding.rule.startswith("1 of 100 windows of training and 0 of 10 validations")


def test_a_finding_reads_as_a_sentence_with_its_numbers() -> None:
    (finding,) = diagnose(to_table(CASES["waits"][1]))
    assert str(finding) == (
        "training waited for data: 40% of 198.0 s in steps went by before their batch was there (limit 25 %); "
        "decode on the GPU, pack the images (`thawline pack`), or give the loader more threads"
    )
    (finding,) = diagnose(to_table(CASES["validation jumps"][1]))
    assert "in epoch 1 it was 2.6" in finding.rule
    assert "validation loss 48 (limit 4." in finding.rule


# Real runs --------------------------------------------------------------------------------------------------


def trained(lr: float, *, epochs: int, samples: int = 1400, wrong: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a small network on 8 x 8 digits under one cycle; a share of the training labels is wrong."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x = torch.from_numpy(digits.images[order] / 16).float().flatten(1)
    y = torch.from_numpy(digits.target[order])
    valid_x, valid_y, x, y = x[-397:], y[-397:], x[:samples], y[:samples].clone()
    spoilt = torch.rand(samples) < wrong
    y[spoilt] = torch.randint(0, 10, (int(spoilt.sum()),))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    batch = min(32, samples // 5)
    steps = samples // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps * epochs, pct_start=0.25, cycle_momentum=False
    )
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        losses = []
        for part in torch.randperm(samples)[: steps * batch].reshape(steps, batch):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            cycle.step()
            losses.append(loss.item())
            rows.append({"kind": "train", "epoch": epoch - 1 + len(losses) / steps, "loss": losses[-1], "lr": rate})
        with torch.no_grad():
            logits = model(valid_x)
        measured = {
            "valid_loss": F.cross_entropy(logits, valid_y).item(),
            "error_rate": float((logits.argmax(1) != valid_y).float().mean()),
        }
        mean = float(np.mean(losses))
        rows.append({"kind": "valid", "epoch": epoch, "train_loss": mean, "valid_samples": 397, **measured})
    return rows


@pytest.mark.parametrize(
    ("lr", "options", "expected"),
    [
        (1.0, {"epochs": 5}, [HIGH]),
        (10.0, {"epochs": 5}, [HIGH]),
        (1e-5, {"epochs": 5}, [LOW]),
        (1e-4, {"epochs": 5}, [LOW]),
        (1e-2, {"epochs": 8}, []),
        (3e-3, {"epochs": 10}, []),
        (5e-3, {"epochs": 2}, [FEW]),
        (1e-2, {"epochs": 60, "samples": 50, "wrong": 0.2}, [MANY]),
    ],
)
def test_real_runs_on_digits(lr: float, options: dict[str, Any], expected: list[str]) -> None:
    findings: list[Finding] = diagnose(to_table(trained(lr, **options)))
    assert [finding.what for finding in findings] == expected, [str(finding) for finding in findings]
