"""Steps that are no numbers: seen before the optimiser, and everything is as before the first of them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kit.toy import ToyModel, Watched, ids_of, learner, loaders, same, snapshot
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.errors import DivergedError
from thawline.trainer.learner import Learner
from thawline.trainer.step.guard import FP16_IN_A_ROW, Guard

CPU = torch.device("cpu")
LossFunction = Callable[[Tensor, Tensor], Tensor]


def spoilt(step: int, how: str) -> LossFunction:
    """Cross-entropy that goes wrong in that training step: nan, an infinite loss, or gradients alone."""
    calls = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        losses = F.cross_entropy(logits, targets, reduction="none")
        if not losses.requires_grad:
            return losses
        calls += 1
        if calls != step + 1:
            return losses
        if how == "infinite loss":
            return losses + math.inf  # whose gradients are finite
        if how == "gradients":
            logits.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
            return losses
        return losses * math.nan

    return loss


def on_disk(folder: Path, *, loss: LossFunction | Literal["auto"] = "auto", log_every: int = 3) -> Learner:
    options: dict[str, Any] = {"checkpoint_every_s": 0.0, "keep": 99, "log_every": log_every, "loss": loss}
    return learner(context=Watched(run_dir=folder), data=loaders(train=22), **options)


def ids_at(step: int) -> list[int]:
    order = loaders(train=22)[0].order
    _, positions = next(order.batches(step))
    rows = order.at(positions)[1]
    return [int(ids_of(22)[int(row)]) for row in rows]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a bad step, with a checkpoint of each of its steps."""
    folder = tmp_path_factory.mktemp("healthy")
    on_disk(folder, log_every=1).fit_one_cycle(2, 1e-2)
    return folder


@pytest.mark.parametrize("how", ["nan", "infinite loss", "gradients"])
@pytest.mark.parametrize("step", [0, 1, 3, 5, 7])
def test_what_is_no_number_ends_the_run_with_everything_as_before_that_step(
    tmp_path: Path, healthy: Path, step: int, how: str
) -> None:
    """The window has three steps: weights, moments and statistics go back to before the bad one, wherever it stands."""
    learn = on_disk(tmp_path / "ill", loss=spoilt(step, how))
    with pytest.raises(DivergedError) as caught:
        learn.fit_one_cycle(2, 1e-2)
    said = str(caught.value)
    assert f"at step {step} (learning rates " in said
    assert f"ids {', '.join(map(str, ids_at(step)))})" in said
    if step == 0:
        assert same(snapshot(learn.model), snapshot(ToyModel()))
        return
    saved, skipped = checkpoint.newest(tmp_path / "ill/checkpoints")
    assert saved is not None
    assert (saved.step, skipped) == (step, [])
    before = checkpoint.load_model(healthy / "checkpoints", f"step_{step:08d}")
    assert same(saved.load("model"), before.load("model"))
    state, plain = saved.load("state"), before.load("state")
    assert state["progress"]["stream_hash"] == plain["progress"]["stream_hash"]
    for number, moments in plain["optimizer"]["state"].items():
        assert same(state["optimizer"]["state"][number], moments)


def test_whoever_goes_on_after_a_bad_step_meets_it_again_and_with_a_sane_loss_reaches_the_healthy_end(
    tmp_path: Path,
) -> None:
    healthy = on_disk(tmp_path / "healthy")
    healthy.fit_one_cycle(2, 1e-2)
    with pytest.raises(DivergedError):
        on_disk(tmp_path / "ill", loss=spoilt(7, "nan")).fit_one_cycle(2, 1e-2)
    again = on_disk(tmp_path / "ill", loss=spoilt(0, "nan"))
    assert again.resume()
    with pytest.raises(DivergedError, match=r"at step 7 \("):
        again.fit_one_cycle(2, 1e-2)
    mended = on_disk(tmp_path / "ill")
    assert mended.resume()
    mended.fit_one_cycle(2, 1e-2)
    assert same(mended.model.state_dict(), healthy.model.state_dict())
    assert mended.progress.stream_hash == healthy.progress.stream_hash


def test_without_a_run_folder_nothing_is_written_and_the_weights_are_still_those_from_before(tmp_path: Path) -> None:
    learn = learner(loss=spoilt(1, "nan"), log_every=4)
    once = learner(log_every=1, context=Watched(stop_at_ask=1))
    once.fit_one_cycle(1, 1e-2)
    with pytest.raises(DivergedError, match="nothing was kept"):
        learn.fit_one_cycle(1, 1e-2)
    assert same(snapshot(learn.model), snapshot(once.model))


class Deeper(ToyModel):
    """The toy with a hidden matrix, for muon."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head.insert(2, nn.Linear(20, 20))


@pytest.mark.parametrize("name", ["nadam", "radam", "rmsprop", "adagrad", "muon", "timm:lion"])
def test_an_optimiser_that_cannot_pass_over_a_step_by_itself_does_not_take_it(tmp_path: Path, name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    common: dict[str, Any] = {"optimizer": name, "checkpoint_every_s": 0.0}
    once = learner(model=Deeper(), log_every=1, context=Watched(tmp_path / "once", stop_at_ask=3), **common)
    once.fit_one_cycle(1, 1e-2)
    ill = learner(model=Deeper(), log_every=5, context=Watched(tmp_path / "ill"), loss=spoilt(3, "nan"), **common)
    with pytest.raises(DivergedError, match=r"at step 3 \(.* what was before it is kept"):
        ill.fit_one_cycle(1, 1e-2)
    assert same(snapshot(ill.model), snapshot(once.model))
    saved, plain = (checkpoint.newest(tmp_path / run / "checkpoints")[0] for run in ("ill", "once"))
    assert saved is not None
    assert plain is not None
    assert (saved.step, plain.step) == (3, 3)
    for number, moments in plain.load("state")["optimizer"]["state"].items():
        assert same(saved.load("state")["optimizer"]["state"][number], moments)


def norms(guard: Guard, values: list[float]) -> list[float]:
    seen = []
    for value in values:
        guard.keep()
        seen.append(float(guard.see(torch.tensor(value))))
    return seen


def test_after_the_first_bad_step_every_step_is_passed_over_until_it_is_read() -> None:
    guard = Guard(nn.Identity(), CPU)
    assert norms(guard, [1.0, 2.0, math.nan, 3.0, math.inf]) == [0, 0, 1, 1, 1]
    seen = guard.read()
    assert (seen.bad, seen.skipped) == (2, 0)


def test_what_is_read_counts_from_the_last_read() -> None:
    guard = Guard(nn.Identity(), CPU)
    norms(guard, [1.0, 2.0, 5.0])
    assert guard.read().grad_norm == 5.0
    norms(guard, [1.0, math.inf])
    assert guard.read().bad == 1


def test_fp16_loses_single_steps_and_a_row_of_them_is_bad() -> None:
    guard = Guard(nn.Identity(), CPU, tolerated=FP16_IN_A_ROW, window=100)
    assert norms(guard, [math.inf, math.inf, 1.0, math.nan, 1.0]) == [1, 1, 0, 1, 0]
    seen = guard.read()
    assert (seen.bad, seen.skipped) == (None, 3)
    row = norms(guard, [math.inf] * FP16_IN_A_ROW)
    assert row == [1.0] * FP16_IN_A_ROW
    assert guard.read().bad is None
    norms(guard, [math.inf, 1.0])
    assert guard.read().bad == 0


def test_buffers_go_back_as_far_as_they_are_remembered() -> None:
    layer = nn.BatchNorm1d(2)
    guard = Guard(layer, CPU, window=3)
    states = []
    for step in range(7):
        guard.keep()
        states.append(snapshot(layer))
        layer.running_mean.fill_(float(step))  # type: ignore[union-attr]
        layer.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        guard.see(torch.tensor(1.0))
    for back in (1, 2, 3):
        assert guard.undo(back)
        assert same(snapshot(layer), states[7 - back])
    assert not guard.undo(4)
    assert not guard.undo(0)
