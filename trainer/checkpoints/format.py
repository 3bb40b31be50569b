"""What does a checkpoint hold, and is it whole? Parts, and a manifest with the sum of every byte.

A checkpoint is a folder `step_00000123/` of parts (`model.pt`, `state.pt`) and `manifest.json`. The manifest holds the
size and SHA-256 of every part and of its own text, so that no change to either goes unseen; and which run it is of, so
that no other goes on from it. SHA-256 and not the faster xxh3 that shards have: `sha256sum` is on every machine, so
that weights can be compared where thawline is not, and at 1.2 GB/s, beside the training, it costs nothing that one
notices. Only tensors and plain values are read back (`weights_only`): a checkpoint cannot carry code. How one is
written is checkpoint's.
"""

import hashlib
import io
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from thawline.dataio.errors import quoted
from thawline.dataio.store.root import Root
from thawline.trainer.errors import CheckpointError

Parts = Mapping[str, Mapping[str, Any]]

FORMAT = 2
MANIFEST = "manifest.json"
_MANIFEST_BYTES = 16 << 20
"""No manifest is longer; a file of that name that is, is not read."""


@dataclass(frozen=True)
class Origin:
    """Which run a checkpoint comes from. Values as JSON has them; older checkpoints do not say, and fit any run."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """By name, what a run and its continuation have in common: settings and data."""
    classes: Sequence[str] = ()
    """What the model tells apart, in the order of its outputs."""

    def foreign(self, other: "Origin") -> str:
        """In which of the values that both name the other's run differs from this, in words; "" where in none."""
        ours, theirs = json.loads(json.dumps([dict(self.run), dict(other.run)]))
        names = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        differ = [f"{name} is {quoted(theirs[name])} there and {quoted(ours[name])} here" for name in names[:3]]
        return "; ".join([*differ, *([f"and {len(names) - 3} more"] if len(names) > 3 else [])])


NO_ORIGIN = Origin()


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint, as its manifest knows it."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint. metrics: those that were numbers."""

    root: Root
    step: int
    metrics: Mapping[str, float]
    parts: Mapping[str, Part]
    origin: Origin = NO_ORIGIN
    content: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """The parts' bytes, read and verified once; empty for a checkpoint that is only counted."""

    def load(self, part: str) -> dict[str, Any]:
        """One part, tensors on the CPU.

        Raises CheckpointError for a part that is missing, carries code or is no dictionary.
        """
        try:
            if part not in self.content:
                raise UnfitError(f"its manifest lists no part {part}")
            content = torch.load(io.BytesIO(self.content[part]), map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise UnfitError(f"it holds a {type(content).__name__}")
            return content
        except Exception as error:  # torch.load raises whatever foreign bytes make it stumble over
            why = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{self.root.full(f'{part}.pt')} cannot be read ({why}): nothing can go on from it; remove "
                f"{self.root} to go on from the one before it"
            ) from error

    def with_content(self) -> "Saved":
        """The same checkpoint with all its bytes. Raises UnfitError if they differ from what was written; OSError."""
        return replace(self, content={name: self._read(part) for name, part in self.parts.items()})

    def _read(self, part: Part) -> bytes:
        data = self.root.read(part.file)
        if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
            raise UnfitError(f"{part.file} changed since it was written")
        return data


class UnfitError(Exception):
    """Why a checkpoint cannot be resumed from. finished: see Skipped."""

    def __init__(self, reason: str, *, finished: bool = True) -> None:
        super().__init__(reason)
        self.finished = finished


def manifest_text(about: Mapping[str, Any]) -> bytes:
    """The only way that a manifest is written: text that differs from this was changed."""
    digest = hashlib.sha256(json.dumps(about, indent=1).encode()).hexdigest()
    return f"{json.dumps({**about, 'sha256': digest}, indent=1)}\n".encode()


def read_manifest(folder: Root) -> Saved:
    """A checkpoint by its manifest and its files' sizes; the parts are not read. Raises UnfitError; OSError."""
    there = folder.listing()
    if MANIFEST not in there:
        raise UnfitError(f"it was not finished: there is no {MANIFEST}", finished=False)
    size = there[MANIFEST]
    if size is None or size > _MANIFEST_BYTES:
        raise UnfitError(f"its {MANIFEST} is no file" if size is None else f"its {MANIFEST} has {size:,} bytes")
    about = _understood(folder.read(MANIFEST))
    try:
        parts = {name: Part(**part) for name, part in about["parts"].items()}
        origin = Origin(dict(about.get("run", {})), tuple(map(str, about.get("classes", ()))))
        saved = Saved(folder, operator.index(about["step"]), about["metrics"], parts, origin)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnfitError(f"its {MANIFEST} lacks what belongs there ({error})") from error
    if not parts:
        raise UnfitError("it lists no parts")
    for part in parts.values():
        found = there.get(part.file)
        if found != part.bytes:
            raise UnfitError(
                f"{part.file} is missing"
                if part.file not in there
                else f"{part.file} is no file"
                if found is None
                else f"{part.file} has {found:,} bytes of {part.bytes:,}"
            )
    return saved


def _understood(data: bytes) -> dict[str, Any]:
    """A manifest's content. Raises UnfitError when its text is not exactly what a writer of this format wrote."""
    try:
        about = json.loads(data)
        wanted = about.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnfitError(f"its {MANIFEST} cannot be understood ({type(error).__name__})") from error
    if wanted != FORMAT:
        raise UnfitError(f"its format is {wanted}, and this thawline reads {FORMAT}")
    if manifest_text({key: value for key, value in about.items() if key != "sha256"}) != data:
        raise UnfitError(f"its {MANIFEST} changed since it was written")
    return dict(about)


def name_of(step: int) -> str:
    """What the folder of a step's checkpoint is called."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a folder that `save` would call so."""
    number = name.removeprefix("step_")
    return int(number) if number.isdecimal() and name == name_of(int(number)) else None


def folder_name(name: str) -> str:
    if not name.strip(" .") or not name.isprintable() or {*name} & {*"/\\"}:
        raise CheckpointError(
            f"name={quoted(name)!r} cannot be a folder's: nothing was written or read; give one like 'stage-1'"
        )
    return name
