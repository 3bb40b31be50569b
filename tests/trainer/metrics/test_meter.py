"""Metrics and losses against plain numpy and scikit-learn, in one process and in several with uneven parts."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn import metrics as sk
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from tests.kit.ranks import processes
from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.named import default_loss
from thawline.trainer.metrics.meter import Meter, build, default_metrics, recalls
from thawline.trainer.metrics.names import IGNORED
from thawline.trainer.metrics.states import ErrorRate, PointError
from thawline.trainer.tasks import TASKS

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


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_the_recall_of_each_class_is_scikit_learns(task: str) -> None:
    logits, targets, losses = draw(task, 90)
    if task == "single_label":
        targets = targets % (CLASSES - 1)  # nobody has the last class
        expected = sk.recall_score(targets, logits.argmax(1), labels=range(CLASSES), average=None, zero_division=np.nan)
    else:
        expected = sk.recall_score(targets, logits > 0, average=None)
    meter = Meter(default_metrics(task, CLASSES), recalls=recalls(task, CLASSES))
    for part in (slice(0, 64), slice(64, 90)):
        meter.update(logits[part], targets[part], losses[part])
    np.testing.assert_allclose(meter.compute_recalls() or [], expected)
    assert recalls("points", CLASSES) is None


def test_counts_are_integers_and_stay_exact_beyond_float32() -> None:
    metrics = default_metrics("single_label", 2)
    metrics.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert {s.dtype for m in metrics.values() for s in m.metric_state.values()} == {torch.int64}  # type: ignore[union-attr]
    error = ErrorRate(2, average="micro")
    error.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    error.tp = torch.tensor([2**24 + 3])
    assert error.compute().item() == 1 / (2**24 + 4)
    points = PointError(2)
    points.update(torch.zeros(1, 1, 2), torch.tensor([[[2.0, torch.nan]]]))
    points.total, points.count = points.total + 2.0**53, points.count + 2**24
    assert points.compute().item() == (2.0**53 + 4) / (2**24 + 1)


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


def of_numbers(task: str, x: Any, y: Any) -> dict[str, float]:
    """Those of numbers and of points, (N, C) or (N, K, 2)."""
    if task == "number":
        return {
            "mae": sk.mean_absolute_error(y, x),
            "rmse": float(np.sqrt(sk.mean_squared_error(y, x))),
            "r2": sk.r2_score(y, x),
            "mean_absolute_percentage_error": sk.mean_absolute_percentage_error(y, x),
        }
    off = (x - y)[~np.isnan(y)]
    far = float(np.nanmean(np.hypot(*np.moveaxis(x - y, -1, 0))))
    errors = {"point_error": far / 2, "point_error_px_side_px_64": far / 2 * 64}
    return {"mse": float((off**2).mean()), "mae": float(np.abs(off).mean()), **errors}


def oracle(task: str, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Every name of NAMES by scikit-learn or plain numpy, in float64."""
    x, y = outputs.numpy().astype(np.float64), targets.numpy()
    if task in ("points", "number"):
        return of_numbers(task, x, y.astype(np.float64))
    if task == "multi_label":
        p = 1 / (1 + np.exp(-x))
        y = (y > 0.5).astype(int)
        yes = p > 0.5
        curves = [c for c in range(CLASSES) if 0 < y[:, c].sum() < len(y)]
        return {
            "accuracy_multi": float((yes == y).mean()),
            "accuracy_multi_threshold_0_2": float(((p > 0.2) == y).mean()),
            "f_beta": sk.fbeta_score(y, yes, beta=1, average="macro", zero_division=0),
            "f_beta_beta_2_threshold_0_3": sk.fbeta_score(y, p > 0.3, beta=2, average="macro", zero_division=0),
            "precision": sk.precision_score(y, yes, average="macro", zero_division=0),
            "recall_average_micro": sk.recall_score(y, yes, average="micro"),
            "roc_auc": float(np.mean([sk.roc_auc_score(y[:, c], p[:, c]) for c in curves])),
            "multilabel_average_precision_average_micro": sk.average_precision_score(y, p, average="micro"),
        }
    if task == "mask":
        kept = y != IGNORED
        found, y = x.argmax(1)[kept], y[kept].astype(int)
        return {
            "jaccard": sk.jaccard_score(y, found, average="macro"),
            "dice": sk.f1_score(y, found, average="macro"),
            "dice_average_micro": sk.f1_score(y, found, average="micro"),
            "accuracy": float((found == y).mean()),
            "error_rate": float((found != y).mean()),
            "multiclass_cohen_kappa": sk.cohen_kappa_score(y, found),
        }
    p, found = np.exp(x) / np.exp(x).sum(1, keepdims=True), x.argmax(1)
    best = np.argsort(-x, axis=1)[:, :3]
    occurring = [c for c in range(CLASSES) if (y == c).any() or (found == c).any()]
    curves = [c for c in range(CLASSES) if (y == c).any()]
    return {
        "error_rate": float((found != y).mean()),
        "accuracy": float((found == y).mean()),
        "top_k_3": float((best == y[:, None]).any(1).mean()),
        "f_beta_beta_2": sk.fbeta_score(y, found, beta=2, average="macro", zero_division=0),
        "f_beta_average_weighted": sk.fbeta_score(y, found, beta=1, average="weighted", zero_division=0),
        "precision": sk.precision_score(y, found, average="macro", zero_division=0),
        "recall": sk.recall_score(y, found, average="macro", zero_division=0),
        "roc_auc": float(np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in curves])),
        "multiclass_specificity": float(np.mean([((y != c) & (found != c)).sum() / (y != c).sum() for c in occurring])),
        "multiclass_matthews_corr_coef": sk.matthews_corrcoef(y, found),
        "multiclass_cohen_kappa_weights_linear": sk.cohen_kappa_score(y, found, weights="linear"),
    }


NAMES = {
    "single_label": [
        *("error_rate", "accuracy", "top_k(3)", "f_beta(beta=2)", "f_beta(average='weighted')", "precision", "recall"),
        *("roc_auc", "MulticlassSpecificity", "MulticlassMatthewsCorrCoef", "MulticlassCohenKappa(weights='linear')"),
    ],
    "multi_label": [
        *("accuracy_multi", "accuracy_multi(threshold=.2)", "f_beta", "f_beta(beta=2, threshold=0.3)", "precision"),
        *("recall(average='micro')", "roc_auc", "MultilabelAveragePrecision(average='micro')"),
    ],
    "points": ["mse", "mae", "point_error", "point_error_px(side_px=64)"],
    "number": ["mae", "rmse", "r2", "MeanAbsolutePercentageError"],
    "mask": ["jaccard", "dice", "dice(average='micro')", "accuracy", "error_rate", "MulticlassCohenKappa"],
}
SAMPLES = 83


def outputs_of(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, targets) over SAMPLES; the last class never occurs, a fifth of points and pixels are not to count."""
    random = np.random.default_rng(3)
    if task in ("single_label", "multi_label"):
        logits, targets, _ = draw(task, SAMPLES)
        targets = torch.where(targets == CLASSES - 1, 0, targets) if task == "single_label" else targets
        if task == "multi_label":
            targets[:, -1] = 0
        return logits, targets
    if task == "number":  # years, whose squares float32 does not tell apart
        years = random.normal(2026, 5, (SAMPLES, CLASSES)).astype(np.float32)
        return torch.from_numpy(years + random.normal(size=years.shape).astype(np.float32)), torch.from_numpy(years)
    if task == "points":
        truth = random.uniform(-1, 1, (SAMPLES, 4, 2)).astype(np.float32)
        outputs = torch.from_numpy(truth + random.normal(size=truth.shape).astype(np.float32))
        truth[random.uniform(size=truth.shape[:2]) < 0.2] = np.nan
        return outputs, torch.from_numpy(truth)
    scores = random.normal(size=(SAMPLES, CLASSES, 6, 5)).astype(np.float32)
    scores[:, -1] = -9
    mask = np.where(
        random.uniform(size=(SAMPLES, 6, 5)) < 0.4, scores.argmax(1), random.integers(0, 3, (SAMPLES, 6, 5))
    )
    mask[random.uniform(size=mask.shape) < 0.2] = IGNORED
    return torch.from_numpy(scores), torch.from_numpy(mask.astype(np.uint8))


def measured(task: str, first: int, last: int) -> dict[str, float]:
    """What a rank that holds samples [first, last) answers."""
    outputs, targets = outputs_of(task)
    meter = Meter(build(NAMES[task], task=task, classes=CLASSES))
    for start in range(first, last, 16):
        part = slice(start, min(start + 16, last))
        meter.update(outputs[part], targets[part], torch.ones(part.stop - start))
    return meter.compute()


@pytest.mark.parametrize("task", NAMES)
def test_every_metric_equals_scikit_learns(task: str) -> None:
    values = measured(task, 0, SAMPLES)
    expected = oracle(task, *outputs_of(task))
    assert list(values) == ["valid_loss", *expected], "the columns, in the order they were asked for"
    assert values == pytest.approx({"valid_loss": 1.0, **expected}, abs=3e-7)


BOUNDS: dict[int, list[tuple[int, ...]]] = {2: [(0, 50, SAMPLES), (0, 0, SAMPLES)], 3: [(0, 0, 61, SAMPLES)]}
"""World size -> where each rank's part begins; some hold nothing."""


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    answers = {}
    for size in (3, 2):
        if rank < size:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
            for i, bounds in enumerate(BOUNDS[size]):
                for task in NAMES:
                    answers[f"{size} {i} {task}"] = measured(task, bounds[rank], bounds[rank + 1])
            dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))


@pytest.mark.slow
def test_ranks_with_uneven_or_empty_parts_count_every_sample_once(tmp_path: Path) -> None:
    processes(_rank, str(tmp_path), number=3)
    ranks: list[Any] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert len(ranks[0]) == 15
    for case, values in ranks[0].items():
        size, _, task = case.split()
        assert all(rank[case] == values for rank in ranks[: int(size)]), f"ranks differ: {case}"
        expected = {"valid_loss": 1.0, **oracle(task, *outputs_of(task))}
        assert values == pytest.approx(expected, abs=3e-7), case


def test_counting_by_class_takes_no_matrix_of_classes_by_classes() -> None:
    """Over 200,000 classes such a matrix has 320 GB."""
    classes = 200_000
    names = ["f_beta", "precision", "recall", "MulticlassF1Score", "MulticlassAccuracy(average='weighted')"]
    metrics = build(names, task="single_label", classes=classes)
    found, targets = torch.tensor([3, classes - 1, 7]), torch.tensor([3, classes - 1, 8])
    metrics.update(torch.nn.functional.one_hot(found, classes).float(), targets)
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values["multiclass_accuracy_average_weighted"] == pytest.approx(2 / 3)
    assert {values[name] for name in ("f_beta", "precision", "recall", "multiclass_f1_score")} == {0.5}


@pytest.mark.parametrize(
    ("text", "task", "classes"),
    [
        ("MulticlassAUROC(thresholds=80000000000)", "single_label", 3),
        ("MultilabelAveragePrecision(thresholds=10000000)", "multi_label", 100),
        ("MulticlassCalibrationError(n_bins=20000000000)", "single_label", 3),
        ("MulticlassCohenKappa", "single_label", 81_000),
        ("F1Score(average='macro')", "single_label", 81_000),
    ],
)
def test_a_metric_that_would_not_fit_is_refused_before_any_of_it_is_there(text: str, task: str, classes: int) -> None:
    with pytest.raises(RecipeError, match=r"would take [0-9,]+ GiB on the device, and 4 are the most.*give"):
        build([text], task=task, classes=classes)


def test_metrics_with_the_same_counts_count_once() -> None:
    metrics = build(
        ["error_rate", "roc_auc", "precision", "accuracy", "f_beta(beta=2)"], task="single_label", classes=4
    )
    groups = sorted(sorted(group) for group in metrics.compute_groups.values())
    assert groups == [["accuracy", "error_rate"], ["f_beta_beta_2", "precision"], ["roc_auc"]]
    cuts = build(["precision(threshold=.2)", "recall", "recall(threshold=.2)"], task="multi_label", classes=4)
    assert sorted(map(len, cuts.compute_groups.values())) == [1, 2]


READS_THE_DEVICE = {
    "single_label": [],
    "multi_label": [],
    "number": [],
    "points": [],
    "mask": ["jaccard", "accuracy", "error_rate"],
}
"""As trainer/metrics/meter.py says."""


@pytest.mark.parametrize("task", NAMES)
def test_no_other_name_than_those_told_reads_the_device_in_update(task: str) -> None:
    """On tensors of a pretended GPU, an operation whose result the host must see raises."""
    shapes = {"single_label": ((8, 6), (8,)), "points": ((8, 4, 2), (8, 4, 2))}
    shapes |= dict.fromkeys(("multi_label", "number"), ((8, 6), (8, 6)))
    outputs, targets = shapes.get(task, ((8, 6, 4, 4), (8, 4, 4)))
    kind = torch.int64 if task in ("single_label", "mask") else torch.float32
    waiting = []
    for name in TASKS[task].own_metrics():
        metrics = build([name], task=task, classes=6, side_px=32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for metric in metrics.values():
                for state, value in metric._defaults.items():
                    if isinstance(value, torch.Tensor):
                        setattr(metric, state, torch.zeros(value.shape, dtype=value.dtype, device="cuda"))
            try:
                metrics.update(torch.zeros(outputs, device="cuda"), torch.zeros(targets, dtype=kind, device="cuda"))
            except (DataDependentOutputException, DynamicOutputShapeException):
                waiting.append(name)
    assert waiting == READS_THE_DEVICE[task]


def test_probabilities_that_float32_would_round_to_one_stay_apart() -> None:
    """Two samples of each class, all taken for 1 with more than 20 nats: only their order tells them apart."""
    logits = torch.tensor([[0.0, 24.0], [0.0, 23.0], [0.0, 22.0], [0.0, 21.0]])
    metrics = build(["roc_auc"], task="single_label", classes=2)
    metrics.update(logits, torch.tensor([1, 1, 0, 0]))
    assert metrics.compute()["roc_auc"].item() == 1.0


def test_a_metric_over_no_samples_is_not_a_number() -> None:
    for task, names in {"single_label": ["roc_auc", "error_rate"], "points": ["mse"]}.items():
        values = Meter(build(names, task=task, classes=3)).compute()
        assert all(np.isnan(value) for value in values.values())


def test_an_unknown_task_gets_a_sentence() -> None:
    with pytest.raises(RecipeError, match=r"task='boxes'.*give single_label, multi_label, number, points, mask"):
        default_metrics("boxes", 2)
    with pytest.raises(RecipeError, match=r"task='boxes'.*give single_label"):
        default_loss("boxes")
