"""How does a network of torchvision become a body? By its children, up to those that pool and classify.

Their weights are loading's matter.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import Permute

from thawline.models.bodies.body import (
    Body,
    Names,
    Origin,
    by_children,
    give_channels,
    is_map,
    named,
    on_meta,
    shape_of,
    stages_of,
)
from thawline.models.errors import ModelError

_AFTER = ("avgpool", "flatten", "dropout", "fc", "classifier", "head", "heads", "aux1", "aux2", "AuxLogits")
"""Children that are no part of the body."""
_SIZED = {"vision_transformer": "image_size", "maxvit": "input_size"}
"""Modules of networks that are built for one size, and the argument that says which."""
_FALLS = 2 / 3
"""A map this much smaller begins a stage; a convolution without padding takes off less."""


class Cut(nn.Sequential):
    """A network's layers up to where it pools: images -> feature map (N, C, h, w)."""

    def forward_intermediates(
        self, images: Tensor, *, output_fmt: str = "NCHW", intermediates_only: bool = True
    ) -> list[Tensor]:
        """The last map of each size, as timm's networks give them."""
        return [value for _, value, ends in walk(self, images) if ends]


class Pooled(Cut):
    """The same of a transformer that pools normed tokens: images -> (N, C)."""

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return features.mean((2, 3))


class _Relu(Cut):
    """The same of a network that ends its features within its forward."""

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return features.relu()


def walk(cut: nn.Sequential, images: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    """Each layer's name, its map with the channels first, and whether it is the last of its size."""
    value, channels_last = images, False
    before: tuple[str, Tensor] | None = None
    for name, layer in steps(cut):
        value = layer(value)
        if isinstance(layer, Permute):
            channels_last = not channels_last
        shown = value.permute(0, 3, 1, 2) if channels_last else value
        if before is not None:
            yield *before, shown.shape[2] <= _FALLS * before[1].shape[2]
        before = name, shown
    if before is not None:
        yield *before, True


def steps(cut: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in the order of the forward: lists within it are opened, blocks are not."""
    for name, layer in cut.named_children():
        if type(layer) is nn.Sequential or (isinstance(layer, nn.Sequential) and _holds_blocks(layer)):
            yield from steps(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer


def _holds_blocks(layer: nn.Sequential) -> bool:
    return type(layer).forward is nn.Sequential.forward and all(any(child.children()) for child in layer)


@cache
def names() -> tuple[str, ...]:
    """torchvision's classification networks."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def origin(name: str) -> Origin:
    """What torchvision says of a network's best weights."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    (m0, m1, m2), (s0, s1, s2) = preset.mean, preset.std
    size_px, parameters = preset.crop_size[0], weights.meta["num_params"]
    if _family(name) in ("googlenet", "inception"):
        # their weights were trained on pixels in [-1, 1], to which their own forward takes ImageNet's normalised ones
        return Origin(size_px, (0.5,) * 3, (0.5,) * 3, parameters=parameters)
    return Origin(size_px, (m0, m1, m2), (s0, s1, s2), parameters=parameters)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a network of torchvision with its own classifier, in order."""
    options = {"init_weights": False} if _family(name) in ("googlenet", "inception") else {}
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None, **options)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _family(name: str) -> str:
    return str(torchvision.models.get_model_builder(name).__module__).rpartition(".")[2]


def body_of(name: str, *, in_channels: int = 3, size_px: int | None = None, maps: bool = False) -> Body:
    """A body with random weights, as torchvision starts them. size_px: for networks that are built for one size.

    maps: changes nothing; no layer stands behind the last feature map.
    Raises ModelError: it cannot be built for this size or these channels.
    """
    module, foreign, bound = _built(name, size_px)
    about = origin(name)
    side_px = (size_px if bound else None) or about.size_px
    return body_from(module, name, about, in_channels=in_channels, size_px=side_px, bound=bound, foreign=foreign)


def body_from(
    module: nn.Module,
    name: str,
    about: Origin,
    *,
    in_channels: int,
    size_px: int,
    bound: bool = False,
    foreign: tuple[str, ...] = (),
) -> Body:
    """The record of a body's module. size_px: the side that it is built for, or else that its stages are measured with.

    Raises ModelError: it cannot see images of this size or these channels.
    """
    if in_channels != 3:
        give_channels(module, in_channels)
    size_px = size_px if bound else max(size_px, 224)
    ghost = on_meta(module)
    shape = shape_of(ghost, channels=in_channels, size_px=size_px, name=name)
    images = torch.empty(1, in_channels, size_px, size_px, device="meta")
    if isinstance(ghost, Cut):
        with torch.no_grad():
            stages = stages_of(ghost.forward_intermediates(images), size_px=size_px)
            by_stage, by_block = groups_of(ghost, images)
    else:
        stages, by_stage = (), by_children(ghost)
        by_block = by_stage
    return Body(
        name=name,
        module=module,
        features=shape[1],
        pooled=not is_map(shape),
        stages=stages,
        by_stage=by_stage,
        by_block=by_block,
        size_px=size_px,
        bound=bound,
        origin=about,
        foreign=foreign,
    )


def _built(name: str, size_px: int | None) -> tuple[nn.Module, tuple[str, ...], bool]:
    """The body's module, its library's other tensors, and whether it sees one size only."""
    family = _family(name)
    sized = _SIZED.get(family)
    options: dict[str, Any] = {}
    if sized:
        size_px = size_px or origin(name).size_px
        options = {sized: size_px if sized == "image_size" else (size_px, size_px)}
    if family in ("googlenet", "inception"):
        options["init_weights"] = True  # torchvision's default; unsaid, it warns
    try:
        network = torchvision.models.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(
            f"{name} cannot be built for images of {size_px} px ({str(error)[:120]}): give data.size_px="
            f"{origin(name).size_px}, or a model that takes any size"
        ) from error
    layers = [(child, layer) for child, layer in network.named_children() if child not in _AFTER]
    foreign = tuple(f"{child}." for child, _ in network.named_children() if child in _AFTER)
    if any(True for _ in network.parameters(recurse=False)):  # its forward does more than its children's
        network.heads = nn.Identity()
        return network, foreign, True
    layers = [(child, nn.Sequential(*layer) if isinstance(layer, nn.ModuleList) else layer) for child, layer in layers]
    kind = _Relu if family == "densenet" else Pooled if _ends_normed(layers) else Cut
    return kind(OrderedDict(layers)), foreign, sized is not None


def _ends_normed(layers: Sequence[tuple[str, nn.Module]]) -> bool:
    """Whether the last layer with parameters norms each place, as a transformer's does: its classifier counts on it."""
    norms = [layer for _, layer in layers if any(True for _ in layer.parameters())]
    return isinstance(norms[-1], nn.LayerNorm)


def groups_of(ghost: Cut, images: Tensor) -> tuple[Names, Names]:
    """Every parameter by stage, and by block."""
    stages, blocks = list[list[str]]([[]]), list[list[str]]([[]])
    layers, ended = dict(steps(ghost)), False
    for name, _, ends in walk(ghost, images):
        layer = layers[name]
        keys = [f"{name}.{key}" for key, _ in layer.named_parameters()]
        if ended:
            stages.append([])
        if keys and not _norms_alone(layer):
            blocks.append([])
        stages[-1] += keys
        blocks[-1] += keys
        ended = ends
    return named(stages), named(blocks)


def _norms_alone(layer: nn.Module) -> bool:
    """It has vectors alone, as a norm does, and so goes with the convolution before it."""
    return not any(layer.children()) and all(parameter.ndim == 1 for parameter in layer.parameters())
