"""How does a run survive being killed? Checkpoints that are either whole or not there.

A checkpoint is a folder `step_00000123/` of parts (`model.pt`, `state.pt`) and `manifest.json` with their SHA-256
sums. It is written under a temporary name, every file and then the folder is flushed to the disk, and it appears
by one rename. Reading checks every sum; a damaged checkpoint is skipped, with the reason, for the one before.
Only tensors and plain values are read back (`weights_only`): a checkpoint cannot carry code.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import CheckpointError

FORMAT = 1
_MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose sums have been checked."""

    folder: Path
    step: int

    def load(self, part: str) -> dict[str, Any]:
        """One part, tensors on the CPU. Raises CheckpointError for a part that is missing or carries code."""
        file = self.folder / f"{part}.pt"
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({str(error).partition(chr(10))[0]}): the run cannot go on from it; remove "
                f"{self.folder} to go on from the checkpoint before it"
            ) from error


def save(folder: Path, step: int, parts: dict[str, dict[str, Any]], *, keep: int) -> Path:
    """Write checkpoint `step` into `folder`, whole or not at all, then remove all but the newest `keep`.

    Raises CheckpointError when the storage refuses; what was there before is untouched.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".tmp_{final.name}_{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        sums = {}
        for name, part in parts.items():
            with (temporary / f"{name}.pt").open("wb") as file:
                torch.save(part, file)
                os.fsync(file.fileno())
            sums[f"{name}.pt"] = _sha256(temporary / f"{name}.pt")
        with (temporary / _MANIFEST).open("w") as text:
            json.dump({"format": FORMAT, "step": step, "sha256": sums}, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        _flush_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # torch.save hides what the storage said behind an error of its own.
        fault = error if isinstance(error, OSError) else error.__context__
        if not isinstance(fault, OSError):
            raise
        raise CheckpointError(
            f"checkpoint {final} cannot be written ({fault.strerror or fault}): a kill now would cost the steps since "
            "the last one; make room or give another storage, then start again to resume"
        ) from error
    _prune(folder, keep, step)
    return final


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint that is whole, or None. Damaged ones are skipped with a warning that says why."""
    for candidate in sorted(folder.glob("step_*"), key=lambda f: (len(f.name), f.name), reverse=True):
        fault = _fault(candidate)
        if fault is None:
            return Saved(candidate, int(candidate.name.removeprefix("step_")))
        log.warning("checkpoint %s is skipped: %s; the one before it is used", candidate, fault)
    return None


def _fault(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, and this thawline reads {FORMAT}"
        if folder.name != f"step_{manifest['step']:08d}":
            return f"it holds step {manifest['step']}"
        if not manifest["sha256"]:
            return "it lists no parts"
        wrong = [name for name, digest in manifest["sha256"].items() if _sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def _prune(folder: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` up to `step`. Later ones are damaged or another run's: not ours to count."""
    numbers = (old.name.removeprefix("step_") for old in folder.glob("step_*"))
    steps = sorted(int(number) for number in numbers if number.isdecimal() and int(number) <= step)
    for old in steps[: -max(1, keep)]:
        shutil.rmtree(folder / f"step_{old:08d}", ignore_errors=True)
    for stale in folder.glob(".tmp_step_*"):  # left by a process that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
