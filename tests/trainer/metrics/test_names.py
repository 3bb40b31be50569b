"""A metric's text: what is built from it, what its column is called, and the sentences for what cannot be."""

import re

import pytest
import torch

from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics import names as metric_names
from thawline.trainer.metrics.direction import higher
from thawline.trainer.metrics.meter import build
from thawline.trainer.tasks import TASKS


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("error_rate", "error_rate"),
        ("top_k(3)", "top_k_3"),
        ("f_beta(beta=2)", "f_beta_beta_2"),
        (" accuracy_multi( threshold = .2 )", "accuracy_multi_threshold_0_2"),
        ("f_beta(beta=0.5, average='micro')", "f_beta_beta_0_5_average_micro"),
        ("MulticlassCohenKappa(weights='linear')", "multiclass_cohen_kappa_weights_linear"),
        ("MulticlassAUROC", "multiclass_auroc"),
        ("MultilabelLRAP(x=-1e-3)", "multilabel_lrap_x_minus_0_001"),
    ],
)
def test_a_column_is_the_text_in_snake_case(text: str, column: str) -> None:
    assert metric_names.parse(text).column == column
    assert re.fullmatch(r"[a-z][a-z0-9_]*", column), "fit for Parquet and PromQL"


def test_every_name_of_the_house_is_built_for_its_tasks() -> None:
    for task, record in TASKS.items():
        names = record.own_metrics()
        assert list(build(list(names), task=task, classes=6, side_px=32)) == sorted(names)
        assert set(record.metrics) <= set(names)
    assert list(build([], task="single_label", classes=2)) == ["accuracy", "error_rate"]


def test_one_label_alone_can_be_asked_for() -> None:
    metrics = build(["accuracy_multi", "f_beta"], task="multi_label", classes=1)
    metrics.update(torch.tensor([[3.0], [-1.0], [2.0]]), torch.tensor([[1.0], [1.0], [1.0]]))
    assert metrics.compute()["accuracy_multi"].item() == pytest.approx(2 / 3)
    assert metrics.compute()["f_beta"].item() == pytest.approx(0.8)


def test_building_touches_no_random_state_and_leaves_no_counts() -> None:
    before = torch.get_rng_state()
    metrics = build(["error_rate", "roc_auc", "MulticlassCalibrationError"], task="single_label", classes=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not metric.update_called for metric in metrics.values())


def test_arguments_reach_the_metric() -> None:
    logits, targets = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]), torch.tensor([1, 0, 0])
    metrics = build(["top_k(1)", "top_k(2)", "top_k(top_k=3)"], task="single_label", classes=3)
    metrics.update(logits, targets)
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values == pytest.approx({"top_k_1": 1 / 3, "top_k_2": 2 / 3, "top_k_top_k_3": 1.0})


@pytest.mark.parametrize(
    ("text", "task", "sentence"),
    [
        ("eror_rate", "single_label", r"'eror_rate' is not known.*give error_rate \(the nearest"),
        ("cohen_kappa", "single_label", r"is not known.*CohenKappa.*nearest"),
        ("zzz", "points", r"is not known.*give mse, mae, point_error, point_error_px, or a class of torchmetrics"),
        ("f_beta(gamma=2)", "single_label", r"gives arguments that f_beta does not take.*it takes beta, average$"),
        ("f_beta(threshold=.3)", "single_label", r"gives arguments that f_beta does not take"),
        ("top_k(2, top_k=3)", "single_label", r"gives arguments that top_k does not take"),
        ("roc_auc(1)", "single_label", r"it takes none here"),
        ("MulticlassAccuracy(num_classes=3)", "single_label", r"MulticlassAccuracy does not take"),
        ("accuracy(dist_sync_on_step=True)", "mask", r"accuracy does not take"),
        ("f_beta(average='foo')", "multi_label", r"cannot be made: .*`average`.*but got foo"),
        ("top_k(9)", "single_label", r"cannot be made: .*`top_k`.*9 and 6"),
        ("mse", "single_label", r"is for task number or points and this one is single_label"),
        ("accuracy_multi", "mask", r"is for task multi_label and this one is mask"),
        ("MulticlassConfusionMatrix", "single_label", r"does not fit task single_label.*more than one number"),
        ("f_beta(average='none')", "single_label", r"does not fit.*more than one number"),
        ("MeanSquaredError", "single_label", r"does not fit task single_label with 6 classes \(.*same shape"),
        ("MulticlassAccuracy(multidim_average='samplewise')", "single_label", r"does not fit"),
        ("__import__('os').getcwd()", "single_label", r"is neither a name nor a name with plain values"),
        ("__import__('os')", "single_label", r"is not known"),
        ("top_k(k)", "single_label", r"is neither a name nor"),
        ("top_k(*[3])", "single_label", r"is neither a name nor"),
        ("top_k(**{'top_k': 3})", "single_label", r"is neither a name nor|does not take"),
        ("top_k(3", "single_label", r"is neither a name nor"),
        ("", "single_label", r"is neither a name nor"),
    ],
)
def test_what_cannot_be_built_gets_a_sentence(text: str, task: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as error:
        build([text], task=task, classes=6)
    assert "\n" not in str(error.value)


def test_two_of_the_same_column_get_a_sentence() -> None:
    with pytest.raises(RecipeError, match=r"'f_beta\(beta=2.0\)' comes twice as column f_beta_beta_2_0"):
        build(["f_beta(beta=2.0)", "f_beta(beta=2.0)"], task="single_label", classes=3)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        *(("error_rate", False), ("mse", False), ("mae", False), ("valid_loss", False)),
        *(("top_k(3)", True), ("top_k_3", True), ("f_beta_beta_2", True), ("roc_auc", True), ("jaccard", True)),
        ("MultilabelHammingDistance(threshold=.2)", False),
        ("multilabel_hamming_distance_threshold_0_2", False),
        ("multiclass_cohen_kappa_weights_linear", True),
        ("MulticlassCalibrationError", False),
        *(("F1Score", True), ("cohen_kappa_weights_linear", True), ("hamming_distance", False), ("AUROC", True)),
        ("MulticlassSpecificity", None),  # torchmetrics says it of neither
        ("something_of_my_own", None),
        ("accuracyish", None),
    ],
)
def test_whether_more_is_better(metric: str, better: bool | None) -> None:
    assert higher(metric) is better
