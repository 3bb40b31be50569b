"""Is a frozen phase with frozen BatchNorm the phase that it would be without its short cuts?"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.ranks import Here, Outcome, worlds_of
from tests.kit.toy import ToyModel, Watched, learner, loaders, same, snapshot
from thawline.models.folding import folded
from thawline.trainer import session
from thawline.trainer.learner import Learner


def frozen(**options: Any) -> Learner:
    data = loaders(dtype=torch.float64, train=22)
    return learner(model=ToyModel(dtype=torch.float64), data=data, batch_norm="frozen", ema=0.8, **options)


def test_folded_or_not_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, folds = [], 0

    def counted(model: torch.nn.Module, n: int) -> torch.nn.Module:
        nonlocal folds
        twin = folded(model, n)
        folds += twin is not model
        return twin

    for cheap in (counted, lambda model, n: model):
        monkeypatch.setattr(session, "folded", cheap)
        learn = frozen(accumulate=2)
        before = snapshot(learn.model)
        learn.fine_tune(1, 1e-2, frozen_epochs=2)  # the whole network trains afterwards
        assert not torch.equal(snapshot(learn.model)["stem.0.weight"], before["stem.0.weight"])
        rows = [row["loss"] for row in learn.recorder.of_kind("train")]
        ends.append((snapshot(learn.model), dict(learn.session.weights()["ema"]), rows))
    assert folds == 1
    (weights, average, losses), (others, other_average, other_losses) = ends
    assert losses == pytest.approx(other_losses, rel=1e-5)  # losses are float32
    for ours, theirs in ((weights, others), (average, other_average)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_frozen_layers_do_not_move_and_the_state_is_the_models_own() -> None:
    learn = frozen()
    before = snapshot(learn.model)
    learn.freeze()
    learn.fit_one_cycle(2, 1e-2)
    after = snapshot(learn.model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (not name.startswith("head.3")), name


def test_a_search_for_a_rate_leaves_a_frozen_model_as_it_was() -> None:
    learn = frozen()
    learn.freeze()
    before = snapshot(learn.model)
    learn.rehearse(lambda step: [1e-3] * 3, stop=lambda loss: False, steps=4)
    assert same(snapshot(learn.model), before)


def test_stopped_within_the_frozen_phase_and_resumed_it_is_the_unbroken_run_bit_by_bit(tmp_path: Path) -> None:
    def run(name: str, *, stop_at_ask: int = 0, resume: bool = False) -> Learner:
        learn = frozen(context=Watched(run_dir=tmp_path / name, stop_at_ask=stop_at_ask), checkpoint_every_s=0.0)
        assert learn.resume() == resume
        learn.fine_tune(1, 1e-2, frozen_epochs=2)
        return learn

    unbroken = run("unbroken")
    stopped = run("broken", stop_at_ask=2)
    assert stopped.stopped
    assert stopped.progress.phase == 0
    resumed = run("broken", resume=True)
    assert same(resumed.model.state_dict(), unbroken.model.state_dict())
    assert same(resumed.session.weights()["ema"], unbroken.session.weights()["ema"])


def fitted(here: Here) -> Outcome:
    model = ToyModel(dropout=0.0, dtype=torch.float64)
    learn = here.learner("frozen", model=model, data=here.data(dtype=torch.float64), batch_norm="frozen")
    learn.fine_tune(1, 1e-2, frozen_epochs=2)
    return {"weights": snapshot(learn.model)}


@pytest.mark.slow
def test_two_and_three_ranks_equal_one(tmp_path: Path) -> None:
    worlds = worlds_of(fitted, tmp_path)
    for outcome in (*worlds[2], *worlds[3]):
        for name, value in worlds[1][0]["weights"].items():
            torch.testing.assert_close(outcome["weights"][name], value, rtol=1e-5, atol=1e-7)
