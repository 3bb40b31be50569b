"""A body that trains in milliseconds: for tests, trials of a set-up, and debugging. Not for results."""

from collections import OrderedDict

from torch import nn

from thawline.models.bodies.body import Body, Origin
from thawline.models.bodies.from_torchvision import Cut, body_from

NAME = "tiny"
FEATURES = 64
"""Channels of the feature map."""
_WIDTHS = (16, 16, 24, 32, FEATURES)


def body_of(name: str = NAME, *, in_channels: int = 3, size_px: int | None = None, maps: bool = False) -> Body:
    """The body with random weights; it sees images of any size from 16 px on, and all its layers give maps.

    Raises ModelError for channels that it cannot have.
    """
    return body_from(network(), name, Origin(), in_channels=in_channels, size_px=Origin().size_px)


def network() -> Cut:
    """Images (N, 3, H, W) -> features (N, 64, H / 16, W / 16), for sides from 16 px on; 32,016 parameters.

    Its children are called as a ResNet's, so that its layer groups are a ResNet's, too.
    """
    stem = [("conv1", nn.Conv2d(3, _WIDTHS[0], 3, stride=2, padding=1, bias=False))]
    children: list[tuple[str, nn.Module]] = [
        *stem,
        ("bn1", nn.BatchNorm2d(_WIDTHS[0])),
        ("relu", nn.ReLU(inplace=True)),
    ]
    for i in range(1, 5):
        layer = nn.Sequential(
            nn.Conv2d(_WIDTHS[i - 1], _WIDTHS[i], 3, stride=1 if i == 1 else 2, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTHS[i]),
            nn.ReLU(inplace=True),
        )
        children.append((f"layer{i}", layer))
    return Cut(OrderedDict(children))
