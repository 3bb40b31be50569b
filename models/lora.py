"""How are few weights trained in place of many? LoRA: beside frozen linear layers, products of two thin ones, by peft.

The only file that imports peft, an extra. What trains is one more layer group, before the head; the others stand still.
A model is whole again when it is merged: what a run leaves needs no peft.
Source: Hu et al., LoRA, 2021.
"""

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from thawline.models.bodies.body import on_meta, shape_of
from thawline.models.bodies.libraries import library_of, origin, sketch
from thawline.models.classifier import Classifier
from thawline.models.errors import ModelError
from thawline.models.groups import unfreeze

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
"""What peft puts into the names of a layer and its two thin ones."""
_SHOWN = 12


def add_lora(
    model: Classifier, *, rank: int, alpha: float | None = None, targets: Sequence[str] = (), seed: int | None = None
) -> Classifier:
    """The model itself, with adapters of this rank beside linear layers of its body; its outputs are as before.

    Only the adapters and the head will train: all layer groups before these stay frozen, whatever is unfrozen.
    alpha: what they add counts alpha / rank; None is rank. targets: ends of the layers' names, such as "qkv" or
    "attn.proj"; all linear layers when empty, but for those of which an attention reads the weights and no more.
    seed: of what the adapters begin with; the caller's random state is then left as it was.
    Raises ModelError: no such layer, a rank or alpha not above 0, peft is not installed, adapters are there already.
    """
    if model.lora_scale:
        raise ModelError("the model has LoRA's adapters already: they would stand on one another; make it anew")
    if rank < 1 or (alpha is not None and not alpha > 0):
        raise ModelError(f"rank={rank}, alpha={alpha}: nothing would be learned; give numbers above 0")
    peft = _peft()
    side = model.options.get("size_px") or origin(model.name).size_px
    channels = model.options.get("in_channels", 3)
    names = _chosen(model.body, targets, name=model.name, size_px=side, channels=channels)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha or rank, target_modules="|".join(map(re.escape, names)), lora_dropout=0.0, bias="none"
    )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(config, model.body)
    base = tuple(tuple(_renamed(key, names) for key in group) for group in model.group_names)
    known = {key for group in base for key in group}
    adapters = tuple(key for key, _ in model.body.named_parameters() if key not in known)
    model.group_names, model.fixed_groups = (*base, adapters), len(base)
    model.lora_scale = (alpha or rank) / rank
    model.origin += f"; LoRA of rank {rank} beside {len(names)} linear layers"
    unfreeze(model)
    return model


def check(name: str, *, targets: Sequence[str] = (), size_px: int | None = None) -> None:
    """Whether `add_lora` can be called on such a model. Raises ModelError, UnknownModelError."""
    body = sketch(name, size_px=size_px)
    _chosen(body.module, targets, name=name, size_px=size_px or body.size_px, channels=3)
    _peft()


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a model, what its adapters add put into the weights beside them: that of the model without.

    Added up in float32. A model without adapters has it already.
    """
    scale = getattr(model, "lora_scale", 0.0)
    if not scale:
        return dict(state)
    plain = dict[str, Tensor]()
    for key, value in state.items():
        layer = key.removesuffix("weight").removesuffix(_BASE)
        if key == f"{layer}{_BASE}weight" and f"{layer}{_UP}" in state:
            more = state[f"{layer}{_UP}"].float() @ state[f"{layer}{_DOWN}"].float()
            value = (value.float() + scale * more).to(value.dtype)
        if not key.endswith((_UP, _DOWN)):
            plain[key.replace(_BASE, ".")] = value
    return plain


def _renamed(key: str, layers: Sequence[str]) -> str:
    """A parameter's name once its layer has an adapter beside it."""
    layer, _, leaf = key.rpartition(".")
    return f"{layer}{_BASE}{leaf}" if layer in layers else key


def _chosen(body: nn.Module, targets: Sequence[str], *, name: str, size_px: int, channels: int) -> list[str]:
    """The linear layers of a body that the targets mean. Raises ModelError where a target means none."""
    layers = _linear(body, name=name, size_px=size_px, channels=channels)
    if not layers:
        raise ModelError(
            f"{name} has no linear layers that an adapter could stand beside: LoRA has nothing to train; leave "
            "model.lora out, or give a transformer or a ConvNeXt"
        )
    found = {target: [layer for layer in layers if f".{layer}".endswith(f".{target}")] for target in targets}
    for target, its in found.items():
        if not its:
            ends = sorted({layer.rpartition(".")[2] for layer in layers})
            raise ModelError(
                f"lora target {target[:80]!r} ends the name of no linear layer in {name}: nothing would train there; "
                f"give some of {', '.join(ends[:_SHOWN])}"
            )
    return [layer for layer in layers if not targets or any(layer in its for its in found.values())]


def _linear(body: nn.Module, *, name: str, size_px: int, channels: int) -> list[str]:
    """The linear layers of a body that are called, in order: an attention that reads their weights would pass by."""
    device: Literal["meta", "cpu"] = "cpu" if library_of(name).computes else "meta"
    ghost = copy.deepcopy(body).eval() if device == "cpu" else on_meta(body)
    called, layers = set[nn.Module](), dict(ghost.named_modules())
    for layer in layers.values():
        if type(layer) is nn.Linear:
            layer.register_forward_hook(lambda layer, inputs, output: called.add(layer))
    shape_of(ghost, channels=channels, size_px=size_px, name=name, device=device)
    return [key for key, layer in layers.items() if layer in called]


def _peft() -> ModuleType:
    """The package. Raises ModelError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ModuleNotFoundError as error:
        raise ModelError(
            "LoRA needs peft, which is not installed: no adapters can be made; "
            'pip install "thawline[lora]", or leave model.lora out'
        ) from error
    module: ModuleType = peft
    return module
