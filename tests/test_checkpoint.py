"""Checkpoints are whole or not there: every way of damaging one that we could think of, and a storage that refuses."""

import errno
import hashlib
import json
import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import checkpoint
from trainer.errors import CheckpointError

FILES = ("model.pt", "state.pt", "manifest.json")


def parts(step: int) -> dict[str, dict[str, Any]]:
    weights = torch.arange(6, dtype=torch.float32).view(2, 3) + step
    return {"model": {"w": weights}, "state": {"step": step, "rows": [{"loss": 0.5 * step, "phase": None}]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 7."""
    for step in (3, 7):
        checkpoint.save(tmp_path, step, parts(step), keep=5)
    return tmp_path


def newest_step(folder: Path) -> int | None:
    """The step found, after comparing every value in it with what was saved under that number."""
    saved = checkpoint.newest(folder)
    if saved is None:
        return None
    expected = parts(saved.step)
    assert torch.equal(saved.load("model")["w"], expected["model"]["w"])
    assert saved.load("state") == expected["state"]
    return saved.step


def expect_skipped(folder: Path, caplog: pytest.LogCaptureFixture, name: str = "step_00000007") -> None:
    caplog.clear()
    assert newest_step(folder) == 3
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert str(folder / name) in warned[0]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_was_saved_comes_back_from_the_newest(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_step(folder) == 7
    assert not caplog.records
    assert names(folder / "step_00000007") == sorted(FILES)


def test_no_folder_or_an_empty_one_holds_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_short_anywhere_is_never_loaded(folder: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    damaged = folder / "step_00000007" / file
    whole = damaged.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        expect_skipped(folder, caplog)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_never_loaded(folder: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    damaged = folder / "step_00000007" / file
    whole = damaged.read_bytes()
    places = range(len(whole)) if file == "manifest.json" else range(0, len(whole), 97)
    for place in places:
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        expect_skipped(folder, caplog)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_never_loaded(folder: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "step_00000007" / file).unlink()
    expect_skipped(folder, caplog)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{}",
        "[]",
        "null",
        '"step_00000007"',
        '{"format": 1, "step": 7, "sha256": {}}',
        '{"format": 1, "step": 7, "sha256": []}',
        '{"format": 1, "step": 7, "sha256": ["model.pt"]}',
        '{"format": 1, "step": "7", "sha256": {"model.pt": ""}}',
        '{"format": 1, "step": null, "sha256": {"model.pt": ""}}',
        '{"format": 1, "step": 7.0, "sha256": {"model.pt": ""}}',
        '{"format": 1, "step": 7, "sha256": {"model.pt": null}}',
        '{"format": 1, "step": 7, "sha256": {"": "00"}}',
        '{"format": 2, "step": 7, "sha256": {"model.pt": ""}}',
    ],
)
def test_a_manifest_of_nonsense_is_never_loaded(folder: Path, manifest: str, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "step_00000007" / "manifest.json").write_text(manifest)
    expect_skipped(folder, caplog)


def test_another_step_s_manifest_is_never_loaded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(folder / "step_00000003" / "manifest.json", folder / "step_00000007" / "manifest.json")
    expect_skipped(folder, caplog)


def test_a_whole_checkpoint_under_another_step_s_name_is_never_loaded(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder / "step_00000007")
    shutil.copytree(folder / "step_00000003", folder / "step_00000007")
    expect_skipped(folder, caplog)


@pytest.mark.parametrize("file", ["model.pt", "state.pt"])
def test_parts_swapped_between_checkpoints_are_never_loaded(
    folder: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(folder, 1, parts(1), keep=5)
    one, other = folder / "step_00000003" / file, folder / "step_00000007" / file
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    assert newest_step(folder) == 1
    assert [record.getMessage().split()[1] for record in caplog.records] == [
        str(folder / "step_00000007"),
        str(folder / "step_00000003"),
    ]


@pytest.mark.parametrize("name", ["step_x", "step_", "step_99999999", "step_0000000009", "step_-1", "step_1e9"])
@pytest.mark.parametrize("content", ["nothing", "a whole checkpoint", "a file"])
def test_a_stray_thing_named_like_a_checkpoint_is_passed_over_and_left_alone(
    folder: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
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
    caplog.clear()
    assert newest_step(folder) == 8
    assert names(folder) == sorted(["step_00000008", name])


def test_a_checkpoint_damaged_later_does_not_push_out_the_good_ones_before_it(folder: Path) -> None:
    (folder / "step_00000007" / "model.pt").write_bytes(b"")
    for step in (4, 5):
        checkpoint.save(folder, step, parts(step), keep=1)
        assert newest_step(folder) == step
    checkpoint.save(folder, 7, parts(7), keep=1)  # passed again, and this time whole
    assert newest_step(folder) == 7
    assert names(folder) == ["step_00000007"]


@pytest.mark.parametrize(("keep", "left"), [(0, [9]), (1, [9]), (2, [8, 9]), (3, [7, 8, 9]), (9, [3, 7, 8, 9])])
def test_only_the_newest_are_kept(folder: Path, keep: int, left: list[int]) -> None:
    for step in (8, 9):
        checkpoint.save(folder, step, parts(step), keep=keep if step == 9 else 9)
    assert names(folder) == [f"step_{step:08d}" for step in left]


def test_steps_beyond_eight_digits_are_still_in_order(folder: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        checkpoint.save(folder, step, parts(step), keep=2)
    assert newest_step(folder) == 100_000_001
    assert names(folder) == ["step_100000000", "step_100000001"]


def test_the_same_step_saved_again_replaces_it(folder: Path) -> None:
    checkpoint.save(folder, 7, {"model": {"w": torch.zeros(1)}}, keep=5)
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert torch.equal(saved.load("model")["w"], torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        saved.load("state")


def test_a_kill_before_the_rename_leaves_nothing_that_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt stands for SIGKILL: no handler of ours may tidy up after it."""

    def die(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, 9, parts(9), keep=5)
    temporary = [name for name in names(folder) if name.startswith(".tmp_step_00000009")]
    assert len(temporary) == 1
    shutil.move(folder / temporary[0], folder / ".tmp_step_00000009_1")  # as another process would have named it
    assert newest_step(folder) == 7
    checkpoint.save(folder, 8, parts(8), keep=5)
    assert names(folder) == ["step_00000003", "step_00000007", "step_00000008"]


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The kernel refuses writes beyond that size, in mid-write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room_bytes", [0, 100, 1000, 30_000, 41_000])
@pytest.mark.parametrize("tensors", [1, 200])
def test_a_storage_that_fills_up_in_mid_write_is_a_checkpoint_error_and_changes_nothing(
    folder: Path, room_bytes: int, tensors: int
) -> None:
    before = {file: file.read_bytes() for file in folder.glob("*/*")}
    model = {str(i): torch.ones(10_000 // tensors) for i in range(tensors)}
    reason: list[str] = []
    with largest_file(room_bytes):
        try:
            checkpoint.save(folder, 9, {"model": model, "state": {}}, keep=1)
        except CheckpointError as error:
            reason.append(str(error))
    assert len(reason) == 1
    assert "step_00000009 cannot be written (File too large)" in reason[0]
    assert {file: file.read_bytes() for file in folder.glob("*/*")} == before
    assert names(folder) == ["step_00000003", "step_00000007"]
    assert newest_step(folder) == 7


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "refuses", ["torch.save", "os.fsync", "json.dump", "pathlib.Path.rename", "pathlib.Path.mkdir"]
)
def test_a_refusal_at_any_stage_is_a_checkpoint_error_and_changes_nothing(
    folder: Path, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(refuses, no_space)
        with pytest.raises(CheckpointError, match=r"step_00000009 cannot be written \(No space left on device\)"):
            checkpoint.save(folder, 9, parts(9), keep=1)
    assert names(folder) == ["step_00000003", "step_00000007"]
    assert newest_step(folder) == 7


def test_a_file_where_the_folder_should_be_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "checkpoints", 1, parts(1), keep=1)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_an_error_that_is_not_the_storage_s_keeps_its_own_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpoint.save(folder, 9, parts(9), keep=1)
    assert names(folder) == ["step_00000003", "step_00000007"]


class Trap:
    """Pickles to a call of `_spring`."""

    calls = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (_spring, ())


def _spring() -> int:
    Trap.calls += 1
    return Trap.calls


def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 2, {"state": {"progress": Trap()}}, keep=1)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None  # its sums are right: only reading it finds out
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read .* remove .*step_00000002"):
        saved.load("state")
    assert Trap.calls == 0


def test_the_manifest_names_every_part_with_the_sum_that_sha256sum_would_print(folder: Path) -> None:
    manifest = json.loads((folder / "step_00000003" / "manifest.json").read_text())
    sums = {f: hashlib.sha256((folder / "step_00000003" / f).read_bytes()).hexdigest() for f in FILES[:2]}
    assert manifest == {"format": 1, "step": 3, "sha256": sums}
