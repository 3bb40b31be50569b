"""What weights lie in a file or folder? A state dict, however it was wrapped, and the classes that it was trained on.

Read are a torch file, and what a run leaves: its folder, a checkpoint, what `Learner.save` kept. Tensors and plain
values only: pickled code is refused, never run.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import WeightsError

REMEDY = 'give model.weights = "FILE", or weights = "none"'

_MANIFEST = "manifest.json"
_PARTS = ("ema", "model")
"""Of a checkpoint: the averaged weights where there are any, for those were measured."""
_WITHIN = ("state_dict", "model", "model_state_dict")
"""Where training programs keep a state dict beside other things: Lightning and timm, torchvision, others."""
_WRAPPERS = ("module", "_orig_mod")
"""What DDP and torch.compile put into the names."""


@dataclass(frozen=True)
class SavedWeights:
    """What was found. classes: what the head tells apart, in order; None where nobody wrote that down."""

    state: Mapping[str, Tensor]
    classes: tuple[str, ...] | None
    where: str


def read(given: str | Path) -> SavedWeights:
    """The weights in a file, in a run's folder (its newest checkpoint) or in a checkpoint's, on the CPU.

    Names lose what DDP (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`) put before them.
    Raises: WeightsError, when nothing is there, or it is unreadable, damaged, holds code or no state dict.
    """
    path = Path(given).expanduser()
    try:
        if path.is_dir():
            return _of_checkpoint(_newest(path))
        if not path.exists():
            raise WeightsError(f'weights file {path} does not exist: {REMEDY}, or weights = "imagenet"')
        if not path.is_file():
            raise WeightsError(f"{path} is neither a file nor a folder, so no weights are read from it: {REMEDY}")
        manifest = path.parent / _MANIFEST
        if manifest.is_file() and (part := _part_of(_about(manifest), path.name)):
            return _of_checkpoint(path.parent, part)
        return SavedWeights(_state(path.read_bytes(), path), None, str(path))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}): check its permissions, or {REMEDY}") from error


def _newest(folder: Path) -> Path:
    """The checkpoint that a folder is, or its newest that is whole."""
    if (folder / _MANIFEST).is_file():
        return folder
    found = [
        each
        for place in (folder, folder / "checkpoints")
        for each in place.glob("step_*")
        if each.name.removeprefix("step_").isdecimal() and (each / _MANIFEST).is_file()
    ]
    if not found:
        raise WeightsError(
            f"{folder} holds no finished checkpoint, so there are no weights in it: give a run's folder, one of its "
            "checkpoints, or a file"
        )
    return max(found, key=lambda each: int(each.name.removeprefix("step_")))


def _about(manifest: Path) -> dict[str, Any]:
    """What a manifest.json says; nothing where it is no checkpoint's."""
    try:
        about = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) and isinstance(about.get("parts"), dict) else {}


def _part_of(about: Mapping[str, Any], file: str) -> str | None:
    """Which part of a checkpoint a file is."""
    parts = about.get("parts", {}).items()
    return next((name for name, part in parts if isinstance(part, dict) and part.get("file") == file), None)


def _of_checkpoint(folder: Path, part: str | None = None) -> SavedWeights:
    """The weights of a checkpoint, or those of one of its parts, the very bytes that were written."""
    about = _about(folder / _MANIFEST)
    parts = about.get("parts", {})
    found = parts.get(part or next((name for name in _PARTS if name in parts), ""))
    file = found.get("file") if isinstance(found, dict) else None
    if not isinstance(file, str) or Path(file).name != file:
        raise WeightsError(f"{folder} is no checkpoint ({_MANIFEST} names no weights): give another, or {REMEDY}")
    data = (folder / file).read_bytes()
    if hashlib.sha256(data).hexdigest() != found.get("sha256"):
        raise WeightsError(
            f"{folder / file} changed since it was written: its weights would be wrong; give another checkpoint"
        )
    names = about.get("classes")
    classes = tuple(map(str, names)) if isinstance(names, list) and names else None
    return SavedWeights(_state(data, folder / file), classes, str(folder / file))


def _state(data: bytes, path: Path) -> dict[str, Tensor]:
    """The state dict in a torch file's bytes, by the names that the model itself would give."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with arbitrary bytes raises anything
        raise WeightsError(
            f"{path} is not a torch file or holds pickled code, which is never run ({type(error).__name__}): "
            "save tensors only, torch.save(model.state_dict(), FILE)"
        ) from error
    while isinstance(state, Mapping) and (inner := [key for key in _WITHIN if isinstance(state.get(key), Mapping)]):
        state = state[inner[0]]
    if not isinstance(state, Mapping) or not all(map(_is_plain, state.values())):
        raise WeightsError(
            f"{path} holds no state dict (a {type(state).__name__}): there is nothing to load by name; "
            "save one with torch.save(model.state_dict(), FILE)"
        )
    named = {_unwrapped(str(key)): value for key, value in state.items()}
    lightning = {key: value for key, value in named.items() if key.startswith("model.")}
    return {key.removeprefix("model."): value for key, value in (lightning or named).items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
