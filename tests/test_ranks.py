"""Several ranks against one: the same weights, the same stream, exact counts, and decisions taken together.

The scenario below runs once in 1, 2 and 3 processes (gloo, on the CPU); the tests compare what came out.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from tests.toy import ToyLoader, ToyModel, Watched, ids_of, learner, loaders, same, snapshot, stream_hash
from trainer import world
from trainer.errors import CheckpointError, DivergedError
from trainer.learner import Learner
from trainer.step import choose_precision, distribute, train_step
from trainer.window import Window

GLOBAL_BATCH = 7  # parts of 3 and 4, of 2, 2 and 3
VALID = 13
Outcome = dict[str, Any]
pytestmark = pytest.mark.slow


@dataclass
class Here:
    """Which process this is, and where it may write."""

    rank: int
    size: int
    folder: Path

    def data(self, **options: Any) -> tuple[ToyLoader, ToyLoader]:
        options = {"valid": VALID, "global_batch": GLOBAL_BATCH, **options}
        return loaders(rank=self.rank, world_size=self.size, **options)

    def learner(self, name: str, *, stop_at_window: int = 0, run_dir: Path | None = None, **options: Any) -> Learner:
        context = Watched(
            rank=self.rank,
            world_size=self.size,
            run_dir=run_dir or self.folder / name,
            stop_at_window=stop_at_window,
        )
        return learner(**{"context": context, "data": self.data(), **options})


def exact_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def collectives(here: Here) -> Outcome:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3)).requires_grad_(False)
    model[0].running_mean.fill_(here.rank + 1.0)  # type: ignore[operator]
    model[1].running_var.copy_(torch.arange(3.0) * here.rank)  # type: ignore[operator]
    world.average_buffers(model)
    readings = []
    for stop, save_due in ((False, here.rank == 0), (here.rank == here.size - 1, here.rank > 0)):
        window = Window()
        for step in range(2):
            ids = torch.tensor([100 * step + 10 * here.rank + i for i in range(here.rank + 1)])
            window.add(ids=ids, losses=torch.full(ids.shape, here.rank + 1.0), data_wait_s=float(here.rank))
        readings.append(window.close(stop=stop, save_due=save_due, lost={}))
    return {
        "gather": world.gather({"rank": here.rank}),
        "gather_to_first": world.gather_to_first(10 * here.rank),
        "buffers": snapshot(model),
        "readings": [
            ([i.tolist() for i in r.ids], r.steps, r.images, r.loss, r.data_wait_s, r.stop, r.save_due)
            for r in readings
        ],
    }


def one_step(here: Here, *, frozen_statistics: bool) -> dict[str, Tensor]:
    """The weights after one step on this rank's part of 7 samples."""
    model = ToyModel(norm=frozen_statistics, dropout=0.0).train(not frozen_statistics)
    train_step(
        distribute(model, torch.device("cpu")),
        next(here.data()[0].stream()),
        loss=exact_loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        precision=choose_precision("fp32", torch.device("cpu")),
        share=GLOBAL_BATCH / here.size,
    )
    return snapshot(model)


def freezing(here: Here) -> Outcome:
    """freeze, fit, unfreeze, fit in float64 without BatchNorm: one process is the oracle, to rounding."""
    model = ToyModel(norm=False, dropout=0.0, dtype=torch.float64)
    learn = here.learner("freezing", model=model, data=here.data(dtype=torch.float64), loss=exact_loss)
    learn.freeze()
    learn.fit_one_cycle(1, 1e-2)
    frozen = snapshot(model)
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-2)
    rows = [(row["step"], row["loss"]) for row in learn.recorder.of_kind("train")]
    return {"frozen": frozen, "weights": snapshot(model), "hash": learn.progress.stream_hash, "losses": rows}


def fitting(here: Here) -> Outcome:
    """BatchNorm and dropout: an unbroken run, and the same one stopped by its last rank and resumed."""
    unbroken = here.learner("unbroken", checkpoint_every_s=0.0)
    unbroken.fine_tune(1, 1e-2)
    last = here.rank == here.size - 1
    stopped = here.learner("stopped", checkpoint_every_s=0.0, stop_at_window=3 if last else 0)
    stopped.fine_tune(1, 1e-2)
    resumed = here.learner("stopped", checkpoint_every_s=0.0)
    found = resumed.resume()
    resumed.fine_tune(1, 1e-2)
    values, predictions = unbroken.validate(), unbroken.predictions()
    return {
        "weights": snapshot(unbroken.model),
        "hash": unbroken.progress.stream_hash,
        "stopped": (stopped.stopped, stopped.progress.step),
        "found": found,
        "resumed": (snapshot(resumed.model), resumed.progress.stream_hash, resumed.progress.step),
        "values": values,
        "predictions": predictions
        and (predictions.ids, predictions.targets, predictions.probabilities, predictions.losses),
    }


def failing(here: Here) -> Outcome:
    """What goes wrong on one rank is the same error on all."""
    last, messages = here.rank == here.size - 1, {}

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return exact_loss(logits, targets) * (float("nan") if last else 1.0)

    try:
        here.learner("diverging", loss=loss).fit_one_cycle(1, 1e-2)
    except DivergedError as error:
        messages["diverged"] = str(error)
    elsewhere = here.folder / "elsewhere" if last and here.size > 1 else here.folder / "unbroken"
    try:
        here.learner("storage", run_dir=elsewhere).resume()
    except CheckpointError as error:
        messages["storage"] = str(error)
    return messages


def scenario(here: Here) -> Outcome:
    return {
        **collectives(here),
        "plain step": one_step(here, frozen_statistics=False),
        "step with frozen statistics": one_step(here, frozen_statistics=True),
        "freezing": freezing(here),
        "fitting": fitting(here),
        "failing": failing(here),
    }


def _process(rank: int, folder: str) -> None:
    """Three processes of which two go on: importing torch is what takes the time."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for size in (3, 2):
        if rank < size:
            here = Here(rank, size, Path(folder, str(size)))
            here.folder.mkdir(exist_ok=True)
            dist.init_process_group("gloo", init_method=f"file://{here.folder}/store", rank=rank, world_size=size)
            torch.save(scenario(here), here.folder / f"{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcome]]:
    """What every rank of 1, 2 and 3 saw."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_process, (str(folder),), nprocs=3)  # type: ignore[no-untyped-call]
    outcomes = {1: [scenario(Here(0, 1, folder / "1"))]}
    for size in (2, 3):
        outcomes[size] = [torch.load(folder / f"{size}/{rank}.pt", weights_only=False) for rank in range(size)]
    return outcomes


Worlds = dict[int, list[Outcome]]
several = pytest.mark.parametrize("size", [2, 3])
every = pytest.mark.parametrize("size", [1, 2, 3])


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@every
def test_gather_gives_every_rank_everything_and_gather_to_first_only_rank_0(worlds: Worlds, size: int) -> None:
    assert [o["gather"] for o in worlds[size]] == [[{"rank": r} for r in range(size)]] * size
    assert [o["gather_to_first"] for o in worlds[size]] == [[10 * r for r in range(size)]] + [[]] * (size - 1)


@every
def test_averaged_buffers_are_the_mean_over_ranks_and_counters_stay_whole(worlds: Worlds, size: int) -> None:
    mean = (size - 1) / 2
    for outcome in worlds[size]:
        buffers = outcome["buffers"]
        assert torch.equal(buffers["0.running_mean"], torch.full((2,), mean + 1))
        assert torch.equal(buffers["0.running_var"], torch.ones(2))
        assert torch.equal(buffers["1.running_var"], torch.arange(3.0) * mean)
        assert buffers["0.num_batches_tracked"].dtype == torch.int64


@every
def test_a_window_closes_with_the_same_reading_on_every_rank(worlds: Worlds, size: int) -> None:
    """Rank r adds r + 1 samples of loss r + 1 a step."""
    ids = [[100 * step + 10 * r + i for r in range(size) for i in range(r + 1)] for step in range(2)]
    images = 2 * sum(r + 1 for r in range(size))
    loss = 2 * sum((r + 1) ** 2 for r in range(size)) / images
    wait = 2 * (size - 1) / 2
    for outcome in worlds[size]:
        first, second = outcome["readings"]
        assert first == (ids, 2, images, pytest.approx(loss), wait, False, True)  # only rank 0's clock was due
        assert second == (ids, 2, images, pytest.approx(loss), wait, True, False)  # the last rank asked; 0's was not


@several
@pytest.mark.parametrize("kind", ["plain step", "step with frozen statistics"])
def test_a_step_over_uneven_parts_gives_one_process_s_weights(worlds: Worlds, size: int, kind: str) -> None:
    for outcome in worlds[size]:
        assert_close(outcome[kind], worlds[1][0][kind], 1e-6)


@several
def test_ranks_stay_identical_through_freeze_fit_unfreeze_fit_and_follow_one_process(worlds: Worlds, size: int) -> None:
    first, alone = worlds[size][0]["freezing"], worlds[1][0]["freezing"]
    for outcome in worlds[size]:
        for name in ("frozen", "weights"):
            assert same(outcome["freezing"][name], first[name])
            assert_close(outcome["freezing"][name], alone[name], 1e-9)
        assert outcome["freezing"]["losses"] == first["losses"]
    assert [step for step, _ in first["losses"]] == [step for step, _ in alone["losses"]]
    np.testing.assert_allclose([loss for _, loss in first["losses"]], [loss for _, loss in alone["losses"]], rtol=1e-9)
    assert torch.equal(first["frozen"]["stem.0.weight"], snapshot(ToyModel(norm=False))["stem.0.weight"].double())
    assert not torch.equal(first["frozen"]["stem.0.weight"], first["weights"]["stem.0.weight"])


@every
def test_the_stream_hash_is_the_plan_s_at_any_world_size(worlds: Worlds, size: int) -> None:
    plan = loaders(global_batch=GLOBAL_BATCH)[0]
    assert {o["freezing"]["hash"] for o in worlds[size]} == {stream_hash(plan, steps=3 + 3)}
    assert {o["fitting"]["hash"] for o in worlds[size]} == {stream_hash(plan, steps=3 + 3)}


@several
def test_ranks_end_with_the_same_weights_and_batchnorm_statistics(worlds: Worlds, size: int) -> None:
    assert all(same(o["fitting"]["weights"], worlds[size][0]["fitting"]["weights"]) for o in worlds[size])


@every
def test_a_stop_asked_of_one_rank_stops_all_at_the_same_step(worlds: Worlds, size: int) -> None:
    assert [o["fitting"]["stopped"] for o in worlds[size]] == [(True, 5)] * size  # windows end at 2, 3 and 5


@every
def test_a_resumed_run_equals_the_unbroken_one_of_as_many_ranks(worlds: Worlds, size: int) -> None:
    """Bit by bit, unless three add up: DDP reorders its buckets after its first step, and gloo's ring then adds a
    weight's three gradients in another order than it did in the unbroken run."""
    for outcome in worlds[size]:
        fit = outcome["fitting"]
        weights, digest, step = fit["resumed"]
        assert fit["found"]
        assert (digest, step) == (fit["hash"], 6)
        if size < 3:
            assert same(weights, fit["weights"])
        assert_close(weights, fit["weights"], 1e-6)


@every
def test_validation_counts_every_sample_once_and_its_error_is_a_plain_count(worlds: Worlds, size: int) -> None:
    fits = [outcome["fitting"] for outcome in worlds[size]]
    assert [fit["predictions"] is None for fit in fits] == [False] + [True] * (size - 1)
    ids, targets, probabilities, losses = fits[0]["predictions"]
    assert ids.tolist() == ids_of(VALID).tolist()
    assert targets.tolist() == loaders(valid=VALID)[1].targets.tolist()
    wrong = int((probabilities.argmax(1) != targets).sum())
    for fit in fits:
        assert fit["values"]["error_rate"] == wrong / VALID
        assert fit["values"]["valid_loss"] == pytest.approx(float(losses.astype(np.float64).mean()), rel=1e-7)
        assert fit["values"] == fits[0]["values"]
    assert 0 < wrong < VALID


@every
def test_a_loss_that_is_no_number_on_one_rank_ends_all_with_the_same_sentence(worlds: Worlds, size: int) -> None:
    messages = {outcome["failing"]["diverged"] for outcome in worlds[size]}
    assert len(messages) == 1
    assert "before step 2" in messages.pop()


@several
def test_ranks_that_see_different_storage_refuse_to_go_on(worlds: Worlds, size: int) -> None:
    steps = [6] * (size - 1) + [None]
    for outcome in worlds[size]:
        assert f"ranks see different checkpoints (steps {steps})" in outcome["failing"]["storage"]
