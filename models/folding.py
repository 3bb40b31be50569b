"""What does a frozen part cost a step? As little as inference: BatchNorm that stands still is folded into convolutions.

For a phase the steps run on a twin of the model. What trains are the model's own layers; what is frozen are copies, in
which a convolution computes what the BatchNorm after it would have done. The model stays as it is: its state dict, its
average, its checkpoints and its validation know nothing of the twin.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from thawline.models.errors import ModelError
from thawline.models.groups import first_trained, layer_groups, modules_of
from thawline.models.heads import AdaptiveConcatPool2d, SpatialSoftmax

_POOLS = (AdaptiveConcatPool2d, SpatialSoftmax, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity)
"""Layers that neither learn nor draw: what is after them takes less room."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""These very types: a subclass (timm's BatchNormAct2d) does more than to normalise."""


def folded(model: nn.Module, n: int) -> nn.Module:
    """The model for steps that train the groups from n on, where BatchNorm's statistics stand still, too.

    Its outputs are the model's to rounding, its trainable layers the model's own, its frozen ones in evaluation mode.
    Where there is nothing to fold it is the model itself. Make it anew when frozen weights change.
    Raises: ModelError, when there is no group n.
    Source: torch's `fuse_conv_bn_eval`; torch.fx finds which BatchNorm follows which convolution.
    """
    groups, first = layer_groups(model), first_trained(model, n)
    twin = copy.deepcopy(model, {id(part): part for group in groups[first:] for part in group})
    own = {id(module) for group in groups[first:] for module in modules_of(group)}
    frozen = {id(module) for group in layer_groups(twin)[:first] for module in modules_of(group)}
    for module in twin.modules():
        if id(module) not in own:  # what holds the groups is in training, as it is in the model
            module.training = id(module) not in frozen
    pairs = [pair for pair in _pairs(twin) if all(map(_foldable, map(twin.get_submodule, pair)))]
    for convolution, norm in pairs:
        both: Any = (twin.get_submodule(convolution).eval(), twin.get_submodule(norm).eval())
        twin.set_submodule(convolution, fuse_conv_bn_eval(*both))
        twin.set_submodule(norm, nn.Identity())
    return twin if pairs else model


def in_two(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What comes before the first layer that learns of the head, pooling included; and the head from there on.

    One after the other they are the model, of whose layers they are made.
    Raises: ModelError, for a model that does not say what it is made of.
    """
    parts = getattr(model, "in_two", None)
    if not callable(parts):
        raise ModelError(
            f"{type(model).__name__} has no method in_two(): where its head begins is not known; give it one that "
            "returns (body, head), of which model(x) is head(body(x)), or leave features uncached"
        )
    body, head = parts()
    layers = [*head] if isinstance(head, nn.Sequential) else [head]
    pools = 0
    while pools < len(layers) - 1 and isinstance(layers[pools], _POOLS):
        pools += 1
    return nn.Sequential(body, *layers[:pools]), nn.Sequential(*layers[pools:])


def _foldable(module: nn.Module) -> bool:
    """A frozen layer whose numbers are exact enough to be multiplied out."""
    kinds = {parameter.dtype for parameter in module.parameters()}
    return kinds <= {torch.float32, torch.float64} and not any(p.requires_grad for p in module.parameters())


def _pairs(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of convolutions that only the BatchNorm beside them uses; where a whole cannot be traced, of its parts."""
    try:
        nodes = list(fx.symbolic_trace(module).graph.nodes)
    except Exception:  # its forward was run on symbols, and may raise whatever it likes: ask its parts
        for name, child in module.named_children():
            if any(child.children()):
                yield from _pairs(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, convolution = module.get_submodule(str(node.target)), module.get_submodule(str(before.target))
        is_pair = type(norm) in _NORMS and type(convolution) in _CONVOLUTIONS and norm.running_mean is not None
        if is_pair and calls[node.target] == calls[before.target] == 1:
            yield f"{prefix}{before.target}", f"{prefix}{node.target}"
