"""Does a result say with what it was computed?"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from thawline.cluster.machine import provenance


def test_versions_equal_what_the_packages_say_of_themselves() -> None:
    import torch

    found = provenance.versions()
    assert set(found) == {"thawline", "python", "torch", "torchvision", "dali", "ray", "pyarrow", "cuda"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["ray"] == importlib.metadata.version("ray")
    assert found["cuda"] == (torch.version.cuda or "none")


def test_hardware_counts_the_cores_this_process_may_use() -> None:
    found = provenance.hardware()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert 0 < found["memory_gib"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 + 0.1


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_of(home: Path) -> str:
        monkeypatch.setattr(provenance, "HOME", home.resolve())
        return provenance.commit.__wrapped__()

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
