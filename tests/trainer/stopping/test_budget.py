"""Budgets: are as many epochs planned as fit, once, and does everything stay as it was meanwhile?"""

from pathlib import Path
from typing import Any

import pytest

from tests.kit.toy import learner, same, snapshot
from tests.trainer.checkpoints.test_resume import asked, on_disk, outcome
from thawline.trainer.errors import RecipeError
from thawline.trainer.schedule.phases import Find, Phase, fine_tune_phases
from thawline.trainer.stopping import budget
from thawline.trainer.stopping.budget import Pace, epochs_within
from thawline.trainer.stopping.durations import seconds, written


def paced(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    monkeypatch.setattr(budget, "measured", lambda session, phases: Pace((step_s,) * len(phases), step_s))


@pytest.mark.parametrize(
    ("text", "time_s"),
    [("90s", 90), ("30m", 1800), ("2h30m", 9000), ("1.5h", 5400), ("1h1m1.5s", 3661.5), ("0.5s", 0.5)],
)
def test_a_time_is_read_as_people_write_it(text: str, time_s: float) -> None:
    assert seconds(text) == time_s
    assert seconds(written(time_s)) == pytest.approx(time_s, abs=0.5)


@pytest.mark.parametrize("text", ["", "0s", "90", "30 m", "30M", "m", "2m1h", "1m1m", "-5m", "1d", "nan", "٣m"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert seconds(text) is None


def test_as_many_epochs_as_fit_in_closed_form() -> None:
    session = learner().session  # 20 samples in batches of 4: 5 steps an epoch
    phases = fine_tune_phases(7, Find(), frozen_epochs=2)
    pace = Pace((0.1, 0.3), 2.0)
    fixed_s, epoch_s = 100 * 0.1 + 10 * 0.1 + 2 * 2.0, 5 * 0.3 + 2.0
    for left_s, epochs in ((fixed_s + epoch_s + 0.01, 1), (fixed_s + 4.9 * epoch_s, 4), (fixed_s + 0.9 * epoch_s, 0)):
        whole, takes_s = epochs_within(session, phases, pace, left_s)
        assert whole == epochs
        assert takes_s == pytest.approx(fixed_s + max(1, epochs) * epoch_s)
    assert epochs_within(session, [Phase("a", steps=3), Phase("b", 1)], Pace((1.0, 1.0), 1.0), 100.0)[0] == 96 // 6


def test_timing_puts_everything_back() -> None:
    timed, plain = learner(ema=0.9), learner(ema=0.9)
    pace = budget.measured(timed.session, fine_tune_phases(1, 1e-2))
    assert len(pace.step_s) == 2
    assert min(*pace.step_s, pace.valid_s) > 0
    for learn in (timed, plain):
        learn.fine_tune(1, 1e-2)
    assert outcome(timed) == outcome(plain)
    assert same(snapshot(timed.model), snapshot(plain.model))


def test_a_budget_shorter_than_one_epoch_is_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paced(monkeypatch, 10.0)
    learn = learner()
    before = snapshot(learn.model)
    with pytest.raises(
        RecipeError, match=r"a budget of 1m is too short for one epoch .*: 2m with .*; give 2m1\ds or more"
    ):
        learn.fit(fine_tune_phases(1, 1e-2), budget_s=60)  # twice 5 steps and a validation
    assert learn.progress.step == 0
    assert same(before, snapshot(learn.model))


def test_stopped_anywhere_and_resumed_on_a_slower_machine_the_plan_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases, budget_s = fine_tune_phases(1, 1e-2), 12000.0

    def fit(folder: Path, *, step_s: float, **options: Any) -> Any:
        paced(monkeypatch, step_s)
        learn = on_disk(folder, **options)
        learn.resume()
        learn.fit(phases, budget_s=budget_s)
        return learn

    unbroken = fit(tmp_path / "unbroken", step_s=500.0)
    assert unbroken.progress.planned_epochs == 2  # of 3,500 s, after a frozen one
    for stop in range(1, asked(unbroken) + 1, 5):
        assert fit(tmp_path / str(stop), step_s=500.0, stop_at_ask=stop).stopped
        resumed = fit(tmp_path / str(stop), step_s=1e9)
        assert outcome(resumed) == outcome(unbroken)
        assert same(snapshot(resumed.model), snapshot(unbroken.model))
    again = unbroken
    again.fit(phases)
    assert again.progress.planned_epochs is None, "the next fit is not planned"
