"""Is what lies on the disk the moment of the save, and does no storage ever stop the training?"""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.kit.checkpoints import largest_file, no_space
from thawline.dataio.store import atomic
from thawline.dataio.store.atomic import Sink
from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.saver import Saver, Written, snapshot

pytest_plugins = ["tests.kit.stores"]


def model_parts(model: nn.Module, step: int) -> dict[str, dict[str, Any]]:
    return {"model": model.state_dict(), "state": {"step": step, "rows": [{"loss": 1.0 / (step + 1)}]}}


class Gate:
    """Holds every write until it is opened, and counts those that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.came = threading.Event(), threading.Event()
        real = checkpoint.save

        def save(*args: Any, **kwargs: Any) -> str:
            self.came.set()
            assert self.open.wait(60)
            return real(*args, **kwargs)

        monkeypatch.setattr(checkpoint, "save", save)


@contextmanager
def saver(root: str | Path, **options: Any) -> Iterator[Saver]:
    made = Saver(root, **{"keep": 3, **options})
    yield made
    made.close()


def done(writer: Saver) -> list[tuple[int, str | None]]:
    """(step, error) of all that was finished, after the write that goes on."""
    writer.wait()
    assert not writer.busy
    return [(each.step, each.error) for each in writer.finished()]


def test_what_is_written_is_the_moment_of_the_save_whatever_happens_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    rows = [{"loss": 0.5}]
    nested: dict[str, Any] = {"moments": [torch.ones(3), {"t": torch.zeros(2)}], "pair": (1, torch.full((1,), 7.0))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with saver(tmp_path) as writer:
        writer.save(4, {"model": model.state_dict(), "state": {"rows": rows, "nested": nested}})
        assert gate.came.wait(60)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(9)
        rows[0]["loss"] = 0.1
        rows.append({"loss": 0.2})
        nested["moments"][0].fill_(9)
        nested["moments"][1]["t"].fill_(9)
        nested["pair"][1].fill_(9)
        gate.open.set()
        assert done(writer) == [(4, None)]
    saved, skipped = checkpoint.newest(tmp_path)
    assert saved is not None
    assert skipped == []
    weights, state = saved.load("model"), saved.load("state")
    assert list(weights) == list(before)
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert state["rows"] == [{"loss": 0.5}]
    assert torch.equal(state["nested"]["moments"][0], torch.ones(3))
    assert torch.equal(state["nested"]["moments"][1]["t"], torch.zeros(2))
    assert state["nested"]["pair"] == (1, torch.full((1,), 7.0))


def test_a_snapshot_keeps_dtypes_layouts_and_the_versions_of_a_state_dict() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    parts = {"model": model.state_dict(), "state": {"half": torch.ones(2, dtype=torch.bfloat16), "none": None}}
    copied = snapshot(parts).parts
    assert vars(copied["model"])["_metadata"] == vars(model.state_dict())["_metadata"]
    for name, value in model.state_dict().items():
        twin = copied["model"][name]
        assert (twin.dtype, twin.shape, twin.stride()) == (value.dtype, value.shape, value.stride())
        assert twin.data_ptr() != value.data_ptr()
        assert not twin.requires_grad
    assert copied["state"]["half"].dtype == torch.bfloat16
    assert copied["state"]["none"] is None


def test_a_save_returns_before_it_is_written_and_the_next_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    model = nn.Linear(2, 2)
    with saver(tmp_path) as writer:
        assert not writer.busy
        assert writer.finished() == []
        writer.save(1, model_parts(model, 1))
        assert writer.busy
        assert writer.finished() == []
        assert checkpoint.newest(tmp_path) == (None, [])
        second = threading.Thread(target=lambda: writer.save(2, model_parts(model, 2)))
        second.start()
        second.join(0.1)
        assert second.is_alive(), "the second save did not wait"
        gate.open.set()
        second.join()
        assert done(writer) == [(1, None), (2, None)]
        assert writer.finished() == []
    saved, _ = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.step == 2


def test_it_keeps_the_newest_and_the_best_and_passes_the_metrics_on(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with saver(tmp_path, keep=1, best=checkpoint.Best("accuracy", higher=True)) as writer:
        for step, accuracy in enumerate([0.5, 0.9, 0.7]):
            writer.save(step, model_parts(model, step), metrics={"accuracy": accuracy})
        assert [(step, error) for step, error in done(writer)] == [(0, None), (1, None), (2, None)]
    assert sorted(Root.of(tmp_path).listing()) == ["step_00000001", "step_00000002"]
    saved, _ = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.metrics == {"accuracy": 0.7}


def test_close_waits_and_finished_still_answers(tmp_path: Path) -> None:
    writer = Saver(tmp_path, keep=1)
    writer.save(1, model_parts(nn.Linear(2, 2), 1))
    writer.close()
    (written,) = writer.finished()
    assert isinstance(written, Written)
    assert (written.step, written.error) == (1, None)
    assert written.seconds >= 0


# A storage that refuses -----------------------------------------------------------------------------------


def test_a_full_disk_is_told_nothing_of_it_stays_and_the_next_try_works(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    with saver(tmp_path / "checkpoints") as writer:
        writer.save(1, model_parts(model, 1))
        assert done(writer) == [(1, None)]
        with largest_file(20_000):
            writer.save(2, model_parts(model, 2))
            ((step, error),) = done(writer)
        assert step == 2
        assert error is not None
        assert "step_00000002 cannot be written (File too large): a kill now would cost" in error
        assert sorted(Root.of(str(tmp_path / "checkpoints")).listing()) == ["step_00000001"]
        writer.save(3, model_parts(model, 3))
        assert done(writer) == [(3, None)]
    saved, skipped = checkpoint.newest(tmp_path / "checkpoints")
    assert (saved and saved.step, skipped) == (3, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_told_and_once_there_is_room_again_the_next_is_written(small_disk: Path) -> None:
    root, model = small_disk / "checkpoints", nn.Linear(200, 200)  # 160 kB
    with saver(root) as writer:
        writer.save(1, model_parts(model, 1))
        assert done(writer) == [(1, None)]
        (small_disk / "others").write_bytes(bytes(750_000))
        for step in (2, 3):
            writer.save(step, model_parts(model, step))
            ((_, error),) = done(writer)
            assert error is not None
            assert "cannot be written (No space left on device)" in error
            assert list(Root.of(root).listing()) == ["step_00000001"]
        (small_disk / "others").unlink()
        writer.save(4, model_parts(model, 4))
        assert done(writer) == [(4, None)]
    saved, skipped = checkpoint.newest(root)
    assert (saved and saved.step, skipped) == (4, [])


@pytest.mark.parametrize("refuses", ["os.fsync", "torch.save", "thawline.dataio.store.atomic.Sink.write"])
def test_a_refusal_at_any_stage_is_told_and_the_next_try_works(
    tmp_path: Path, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    with saver(tmp_path / "checkpoints") as writer:
        for step in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(refuses, no_space)
                writer.save(step, model_parts(model, step))
                ((_, error),) = done(writer)
            assert error is not None
            assert "(No space left on device)" in error
        assert Root.of(str(tmp_path / "checkpoints")).listing() == {}
        writer.save(2, model_parts(model, 2))
        assert done(writer) == [(2, None)]


def test_a_storage_that_goes_away_and_comes_back_costs_only_what_fell_between(tmp_path: Path) -> None:
    root, away = tmp_path / "mount" / "checkpoints", tmp_path / "away"
    model = nn.Linear(2, 2)
    with saver(root) as writer:
        writer.save(1, model_parts(model, 1))
        assert done(writer) == [(1, None)]
        root.parent.rename(away)
        root.parent.write_text("no folder any more")
        writer.save(2, model_parts(model, 2))
        ((_, error),) = done(writer)
        assert error is not None
        assert "cannot be written (Not a directory)" in error
        root.parent.unlink()
        away.rename(root.parent)
        writer.save(3, model_parts(model, 3))
        assert done(writer) == [(3, None)]
    assert sorted(Root.of(root).listing()) == ["step_00000001", "step_00000003"]


def test_what_is_no_storage_s_fault_is_raised_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error")

    with saver(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fail)
            writer.save(1, model_parts(nn.Linear(2, 2), 1))
            writer.wait()
        with pytest.raises(RuntimeError, match="CUDA error"):
            writer.finished()
        assert writer.finished() == []


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


def test_a_kill_between_the_parts_and_the_manifest_leaves_an_unfinished_folder_that_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = atomic.atomic_write

    @contextmanager
    def no_manifest(root: Root, name: str, **options: Any) -> Iterator[Sink]:
        if name == "manifest.json":
            raise Killed
        with real(root, name, **options) as sink:
            yield sink

    model = nn.Linear(2, 2)
    with saver(tmp_path) as writer:
        writer.save(1, model_parts(model, 1))
        assert done(writer) == [(1, None)]
        with monkeypatch.context() as patch:
            patch.setattr("thawline.trainer.checkpoints.checkpoint.atomic_write", no_manifest)
            writer.save(2, model_parts(model, 2))
            writer.wait()
            with pytest.raises(Killed):
                writer.finished()
    assert sorted(file.name for file in (tmp_path / "step_00000002").iterdir()) == ["model.pt", "state.pt"]
    saved, skipped = checkpoint.newest(tmp_path)
    assert (saved and saved.step) == 1
    assert [(each.name, each.reason) for each in skipped] == [
        ("step_00000002", "it was not finished: there is no manifest.json")
    ]
    with saver(tmp_path) as writer:  # the run that goes on
        for step in (2, 3):
            writer.save(step, model_parts(model, step))
        assert done(writer) == [(2, None), (3, None)]
    assert checkpoint.newest(tmp_path)[1] == []


# An object store ------------------------------------------------------------------------------------------


def test_it_writes_to_a_store_and_survives_one_that_is_gone(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = s3.format("runs/pets/checkpoints")
    model = nn.Linear(50, 50)
    with saver(root, keep=1) as writer:
        for step in (1, 2):
            writer.save(step, model_parts(model, step))
        assert done(writer) == [(1, None), (2, None)]
        free = "?allow_bucket_creation=true&allow_bucket_deletion=true&"
        filesystem, base = Root.of(root.replace("?", free)).opened
        bucket = base.partition("/")[0]
        filesystem.delete_dir(bucket)
        writer.save(3, model_parts(model, 3))
        ((_, error),) = done(writer)
        assert error is not None
        assert f"cannot be written (there is no {bucket} in the store)" in error
        filesystem.create_dir(bucket)
        writer.save(4, model_parts(model, 4))
        assert done(writer) == [(4, None)]
    saved, skipped = checkpoint.newest(root)
    assert (saved and saved.step, skipped) == (4, [])
    assert saved is not None
    assert torch.equal(saved.load("model")["weight"], model.weight)


def test_an_upload_that_breaks_off_is_told_and_leaves_nothing_that_counts(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, model, written = s3.format("checkpoints"), nn.Linear(50, 50), 0
    real = Sink.write

    def breaks(self: Sink, data: Any) -> int:
        nonlocal written
        written += 1
        if written > 20:
            raise ConnectionResetError(104, "Connection reset by peer")
        return real(self, data)

    with saver(root) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(Sink, "write", breaks)
            writer.save(1, model_parts(model, 1))
            ((_, error),) = done(writer)
        assert error is not None
        assert "cannot be written (Connection reset by peer)" in error
        assert checkpoint.newest(root) == (None, [])
        writer.save(2, model_parts(model, 2))
        assert done(writer) == [(2, None)]
