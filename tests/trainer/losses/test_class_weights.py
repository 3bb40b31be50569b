"""Do class weights weigh what torch and scikit-learn say they do, the same on every rank?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from tests.kit.ranks import Here, Outcome, worlds_of
from tests.kit.toy import CLASSES, ToyModel, learner, loader, samples, snapshot
from thawline.dataio.stream.balanced import balanced
from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.class_weights import weigh
from thawline.trainer.losses.named import default_loss

WEIGHTS = torch.tensor([0.5, 3.0, 1.25])
LOGITS = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 2
HARD = torch.randint(3, (20,), generator=torch.Generator().manual_seed(1))


def mixed() -> Tensor:
    return 0.7 * torch.eye(3)[HARD] + 0.3 * torch.eye(3)[HARD.flip(0)]


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_of_a_single_label_they_are_torchs_weight(share: float) -> None:
    loss = default_loss("single_label", label_smoothing=share, class_weights=WEIGHTS)
    for targets in (HARD, mixed()):
        theirs = torch.nn.CrossEntropyLoss(WEIGHTS, label_smoothing=share, reduction="none")
        assert torch.equal(loss(LOGITS, targets), theirs(LOGITS, targets))
        shares = np.eye(3)[HARD] if targets is HARD else targets.double().numpy()
        scores = LOGITS.double().numpy()
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        expected = -(WEIGHTS.numpy() * ((1 - share) * shares + share / 3) * log_p).sum(1)
        np.testing.assert_allclose(loss(LOGITS, targets), expected, rtol=1e-5)


def test_of_several_labels_they_are_torchs_pos_weight() -> None:
    targets = (mixed() > 0.1).float()
    p = 1 / (1 + np.exp(-LOGITS.double().numpy()))
    expected = -(WEIGHTS.numpy() * targets.numpy() * np.log(p) + (1 - targets.numpy()) * np.log(1 - p)).mean(1)
    losses = default_loss("multi_label", class_weights=WEIGHTS)(LOGITS, targets)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_balanced_is_scikit_learns_formula() -> None:
    names = ("ape", "bee", "cat", "dodo")
    targets = torch.tensor([0] * 9 + [1] * 3 + [2])
    data = loader(torch.zeros(13, 3, 4, 4), targets, train=True, classes=names)
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    np.testing.assert_allclose(weigh("balanced", data), [*theirs, 1.0])  # nobody has seen a dodo
    several = (
        torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.1, 0.5, 0.9, 0.0])
    ).float()
    data = loader(torch.zeros(50, 3, 4, 4), several, train=True, classes=names, task="multi_label")
    pairs = [
        compute_class_weight("balanced", classes=np.arange(2), y=column) for column in several[:, :3].T.int().numpy()
    ]
    np.testing.assert_allclose(weigh("balanced", data), [*(yes / no for no, yes in pairs), 1.0])


def test_by_name_the_others_weigh_one() -> None:
    data = loader(*samples(8, seed=0), train=True)
    np.testing.assert_array_equal(weigh({"cat": 3.5}, data), [1, 1, 3.5])


def test_weights_of_one_change_nothing() -> None:
    weights = []
    for asked in (None, dict.fromkeys(CLASSES, 1.0)):
        model = ToyModel()
        learner(model=model, class_weights=asked, ema=0.9, label_smoothing=0.1).fit_one_cycle(1, 1e-2)
        weights.append(snapshot(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"class_weights": {"cta": 2.0}}, "names 'cta', which is none of the 3 classes.*did you mean 'cat'"),
        ({"class_weights": {"cat": 0.0}}, "class_weights=.* is out of range"),
        (
            {"class_weights": "balanced", "loss": "focal"},
            "and loss focal: .*leave them out, or give loss='cross_entropy'",
        ),
        ({"class_weights": "balanced", "loss": lambda outputs, targets: outputs}, "beside a loss of your own"),
    ],
)
def test_weights_that_weigh_nothing_get_a_sentence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        learner(**options)


def test_a_task_without_classes_has_no_weights() -> None:
    data = loader(*samples(8, seed=0), train=True, task="points")
    with pytest.raises(RecipeError, match=r"task='points'.*train single_label or multi_label"):
        weigh("balanced", data)


def fitted(here: Here) -> Outcome:
    learn = here.learner("weighted", model=ToyModel(norm=False, dropout=0.0), class_weights="balanced", ema=0.5)
    learn.fit_one_cycle(2, 1e-2)
    recalls = {each["name"]: each["recall"] for each in learn.recorder.of_kind("valid")[-1]["recalls"]}
    return {"weights": snapshot(learn.model), "loss": learn.validate()["valid_loss"], "recalls": recalls}


def drawn(here: Here) -> Outcome:
    """The hash of a balanced stream: unbroken, and stopped on the way and resumed."""
    hashes = []
    for name, stop in (("unbroken", 0), ("broken", 3), ("broken", 0)):
        train, valid = here.data()
        kinds = train.targets.numpy()
        shape = {name: getattr(train.order, name) for name in ("n", "global_batch", "rank", "world_size")}
        train.order = balanced(kinds, power=1.0, count=3, seed=7, **shape)
        learn = here.learner(name, data=(train, valid), stop_at_ask=stop, checkpoint_every_s=0.0)
        learn.resume()
        learn.fit_one_cycle(3, 1e-2)
        hashes.append((learn.progress.step, learn.progress.stream_hash))
    return {"hashes": hashes}


@pytest.mark.slow
def test_a_balanced_stream_has_one_hash_in_any_world_and_after_an_interruption(tmp_path: Path) -> None:
    worlds = worlds_of(drawn, tmp_path)
    unbroken, stopped, resumed = worlds[1][0]["hashes"]
    assert stopped[0] < unbroken[0]
    assert resumed == unbroken
    for outcome in (*worlds[2], *worlds[3]):
        assert outcome["hashes"] == [unbroken, stopped, unbroken]


@pytest.mark.slow
def test_two_and_three_ranks_equal_one(tmp_path: Path) -> None:
    worlds = worlds_of(fitted, tmp_path)
    (one,) = worlds[1]
    for outcome in (*worlds[2], *worlds[3]):
        assert outcome["recalls"] == one["recalls"]
        assert outcome["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for name, value in one["weights"].items():
            torch.testing.assert_close(outcome["weights"][name], value, rtol=1e-4, atol=1e-6)
