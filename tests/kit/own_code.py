"""What do tests write as a user's own code? A module that leaves a trace when it is imported."""

import sys
from pathlib import Path

import pytest

NETS = '''
"""A body, other things that functions return, and losses."""

import torch
import torch.nn.functional as F
from torch import nn

print("nets was imported")


def body(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
    )


class Vectors(nn.Module):
    def __init__(self, in_channels=3):
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, 2, 1)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, images):
        value = self.first(images).relu().mean((2, 3))
        for block in self.blocks:
            value = value + block(value).relu()
        return value


class Sized(nn.Module):
    """Sees images of one side alone."""

    def __init__(self, size_px):
        super().__init__()
        self.whole = nn.Linear(3 * size_px * size_px, 12)

    def forward(self, images):
        return self.whole(images.flatten(1))


class Last(nn.Module):
    """The channels come last."""

    def forward(self, images):
        return nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)


def described():
    from thawline import as_body

    made = body()
    return as_body(made, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), groups=[[made[:2]], [made[2:4]], [made[4:]]])


def two_groups_short():
    from thawline import as_body

    made = body()
    return as_body(made, groups=[[made[:2]], [made[4:]]])


def several():
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    return Two()


def number():
    return 3


def fails():
    raise OSError("no such weights")


made = body()


def loss(outputs, targets, *, label_smoothing=0.0):
    return F.cross_entropy(outputs.float(), targets, reduction="none", label_smoothing=label_smoothing)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("twice", torch.tensor(2.0))

    def forward(self, outputs, targets):
        return self.twice * F.cross_entropy(outputs, targets, reduction="none")


def one_number(outputs, targets):
    return F.cross_entropy(outputs, targets)
'''


def write_nets(folder: Path) -> Path:
    """nets.py in a folder."""
    (folder / "nets.py").write_text(NETS)
    return folder / "nets.py"


def forget(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let no earlier test's modules of these names be found, nor this one's by a later one."""
    from thawline.models.bodies import from_code

    from_code.origin.cache_clear()
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("nets", *modules):
        monkeypatch.setitem(sys.modules, module, None)  # so that what comes instead is taken away again
        del sys.modules[module]
