"""Which checkpoints do several tests share?"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint


def parts(step: int) -> dict[str, dict[str, Any]]:
    weights = torch.arange(6, dtype=torch.float32).view(2, 3) + step
    return {"model": {"w": weights}, "state": {"step": step, "rows": [{"loss": 0.5 * step, "phase": None}]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 7."""
    for step in (3, 7):
        checkpoint.save(tmp_path, step, parts(step), keep=5)
    return tmp_path


def newest_step(root: str | Path) -> int | None:
    """The newest step, after comparing every value in it with what was saved for that step."""
    saved, _ = checkpoint.newest(root)
    if saved is None:
        return None
    expected = parts(saved.step)
    assert torch.equal(saved.load("model")["w"], expected["model"]["w"])
    assert saved.load("state") == expected["state"]
    return saved.step


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def steps(root: str | Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in Root.of(root).listing())


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Within, the kernel refuses writes beyond that size, in the middle of a write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
