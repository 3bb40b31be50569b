"""cosine, step and plateau: torch's own schedulers at every step, and at every epoch what was measured has decided."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from tests.kit.toy import same
from tests.trainer.checkpoints.test_resume import asked, on_disk, outcome
from thawline.trainer.errors import RecipeError
from thawline.trainer.learner import Learner
from thawline.trainer.schedule.phases import Phase, cosine_phases, plateau_phases, step_phases
from thawline.trainer.stopping.early import falls

LR = 3e-3


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)


def of_torch(scheduler: LRScheduler, steps: int) -> list[float]:
    """Its rate at each step, called after every one."""
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def rates(phase: Phase, steps: int) -> list[float]:
    schedule = phase.schedule(LR, groups=1, steps=steps)
    return [schedule.at(step)[0][0] for step in range(steps)]


@pytest.mark.parametrize("steps", [10, 99, 1440])
def test_cosine_is_torch_s_cosine_annealing(steps: int) -> None:
    (plain,) = cosine_phases(1, LR, div_final=1e3)
    torch_s = CosineAnnealingLR(optimizer(), steps, eta_min=LR / 1e3)
    assert rates(plain, steps) == pytest.approx(of_torch(torch_s, steps), rel=1e-6)
    assert plain.name == "cosine"


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # of torch's own SequentialLR
@pytest.mark.parametrize("steps", [10, 100, 1440])
def test_cosine_with_a_warm_up_is_torch_s_two_in_a_row(steps: int) -> None:
    (warmed,) = cosine_phases(1, LR, warmup=0.1, div=20)
    warm, opt = steps // 10, optimizer()
    linear = LinearLR(opt, start_factor=1 / 20, total_iters=warm)
    torch_s = SequentialLR(opt, [linear, CosineAnnealingLR(opt, steps - warm, eta_min=LR / 1e5)], milestones=[warm])
    assert rates(warmed, steps) == pytest.approx(of_torch(torch_s, steps), rel=1e-6)


@pytest.mark.parametrize("steps", [10, 99, 1440])
def test_step_is_torch_s_multi_step(steps: int) -> None:
    (plain,) = step_phases(1, LR)
    milestones = [math.ceil(share * steps) for share in (0.5, 0.75)]
    assert rates(plain, steps) == pytest.approx(of_torch(MultiStepLR(optimizer(), milestones), steps))
    (given,) = step_phases(1, LR, milestones=(0.1, 0.3, 0.9), gamma=0.5, warmup=0.1, div=4)
    at = {share: rates(given, 1000)[int(1000 * share)] for share in (0.0, 0.05, 0.1, 0.299, 0.3, 0.9)}
    expected = {0.0: LR / 4, 0.05: LR * 5 / 8, 0.1: LR / 2, 0.299: LR / 2, 0.3: LR / 4, 0.9: LR / 8}
    assert at == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [{"milestones": (0.7, 0.5)}, {"milestones": (0.1,), "warmup": 0.2}, {"milestones": (1.5,)}, {"gamma": 1}],
)
def test_a_step_that_makes_no_schedule_gets_a_sentence(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"(milestones|gamma)=.*; give (rising|0|a factor)"):
        step_phases(1, LR, **options)


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("wait", [1, 2, 3])
def test_a_plateau_is_torch_s(wait: int, higher: bool) -> None:
    values = torch.randint(0, 12, (60,), generator=torch.Generator().manual_seed(wait)).tolist()  # with equals
    opt = optimizer()
    mode, patience = "max" if higher else "min", wait - 1  # torch counts the epochs that are borne
    torch_s = lr_scheduler.ReduceLROnPlateau(opt, mode, factor=0.5, patience=patience, threshold=0)  # type: ignore[arg-type]
    (phase,) = plateau_phases(1, LR, gamma=0.5)
    for epoch, value in enumerate(values, start=1):
        torch_s.step(value)
        fallen = falls(values[:epoch], higher=higher, wait=wait)
        ours = phase.schedule(LR, groups=1, steps=1, fallen=fallen).at(0)[0][0]
        assert ours == pytest.approx(opt.param_groups[0]["lr"], abs=2e-8)  # torch ignores falls below 1e-8


def test_a_plateau_interrupted_anywhere_equals_the_unbroken_run(tmp_path: Path) -> None:
    phases = plateau_phases(6, [0.05, 0.5], gamma=0.2, warmup=0.1)

    def fit(folder: Path, **options: Any) -> Learner:
        learn = on_disk(folder, **options)
        learn.resume()
        learn.fit(phases)
        return learn

    unbroken = fit(tmp_path / "unbroken")
    losses = [row["valid_loss"] for row in unbroken.recorder.of_kind("valid")]
    for row in unbroken.recorder.of_kind("train"):
        if row["phase_step"] > 4:  # after the warm-up
            ended = sum(valid["step"] < row["step"] for valid in unbroken.recorder.of_kind("valid"))
            fallen = falls(losses[:ended], higher=False, wait=1)
            assert row["lr"] == pytest.approx(0.5 * 0.2**fallen)
    assert 1 <= falls(losses[:-1], higher=False, wait=1) <= 4
    for stop in range(2, asked(unbroken) + 1, 6):
        assert fit(tmp_path / str(stop), stop_at_ask=stop).stopped
        resumed = fit(tmp_path / str(stop))
        assert outcome(resumed) == outcome(unbroken)
        assert same(resumed.model.state_dict(), unbroken.model.state_dict())
