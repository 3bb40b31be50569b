"""Interruptions: is a run that was stopped, killed or damaged the same run when it goes on?"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.toy import Spy, ToyLoader, ToyModel, Watched, learner, loaders, same, snapshot
from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint, keeper, saver
from thawline.trainer.errors import CheckpointError
from thawline.trainer.learner import Learner

RECIPES: dict[str, Callable[[Learner], None]] = {
    "one_cycle": lambda learn: learn.fit_one_cycle(2, 1e-2),
    "fine_tune": lambda learn: learn.fine_tune(2, 1e-2),
    "no frozen phase": lambda learn: learn.fine_tune(1, 1e-2, frozen_epochs=0),
}


def on_disk(
    folder: Path, *, data: tuple[ToyLoader, ToyLoader] | None = None, stop_at_ask: int = 0, **options: Any
) -> Learner:
    """A new learner on that run's folder that writes a checkpoint at every window."""
    context = Watched(run_dir=folder, stop_at_ask=stop_at_ask)
    return learner(context=context, checkpoint_every_s=0.0, data=data or loaders(train=22), **options)


def asked(learn: Learner) -> int:
    """How often the run asked whether to stop."""
    assert isinstance(learn.context, Watched)
    return learn.context.asked


def outcome(learn: Learner) -> tuple[object, ...]:
    """All that two equal runs share; times differ."""
    rows = [
        {
            name: value
            for name, value in row.items()
            if not name.endswith("_s") and name not in ("data_wait_fraction", "straggler")
        }
        for row in learn.recorder.rows
        if row["kind"] in ("train", "valid")
    ]
    progress = learn.progress
    return rows, progress.step, progress.phase, progress.phase_step, progress.epochs, progress.stream_hash


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_stopped_at_any_checkpoint_and_resumed_equals_the_unbroken_one_bit_by_bit(
    tmp_path: Path, recipe: str
) -> None:
    unbroken = on_disk(tmp_path / "unbroken")
    RECIPES[recipe](unbroken)
    asks = asked(unbroken)
    assert asks > len(unbroken.recorder.of_kind("train")) >= 3  # after windows, and within validations
    for stop in range(1, asks + 1):
        first = on_disk(tmp_path / str(stop), stop_at_ask=stop)
        RECIPES[recipe](first)
        assert first.stopped
        second = on_disk(tmp_path / str(stop))
        assert second.resume()
        RECIPES[recipe](second)
        assert not second.stopped
        assert second.recorder.of_kind("train")[0]["time_s"] == first.recorder.of_kind("train")[0]["time_s"]
        assert outcome(second) == outcome(unbroken)
        assert same(second.model.state_dict(), unbroken.model.state_dict())


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


def test_a_run_killed_before_any_step_and_resumed_equals_the_unbroken_one_bit_by_bit(tmp_path: Path) -> None:
    unbroken = on_disk(tmp_path / "unbroken")
    unbroken.fine_tune(1, 1e-2)
    for fatal in range(unbroken.progress.step):

        def kill(step: int, fatal: int = fatal) -> None:
            if step == fatal:
                raise Killed

        with pytest.raises(Killed):
            on_disk(tmp_path / str(fatal), data=loaders(train=22, before=kill)).fine_tune(1, 1e-2)
        second = on_disk(tmp_path / str(fatal))
        assert second.resume() == (fatal >= 2)  # the first window closes after two steps
        assert fatal - 2 < second.progress.step <= fatal
        second.fine_tune(1, 1e-2)
        assert outcome(second) == outcome(unbroken)
        assert same(second.model.state_dict(), unbroken.model.state_dict())


def test_a_run_interrupted_again_and_again_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = on_disk(tmp_path / "unbroken")
    unbroken.fine_tune(2, 1e-2)
    tries = 0
    while True:
        learn = on_disk(tmp_path / "broken", stop_at_ask=5)  # a validation asks four times, and must come to its end
        assert learn.resume() == (tries > 0)
        learn.fine_tune(2, 1e-2)
        if not learn.stopped:
            break
        tries += 1
    assert tries == 5
    assert outcome(learn) == outcome(unbroken)
    assert same(learn.model.state_dict(), unbroken.model.state_dict())


def test_the_same_learner_can_go_on_after_a_stop(tmp_path: Path) -> None:
    unbroken = on_disk(tmp_path / "unbroken")
    unbroken.fine_tune(2, 1e-2)
    learn = on_disk(tmp_path / "stopped", stop_at_ask=4)
    learn.fine_tune(2, 1e-2)
    assert learn.stopped
    assert learn.resume()
    learn.fine_tune(2, 1e-2)
    assert outcome(learn) == outcome(unbroken)
    assert same(learn.model.state_dict(), unbroken.model.state_dict())


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    tmp_path: Path,
) -> None:
    unbroken = on_disk(tmp_path / "unbroken")
    unbroken.fine_tune(2, 1e-2)
    on_disk(tmp_path / "broken", stop_at_ask=9).fine_tune(2, 1e-2)
    (tmp_path / "broken/checkpoints/step_00000010/state.pt").write_bytes(b"")
    learn = on_disk(tmp_path / "broken")
    assert learn.resume()
    assert learn.progress.step == 8
    assert isinstance(learn.context, Watched)
    notes = [str(row["text"]) for row in learn.context.published if row["kind"] == "note"]
    assert "step_00000010 is skipped: " in notes[0]
    learn.fine_tune(2, 1e-2)
    assert outcome(learn) == outcome(unbroken)
    assert same(learn.model.state_dict(), unbroken.model.state_dict())


def test_without_a_checkpoint_there_is_nothing_to_resume_and_nothing_changes(tmp_path: Path) -> None:
    learn = on_disk(tmp_path)
    before = snapshot(learn.model)
    assert learn.resume() is False
    assert same(before, learn.model.state_dict())
    assert learn.progress.step == 0


def test_a_finished_run_resumes_to_its_end_without_another_step(tmp_path: Path) -> None:
    first = on_disk(tmp_path)
    first.fine_tune(1, 1e-2)
    second = on_disk(tmp_path, data=loaders(train=22, before=lambda step: pytest.fail("a batch was asked for")))
    assert second.resume()
    second.fine_tune(1, 1e-2)
    assert outcome(second) == outcome(first)
    assert same(second.model.state_dict(), first.model.state_dict())


def test_a_run_does_not_go_on_from_another_s_checkpoint(tmp_path: Path) -> None:
    """What lies there is neither taken nor taken for a damaged one of its own: the run begins."""
    first = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0, run={"data": "12ab"})
    first.fit_one_cycle(1, 1e-2)
    again = learner(context=Watched(run_dir=tmp_path), run={"data": "12ab"})
    assert again.resume()
    other = learner(context=Watched(run_dir=tmp_path), run={"data": "34cd"})
    assert not other.resume()
    assert other.progress.step == 0
    assert isinstance(other.context, Watched)
    said = [str(row["text"]) for row in other.context.published]
    assert said == [
        f"checkpoint step_0000000{n} is skipped: it is another run's (data is 12ab there and 34cd here)"
        for n in (5, 4, 2)
    ]


def test_what_is_resumed_is_announced_and_shown_again(tmp_path: Path) -> None:
    on_disk(tmp_path, stop_at_ask=2).fit_one_cycle(1, 1e-2)
    learn = on_disk(tmp_path)
    assert learn.resume()
    assert isinstance(learn.context, Watched)
    note, *rows = learn.context.published
    assert note["kind"] == "note"
    assert "resumed at step 4" in str(note["text"])
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4]


def test_going_on_reads_every_byte_of_a_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of a large model would otherwise fetch gigabytes twice."""
    context = Watched(run_dir=tmp_path)
    learner(context=context, checkpoint_every_s=1e6, ema=0.9).fit_one_cycle(1, 1e-2)
    read, real = list[str](), Root.read

    def counted(root: Root, name: str, **options: Any) -> bytes:
        read.append(name)
        return real(root, name, **options)

    monkeypatch.setattr(Root, "read", counted)
    learn = learner(context=context, ema=0.9)
    assert learn.resume()
    assert sorted(name for name in read if name.endswith(".pt")) == ["ema.pt", "model.pt", "state.pt"]
    read.clear()
    learn.save("stage")
    learn.load("stage")
    assert sorted(name for name in read if name.endswith(".pt")) == ["ema.pt", "model.pt"]


def test_a_checkpoint_copies_no_row_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are only added to: a list of the same rows stays as it was, however long the run. What it holds is written
    beside the training."""
    copies, real = list[Any](), saver.snapshot

    def watched(parts: Any) -> Any:
        copies.append(real(parts))
        return copies[-1]

    monkeypatch.setattr(saver, "snapshot", watched)
    learn = on_disk(tmp_path)
    learn.fit_one_cycle(1, 1e-2)
    rows = learn.recorder.rows
    kept = [copy.parts["state"]["rows"] for copy in copies]
    assert len(kept) == 3  # two windows, and the epoch's end
    assert [len(each) for each in kept] == sorted({len(each) for each in kept})
    assert all(one is other for each in kept for one, other in zip(each, rows, strict=False))


def test_checkpoints_are_written_when_due_and_at_the_end_of_a_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=1e6, keep=9)
    learn.fine_tune(1, 1e-3)
    folder = tmp_path / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["step_00000005", "step_00000010"]
    learner(context=Watched(run_dir=tmp_path / "silent")).fit_one_cycle(1, 1e-3)
    assert not (tmp_path / "silent").exists()  # none were asked for


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is tried three times, at once."""
    monkeypatch.setattr(keeper, "_AGAIN_S", (0.0, 0.0))


def refusing(monkeypatch: pytest.MonkeyPatch, step: int, *, times: int) -> list[int]:
    """Have the storage refuse so often from a step on; the steps that it refused."""
    write, refused = checkpoint.save, list[int]()

    def save(folder: str, at: int, *args: Any, **kwargs: Any) -> str:
        if at >= step and len(refused) < times:
            refused.append(at)
            raise CheckpointError("no space")
        return write(folder, at, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    return refused


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(("stop_at_ask", "last"), [(0, 11), (2, 4)])
def test_the_last_checkpoint_is_tried_again_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at_ask: int, last: int
) -> None:
    refused = refusing(monkeypatch, last, times=2)
    learn = on_disk(tmp_path, stop_at_ask=stop_at_ask)
    learn.fit_one_cycle(2, 1e-2)
    assert (learn.progress.step, refused) == (last, [last] * 2)
    saved, skipped = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert (saved.step, skipped) == (last, [])
    assert same(saved.load("model"), learn.model.state_dict())


@pytest.mark.usefixtures("patience")
def test_a_checkpoint_that_cannot_be_written_is_reported_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    spy, plain = Spy(), learner()
    learn = learner(context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0, sinks=[spy])
    plain.fit_one_cycle(1, 1e-2)
    with pytest.raises(CheckpointError, match=r"cannot be written.*run's last and was tried 3 times.*no result"):
        learn.fit_one_cycle(1, 1e-2)
    assert same(plain.model.state_dict(), learn.model.state_dict())
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 3
    assert all("cannot be written" in error for error in errors)
    assert not [row for row in spy.rows if row["kind"] == "checkpoint"]  # what failed is not counted as committed


@pytest.mark.usefixtures("patience")
def test_after_a_failed_write_the_one_before_it_still_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = on_disk(tmp_path / "unbroken")
    unbroken.fine_tune(2, 1e-2)
    with monkeypatch.context() as patch:
        refusing(patch, 8, times=99)
        with pytest.raises(CheckpointError, match="no space"):
            on_disk(tmp_path / "full", stop_at_ask=10).fine_tune(2, 1e-2)
    learn = on_disk(tmp_path / "full")
    assert learn.resume()
    assert learn.progress.step == 6
    learn.fine_tune(2, 1e-2)
    assert outcome(learn) == outcome(unbroken)
    assert same(learn.model.state_dict(), unbroken.model.state_dict())


def test_a_checkpoint_of_another_model_changes_nothing_and_names_where_they_differ(tmp_path: Path) -> None:
    on_disk(tmp_path).fit_one_cycle(1, 1e-2)
    learn = learner(model=ToyModel(norm=False), context=Watched(run_dir=tmp_path), data=loaders(train=22))
    before = snapshot(learn.model)
    with pytest.raises(CheckpointError, match=r"holds the weights of another model than this ToyModel .*1"):
        learn.resume()
    assert same(before, snapshot(learn.model))


def test_a_state_of_another_version_gets_a_sentence(tmp_path: Path) -> None:
    on_disk(tmp_path).fit_one_cycle(1, 1e-2)
    saved, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    state = saved.load("state")
    parts = {"model": saved.load("model"), "state": {**state, "progress": {**state["progress"], "mood": 1}}}
    checkpoint.save(tmp_path / "checkpoints", saved.step + 1, parts, keep=9)
    with pytest.raises(CheckpointError, match=r"was written by another version of thawline .*mood"):
        on_disk(tmp_path).resume()
