"""What a learner can be told besides how long and how fast, against plain arithmetic and runs without it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kit.toy import Spy, ToyModel, Watched, learner, loaders, same, snapshot
from thawline.trainer import Best, Find, OptimSettings, Phase, lr_find
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.errors import CheckpointError, RecipeError
from thawline.trainer.learner import Learner
from thawline.trainer.schedule.phases import fine_tune_phases
from thawline.trainer.step import world


class Weights(Spy):
    """A sink that copies the weights after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.learn: Learner | None = None
        self.seen: list[dict[str, Tensor]] = []

    def step(self, *, images: int, step_s: float, data_wait_s: float) -> None:
        assert self.learn is not None
        self.seen.append({name: p.detach().clone() for name, p in self.learn.model.named_parameters()})


# Stages -----------------------------------------------------------------------------------------------------


def test_what_was_saved_under_a_name_comes_back_here_and_in_another_learner(tmp_path: Path) -> None:
    learn = learner(context=Watched(run_dir=tmp_path), ema=0.9)
    learn.fit_one_cycle(1, 1e-2)
    learn.save("stage-1")
    stage, values = snapshot(learn.model), learn.validate()
    learn.fit_one_cycle(1, 1e-2)
    assert not same(stage, snapshot(learn.model))
    assert learn.load("stage-1") is learn
    assert same(stage, snapshot(learn.model))
    assert learn.validate() == values  # of the averaged weights, which came back too
    plain = learner(context=Watched(run_dir=tmp_path), model=ToyModel(seed=5)).load("stage-1")
    assert same(stage, snapshot(plain.model))


def test_a_stage_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    learn = learner(context=Watched(run_dir=tmp_path))
    before = snapshot(learn.model)
    with pytest.raises(CheckpointError, match=r"stage-2 cannot be loaded .* no weights were changed"):
        learn.load("stage-2")
    assert same(before, snapshot(learn.model))


# Averaged weights -------------------------------------------------------------------------------------------


def test_the_average_follows_its_recurrence_and_is_what_is_measured(tmp_path: Path) -> None:
    spy = Weights()
    learn = learner(ema=0.8, sinks=[spy], model=ToyModel(dropout=0.0))
    spy.learn = learn
    mean = {name: p.detach().double() for name, p in learn.model.named_parameters()}
    learn.fit_one_cycle(2, 1e-2)
    assert len(spy.seen) == 10
    for weights in spy.seen:
        mean = {name: 0.8 * mean[name] + 0.2 * weights[name].double() for name in mean}
    raw = snapshot(learn.model)
    values = learn.validate()
    assert same(raw, snapshot(learn.model))  # the weights that train are back in their place
    averaged = ToyModel(dropout=0.0)
    averaged.load_state_dict({**raw, **{name: value.float() for name, value in mean.items()}})
    images, targets = loaders()[1].inputs, loaders()[1].targets
    with torch.no_grad():
        logits = averaged.eval()(images)
        plain = learn.model.eval()(images)
    assert values["valid_loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert values["valid_loss"] != pytest.approx(float(F.cross_entropy(plain, targets)), rel=1e-3)


def test_a_run_with_averaged_weights_resumes_bit_by_bit(tmp_path: Path) -> None:
    def on_disk(name: str, **options: Any) -> Learner:
        context = Watched(run_dir=tmp_path / name, **options)
        return learner(context=context, ema=0.9, checkpoint_every_s=0.0)

    unbroken = on_disk("unbroken")
    unbroken.fine_tune(1, 1e-2)
    on_disk("broken", stop_at_ask=2).fine_tune(1, 1e-2)
    resumed = on_disk("broken")
    assert resumed.resume()
    resumed.fine_tune(1, 1e-2)
    assert unbroken.session.ema is not None
    assert resumed.session.ema is not None
    assert same(resumed.session.ema.state_dict(), unbroken.session.ema.state_dict())
    assert resumed.validate() == unbroken.validate()


# A learning rate that is found -------------------------------------------------------------------------------


def peaks(learn: Learner) -> list[float]:
    """The largest recorded rate of the head, by phase."""
    rows = learn.recorder.of_kind("train")
    names = list(dict.fromkeys(str(row["phase"]) for row in rows))
    return [max(float(row["lr"] or 0) for row in rows if row["phase"] == name) for name in names]


def test_a_phase_that_asks_for_it_trains_at_what_the_finder_suggests_and_the_next_takes_it_over() -> None:
    data = loaders(train=200)
    learn = learner(data=data, log_every=1)
    learn.fit(fine_tune_phases(1, Find()))
    alone = learner(data=loaders(train=200))
    found = lr_find(alone, lr=slice(1.0), freeze_to=-1).valley
    assert learn.progress.found_lr == found
    given = learner(data=loaders(train=200), log_every=1)
    given.fit(fine_tune_phases(1, found))
    assert peaks(learn) == pytest.approx(peaks(given), rel=1e-12)
    assert same(snapshot(learn.model), snapshot(given.model))


def test_a_resumed_phase_keeps_the_rate_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_disk(name: str, **options: Any) -> Learner:
        context = Watched(run_dir=tmp_path / name, **options)
        return learner(context=context, data=loaders(train=200), checkpoint_every_s=0.0, log_every=10)

    phases = [Phase("found", steps=40, lr=Find())]
    unbroken = on_disk("unbroken")
    unbroken.fit(phases)
    on_disk("broken", stop_at_ask=2).fit(phases)
    resumed = on_disk("broken")
    assert resumed.resume()
    monkeypatch.setattr("thawline.trainer.learner.lr_find", lambda *args, **kwargs: pytest.fail("searched again"))
    resumed.fit(phases)
    assert same(snapshot(resumed.model), snapshot(unbroken.model))


def test_a_phase_cannot_take_over_what_nobody_found() -> None:
    with pytest.raises(RecipeError, match=r"phase 'late' takes the lr that an earlier phase found, and none searched"):
        learner().fit([Phase("late", epochs=1, lr=Find(search=False))])


# Lengths and schedules ---------------------------------------------------------------------------------------


def test_phases_count_epochs_steps_or_samples_and_each_ends_with_a_validation() -> None:
    learn = learner(log_every=100)
    learn.fit([Phase("a", steps=7), Phase("b", samples=9), Phase("c", epochs=0.5)])
    rows = [(row["phase"], row["step"], row["epoch"]) for row in learn.recorder.of_kind("valid")]
    assert [(name, step) for name, step, _ in rows] == [("a", 5), ("a", 7), ("b", 10), ("c", 12)]
    np.testing.assert_allclose([float(epoch or 0) for *_, epoch in rows], [1.0, 1.4, 2.0, 2.5])


def test_flat_cosine_leaves_momentum_to_the_recipe() -> None:
    spy = Spy()
    learn = learner(sinks=[spy], log_every=1, optimizer=OptimSettings(name="sgd", momentum=0.7, nesterov=True))
    learn.fit_flat_cos(2, 1e-2)
    lrs = [float(row["lr"] or 0) for row in learn.recorder.of_kind("train")]
    np.testing.assert_allclose(lrs[:8], 1e-2)  # three quarters of ten steps, rounded up
    assert lrs[8] < lrs[7]
    assert lrs[9] < lrs[8]
    assert {row["momentum"] for row in learn.recorder.of_kind("train")} == {None}


def test_settings_that_make_no_step_are_refused_at_once() -> None:
    with pytest.raises(RecipeError, match=r"eps=0\.0 is out of range"):
        learner(optimizer=OptimSettings(eps=0.0))
    for options in ({"accumulate": 0}, {"clip": 0.0}, {"ema": 1.0}, {"label_smoothing": 1.0}):
        with pytest.raises(RecipeError, match=r"is out of range: .*give"):
            learner(**options)


# Micro-batches, BatchNorm ------------------------------------------------------------------------------------


def test_accumulation_splits_a_step_without_changing_it() -> None:
    weights = []
    for pieces in (1, 2):
        data = loaders(dtype=torch.float64)
        model = ToyModel(norm=False, dropout=0.0, dtype=torch.float64)
        learn = learner(model=model, data=data, accumulate=pieces, clip=0.5)
        learn.fit_one_cycle(2, 1e-2)
        weights.append(snapshot(model))
        assert learn.progress.splits == pieces
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-8)


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_scale() -> None:
    learn = learner(batch_norm="frozen")
    before = snapshot(learn.model)
    learn.fit_one_cycle(1, 1e-2)
    after = snapshot(learn.model)
    assert torch.equal(before["stem.1.running_mean"], after["stem.1.running_mean"])
    assert not torch.equal(before["stem.1.weight"], after["stem.1.weight"])


def test_batchnorm_over_all_ranks_is_refused_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    learner(batch_norm="sync")  # one rank is all ranks
    monkeypatch.setattr(world, "world_size", lambda: 2)
    with pytest.raises(RecipeError, match=r"batch_norm='sync' on cpu: .* give train or frozen"):
        learner(batch_norm="sync")


# Checkpoints that are kept -----------------------------------------------------------------------------------


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    learn = learner(
        context=Watched(run_dir=tmp_path), checkpoint_every_s=1e9, keep=1, best=Best("valid_loss"), log_every=5
    )
    learn.fit_one_cycle(6, 0.3)  # so fast that the last epoch is not the best
    rows = {int(row["step"] or 0): float(row["valid_loss"] or 0) for row in learn.recorder.of_kind("valid")}
    best = min(rows, key=lambda step: rows[step])
    assert best != 30, rows
    kept = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert kept == {f"step_{best:08d}", "step_00000030"}
    saved = checkpoint.load_model(tmp_path / "checkpoints", f"step_{best:08d}")
    assert saved.metrics["valid_loss"] == rows[best]


def test_a_best_by_what_is_not_measured_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"best='f1' is not measured: .* give one of valid_loss, "):
        learner(best=Best("f1"))


def test_whoever_resumes_sweeps_up_what_a_kill_left(tmp_path: Path) -> None:
    first = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0, keep=1)
    first.fit_one_cycle(1, 1e-2)
    dead = tmp_path / "checkpoints/step_00000002"
    dead.mkdir()
    (dead / "model.pt").write_bytes(b"half of it")
    again = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0, keep=1)
    assert again.resume()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


def test_when_no_checkpoint_can_be_trusted_nothing_is_begun_anew(tmp_path: Path) -> None:
    first = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0, keep=2)
    first.fit_one_cycle(1, 1e-2)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "model.pt").write_bytes(b"")
    again = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be trusted any more: .* remove the run's folder"
    ):
        again.resume()
