"""What turns a body's feature maps into a class for each pixel? fastai's dynamic U-Net, over any body with stages.

Source: Ronneberger et al., U-Net, 2015, as fastai's `DynamicUnet` builds it, whose parameters and shapes these are.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.errors import ModelError

_FIRST_BIAS = 1e-3
"""What fastai's BatchNorms begin with."""


class Stage(Protocol):
    """Layers of a body whose maps have one size."""

    @property
    def channels(self) -> int:
        """Of the maps."""


class UNetHead(nn.Module):
    """(images (N, 3, H, W), a body's maps from the largest to the smallest) -> logits (N, classes, H, W).

    The smallest map goes through two convolutions, then up, from one map to the next larger one. The last step sees the
    images themselves. Sides need not be multiples of anything: what is enlarged is fitted to the map that it meets.
    """

    def __init__(self, channels: Sequence[int], classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        *skips, deepest = channels
        self.middle = nn.Sequential(
            _norm(deepest), nn.ReLU(), *_convolution(deepest, 2 * deepest), *_convolution(2 * deepest, deepest)
        )
        blocks, below = list[UNetBlock](), deepest
        for number, skip in enumerate(reversed(skips), start=1):
            blocks.append(UNetBlock(below, skip, halved=number == len(skips)))
            below = blocks[-1].channels
        self.blocks = nn.ModuleList(blocks)
        self.up = Enlarged(below, below)
        self.last = Residual(below + in_channels)
        self.classify = nn.Conv2d(below + in_channels, classes, 1)
        _start(self.classify)

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        *skips, value = maps
        value = self.middle(value)
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            value = block(value, skip)
        value = _fitted(self.up(value), images)
        return self.classify(self.last(torch.cat([value, images.to(value.dtype)], 1)))


class UNetBlock(nn.Module):
    """(map from below (N, below, h, w), the body's map (N, skip, about 2h, about 2w)) -> (N, channels, 2h, 2w)."""

    channels: int
    """What comes out."""

    def __init__(self, below: int, skip: int, *, halved: bool) -> None:
        super().__init__()
        inside = below // 2 + skip
        self.channels = inside // 2 if halved else inside
        self.up = Enlarged(below, below // 2)
        self.norm = _norm(skip)
        self.convolutions = nn.Sequential(
            *_convolution(inside, self.channels), *_convolution(self.channels, self.channels)
        )

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        joined = torch.cat([_fitted(self.up(below), skip), self.norm(skip)], 1)
        value: Tensor = self.convolutions(joined.relu())
        return value


class Enlarged(nn.Module):
    """(N, inside, h, w) -> (N, outside, 2h, 2w), whose four pixels of one begin alike, so that no pattern shows.

    Source: Shi et al., 2016, for the shuffle; Aitken et al., Checkerboard artifact free sub-pixel convolution, 2017.
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inside, 4 * outside, 1)
        self.shuffle = nn.PixelShuffle(2)
        with torch.no_grad():
            one = torch.empty(outside, inside, 1, 1)
            nn.init.kaiming_normal_(one)
            self.convolution.weight.copy_(one.repeat_interleave(4, 0))
            self.convolution.bias.zero_()  # type: ignore[union-attr]

    def forward(self, value: Tensor) -> Tensor:
        shuffled: Tensor = self.shuffle(self.convolution(value).relu())
        return shuffled


class Residual(nn.Module):
    """Two convolutions beside the value itself, (N, channels, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *_convolution(channels, channels), _start(nn.Conv2d(channels, channels, 3, padding=1))
        )

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = (self.path(value) + value).relu()
        return out


def unet_head(
    features: int, outputs: int, *, stages: Sequence[Stage], dropout: float = 0.5, in_channels: int = 3
) -> UNetHead:
    """A U-Net's decoder over a body with two stages or more, the largest map first; it has no dropout.

    Raises: ModelError for fewer than two classes.
    """
    if outputs < 2:
        raise ModelError(f"a mask of {outputs} classes has nothing to tell apart: give at least two")
    return UNetHead([stage.channels for stage in stages], outputs, in_channels=in_channels)


def _fitted(value: Tensor, to: Tensor) -> Tensor:
    """At the size of another map."""
    return value if value.shape[-2:] == to.shape[-2:] else F.interpolate(value, to.shape[-2:], mode="nearest")


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.bias, _FIRST_BIAS)
    return norm


def _convolution(inside: int, outside: int) -> tuple[nn.Module, nn.Module]:
    return _start(nn.Conv2d(inside, outside, 3, padding=1)), nn.ReLU()


def _start(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(convolution.weight)
    if convolution.bias is not None:
        nn.init.normal_(convolution.bias, 0, 0.01)
    return convolution
