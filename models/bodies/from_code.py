"""How does a user's own network become a body? By one forward pass: what it gives, says what it is.

Named by `python:MODULE:FUNCTION`; `code` imports it. Whether it may be imported, whoever read the name has asked.
"""

import inspect
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from thawline.models import code
from thawline.models.bodies.body import Body, Names, Origin, Stage, by_children, feature_maps, give_channels, stages_of
from thawline.models.bodies.from_torchvision import Cut, groups_of
from thawline.models.errors import CodeError
from thawline.models.groups import Part, parameters_of

_SIZE_PX = 224


def as_body(
    module: nn.Module,
    *,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    size_px: int = _SIZE_PX,
    in_channels: int = 3,
    groups: Sequence[Sequence[Part]] | None = None,
    licence: str = "",
) -> Body:
    """A network of your own as a body: images (N, in_channels, H, W) float -> feature maps (N, C, h, w), or vectors
    (N, C), to be returned by a function that `model.name = "python:MODULE:FUNCTION"` names.

    mean, std: of pixels in [0, 1], per channel, as its weights were trained with; ImageNet's when not given.
    size_px: side of the images that it is looked at with, once, on the CPU, in evaluation mode.
    groups: layer groups, stem first, each a list of submodules or parameters; by its children when not given.
    licence: of the weights. It has stages, as a U-Net needs, where it is a plain `nn.Sequential`, or has timm's method
    `forward_intermediates`.
    Raises: CodeError, where it does not take such images, or gives neither maps nor vectors.
    """
    name, known = type(module).__name__, Origin(size_px=size_px, licence=licence)
    origin = replace(known, mean=mean or known.mean, std=std or known.std)
    images = torch.zeros(2, in_channels, size_px, size_px)
    features = tried(module.cpu(), images, name=name)
    if type(module) is nn.Sequential and features.ndim == 4:
        module = Cut(OrderedDict(module.named_children()))
    stages, by_stage, by_block = _measured(module.eval(), images)
    if groups is not None:
        by_stage = by_block = _named(module, groups)
    module.train()
    return Body(
        name=name,
        module=module,
        features=features.shape[1],
        pooled=features.ndim == 2,
        stages=stages,
        by_stage=by_stage,
        by_block=by_block,
        size_px=size_px,
        bound=False,
        origin=origin,
    )


def body_of(name: str, *, in_channels: int = 3, size_px: int | None = None, maps: bool = False) -> Body:
    """What the function under a name makes, as a body.

    It is called with `in_channels` and `size_px` where it has arguments called so: what takes a size is built for it.
    maps: does not matter here.
    Raises CodeError: it is not there, or fails, or makes no body; ModelError: it does not take these channels.
    """
    side = size_px or _SIZE_PX
    takes = _arguments(code.target(name))
    offered = {"in_channels": in_channels, "size_px": side}
    made = code.called(name, **{key: value for key, value in offered.items() if key in takes})
    if isinstance(made, Body):
        return replace(made, name=name, bound=made.bound or "size_px" in takes)
    if not isinstance(made, nn.Module):
        raise CodeError(
            f"{name} returned {type(made).__name__}, which is no torch.nn.Module: there is nothing to train; return a "
            "network without its classifier, or what thawline.as_body makes of it"
        )
    if in_channels != 3 and "in_channels" not in takes:
        give_channels(made, in_channels)
    try:
        body = as_body(made, size_px=side, in_channels=in_channels)
    except CodeError as error:
        raise CodeError(f"{name}: {error}") from error
    return replace(body, name=name, bound="size_px" in takes)


@cache
def origin(name: str) -> Origin:
    """What is known of the pixels that it was trained on; to find out, it is made once. Raises as `body_of`."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return body_of(name).origin


def tried(module: nn.Module, images: Tensor, *, name: str) -> Tensor:
    """What a module, in evaluation mode from here on, gives for some images. Raises CodeError where no body would."""
    try:
        with torch.no_grad():
            features = module.eval()(images)
    except Exception as error:  # a user's code
        raise CodeError(
            f"{name} cannot see images {tuple(images.shape)}, ({code.said(error)}): nothing could be trained; mend its "
            "forward, or give another data.size_px"
        ) from error
    shape = tuple(features.shape) if isinstance(features, Tensor) else ()
    square = len(shape) == 2 or (len(shape) == 4 and shape[2] == shape[3])
    if not square or shape[0] != len(images):
        gave = f"a tensor {shape}" if shape else f"a {type(features).__name__}"
        raise CodeError(
            f"{name} gives {gave} for images {tuple(images.shape)}: no head can stand on that; return feature maps "
            "(N, C, h, w), the channels first, or vectors (N, C)"
        )
    return features


def _measured(module: nn.Module, images: Tensor) -> tuple[tuple[Stage, ...], Names, Names]:
    """Its stages, and every parameter by stage and by block."""
    by_stage = by_block = by_children(module)
    stages: tuple[Stage, ...] = ()
    with torch.no_grad():
        if hasattr(module, "forward_intermediates"):
            stages = stages_of(feature_maps(module, images), size_px=images.shape[-1])
        if isinstance(module, Cut):
            by_stage, by_block = groups_of(module, images)
    return stages, by_stage, by_block


def _named(module: nn.Module, groups: Sequence[Sequence[Part]]) -> Names:
    """Layer groups as names of parameters. Raises CodeError where a parameter is in none, or in two."""
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    found = [[names.get(id(p), "") for part in group for p in parameters_of(part)] for group in groups]
    placed = Counter(chain.from_iterable(found))
    for key in names.values():
        if placed[key] != 1:
            raise CodeError(
                f"groups hold {key} {placed[key]} times: it would not train as meant; put every layer in exactly one"
            )
    return tuple(tuple(filter(None, group)) for group in found)


def _arguments(function: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return ()
