"""Trouble on one rank: what all of them do about it, at the same step and in the same words.

Each of the ranks' troubles is injected by the model or the loader of the test, on the last rank, in 1, 2 and 3
processes; nothing in the product knows of it.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kit.ranks import GLOBAL_BATCH, Here, Outcome, exact_loss, worlds_of
from tests.kit.toy import Spy, ToyLoader, ToyModel, same, snapshot
from thawline.dataio.batch import Batch
from thawline.dataio.errors import QuarantineError
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.errors import DivergedError, MemoryLimitError, PeerError
from thawline.trainer.learner import Learner

pytestmark = pytest.mark.slow
PLACES = ("forward", "backward")
STEPS = (0, 1, 4)  # the first, before DDP has laid out its buckets; the next, when it lays them out; and a later one


class _Trip(torch.autograd.Function):
    """Passes a tensor on; its backward calls."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, trip: Any) -> Tensor:
        ctx.trip = trip
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.trip()
        return gradients[0], None


class Narrow(ToyModel):
    """Runs out of memory in chosen training steps, unless it sees at most `room` samples at a time."""

    def __init__(self, *, steps: tuple[int, ...], place: str, room: int = 3, here: bool = True) -> None:
        super().__init__(norm=False, dropout=0.0, dtype=torch.float64)
        self.steps, self.place, self.room, self.here = steps, place, room, here
        self.step, self.raised = -1, 0

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not self.here or self.step not in self.steps or len(images) <= self.room:
            return super().forward(images)
        if self.place == "forward":
            self._trip()
        body = _Trip.apply(self.body(self.stem(images)), self._trip)  # the head's gradients are reduced by then
        return self.head(body)

    def _trip(self) -> None:
        self.raised += 1
        if self.raised % 2:
            raise torch.OutOfMemoryError("injected")
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: injected")


def exact(here: Here, name: str, model: nn.Module | None = None, **options: Any) -> Learner:
    """float64 without BatchNorm, so that however a step is split, it is the same one."""
    data = here.data(dtype=torch.float64, global_batch=12)
    if isinstance(model, Narrow):

        def count(step: int) -> None:
            model.step = step

        data[0].before = count
    plain = ToyModel(norm=False, dropout=0.0, dtype=torch.float64)
    return here.learner(name, model=model or plain, data=data, loss=exact_loss, log_every=3, **options)


def short_of_memory(here: Here) -> Outcome:
    plain = exact(here, "plain")
    plain.fit_one_cycle(3, 1e-2)
    outcomes: Outcome = {"plain": (snapshot(plain.model), plain.progress.stream_hash)}
    for place in PLACES:
        for step in STEPS:
            model = Narrow(steps=tuple(range(step, 99)), place=place, here=here.last)
            learn = exact(here, f"narrow {place} {step}", model, checkpoint_every_s=0.0)
            learn.fit_one_cycle(3, 1e-2)
            notes = [str(row["text"]) for row in learn.context.published if row["kind"] == "note"]  # type: ignore[attr-defined]
            saved, _ = checkpoint.newest(learn.keeper.root)
            kept = saved.load("state")["progress"]["splits"] if saved else None
            outcomes[f"{place} {step}"] = (
                *(snapshot(model), learn.progress.stream_hash, learn.progress.splits, notes),
                *(model.raised, kept),
            )
    hopeless = Narrow(steps=(1,), place="backward", room=0, here=here.last)
    try:
        exact(here, "hopeless", hopeless).fit_one_cycle(1, 1e-2)
    except MemoryLimitError as error:
        outcomes["hopeless"] = str(error)
    return outcomes


def diverging(here: Here) -> Outcome:
    """NaN in the last rank's loss at step 4, in the middle of a window of three."""
    calls = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += logits.requires_grad
        return exact_loss(logits, targets) * (math.nan if here.last and calls == 5 else 1.0)

    outcomes: Outcome = {}
    learn = here.learner("diverging", log_every=3, loss=loss, checkpoint_every_s=0.0, keep=9)
    try:
        learn.fit_one_cycle(2, 1e-2)
    except DivergedError as error:
        outcomes["said"] = str(error)
    saved, _ = checkpoint.newest(learn.keeper.root)
    outcomes["saved"] = saved and (saved.step, saved.load("model"))
    outcomes["weights"] = snapshot(learn.model)
    plain = here.learner("until 4", log_every=1, checkpoint_every_s=0.0, keep=9)
    plain.fit_one_cycle(2, 1e-2)
    outcomes["healthy"] = checkpoint.load_model(plain.keeper.root, "step_00000004").load("model")
    return outcomes


class Breaking(ToyLoader):
    """Fails when its last rank is asked for a chosen batch."""

    failure: Exception
    at: int

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().stream(first_step)):
            if number == self.at and self.order.rank == self.order.world_size - 1:
                raise self.failure
            yield batch


def failing(here: Here) -> Outcome:
    """A loader that gives up, in words for a user or in none; in training (epochs of 3 steps) and in validation."""
    outcomes: Outcome = {}
    for name, failure in (("quarantine", QuarantineError("too many files are gone")), ("bug", ZeroDivisionError("x"))):
        for place, at in (("train", 0), ("train", 1), ("train", 3), ("valid", 0)):
            data = dict(zip(("train", "valid"), here.data(), strict=True))
            broken = Breaking(**vars(data[place]))
            broken.failure, broken.at = failure, at
            data[place] = broken
            learn = here.learner(name, data=(data["train"], data["valid"]))
            try:
                learn.fit_one_cycle(2, 1e-2)
            except Exception as error:
                outcomes[f"{name} {place} {at}"] = (type(error), str(error), learn.progress.step)
    return outcomes


def stopping(here: Here) -> Outcome:
    """A stop in each phase of three, asked of the last rank: at a window, and in the middle of a validation."""
    outcomes: Outcome = {}
    unbroken = here.learner("whole", checkpoint_every_s=0.0)
    unbroken.fine_tune(2, 1e-2)
    asks = unbroken.context.asked  # type: ignore[attr-defined]
    weights = snapshot(unbroken.model)
    for ask in range(1, asks + 1):
        first = here.learner(f"stop {ask}", checkpoint_every_s=0.0, stop_at_ask=ask if here.last else 0)
        first.fine_tune(2, 1e-2)
        second = here.learner(f"stop {ask}", checkpoint_every_s=0.0)
        found = second.resume()
        second.fine_tune(2, 1e-2)
        equal = same(snapshot(second.model), weights)
        hashed = second.progress.stream_hash == unbroken.progress.stream_hash
        outcomes[str(ask)] = (first.stopped, first.progress.step, first.progress.validate_due, found, equal, hashed)
    return outcomes


def lagging(here: Here) -> Outcome:
    """The last rank takes its time over every batch, in its forward pass."""

    class Slow(ToyModel):
        def forward(self, images: Tensor) -> Tensor:
            if self.training and here.last:
                time.sleep(0.05)
            return super().forward(images)

    spy = Spy()
    learn = here.learner("lagging", model=Slow(), sinks=[spy])
    learn.fit_one_cycle(2, 1e-2)
    return {"rows": learn.recorder.of_kind("train"), "busy": spy.busy_s}


def scenario(here: Here) -> Outcome:
    return {
        "memory": short_of_memory(here),
        "diverging": diverging(here),
        "failing": failing(here),
        "stopping": stopping(here),
        "lagging": lagging(here),
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcome]]:
    return worlds_of(scenario, tmp_path_factory.mktemp("together"))


Worlds = dict[int, list[Outcome]]
several = pytest.mark.parametrize("size", [2, 3])
every = pytest.mark.parametrize("size", [1, 2, 3])


@every
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_on_one_rank_splits_the_step_on_all_and_changes_no_number(
    worlds: Worlds, size: int, place: str, step: int
) -> None:
    for rank, outcome in enumerate(worlds[size]):
        weights, digest = outcome["memory"]["plain"]
        narrow, narrow_digest, splits, notes, raised, kept = outcome["memory"][f"{place} {step}"]
        torch.testing.assert_close(narrow, weights, rtol=1e-9, atol=1e-11)
        assert same(narrow, worlds[size][0]["memory"][f"{place} {step}"][0])
        assert narrow_digest == digest
        assert splits == {1: 4, 2: 2, 3: 2}[size]  # parts of 12, 6 and 4 samples until 3 go at a time
        assert kept == splits
        assert bool(raised) == (rank == size - 1)
        told = [note for note in notes if "out of memory" in note]
        assert len(told) == {1: 2, 2: 1, 3: 1}[size] * (rank == 0)
        if rank == 0:
            assert f"out of memory at step {step}: every rank splits its local batch into 2 micro-batches" in told[0]


@every
def test_what_does_not_fit_however_it_is_split_ends_all_ranks_with_a_sentence(worlds: Worlds, size: int) -> None:
    said = {outcome["memory"]["hopeless"] for outcome in worlds[size]}
    assert len(said) == 1
    assert "more of them would hold one image each" in said.pop()


@every
def test_no_number_on_one_rank_ends_all_at_that_step_with_the_state_before_it(worlds: Worlds, size: int) -> None:
    first = worlds[size][0]["diverging"]
    assert "at step 4 (learning rates" in first["said"]
    assert first["said"].count(",") >= GLOBAL_BATCH - 1 + 2  # all ids of the global batch, whoever had them
    for outcome in worlds[size]:
        told = outcome["diverging"]
        assert told["said"] == first["said"]
        assert same(told["weights"], first["weights"])
        assert told["saved"][0] == 4
        learnt = {name for name, value in told["healthy"].items() if "running" not in name}
        for name in learnt:
            assert torch.equal(told["saved"][1][name], told["healthy"][name])
        # the healthy run averaged its statistics after every step, this one after three: the same, but for rounding
        torch.testing.assert_close(told["saved"][1], told["healthy"], rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize(("where", "taken"), [("train 0", 0), ("train 1", 1), ("train 3", 3), ("valid 0", 3)])
def test_a_loader_that_gives_up_on_one_rank_ends_all_in_its_words(
    worlds: Worlds, size: int, where: str, taken: int
) -> None:
    for rank, outcome in enumerate(worlds[size]):
        assert outcome["failing"][f"quarantine {where}"] == (QuarantineError, "too many files are gone", taken)
        kind, said, step = outcome["failing"][f"bug {where}"]
        assert step == taken
        if rank == size - 1:
            assert (kind, said) == (ZeroDivisionError, "x")
        else:
            assert kind is PeerError
            assert f"rank {size - 1} failed (ZeroDivisionError: x)" in said


@every
def test_a_stop_at_any_moment_of_any_phase_resumes_to_the_unbroken_run(worlds: Worlds, size: int) -> None:
    asks = worlds[size][-1]["stopping"]
    assert len(asks) >= 6
    for ask, (stopped, step, due, found, equal, hashed) in asks.items():
        assert (stopped, found, equal, hashed) == (True, True, True, True), ask
        others = [outcome["stopping"].get(ask) for outcome in worlds[size]]
        assert all(other is None or other[:3] == (stopped, step, due) for other in others)
    assert {due for _, _, due, *_ in asks.values()} == {True, False}  # in validations too


@several
def test_a_rank_that_falls_behind_is_named_and_its_own_work_is_longer(worlds: Worlds, size: int) -> None:
    busy = [sum(outcome["lagging"]["busy"]) for outcome in worlds[size]]
    assert max(busy[:-1]) < busy[-1]
    for row in worlds[size][0]["lagging"]["rows"]:
        assert row["straggler"] == size - 1
        assert row["busy_max_s"] > row["busy_s"]
