"""Stopping: does a phase end where its epochs' numbers say so, with the weights of its best epoch, resumed or not?"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.ranks import Here, Outcome, exact_loss, worlds_of
from tests.kit.toy import ToyModel, Watched, learner, loaders, same, snapshot
from tests.trainer.checkpoints.test_resume import asked, outcome
from thawline.trainer.errors import RecipeError
from thawline.trainer.learner import Learner
from thawline.trainer.records.rows import Recorded
from thawline.trainer.schedule.phases import Phase
from thawline.trainer.stopping.budget import measured
from thawline.trainer.stopping.early import Stopping, best_epoch, falls, since_best

PATIENT = Stopping(patience=2, restore_best=True)


class Epochs:
    """A sink that keeps the weights of each validation."""

    def __init__(self) -> None:
        self.learn: Learner | None = None
        self.weights: list[dict[str, torch.Tensor]] = []

    def step(self, **numbers: Any) -> None: ...

    def busy(self, **numbers: Any) -> None: ...

    def observe(self, row: Recorded) -> None:
        if row["kind"] == "valid":
            assert self.learn is not None
            self.weights.append(snapshot(self.learn.model))


def made(folder: Path | None = None, *, stop_at_ask: int = 0, **options: Any) -> tuple[Learner, Epochs]:
    epochs = Epochs()
    context = Watched(run_dir=folder or "never", stop_at_ask=stop_at_ask)
    written: dict[str, Any] = {} if folder is None else {"checkpoint_every_s": 0.0}
    epochs.learn = learner(context=context, data=loaders(train=22), sinks=[epochs], **written, **options)
    return epochs.learn, epochs


def losses(learn: Learner) -> list[float]:
    return [row["valid_loss"] for row in learn.recorder.of_kind("valid")]


def test_a_phase_ends_after_its_patience_with_the_weights_of_its_best_epoch() -> None:
    learn, epochs = made(stopping=PATIENT)
    predicted = learn.fit([Phase("far", 12, lr=0.5, shape="constant")], predict=True)
    measured = losses(learn)
    best = measured.index(min(measured))
    assert 1 < len(measured) == best + 3 < 12  # two more, neither better
    assert same(learn.model.state_dict(), epochs.weights[best])
    rows = learn.recorder.of_kind("valid")
    assert learn.progress.epochs == rows[-1]["epoch"]
    assert learn.session.described() == rows[best]
    assert predicted is not None
    assert predicted.losses.mean() == pytest.approx(min(measured), rel=1e-6)
    assert learn.validate()["valid_loss"] == min(measured)


def test_every_phase_is_watched_anew() -> None:
    learn, epochs = made(stopping=Stopping(patience=1, restore_best=True))
    learn.fit([Phase("far", 9, lr=0.5, shape="constant"), Phase("further", 9, lr=0.5, shape="constant")])
    rows = learn.recorder.of_kind("valid")
    first = [row["valid_loss"] for row in rows if row["phase"] == "far"]
    second = [row["valid_loss"] for row in rows if row["phase"] == "further"]
    for part in (first, second):
        assert part.index(min(part)) == len(part) - 2 < 8
    assert same(learn.model.state_dict(), epochs.weights[len(first) + len(second) - 2])


def test_without_patience_all_epochs_run_and_the_best_is_restored_with_its_average() -> None:
    learn, epochs = made(stopping=Stopping(restore_best=True, monitor="error_rate"), ema=0.5)
    learn.fit([Phase("far", 6, lr=0.5, shape="constant")])
    errors = [float(row["error_rate"]) for row in map(dict[str, Any], learn.recorder.of_kind("valid"))]
    best = errors.index(min(errors))
    assert len(errors) == 6
    assert best < 5
    assert same(learn.model.state_dict(), epochs.weights[best])
    assert learn.validate()["error_rate"] == min(errors)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_stopped_at_any_checkpoint_and_resumed_it_equals_the_unbroken_run(tmp_path: Path, ema: float) -> None:
    options: dict[str, Any] = {"stopping": PATIENT, "ema": ema}
    phases = [Phase("frozen", 1, freeze_to=-1, lr=0.1), Phase("far", 9, lr=0.5, shape="constant")]
    unbroken, _ = made(tmp_path / "unbroken", **options)
    unbroken.fit(phases)
    assert len(losses(unbroken)) < 9
    for stop in range(1 if ema else 4, asked(unbroken) + 1, 17):
        first, _ = made(tmp_path / str(stop), stop_at_ask=stop, **options)
        first.fit(phases)
        assert first.stopped
        second, _ = made(tmp_path / str(stop), **options)
        assert second.resume()
        second.fit(phases)
        assert outcome(second) == outcome(unbroken)
        assert same(second.model.state_dict(), unbroken.model.state_dict())
        assert same(second.session.weights().get("ema", {}), unbroken.session.weights().get("ema", {}))


def watched(here: Here) -> Outcome:
    def fit(name: str, *, stop_at_ask: int = 0) -> Learner:
        model = ToyModel(norm=False, dropout=0.0, dtype=torch.float64)
        data = here.data(dtype=torch.float64, global_batch=6)
        options: dict[str, Any] = {"loss": exact_loss, "stopping": PATIENT, "checkpoint_every_s": 0.0}
        learn = here.learner(name, model=model, data=data, stop_at_ask=stop_at_ask, **options)
        learn.resume()
        learn.fit([Phase("far", 12, lr=0.1, shape="constant")])
        return learn

    unbroken = fit("unbroken")
    assert fit("broken", stop_at_ask=9 if here.last else 0).stopped
    weights = snapshot(fit("broken").model)
    assert same(weights, snapshot(unbroken.model))
    pace = measured(unbroken.session, [Phase("planned", 1)])
    return {"losses": losses(unbroken), "weights": weights, "pace": pace}


@pytest.mark.slow
def test_two_ranks_stop_restore_and_plan_as_one(tmp_path: Path) -> None:
    worlds = worlds_of(watched, tmp_path, sizes=(2, 1))
    (one,), (first, second) = worlds[1], worlds[2]
    assert 2 < len(one["losses"]) < 12
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"])
    assert same(first["weights"], second["weights"])
    assert first["pace"] == second["pace"], "each rank has a clock of its own, and the slowest counts"
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value)


def test_values_that_are_no_numbers_are_never_the_best() -> None:
    values = [math.nan, 3.0, 2.0, 2.0, math.nan, 1.0, 4.0]
    assert (best_epoch(values, higher=False), since_best(values, higher=False)) == (5, 1)
    assert (best_epoch(values, higher=True), since_best(values, higher=True)) == (6, 0)
    assert (best_epoch(values[:4], higher=False), since_best(values[:4], higher=False)) == (2, 1)
    assert (best_epoch([math.nan], higher=False), since_best([math.nan] * 3, higher=True)) == (None, 3)
    assert [falls(values[:n], higher=False, wait=1) for n in range(8)] == [0, 1, 1, 1, 2, 3, 3, 4]
    assert [falls(values[:n], higher=False, wait=2) for n in range(8)] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_what_is_not_measured_cannot_be_watched() -> None:
    with pytest.raises(RecipeError, match=r"monitor='f1' is not measured: .* give one of valid_loss, "):
        learner(stopping=Stopping(patience=1, monitor="f1"))
    with pytest.raises(RecipeError, match="patience=0 is out of range"):
        learner(stopping=Stopping(patience=0))
