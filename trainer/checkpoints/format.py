"""What does a checkpoint hold, and is it whole? Parts, and a manifest with their checksums.

A checkpoint is a folder `step_00000123/` of parts (`model.pt`, `state.pt`) and `manifest.json`. The manifest holds the
size and SHA-256 of every part and of its own text, so that no change to either goes unseen; and which run it is of, so
that no other goes on from it. The sum is SHA-256 and not the faster xxh3 of shards: `sha256sum` is on every machine, so
that weights can be compared where thawline is not installed, and at 1.2 GB/s, beside the training, nobody notices it.
Only tensors and plain values are read back (`weights_only`): a checkpoint cannot carry code. How one is written, see
checkpoint.
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
"""No manifest is longer; a longer file of that name is not read."""


@dataclass(frozen=True)
class Origin:
    """Which run a checkpoint comes from, as JSON can hold it. Older checkpoints do not say, and fit any run."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """Settings and data that a run and its continuation have in common, by name."""
    classes: Sequence[str] = ()
    """What the model tells apart, in the order of its outputs."""

    def foreign(self, other: "Origin") -> str:
        """How the other's run differs from this in the values that both name, in words; "" where it does not."""
        own, others = json.loads(json.dumps([dict(self.run), dict(other.run)]))
        names = [name for name in own if name in others and own[name] != others[name]]
        differ = [f"{name} is {quoted(others[name])} there and {quoted(own[name])} here" for name in names[:3]]
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
    """A checkpoint. metrics: the finite ones."""

    root: Root
    step: int
    metrics: Mapping[str, float]
    parts: Mapping[str, Part]
    origin: Origin = NO_ORIGIN
    content: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """The parts' bytes, read and verified once; empty where only the manifest was read."""

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
        except Exception as error:  # torch.load raises whatever it likes on foreign bytes
            why = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(
                f"{self.root.full(f'{part}.pt')} cannot be read ({why}): nothing can go on from it; remove "
                f"{self.root} to go on from the one before it"
            ) from error

    def with_content(self) -> "Saved":
        """The same checkpoint with all its bytes. Raises UnfitError if they have changed since; OSError."""
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
    """A manifest's only valid text: any other was changed."""
    digest = hashlib.sha256(json.dumps(about, indent=1).encode()).hexdigest()
    return f"{json.dumps({**about, 'sha256': digest}, indent=1)}\n".encode()


def read_manifest(folder: Root) -> Saved:
    """A checkpoint by its manifest and its files' sizes; the parts are not read. Raises UnfitError; OSError."""
    listing = folder.listing()
    if MANIFEST not in listing:
        raise UnfitError(f"it was not finished: there is no {MANIFEST}", finished=False)
    manifest_bytes = listing[MANIFEST]
    if manifest_bytes is None or manifest_bytes > _MANIFEST_BYTES:
        raise UnfitError(
            f"its {MANIFEST} is no file" if manifest_bytes is None else f"its {MANIFEST} has {manifest_bytes:,} bytes"
        )
    about = _parsed(folder.read(MANIFEST))
    try:
        parts = {name: Part(**part) for name, part in about["parts"].items()}
        origin = Origin(dict(about.get("run", {})), tuple(map(str, about.get("classes", ()))))
        saved = Saved(folder, operator.index(about["step"]), about["metrics"], parts, origin)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnfitError(f"its {MANIFEST} lacks what belongs in it ({error})") from error
    if not parts:
        raise UnfitError("it lists no parts")
    for part in parts.values():
        size = listing.get(part.file)
        if size != part.bytes:
            raise UnfitError(
                f"{part.file} is missing"
                if part.file not in listing
                else f"{part.file} is no file"
                if size is None
                else f"{part.file} has {size:,} bytes of {part.bytes:,}"
            )
    return saved


def _parsed(data: bytes) -> dict[str, Any]:
    """A manifest's content. Raises UnfitError when its text is not exactly what `manifest_text` writes."""
    try:
        about = json.loads(data)
        version = about.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnfitError(f"its {MANIFEST} cannot be understood ({type(error).__name__})") from error
    if version != FORMAT:
        raise UnfitError(f"its format is {version}, and this thawline reads {FORMAT}")
    if manifest_text({key: value for key, value in about.items() if key != "sha256"}) != data:
        raise UnfitError(f"its {MANIFEST} changed since it was written")
    return dict(about)


def name_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of which a folder of this name is the checkpoint; None for other names."""
    number = name.removeprefix("step_")
    return int(number) if number.isdecimal() and name == name_of(int(number)) else None


def folder_name(name: str) -> str:
    if not name.strip(" .") or not name.isprintable() or {*name} & {*"/\\"}:
        raise CheckpointError(
            f"name={quoted(name)!r} cannot be a folder's: nothing was written or read; give one like 'stage-1'"
        )
    return name
