"""Does the doctor see what is wrong with a machine, and name it?"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from thawline.cluster import doctor


def test_versions_equal_what_the_packages_say_of_themselves() -> None:
    import torch

    found = doctor.versions()
    assert set(found) == {"thawline", "python", "torch", "torchvision", "dali", "ray", "pyarrow", "cuda"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["ray"] == importlib.metadata.version("ray")
    assert found["cuda"] == (torch.version.cuda or "none")


def test_hardware_counts_the_cores_this_process_may_use() -> None:
    found = doctor.hardware()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert 0 < found["memory_gib"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 + 0.1


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_of(home: Path) -> str:
        monkeypatch.setattr(doctor, "HOME", home.resolve())
        return doctor.commit.__wrapped__()

    file = tmp_path / "cluster" / "x.py"
    file.parent.mkdir()
    assert commit_of(tmp_path) == "unknown"
    file.write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    assert commit_of(tmp_path) == "unknown"  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "a")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").touch()  # no code of ours
    assert commit_of(tmp_path) == head
    assert commit_of(file.parent) == "unknown"  # installed inside another repository
    file.write_text("a = 2\n")
    assert commit_of(tmp_path) == f"{head}+dirty"
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == "unknown"


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_the_report_covers_every_engine_and_gives_remedies_only_where_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thawline.dataio.pixels import dali

    monkeypatch.setattr(dali, "probe", lambda: "the decoder is on strike")
    checks = by_name(doctor.collect(storage=str(tmp_path / "runs")))
    assert "the decoder is on strike" in checks["engine dali"].value
    assert not checks["engine dali"].ok
    assert checks["engine reference"].ok
    assert checks["storage"].ok
    assert not (tmp_path / "runs").exists()
    assert {"python", "torch", "cpu", "memory", "apex", "collectives", "packages", "DALI"} <= checks.keys()
    assert [check.name for check in checks.values() if bool(check.remedy) is check.ok] == []


def test_an_unusable_storage_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for storage in (str(file), str(file / "runs"), "nothing://bucket"):
        check = by_name(doctor.collect(storage=storage))["storage"]
        assert not check.ok
        assert storage in check.value


@pytest.mark.parametrize(("state", "ok"), [("nvidia", True), ("missing", True), ("unrelated", False)])
def test_the_wrong_apex_is_not_well_and_none_is(state: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from thawline.trainer import optim

    monkeypatch.setattr(optim, "find_apex", lambda: (state, f"it is {state}"))
    check = by_name(doctor.collect())["apex"]
    assert (check.value, check.ok) == (f"it is {state}", ok)
