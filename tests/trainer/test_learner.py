"""The learner on a toy: schedules really set, freezing, exact numbers, and a run that survives being interrupted."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kit.toy import Spy, ToyLoader, ToyModel, Watched, ids_of, learner, loaders, same, snapshot, stream_hash
from thawline.dataio.batch import Batch
from thawline.trainer.errors import CheckpointError, RecipeError
from thawline.trainer.schedule.phases import fine_tune_phases, one_cycle_phases
from thawline.trainer.step.step import update

STEPS = 5  # an epoch: 20 samples in batches of 4
Hyper = tuple[dict[int, float], float]


@pytest.fixture
def hypers(monkeypatch: pytest.MonkeyPatch) -> list[Hyper]:
    """(lr by layer group, momentum) as the optimiser held them in each step."""
    seen: list[Hyper] = []

    def spy(optimizer: torch.optim.Optimizer, **kwargs: Any) -> None:
        groups = optimizer.param_groups
        momenta = {group["betas"][0] if "betas" in group else group["momentum"] for group in groups}
        rates = {(group["layer_group"], float(group["lr"])) for group in groups}
        assert len(momenta) == 1
        assert len(rates) == len(dict(rates))  # with and without decay, a layer group has one rate
        seen.append((dict(rates), momenta.pop()))
        update(optimizer, **kwargs)

    monkeypatch.setattr("thawline.trainer.step.step.update", spy)
    return seen


def closed_form(step: int, steps: int, top: float, div: float, pct: float) -> tuple[float, float]:
    """(lr, momentum) of fastai's one cycle, written out."""
    p = step / steps
    if p < pct:
        up = (1 - math.cos(math.pi * p / pct)) / 2
        return top / div + (top - top / div) * up, 0.95 - 0.1 * up
    down = (1 - math.cos(math.pi * (p - pct) / (1 - pct))) / 2
    return top + (top / 1e5 - top) * down, 0.85 + 0.1 * down


def assert_cycle(hypers: list[Hyper], tops: list[float], *, div: float, pct: float) -> None:
    for step, (rates, momentum) in enumerate(hypers):
        for group, top in enumerate(tops):
            lr, expected_momentum = closed_form(step, len(hypers), top, div, pct)
            assert rates[group] == pytest.approx(lr, rel=1e-7)  # float32 on the device
            assert momentum == pytest.approx(expected_momentum, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_cycle_sets_the_closed_form_s_lr_and_momentum_at_every_step(hypers: list[Hyper], optimizer: str) -> None:
    learner(optimizer=optimizer).fit_one_cycle(4, slice(1e-4, 1e-2))
    assert len(hypers) == 4 * STEPS
    assert_cycle(hypers, [1e-4, 1e-3, 1e-2], div=25, pct=0.25)


def test_fine_tune_sets_both_cycles_and_its_groups_peak_at_the_published_rates(hypers: list[Hyper]) -> None:
    learner().fine_tune(2, 3e-3, frozen_epochs=2)
    frozen, unfrozen = hypers[: 2 * STEPS], hypers[2 * STEPS :]
    assert len(unfrozen) == 2 * STEPS
    assert_cycle(frozen, [3e-4, 3e-4, 3e-3], div=25, pct=0.99)
    assert_cycle(unfrozen, [1.5e-5, 1.5e-4, 1.5e-3], div=5, pct=0.3)
    peaks = [max(rates[group] for rates, _ in unfrozen) for group in range(3)]
    assert peaks == pytest.approx([1.5e-5, 1.5e-4, 1.5e-3], rel=1e-7)


def test_fine_tune_trains_the_head_and_batchnorm_first_and_then_everything() -> None:
    learn = learner(context=Watched(stop_at_ask=2))  # inside the frozen phase
    before = snapshot(learn.model)
    learn.fine_tune(1, 1e-2)
    after = snapshot(learn.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    convolutions = {"stem.0.weight", "stem.0.bias", "body.1.weight", "body.1.bias"}
    assert moved == before.keys() - convolutions
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-2)
    assert not any(torch.equal(after[name], value) for name, value in learn.model.state_dict().items())


def test_freeze_and_unfreeze_hold_for_the_fits_that_follow() -> None:
    learn = learner()
    before = snapshot(learn.model)
    learn.freeze()
    learn.fit_one_cycle(1, 1e-2)
    learn.fit_one_cycle(1, 1e-2)
    frozen = snapshot(learn.model)
    assert torch.equal(before["stem.0.weight"], frozen["stem.0.weight"])
    assert not torch.equal(before["stem.1.running_mean"], frozen["stem.1.running_mean"])
    assert not torch.equal(before["head.3.weight"], frozen["head.3.weight"])
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-2)
    assert not torch.equal(frozen["stem.0.weight"], learn.model.state_dict()["stem.0.weight"])


def test_every_epoch_ends_with_a_validation_and_every_window_has_a_row() -> None:
    context, seen = Watched(), losses_of_steps()
    learn = learner(data=loaders(train=22), context=context, loss=seen)
    learn.fine_tune(2, 1e-3)
    steps = [6, 6 + 6, 6 + 11]  # round(5.5), round(11): no epoch is cut, a batch may straddle
    valid, train = learn.recorder.of_kind("valid"), learn.recorder.of_kind("train")
    assert [row["step"] for row in valid] == steps
    assert [row["phase"] for row in valid] == ["frozen", "unfrozen", "unfrozen"]
    assert [row["epoch"] for row in valid] == pytest.approx([1, 1 + 2 * 6 / 11, 3])
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10, 12, 14, 16, 17]
    assert [(row["phase_step"], row["phase_steps"]) for row in train[2:4]] == [(6, 6), (2, 11)]
    assert [row["images"] for row in train] == [8] * 8 + [4]
    per_step = seen.training_means()
    assert len(per_step) == 17
    for row, first, last in zip(train, [0, 2, 4, 6, 8, 10, 12, 14, 16], [2, 4, 6, 8, 10, 12, 14, 16, 17], strict=True):
        assert row["loss"] == pytest.approx(np.mean(per_step[first:last]), rel=1e-6)
    for measured, first, last in zip(valid, [0, 6, 12], steps, strict=True):
        assert measured["train_loss"] == pytest.approx(np.mean(per_step[first:last]), rel=1e-6)
        assert {"valid_loss", "error_rate", "accuracy", "valid_s"} <= measured.keys()
    assert [row for row in context.published if row["kind"] != "note"] == learn.recorder.rows
    times = [row["time_s"] for row in learn.recorder.rows if row["kind"] == "train" or row["kind"] == "valid"]
    assert times == sorted(times)
    assert learn.progress.epochs == 3


class losses_of_steps:  # noqa: N801  # reads as what it collects
    """The default loss, remembering what it gave in training."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none")
        if losses.requires_grad:
            self.kept.append(losses.detach().clone())
        return losses

    def training_means(self) -> list[float]:
        return [float(losses.double().mean()) for losses in self.kept]


def test_metrics_and_predictions_count_every_validation_sample_exactly_once() -> None:
    learn = learner()
    learn.fit_one_cycle(2, 1e-2)
    data, values, predictions = learn.valid, learn.validate(), learn.predictions()
    assert isinstance(data, ToyLoader)
    assert predictions is not None
    with torch.no_grad():
        logits = learn.model.eval()(data.inputs).double().numpy()
    targets = data.targets.numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = -np.log(p[np.arange(13), targets])
    wrong = int((logits.argmax(1) != targets).sum())
    assert 0 < wrong < 13
    assert values == {
        "valid_loss": pytest.approx(losses.mean()),
        "error_rate": wrong / 13,
        "accuracy": values["accuracy"],
    }
    assert values["accuracy"] == pytest.approx(1 - wrong / 13)
    assert {name: learn.recorder.last_metric(name) for name in values} == values
    assert predictions.ids.tolist() == ids_of(13).tolist()
    assert predictions.targets.tolist() == targets.tolist()
    np.testing.assert_allclose(predictions.probabilities, p, rtol=1e-5)
    np.testing.assert_allclose(predictions.losses, losses, rtol=1e-5)
    table = predictions.table(data.classes)
    assert table.column("id").to_pylist() == ids_of(13).tolist()
    assert table.column("target").to_pylist() == [data.classes[t] for t in targets]
    assert table.column("prediction").to_pylist() == [data.classes[k] for k in logits.argmax(1)]
    np.testing.assert_allclose(table.column("probability").to_numpy(), p.max(1), rtol=1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_fit_s_predictions_are_those_of_the_trained_model_and_cost_no_further_pass(ema: float) -> None:
    learn = learner(ema=ema)
    passes, stream = list[int](), learn.valid.stream

    def counted(first_step: int = 0) -> Iterator[Batch]:
        passes.append(first_step)
        return stream(first_step)

    learn.valid.stream = counted  # type: ignore[method-assign]
    kept = learn.fit(fine_tune_phases(2, 1e-2), predict=True)
    assert passes == [STEPS, 2 * STEPS, 3 * STEPS]
    fresh = learn.predictions()
    assert kept is not None
    assert fresh is not None
    for name in ("ids", "targets", "probabilities", "losses"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(fresh, name))


def test_a_fit_that_was_finished_before_predicts_anew_and_one_that_is_stopped_does_not(tmp_path: Path) -> None:
    phases = one_cycle_phases(2, 1e-2)
    stopped = learner(context=Watched(run_dir=tmp_path / "stopped", stop_at_ask=1))
    assert stopped.fit(phases, predict=True) is None
    first = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=1e6)
    kept = first.fit(phases, predict=True)
    again = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=1e6)
    assert again.resume()
    late = again.fit(phases, predict=True)
    assert kept is not None
    assert late is not None
    np.testing.assert_array_equal(late.probabilities, kept.probabilities)


def test_several_labels_are_predicted_by_sigmoid_and_named_at_a_half() -> None:
    train, valid = loaders(task="multi_label")
    for data in (train, valid):
        data.targets = F.one_hot(data.targets, 3).float()
    learn = learner(data=(train, valid))
    learn.fit_one_cycle(1, 1e-2)
    predictions = learn.predictions()
    assert predictions is not None
    with torch.no_grad():
        p = 1 / (1 + np.exp(-learn.model.eval()(valid.inputs).double().numpy()))
    np.testing.assert_allclose(predictions.probabilities, p, rtol=1e-5)
    table = predictions.table(valid.classes)
    assert table.column("target").to_pylist() == [[valid.classes[int(row.argmax())]] for row in valid.targets]
    named = [[name for name, share in zip(valid.classes, row, strict=True) if share > 0.5] for row in p]
    assert table.column("prediction").to_pylist() == named
    right = ((p > 0.5) == (valid.targets.numpy() > 0)).mean()
    assert learn.validate()["accuracy_multi"] == pytest.approx(right, abs=1e-7)


def test_validation_changes_neither_the_weights_nor_what_training_does_next() -> None:
    plain, curious = learner(), learner()
    for learn in (plain, curious):
        learn.fit_one_cycle(1, 1e-2)
        if learn is curious:
            before = snapshot(learn.model)
            learn.validate()
            learn.predictions()
            assert same(before, learn.model.state_dict())
        learn.fit_one_cycle(1, 1e-2)
    assert same(plain.model.state_dict(), curious.model.state_dict())


def test_two_fits_in_a_row_continue_the_stream_and_hash_what_arrived() -> None:
    learn = learner(data=loaders(train=22))
    assert isinstance(learn.train, ToyLoader)
    learn.fit_one_cycle(1, 1e-3)
    assert learn.progress.stream_hash == stream_hash(learn.train, steps=6)
    learn.fine_tune(2, 1e-3)
    assert learn.progress.step == 6 + 6 + 11
    assert learn.progress.stream_hash == stream_hash(learn.train, steps=6 + 6 + 11)
    assert learn.progress.epochs == 4


def test_the_hash_is_of_the_ids_that_came_with_the_pixels() -> None:
    honest, confused = learner(), learner()
    data = confused.train
    assert isinstance(data, ToyLoader)
    render = data.stream

    def mixed_up(first_step: int = 0) -> Iterator[Batch]:
        for batch in render(first_step):
            yield Batch(batch.arguments[0].flip(0), batch.targets.flip(0), batch.ids.flip(0))

    data.stream = mixed_up  # type: ignore[method-assign]
    for learn in (honest, confused):
        learn.fit_one_cycle(1, 1e-3)
    assert honest.progress.stream_hash != confused.progress.stream_hash


def fitted(*, seed: int = 42, rank: int = 0, noise: int = 0, model: ToyModel | None = None) -> dict[str, Tensor]:
    """The weights after an epoch, with the global generator somewhere else at every step."""
    torch.manual_seed(noise)
    data = loaders(before=lambda step: torch.rand(noise + 1))
    learn = learner(seed=seed, data=data, context=Watched(rank=rank), model=model)
    learn.fit_one_cycle(1, 1e-2)
    return snapshot(learn.model)


def test_dropout_is_a_function_of_seed_step_and_rank_alone() -> None:
    reference = fitted()
    assert same(reference, fitted(noise=5))
    assert not same(reference, fitted(seed=43))
    assert not same(reference, fitted(rank=1))
    still = [fitted(seed=seed, model=ToyModel(dropout=0.0)) for seed in (42, 43)]
    assert same(*still)  # so it was the dropout


def test_every_step_draws_another_dropout() -> None:
    masks: list[Tensor] = []
    model = ToyModel(dropout=0.5)
    model.head[2].register_forward_hook(lambda layer, inputs, output: masks.append((output == 0) & (inputs[0] != 0)))
    learner(model=model).fit_one_cycle(1, 1e-9)
    training = masks[:STEPS]
    assert all(not torch.equal(a, b) for i, a in enumerate(training) for b in training[:i])
    assert not any(bool(mask.any()) for mask in masks[STEPS:])  # none in validation


def test_a_sink_gets_one_call_a_step_and_every_row() -> None:
    spy = Spy()
    learn = learner(sinks=[spy])
    learn.fit_one_cycle(2, 1e-3)
    assert [images for images, _, _ in spy.steps] == [4] * (2 * STEPS)
    assert all(step > 0 and wait >= 0 for _, step, wait in spy.steps)
    assert len(spy.busy_s) == 6  # one a window
    assert spy.rows == learn.recorder.rows
    waits = [sum(wait for _, _, wait in spy.steps[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))]
    assert [row["data_wait_s"] for row in learn.recorder.of_kind("train")[:3]] == pytest.approx(waits)


def test_a_fit_tells_once_what_will_hardly_be_meant() -> None:
    model = ToyModel()
    model.pretrained = False  # type: ignore[assignment]
    context = Watched()
    learn = learner(model=model, context=context)
    learn.fine_tune(1, 1e-3)
    learn.freeze()
    learn.fit_one_cycle(1, 1e-3)  # by now the body has been trained
    notes = [str(row["text"]) for row in context.published if row["kind"] == "note"]
    assert [note.partition(", and")[0].partition(":")[0] for note in notes] == [
        "2 epoch(s) come to 10 steps of 4 images",
        "phase 'frozen' freezes a body of random weights",
        "1 epoch(s) come to 5 steps of 4 images",
    ]


def test_what_was_never_saved_is_not_called_unfinished(tmp_path: Path) -> None:
    learn = learner(context=Watched(run_dir=tmp_path))
    with pytest.raises(CheckpointError, match=r"models/nope cannot be loaded \(it does not exist; there is nothing\)"):
        learn.load("nope")
    learn.save("stage-1")
    with pytest.raises(CheckpointError, match=r"does not exist; there are stage-1"):
        learn.load("nope")


def test_weights_that_tell_other_classes_apart_are_not_loaded(tmp_path: Path) -> None:
    learner(context=Watched(run_dir=tmp_path)).save("stage-1")
    learn = learner(
        data=loaders(classes=("ape", "cat", "bee")), model=ToyModel(seed=3), context=Watched(run_dir=tmp_path)
    )
    before = snapshot(learn.model)
    with pytest.raises(CheckpointError, match=r"stage-1 was trained on other classes \('bee' in the place of 'cat'\)"):
        learn.load("stage-1")
    assert same(before, snapshot(learn.model))


def test_close_gives_both_loaders_back() -> None:
    learn = learner()
    learn.close()
    assert [data.closed for data in (learn.train, learn.valid) if isinstance(data, ToyLoader)] == [True, True]


def test_a_precision_or_optimiser_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match="fp16"):
        learner(precision="fp16")
    with pytest.raises(RecipeError, match="did you mean 'adam'"):
        learner(optimizer="adamv").fit_one_cycle(1)
