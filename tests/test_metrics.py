"""Metrics and losses against plain numpy, in one process and in two with uneven parts."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from trainer.errors import RecipeError
from trainer.losses import default_loss
from trainer.metrics import AccuracyMulti, ErrorRate, Meter, default_metrics

LOGITS = [
    [0.6734, 0.2576],
    [0.4689, 0.4607],
    [-2.2457, -0.3727],
    [4.4164, -1.2760],
    [0.9233, 0.5347],
    [1.0698, 1.6187],
]
CLASSES = 5


def draw(task: str, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, targets, losses) of a mediocre model."""
    random = np.random.default_rng(11)
    logits = torch.from_numpy(random.normal(size=(samples, CLASSES)).astype(np.float32))
    if task == "single_label":
        targets = torch.from_numpy(random.integers(0, CLASSES, samples))
        logits[torch.arange(samples), targets] += 1
    else:
        targets = (logits + torch.from_numpy(random.normal(size=logits.shape)) > 0).float()
    return logits, targets, default_loss(task)(logits, targets)


def count(task: str, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> dict[str, float]:
    """What the metrics must be: numpy, float64."""
    x, y, loss = logits.numpy(), targets.numpy(), float(losses.numpy().astype(np.float64).mean())
    if task == "single_label":
        wrong = int(np.count_nonzero(x.argmax(1) != y))
        return {"valid_loss": loss, "error_rate": wrong / len(y), "accuracy": (len(y) - wrong) / len(y)}
    return {"valid_loss": loss, "accuracy_multi": float(((x > 0) == (y == 1)).mean())}


def test_cross_entropy_equals_the_published_values() -> None:
    losses = default_loss("single_label")(torch.tensor(LOGITS), torch.tensor([0, 1, 0, 1, 1, 0]))
    np.testing.assert_allclose(losses, [0.5067, 0.6973, 2.0160, 5.6958, 0.9062, 1.0048], atol=1e-4)
    assert losses.mean().item() == pytest.approx(1.8045, abs=1e-4)  # the logits are rounded to four digits


def test_binary_cross_entropy_equals_plain_numpy() -> None:
    logits, targets, losses = draw("multi_label", 50)
    p = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    y = targets.numpy()
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_computed_in_float32(task: str, dtype: torch.dtype) -> None:
    logits, targets, _ = draw(task, 20)
    half = logits.to(dtype)
    losses = default_loss(task)(half, targets)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, default_loss(task)(half.float(), targets))


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_metrics_over_uneven_batches_equal_a_numpy_count(task: str) -> None:
    meter = Meter(default_metrics(task, CLASSES)).to(torch.device("cpu"))
    for samples in (359, 101):  # the second pass shows that reset forgets the first
        data = draw(task, samples)
        meter.reset()
        for start in range(0, samples, 64):
            with torch.inference_mode(start == 64):  # as eval_step's outputs are
                meter.update(*(part[start : start + 64].clone() for part in data))
        values = meter.compute()
        expected = count(task, *data)
        assert values == pytest.approx(expected, abs=1e-7)


def test_counts_are_integers_and_stay_exact_beyond_float32() -> None:
    metrics = default_metrics("single_label", 2)
    metrics.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert {s.dtype for m in metrics.values() for s in m.metric_state.values()} == {torch.int64}  # type: ignore[union-attr]
    error = ErrorRate(2, average="micro")
    error.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    error.tp = torch.tensor([2**24 + 3])
    assert error.compute().item() == 1 / (2**24 + 4)
    multi = AccuracyMulti()
    multi.update(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    assert (multi.right.dtype, multi.right.item(), multi.total.item()) == (torch.int64, 2, 3)


def test_the_mean_loss_stays_exact_over_more_samples_than_float32_counts() -> None:
    meter = Meter(default_metrics("single_label", 2))
    ones = torch.ones(2**20)
    for _ in range(17):
        meter.loss.update(ones)
    meter.update(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.tensor([3.0]))
    assert meter.compute()["valid_loss"] == (17 * 2**20 + 3) / (17 * 2**20 + 1)


def test_a_loss_that_is_not_a_number_shows() -> None:
    meter = Meter(default_metrics("single_label", 2))
    meter.update(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1.0, torch.nan]))
    assert np.isnan(meter.compute()["valid_loss"])


def test_a_label_s_verdict_does_not_depend_on_the_batch_it_came_in() -> None:
    """All logits within [0, 1]: a positive logit is still a yes, 0.1 as much as 0.9."""
    logits, targets = torch.tensor([[0.1, 0.9], [0.3, 0.2]]), torch.ones(2, 2)
    metric = default_metrics("multi_label", 2)
    metric.update(logits, targets)
    assert metric.compute()["accuracy_multi"].item() == 1.0


def _rank(rank: int, folder: str, cuts: list[tuple[int, int]]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    answers = []
    for task in ("single_label", "multi_label"):
        data = draw(task, cuts[-1][1])
        for cut in cuts:
            meter = Meter(default_metrics(task, CLASSES))
            first, last = (0, cut[0]) if rank == 0 else cut
            for start in range(first, last, 16):
                meter.update(*(part[start : min(start + 16, last)] for part in data))
            answers.append(meter.compute())
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_uneven_parts_count_every_sample_once(tmp_path: Path) -> None:
    cuts = [
        (180, 359),
        (97, 359),
        (0, 359),
    ]  # rank 0 takes [0, a), rank 1 [a, b); in the last, rank 0 has none
    spawn(_rank, (str(tmp_path), cuts), nprocs=2)  # type: ignore[no-untyped-call]
    ranks: list[Any] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for i, task in enumerate(("single_label", "multi_label")):
        for values in ranks[0][3 * i : 3 * i + 3]:
            assert values == pytest.approx(count(task, *draw(task, 359)), abs=1e-7)


def test_an_unknown_task_gets_a_sentence() -> None:
    for make in (default_loss, lambda task: default_metrics(task, 2)):
        with pytest.raises(RecipeError, match=r"task='boxes'.*give single_label or multi_label"):
            make("boxes")
