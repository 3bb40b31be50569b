"""What was saved comes back, and only it: the newest and the best are kept, a storage that refuses changes nothing."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit.checkpoints import names, newest_step, no_space, parts, steps
from thawline.dataio.store import atomic
from thawline.dataio.store.atomic import Sink
from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.checkpoints.format import Origin, manifest_text
from thawline.trainer.errors import CheckpointError

pytest_plugins = ["tests.kit.stores"]

FILES = ("manifest.json", "model.pt", "state.pt")


def test_what_was_saved_comes_back_from_the_newest(folder: Path) -> None:
    assert newest_step(folder) == 7
    assert checkpoint.newest(folder)[1] == []
    assert names(folder / "step_00000007") == sorted(FILES)


def test_no_folder_or_an_empty_one_holds_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


def test_the_manifest_names_every_part_with_the_sum_that_sha256sum_prints(folder: Path) -> None:
    checkpoint.save(folder, 9, parts(9), keep=5, metrics={"valid_loss": 0.25, "error_rate": float("nan")})
    home = folder / "step_00000009"
    printed = subprocess.run(["sha256sum", *FILES[1:]], cwd=home, capture_output=True, text=True, check=True).stdout
    sums = {line.split()[1]: line.split()[0] for line in printed.splitlines()}
    manifest = json.loads((home / "manifest.json").read_text())
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    assert manifest == {
        "format": 2,
        "step": 9,
        "metrics": {"valid_loss": 0.25},
        "parts": {
            name: {"file": f"{name}.pt", "bytes": (home / f"{name}.pt").stat().st_size, "sha256": sums[f"{name}.pt"]}
            for name in ("model", "state")
        },
        "run": {},
        "classes": [],
    }
    saved, _ = checkpoint.newest(folder)
    assert saved is not None
    assert saved.metrics == {"valid_loss": 0.25}


@pytest.mark.parametrize("name", ["step_x", "step_", "step_99999999", "step_0000000009", "step_-1", "step_1e9"])
@pytest.mark.parametrize("content", ["nothing", "a whole checkpoint", "a file"])
def test_a_stray_thing_named_like_a_checkpoint_is_passed_over_and_left_alone(
    folder: Path, name: str, content: str
) -> None:
    stray = folder / name
    if content == "a file":
        stray.write_text("hello")
    elif content == "nothing":
        stray.mkdir()
    else:
        shutil.copytree(folder / "step_00000007", stray)
    assert newest_step(folder) == 7
    checkpoint.save(folder, 8, parts(8), keep=1)
    assert newest_step(folder) == 8
    assert names(folder) == sorted(["step_00000008", name])


# What is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(0, [9]), (1, [9]), (2, [8, 9]), (3, [7, 8, 9]), (9, [3, 7, 8, 9])])
def test_only_the_newest_are_kept(folder: Path, keep: int, left: list[int]) -> None:
    for step in (8, 9):
        checkpoint.save(folder, step, parts(step), keep=keep if step == 9 else 9)
    assert steps(folder) == left


LOSSES = {1: 0.9, 2: 0.4, 3: 0.6, 4: 0.4, 5: 0.5, 6: 0.8}


@pytest.mark.parametrize(
    ("best", "left"),
    [
        (Best("loss"), [4, 5, 6]),  # 2 and 4 are equal: the later
        (Best("loss", higher=True), [1, 5, 6]),
        (Best("unknown"), [5, 6]),
        (None, [5, 6]),
    ],
)
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, best: Best | None, left: list[int]) -> None:
    for step, loss in LOSSES.items():
        checkpoint.save(tmp_path, step, parts(step), keep=2, metrics={"loss": loss}, best=best)
    assert steps(tmp_path) == left


def test_one_without_the_metric_or_with_no_number_for_it_is_never_the_best(tmp_path: Path) -> None:
    measured: list[dict[str, float]] = [{"loss": float("nan")}, {"loss": 0.5}, {}, {"loss": float("-inf")}, {}]
    for step, metrics in enumerate(measured):
        checkpoint.save(tmp_path, step, parts(step), keep=1, metrics=metrics, best=Best("loss"))
    assert steps(tmp_path) == [1, 4]


def test_a_damaged_one_takes_no_place_of_those_kept_and_goes_when_it_is_older_than_they(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, parts(step), keep=9)
    (tmp_path / "step_00000002/model.pt").write_bytes(b"short")
    checkpoint.save(tmp_path, 4, parts(4), keep=3)
    assert steps(tmp_path) == [1, 2, 3, 4]
    checkpoint.save(tmp_path, 5, parts(5), keep=3)
    assert steps(tmp_path) == [3, 4, 5]


def test_the_unfinished_ones_before_the_newest_are_removed_and_those_after_it_are_not(folder: Path) -> None:
    for step in (5, 8, 10):
        shutil.copytree(folder / "step_00000003", folder / f"step_{step:08d}")
        (folder / f"step_{step:08d}/manifest.json").unlink()
    checkpoint.save(folder, 9, parts(9), keep=5)
    assert steps(folder) == [3, 7, 9, 10]


def test_a_checkpoint_damaged_later_does_not_push_out_the_good_ones_before_it(folder: Path) -> None:
    (folder / "step_00000007" / "model.pt").write_bytes(b"")
    for step in (4, 5):
        checkpoint.save(folder, step, parts(step), keep=1)
        assert newest_step(folder) == step
    checkpoint.save(folder, 7, parts(7), keep=1)  # passed again, and this time whole
    assert newest_step(folder) == 7
    assert names(folder) == ["step_00000007"]
    assert names(folder / "step_00000007") == sorted(FILES)


OURS = Origin({"data": "12ab", "fit.lr": (1e-4, 1e-2), "seed": 7}, ("ape", "bee"))
THEIRS = Origin({"data": "34cd", "fit.lr": (1e-4, 1e-2), "since": 2}, ("cat", "dog"))


def test_one_of_another_run_is_skipped_with_a_sentence_and_left_alone(tmp_path: Path) -> None:
    for step, origin in ((2, OURS), (4, THEIRS), (6, OURS), (8, THEIRS)):
        checkpoint.save(tmp_path, step, parts(step), keep=1, origin=origin)
    assert sorted(Root.of(tmp_path).listing()) == [f"step_{step:08d}" for step in (6, 8)], "each keeps its own newest"
    saved, skipped = checkpoint.newest(tmp_path, origin=OURS)
    assert saved is not None
    assert (saved.step, saved.origin.classes) == (6, ("ape", "bee"))
    reason = "it is another run's (data is 34cd there and 12ab here)"
    assert skipped == [checkpoint.Skipped("step_00000008", reason, finished=False)]
    checkpoint.save(tmp_path, 10, parts(10), keep=1, origin=OURS)
    assert sorted(Root.of(tmp_path).listing()) == [f"step_{step:08d}" for step in (8, 10)]


def test_one_that_says_nothing_of_its_run_is_anybody_s(folder: Path) -> None:
    """As those from before checkpoints said so."""
    manifest = folder / "step_00000007/manifest.json"
    about = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in ("run", "classes")}
    manifest.write_bytes(manifest_text({key: value for key, value in about.items() if key != "sha256"}))
    saved, skipped = checkpoint.newest(folder, origin=OURS)
    assert saved is not None
    assert (saved.step, skipped) == (7, [])


@pytest.mark.parametrize("replaced", [False, True])
def test_a_link_goes_and_what_lies_behind_it_stays(tmp_path: Path, replaced: bool) -> None:
    """Pruned once newer ones stand there, or replaced by one of the same step."""
    elsewhere = Path(checkpoint.save(tmp_path / "elsewhere", 3, parts(3), keep=1))
    before = {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    root = tmp_path / "run"
    root.mkdir()
    (root / "step_00000003").symlink_to(elsewhere)
    saved, (skipped,) = checkpoint.newest(root)
    assert saved is None
    assert "it is a link" in skipped.reason
    checkpoint.save(root, 3 if replaced else 5, parts(5), keep=1)
    assert not (root / "step_00000003").is_symlink()
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == before


def test_steps_beyond_eight_digits_are_still_in_order(folder: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        checkpoint.save(folder, step, parts(step), keep=2)
    assert newest_step(folder) == 100_000_001
    assert names(folder) == ["step_100000000", "step_100000001"]


def test_old_ones_that_cannot_be_removed_are_told_and_do_not_undo_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "rmtree", no_space)
    checkpoint.save(folder, 9, parts(9), keep=1)
    assert "cannot be removed (No space left on device)" in caplog.text
    assert newest_step(folder) == 9


def test_nothing_is_removed_for_one_that_the_storage_took_and_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_write", lambda *args: None)
    checkpoint.save(folder, 9, parts(9), keep=1)
    assert steps(folder) == [3, 7]


# The same step again --------------------------------------------------------------------------------------


def test_the_same_step_saved_again_replaces_it(folder: Path) -> None:
    for value in range(3):
        checkpoint.save(folder, 7, {"model": {"w": torch.full((1,), float(value))}}, keep=5)
        saved, _ = checkpoint.newest(folder)
        assert saved is not None
        assert torch.equal(saved.load("model")["w"], torch.full((1,), float(value)))
        assert len(names(folder / "step_00000007")) == 2
        with pytest.raises(CheckpointError, match=r"state\.pt cannot be read \(its manifest lists no part state\)"):
            saved.load("state")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


@pytest.mark.parametrize("files_written", range(4))
@pytest.mark.parametrize("step", [7, 9])
def test_a_kill_after_any_file_leaves_the_old_or_the_new_and_the_next_save_tidies_up(
    folder: Path, files_written: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = 0
    new = {"model": {"w": torch.zeros(3)}, "state": {}}
    real = atomic.atomic_write

    @contextmanager
    def until(*args: Any, **kwargs: Any) -> Iterator[Sink]:
        nonlocal renamed
        if renamed == files_written:
            raise Killed
        with real(*args, **kwargs) as sink:
            yield sink
        renamed += 1

    with monkeypatch.context() as patch:
        patch.setattr("thawline.trainer.checkpoints.checkpoint.atomic_write", until)
        if files_written < 3:
            with pytest.raises(Killed):
                checkpoint.save(folder, step, new, keep=5)
        else:
            checkpoint.save(folder, step, new, keep=5)
    if files_written < 3:
        assert newest_step(folder) == 7
        reasons = {skipped.name: skipped.reason for skipped in checkpoint.newest(folder)[1]}
        unfinished = {"step_00000009": "it was not finished: there is no manifest.json"}
        assert reasons == (unfinished if step == 9 and files_written else {})
    else:
        saved, _ = checkpoint.newest(folder)
        assert saved is not None
        assert torch.equal(saved.load("model")["w"], torch.zeros(3))
    checkpoint.save(folder, step, parts(step), keep=1)
    assert newest_step(folder) == step
    assert names(folder) == [f"step_{step:08d}"]
    assert len(names(folder / f"step_{step:08d}")) == 3
