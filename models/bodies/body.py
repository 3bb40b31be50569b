"""What is a body? One record, whoever wrote the network: its features, its stages, its layer groups, its pixels.

How one is made of a library's network, from_torchvision and from_timm say; what stands on it, heads.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thawline.models.errors import ModelError
from thawline.models.settings import GROUPINGS, Grouping

Names = tuple[tuple[str, ...], ...]
"""Parameters of a body by layer group, stem first."""

RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels."""


@dataclass(frozen=True)
class Stage:
    """Layers whose feature maps have one size: the last of them is what a U-Net takes over."""

    channels: int
    stride: int
    """Pixels of the image beside one of the map; a power of two."""


@dataclass(frozen=True)
class Origin:
    """What a body's published weights were trained on, which is known without building it."""

    size_px: int = 224
    mean: tuple[float, float, float] = RGB[0]
    """Of pixels in [0, 1], per channel."""
    std: tuple[float, float, float] = RGB[1]
    licence: str = ""
    """Of the weights; empty where its library does not say."""
    parameters: int | None = None
    """Of the whole network with its own classifier; None where only building it tells."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Body:
    """A network without its classifier. `module` takes (N, in_channels, H, W) float."""

    name: str
    module: nn.Module
    features: int
    """Channels of what `module` gives."""
    pooled: bool
    """It gives a vector for each image, (N, features): a transformer's token. Else feature maps (N, features, h, w)."""
    stages: tuple[Stage, ...]
    """Feature maps from the largest to the smallest, as `feature_maps` gives them; empty where all have one size."""
    by_stage: Names
    """Every parameter, by the size of its layer's map; a transformer's by block."""
    by_block: Names
    """Every parameter, by the smallest pieces that are trained at one rate."""
    size_px: int
    """Side of the images that it was built for, or, where it is not `bound`, that its stages were measured with."""
    bound: bool
    """It sees images of that side only, or was built for it."""
    origin: Origin
    foreign: tuple[str, ...] = ()
    """What the names of the classifier's tensors begin with in its library's own weights."""

    def groups(self, how: Grouping = "three") -> Names:
        """Every parameter of the body by layer group. Raises ModelError for another word."""
        if how not in GROUPINGS:
            raise ModelError(
                f"groups={how[:80]!r}: which layers train together is not known; give {', '.join(GROUPINGS)}"
            )
        if how == "blocks":
            return self.by_block
        if how == "stages" or len(self.by_stage) < 2:
            return self.by_stage
        half = len(self.by_stage) - len(self.by_stage) // 2
        return sum(self.by_stage[:half], ()), sum(self.by_stage[half:], ())


def feature_maps(module: nn.Module, images: Tensor) -> list[Tensor]:
    """What each of a body's `stages` gives, (N, channels, h, w), the largest first.

    module: a body's, of which `stages` is not empty. Source: timm's name and meaning.
    """
    network: Any = module
    maps: list[Tensor] = network.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    return maps


def on_meta(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that has shapes and computes nothing."""
    return copy.deepcopy(module).to("meta").eval()


def shape_of(
    module: nn.Module, *, channels: int, size_px: int, name: str, device: Literal["meta", "cpu"] = "meta"
) -> tuple[int, ...]:
    """What `on_meta`'s module gives for one image of this side. Raises ModelError where it cannot see such an image.

    device: the module's, which is in evaluation mode.
    """
    try:
        with torch.no_grad():
            shape: tuple[int, ...] = tuple(module(torch.zeros(1, channels, size_px, size_px, device=device)).shape)
    except Exception as error:  # every library says it in its own way
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name} cannot see images of {size_px} px ({said[:120]}): nothing could be trained; give "
            "another data.size_px, or a model that takes any size"
        ) from error
    return shape


def is_map(shape: Sequence[int]) -> bool:
    """Whether a square image became a feature map with the channels first."""
    return len(shape) == 4 and shape[2] == shape[3] != shape[1]


def stages_of(maps: Sequence[Tensor], *, size_px: int) -> tuple[Stage, ...]:
    """What stages one square image's feature maps come from; none, where one is no smaller than that before it."""
    found = [Stage(each.shape[1], 2 ** round(log2(size_px / each.shape[2]))) for each in maps]
    falling = all(a.stride < b.stride for a, b in pairwise(found))
    return tuple(found) if falling and len(found) > 1 else ()


def named(parts: Sequence[Sequence[str]]) -> Names:
    """These groups of names, without the empty ones."""
    return tuple(tuple(part) for part in parts if part)


def by_children(module: nn.Module) -> Names:
    """Every parameter by block: the elements of the lists that hold most of the network.

    What stands before the first block is the stem, what comes after the last goes with it. A module that is no list but
    holds more than half of the parameters is looked into.
    """
    most = sum(parameter.numel() for parameter in module.parameters()) / 2
    stem, blocks = list[str](), list[list[str]]()
    for names, is_block in _pieces(module, "", most):
        if is_block:
            blocks.append(names)
        else:
            (blocks[-1] if blocks else stem).extend(names)
    return named([stem, *blocks])


def _pieces(module: nn.Module, prefix: str, most: float) -> Iterator[tuple[list[str], bool]]:
    yield [prefix + name for name, _ in module.named_parameters(recurse=False)], False
    for name, child in module.named_children():
        inside = f"{prefix}{name}."
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for i, block in child.named_children():
                yield [f"{inside}{i}.{key}" for key, _ in block.named_parameters()], True
        elif sum(parameter.numel() for parameter in child.parameters()) > most:
            yield from _pieces(child, inside, most)
        else:
            yield [inside + key for key, _ in child.named_parameters()], False


def give_channels(module: nn.Module, channels: int) -> None:
    """Let a network for RGB take images of so many channels: its first convolution starts anew."""
    first = _first_convolution(module, channels)
    first.in_channels = channels
    shape = (first.out_channels, channels, *first.kernel_size)
    first.weight = nn.Parameter(first.weight.new_empty(shape))
    first.reset_parameters()


def _first_convolution(module: nn.Module, channels: int) -> nn.Conv2d:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            if layer.in_channels == 3 and layer.groups == 1:
                return layer
            break
    raise ModelError(
        f"in_channels={channels}: {type(module).__name__} does not begin with a convolution of three channels, so it "
        "takes RGB alone; give in_channels=3, or another model"
    )


def for_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution's weight (out, 3, h, w), trained on RGB, for images of so many channels.

    One is given the sum over RGB, two the first two by 1.5, and what goes beyond three begins at zero.
    Source: fastai, `create_body`.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    if channels == 2:
        return weight[:, :2] * 1.5
    grown = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    grown[:, :3] = weight
    return grown
