"""Where do trained weights come from? torchvision's downloads, or a file.

What a file holds, `saved` says: here it is fitted to a model.
"""

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from thawline.models.bodies.body import for_channels
from thawline.models.errors import WeightsError
from thawline.models.heads import convert_units, other_units
from thawline.models.weights import fetched, saved
from thawline.models.weights.saved import REMEDY

_FC = ("fc.",)
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)(?=\.)")
"""torchvision's files of DenseNets have the names of an older torch."""


def imagenet_url(name: str) -> str:
    """Where torchvision keeps its first ImageNet-1k weights of a body."""
    weights = torchvision.models.get_model_weights(name)
    chosen = weights.__members__.get("IMAGENET1K_V1", weights.DEFAULT)  # the largest two have none of that name
    return str(chosen.url)


def load_imagenet(model: nn.Module, name: str, *, foreign: Sequence[str] = _FC) -> str:
    """Fill `model.body` with torchvision's ImageNet weights, by torch hub's cache. Returns what was loaded.

    foreign: what the names of the classifier's tensors begin with.
    Raises: WeightsError within seconds when offline, on an HTTP error, a wrong checksum or a damaged cache.
    """
    url = imagenet_url(name)
    cache = fetched.cache()
    cached = cache / url.rsplit("/", 1)[-1]
    try:
        # torch announces a download on stdout, where only data belongs
        with fetched.alone(cache), fetched.network_timeout(), contextlib.redirect_stdout(sys.stderr):
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
    load_body(model, _without(state, foreign), where=str(cached))
    return f"{cached.name}: body of {name}, trained on ImageNet-1k; head as initialised"


def load_file(
    model: nn.Module,
    file: str | Path,
    *,
    classes: Sequence[str] | None = None,
    foreign: Sequence[str] = _FC,
) -> str:
    """Fill a model that has `body` and `head` from a file or a run. Returns what was loaded, and what was not.

    file: see saved.read; or an address. Its state dict is the library's (conv1.weight, ...: the body, and under
    `foreign` a classifier, which is left out), or ours (body.*, head.*: the head too where its shapes agree, and
    `classes`, if they are told, are those that it was trained on, in their order; of numbers, it says the same as
    before whatever they are standardised by here). The body must fit exactly, else nothing is loaded.
    Raises: WeightsError, when it is missing, unreadable, holds code, does not fit or holds what is no number.
    """
    found = saved.read(fetched.fetch(str(file)) if fetched.is_url(file) else file)
    path, state = found.where, found.state
    if not any(key.startswith("body.") for key in state):
        load_body(model, _without(state, foreign), where=path)
        return f"{path}: body; the file has no head of ours, so the head is as initialised"
    if any(".lora_A." in key for key in state):
        raise WeightsError(
            f"{path} is of a run with LoRA that has not finished: its adapters are not merged, so no other model takes "
            "it; let it finish, and give the run's folder"
        )
    head = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
    body = {key.removeprefix("body."): value for key, value in _without(state, ("head.",)).items()}
    own = model.get_submodule("head")
    misfits = differences(own, head)
    why = f"its {_first(misfits)}" if misfits else _other_classes(found.classes, classes)
    why = why or (other_units(own, found.options) if classes is not None or found.options is not None else "")
    if not why:
        _check_numbers(head, where=path)
    load_body(model, body, where=path)
    if why:
        return f"{path}: body only; the head is as initialised, since {why}"
    own.load_state_dict(head)
    if found.options is not None:
        convert_units(own, found.options)
    return f"{path}: body and head"


def _other_classes(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> str:
    """Why a head of the right shape is not the right one; "" where it is, or where nobody knows ours."""
    if ours is None or (theirs is not None and tuple(theirs) == tuple(ours)):
        return ""
    if theirs is None:
        return "the file does not say which classes it was trained on"
    there, here = next(pair for pair in zip_longest(theirs, ours, fillvalue="none") if pair[0] != pair[1])
    return f"it was trained on other classes ({there[:80]!r} in the place of {here[:80]!r})"


def _without(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(tuple(prefixes))}


def load_body(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Fill `model.body`. where: what the weights are called in errors. Raises WeightsError, and changes nothing."""
    body = model.get_submodule("body")
    state = _for_channels(body, {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()})
    misfits = differences(body, state)
    if misfits:
        raise WeightsError(
            f"{where} does not fit the model's body{_share(body, state)}: {_first(misfits)}; give weights of the same "
            "body"
        )
    _check_numbers(state, where=where)
    body.load_state_dict(state)


def _share(body: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How much of it does, where that is little: then it is of another architecture."""
    own = body.state_dict()
    fit = sum(key in state and state[key].shape == value.shape for key, value in own.items())
    return f" and is of another architecture ({fit} of its {len(own)} tensors are there)" if 2 * fit < len(own) else ""


def _for_channels(body: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of RGB for a body that takes more channels or fewer."""
    first = next(((key, own) for key, own in body.state_dict().items() if own.ndim == 4), None)
    if first is not None and (theirs := state.get(first[0])) is not None and theirs.ndim == 4:
        key, channels = first[0], first[1].shape[1]
        if channels != theirs.shape[1] == 3:
            return {**state, key: for_channels(theirs, channels)}
    return state


def _check_numbers(state: Mapping[str, Tensor], *, where: str) -> None:
    for key, value in state.items():
        bad = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
        if bad:
            raise WeightsError(
                f"{where} holds {bad:,} of {value.numel():,} values of {key} that are no finite numbers (NaN or "
                "infinity): every output would be NaN; give weights from before the training diverged"
            )


def differences(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
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
