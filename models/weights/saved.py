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

from thawline.models.errors import WeightsError
from thawline.models.weights import tensors

REMEDY = 'give model.weights = "FILE", or weights = "none"'

_MANIFEST = "manifest.json"
_BEGINNINGS = (b"PK", b"\x80")
"""Of what torch.save writes: an archive, and before torch 1.6 a pickle."""
_WEIGHTS, _AVERAGE = "model", "ema"
"""Parts of a checkpoint: all weights, and where one was kept the average of the parameters, which was measured."""
_WITHIN = ("state_dict", "model", "model_state_dict", "model_state")
"""Where training programs keep a state dict beside other things: Lightning and timm, torchvision, others."""
BUNDLE, DESCRIPTION, BUNDLED = "model", "model.json", "model.safetensors"
"""A bundle's folder within a run's, and its two files."""
_WRAPPERS = ("module", "_orig_mod")
"""What DDP and torch.compile put into the names."""


@dataclass(frozen=True)
class SavedWeights:
    """What was found. classes: what the head tells apart, in order; options: what `create` was given, as a bundle says.

    None where nobody wrote that down.
    """

    state: Mapping[str, Tensor]
    classes: tuple[str, ...] | None
    where: str
    options: Mapping[str, Any] | None = None


def read(given: str | Path) -> SavedWeights:
    """The weights in a file, in a run's folder (its bundle, or else its newest checkpoint), in a bundle's or a
    checkpoint's, on the CPU.

    Names lose what DDP (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`) put before them.
    Raises: WeightsError, when nothing is there, or it is unreadable, damaged, holds code or no state dict.
    """
    path = Path(given).expanduser()
    try:
        if (bundle := _bundle(path)) is not None:
            return _of_bundle(bundle)
        if path.is_dir():
            folder = _newest(path)
            return _of_checkpoint(folder, _about(folder))
        if not path.exists():
            raise WeightsError(f'weights file {path} does not exist: {REMEDY}, or weights = "imagenet"')
        if not path.is_file():
            raise WeightsError(f"{path} is neither a file nor a folder, so no weights are read from it: {REMEDY}")
        if path.name in _files(about := _about(path.parent)).values():
            return _of_checkpoint(path.parent, about, path.name)
        if path.suffix == ".safetensors":
            return SavedWeights(_named(_tensors(path.read_bytes(), path)), None, str(path))
        return SavedWeights(_state(_read(path), path), None, str(path))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}): check its permissions, or {REMEDY}") from error


def _bundle(path: Path) -> Path | None:
    """The bundle that a path is, holds as a finished run does, or is the weights of."""
    for folder in (path, path / BUNDLE, *([path.parent] if path.name == BUNDLED else [])):
        if (folder / DESCRIPTION).is_file() and (folder / BUNDLED).is_file():
            return folder
    return None


def _of_bundle(folder: Path) -> SavedWeights:
    """The weights that a run's last validation measured."""
    file = folder / BUNDLED
    try:
        about = json.loads((folder / DESCRIPTION).read_bytes())
        classes, checksum = tuple(map(str, about["classes"])), about["weights"]["sha256"]
        options = dict(about["options"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{folder / DESCRIPTION} is not a bundle's description: copy the bundle again") from error
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != checksum:
        raise WeightsError(f"{file} changed since it was written: its weights would be wrong; copy the bundle again")
    return SavedWeights(_tensors(data, file), classes, str(file), options)


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tensors.from_bytes(data, where=str(path)).items()}


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


def _about(folder: Path) -> dict[str, Any]:
    """What the manifest.json of a checkpoint says; nothing where there is none."""
    manifest = folder / _MANIFEST
    try:
        about = json.loads(manifest.read_bytes()) if manifest.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) and isinstance(about.get("parts"), dict) else {}


def _files(about: Mapping[str, Any]) -> dict[str, str]:
    """Part -> the file that it lies in, in the checkpoint's own folder."""
    parts = about.get("parts", {}).items()
    named = {name: str(part["file"]) for name, part in parts if isinstance(part, dict) and "file" in part}
    return {name: file for name, file in named.items() if Path(file).name == file}


def _of_checkpoint(folder: Path, about: Mapping[str, Any], file: str | None = None) -> SavedWeights:
    """The weights of a checkpoint, or those in one of its files."""
    there = _files(about)
    chosen = [file] if file else [there[name] for name in (_WEIGHTS, _AVERAGE) if name in there]
    if not chosen:
        raise WeightsError(f"{folder} is no checkpoint ({_MANIFEST} names no weights): give another, or {REMEDY}")
    sums = [part.get("sha256") for part in about["parts"].values() if isinstance(part, dict)]
    state: dict[str, Tensor] = {}
    for name in chosen:
        data = _read(folder / name)
        if hashlib.sha256(data).hexdigest() not in sums:
            raise WeightsError(
                f"{folder / name} changed since it was written: its weights would be wrong; give another checkpoint"
            )
        state |= _state(data, folder / name)
    names = about.get("classes")
    classes = tuple(map(str, names)) if isinstance(names, list) and names else None
    return SavedWeights(state, classes, str(folder / chosen[0]))


def _read(path: Path) -> bytes:
    """All of a file that begins as torch's do; of another, however large, no more than that. Raises OSError."""
    with path.open("rb") as file:
        if not (first := file.read(2)).startswith(_BEGINNINGS):
            return first
        try:
            return first + file.read()
        except MemoryError as error:
            raise WeightsError(
                f"{path} has {path.stat().st_size:,} bytes, which do not fit into memory: {REMEDY}"
            ) from error


def _state(data: bytes, path: Path) -> dict[str, Tensor]:
    """The state dict in a torch file's bytes, by the names that the model itself would give."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with arbitrary bytes raises anything
        raise WeightsError(
            f"{path} is not a torch file or holds pickled code, which is never run ({type(error).__name__}): "
            "save tensors only, torch.save(model.state_dict(), FILE)"
        ) from error
    for _ in _WITHIN:  # no deeper: a file may hold itself
        if isinstance(state, Mapping) and (inner := [key for key in _WITHIN if isinstance(state.get(key), Mapping)]):
            state = state[inner[0]]
    if not isinstance(state, Mapping) or not all(map(_is_plain, state.values())):
        raise WeightsError(
            f"{path} holds no state dict (a {type(state).__name__}): there is nothing to load by name; "
            "save one with torch.save(model.state_dict(), FILE)"
        )
    return _named(state)


def _named(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    named = {_unwrapped(str(key)): value for key, value in state.items()}
    lightning = {key: value for key, value in named.items() if key.startswith("model.")}
    return {key.removeprefix("model."): value for key, value in (lightning or named).items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
