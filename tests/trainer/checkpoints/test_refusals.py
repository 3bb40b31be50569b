"""What if the storage refuses, or is an object store? A checkpoint is whole or not there, whatever happens."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.kit.checkpoints import largest_file, names, newest_step, no_space, parts, steps
from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.checkpoint import Best
from thawline.trainer.errors import CheckpointError

# A storage that refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("room_bytes", [0, 100, 1000, 30_000, 41_000])
@pytest.mark.parametrize("tensors", [1, 200])
@pytest.mark.parametrize("step", [7, 9])
def test_a_storage_that_fills_up_in_mid_write_is_a_checkpoint_error_and_changes_nothing(
    folder: Path, room_bytes: int, tensors: int, step: int
) -> None:
    before = {file: file.read_bytes() for file in folder.glob("*/*")}
    model = {str(i): torch.ones(10_000 // tensors) for i in range(tensors)}
    reason: list[str] = []
    with largest_file(room_bytes):
        try:
            checkpoint.save(folder, step, {"model": model, "state": {}}, keep=1)
        except CheckpointError as error:
            reason.append(str(error))
    assert len(reason) == 1
    assert f"step_{step:08d} cannot be written (File too large)" in reason[0]
    kept = {file: file.read_bytes() for file in folder.glob("*/*") if file in before}
    assert kept == before
    assert names(folder) == ["step_00000003", "step_00000007"]
    assert newest_step(folder) == 7


@pytest.mark.parametrize(
    "refuses", ["torch.save", "os.fsync", "thawline.dataio.store.atomic.Sink.write", "pathlib.Path.mkdir"]
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
    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory\)"):
        checkpoint.save(tmp_path / "checkpoints", 1, parts(1), keep=1)
    with pytest.raises(CheckpointError, match=r"cannot be listed or read \(Not a directory\)"):
        checkpoint.newest(tmp_path / "checkpoints")


def test_an_error_that_is_not_the_storage_s_keeps_its_own_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpoint.save(folder, 9, parts(9), keep=1)
    assert names(folder) == ["step_00000003", "step_00000007"]


# By name --------------------------------------------------------------------------------------------------


def test_a_model_is_saved_and_loaded_by_name_and_replaced_in_one_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        folder = checkpoint.save_model(tmp_path, "stage 1", parts(step), step=step)
        saved = checkpoint.load_model(tmp_path, "stage 1")
        assert (saved.step, saved.root.text) == (step, folder)
        assert torch.equal(saved.load("model")["w"], parts(step)["model"]["w"])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        with pytest.raises(CheckpointError, match=r"stage 1 cannot be written .*untouched"):
            checkpoint.save_model(tmp_path, "stage 1", parts(3))
    assert checkpoint.load_model(tmp_path, "stage 1").load("state") == parts(2)["state"]
    checkpoint.load_model(shutil.move(tmp_path / "stage 1", tmp_path / "renamed") and tmp_path, "renamed")


def test_a_model_that_is_not_there_or_has_changed_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"stage-2 cannot be loaded \(it does not exist"):
        checkpoint.load_model(tmp_path, "stage-2")
    home = Path(checkpoint.save_model(tmp_path, "stage-2", parts(1)))
    data = bytearray((home / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (home / "model.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"stage-2 cannot be loaded \(model\.pt changed"):
        checkpoint.load_model(tmp_path, "stage-2")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\\b", "a\nb"])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a folder's"):
        checkpoint.save_model(tmp_path, name, parts(1))
    with pytest.raises(CheckpointError, match="cannot be a folder's"):
        checkpoint.load_model(tmp_path, name)
    assert names(tmp_path) == []


# An object store ------------------------------------------------------------------------------------------


def test_a_store_holds_the_same_checkpoints_and_keeps_the_same_ones(s3: str) -> None:
    root = s3.format("runs/pets/checkpoints")
    assert checkpoint.newest(root) == (None, [])
    for step in (1, 2, 3, 4, 4):
        made = checkpoint.save(root, step, parts(step), keep=2, metrics={"loss": float(step)}, best=Best("loss"))
        assert made == s3.format(f"runs/pets/checkpoints/step_{step:08d}")
        assert newest_step(root) == step
    assert steps(root) == [1, 3, 4]
    filesystem, base = Root.of(root).opened
    filesystem.delete_file(f"{base}/step_00000004/manifest.json")
    assert newest_step(root) == 3
    assert [skipped.reason for skipped in checkpoint.newest(root)[1]] == [
        "it was not finished: there is no manifest.json"
    ]
    checkpoint.save(root, 5, parts(5), keep=1)
    assert steps(root) == [5]
    checkpoint.save_model(root, "stage #1", parts(8), step=8)
    assert checkpoint.load_model(root, "stage #1").load("state") == parts(8)["state"]
    assert "stage #1" in Root.of(root).listing()


def test_a_store_that_is_not_there_is_told_and_never_taken_for_an_empty_one(s3: str) -> None:
    nowhere = s3.format("runs").replace("s3://", "s3://no-such-")
    with pytest.raises(CheckpointError, match=r"step_00000001\?.* cannot be written \(there is no no-such-"):
        checkpoint.save(nowhere, 1, parts(1), keep=1)
    with pytest.raises(CheckpointError, match=r"cannot be listed or read \(there is no no-such-"):
        checkpoint.newest(nowhere)


def test_a_store_that_stops_answering_is_told_and_no_older_checkpoint_is_taken_instead(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = s3.format("checkpoints"), Root.read
    for step in (1, 2):
        checkpoint.save(root, step, parts(step), keep=2)

    def fail(where: Root, name: str) -> bytes:
        if "step_00000002" in where.text:
            raise OSError("AWS Error NETWORK_CONNECTION")
        return read(where, name)

    monkeypatch.setattr(Root, "read", fail)
    with pytest.raises(CheckpointError, match=r"cannot be listed or read \(AWS Error NETWORK_CONNECTION\)"):
        checkpoint.newest(root)
