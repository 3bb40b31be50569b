"""Where do trained weights come from? torchvision's downloads, or a file.

Files are read as tensors only: pickled code is refused, never run.
"""

import contextlib
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.errors import WeightsError

CONNECT_TIMEOUT_S = 5.0
"""How long a download may stand still; torch itself would wait for ever."""

REMEDY = 'give model.weights = "FILE", or weights = "none"'


def imagenet_url(name: str) -> str:
    """Where torchvision keeps its first ImageNet-1k weights of a backbone."""
    return torchvision.models.get_model_weights(name).IMAGENET1K_V1.url


def load_imagenet(model: nn.Module, name: str) -> str:
    """Fill `model.body` with torchvision's ImageNet weights, by torch hub's cache. Returns what was loaded.

    Raises: WeightsError within seconds when offline, on an HTTP error, a wrong checksum or a damaged cache.
    """
    url = imagenet_url(name)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cached = cache / url.rsplit("/", 1)[-1]
    try:
        # torch announces a download on stdout, where only data belongs
        with _network_timeout(), contextlib.redirect_stdout(sys.stderr):
            state = torch.hub.load_state_dict_from_url(
                url, check_hash=True, weights_only=True, map_location="cpu", progress=sys.stderr.isatty()
            )
    except Exception as error:  # the network, the disk, the checksum, or the unpickler on a damaged file
        if cached.exists():
            raise WeightsError(
                f"{cached} cannot be used ({type(error).__name__}): no ImageNet weights for {name}; "
                f"delete it to download it again, {REMEDY}"
            ) from error
        kind = "" if isinstance(error, OSError | RuntimeError) else f"{type(error).__name__}: "
        raise WeightsError(
            f"{url} could not be fetched ({kind}{error}): no ImageNet weights for {name}; "
            f"put the file in {cache}, {REMEDY}"
        ) from error
    _load_body(model, _without(state, "fc."), where=str(cached))
    return f"{cached.name}: body of {name}, trained on ImageNet-1k; head as initialised"


def load_file(model: nn.Module, file: str | Path) -> str:
    """Fill a model that has `body` and `head` from a file. Returns what was loaded, and what was not.

    The file holds a state dict, bare or under the key "model": torchvision's (conv1.weight, ...: the body),
    or ours (body.*, head.*: the head too where its shapes agree, so that other classes can be learned).
    The body must fit exactly, else nothing is loaded.
    Raises: WeightsError, when the file is missing, unreadable, holds code or does not fit.
    """
    path = Path(file).expanduser()
    state = _read(path)
    if not any(key.startswith("body.") for key in state):
        _load_body(model, _without(state, "fc."), where=str(path))
        return f"{path}: body; the file has no head of ours, so the head is as initialised"
    head = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
    body = {key.removeprefix("body."): value for key, value in _without(state, "head.").items()}
    _load_body(model, body, where=str(path))
    misfits = _misfits(model.get_submodule("head"), head)
    if misfits:
        return f"{path}: body only; the head is as initialised, since its {_first(misfits)}"
    model.get_submodule("head").load_state_dict(head)
    return f"{path}: body and head"


@contextlib.contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU."""
    if not path.is_file():
        raise WeightsError(f'weights file {path} does not exist: {REMEDY}, or weights = "imagenet"')
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}): check its permissions, or {REMEDY}") from error
    except Exception as error:  # an unpickler fed with arbitrary bytes raises anything
        raise WeightsError(
            f"{path} is not a torch file or holds pickled code, which is never run ({type(error).__name__}): "
            "save tensors only, torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"{path} holds no state dict (a {type(state).__name__}): there is nothing to load by name; "
            "save one with torch.save(model.state_dict(), FILE)"
        )
    return {str(key): value for key, value in state.items()}


def _without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


def _load_body(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    body = model.get_submodule("body")
    misfits = _misfits(body, state)
    if misfits:
        raise WeightsError(
            f"{where} does not fit the model's body: {_first(misfits)}; give weights of the same backbone"
        )
    body.load_state_dict(state)


def _misfits(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """How a state dict differs from a module's, a phrase a key. Empty: it can be loaded."""
    own = module.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # torchvision's older files were saved before BatchNorm counted its batches; torch then fills in zero
    missing = [f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    return shapes + missing + [f"{key} is not in the model" for key in state if key not in own]


def _first(misfits: list[str]) -> str:
    more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    return ", ".join(misfits[:3]) + more
