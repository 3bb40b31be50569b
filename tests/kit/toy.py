"""What is the smallest training set-up? Fixed random tensors in an ArrayLoader, and a model of 3 groups.

No files, no decoder: a fit takes milliseconds.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thawline.dataio.batch import Batch
from thawline.dataio.stream.arrays import ArrayLoader
from thawline.dataio.stream.plan import Once, Training
from thawline.trainer.context import LocalContext
from thawline.trainer.learner import Learner
from thawline.trainer.records.rows import Row

CLASSES = ("ape", "bee", "cat")
SIDE_PX = 4


def ids_of(samples: int) -> Tensor:
    """Manifest ids, (samples,) int64: never equal to the row, so that confusing them fails."""
    return 100 + 3 * torch.arange(samples)


@dataclass(kw_only=True)
class ToyLoader(ArrayLoader):
    """Images in memory, observable by tests: `before` is called before every training step."""

    inputs: Tensor
    before: Callable[[int], object] = lambda step: None
    closed: bool = False
    lost: dict[int, str] = field(default_factory=dict)

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        batches = super().stream(first_step)
        if not self.order.endless:
            yield from batches
            return
        for step in count(first_step):
            self.before(step)
            yield next(batches)

    def augmented(self, view: int) -> "ToyLoader":
        """Each view adds its number to the pixels, from 1."""
        return replace(self, inputs=self.inputs + view + 1)

    @property
    def quarantined(self) -> Mapping[int, str]:
        return dict(self.lost)

    def quarantine(self, files: Mapping[int, str]) -> None:
        self.lost |= files

    def close(self) -> None:
        self.closed = True


def loader(
    images: Tensor,
    targets: Tensor,
    *,
    train: bool,
    global_batch: int = 4,
    seed: int = 7,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> ToyLoader:
    """Of images (N, 3, 4, 4) and their targets; other options are ToyLoader's."""
    shape = {"n": len(images), "global_batch": global_batch, "rank": rank, "world_size": world_size}
    return ToyLoader(
        order=Training(**shape, seed=seed) if train else Once(**shape),
        inputs=images.contiguous(memory_format=torch.channels_last),
        targets=targets,
        ids=ids_of(len(images)),
        **{"task": "single_label", "classes": CLASSES, **options},
    )


class ToyModel(nn.Module):
    """(N, 3, 4, 4) to (N, 3): two convolutions and a head, each a layer group; the same weights for a seed."""

    def __init__(self, *, norm: bool = True, dropout: float = 0.25, seed: int = 0, dtype: torch.dtype | None = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity())
            self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5) if norm else nn.Identity())
            self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(20, len(CLASSES)))
        self.to(dtype)

    def groups(self) -> list[list[nn.Module]]:
        return [[self.stem], [self.body], [self.head]]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)))


def samples(number: int, *, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(images (number, 3, 4, 4), targets (number,)): each class has a brighter channel, so that it can be learnt."""
    source = torch.Generator().manual_seed(seed)
    targets = torch.randint(len(CLASSES), (number,), generator=source)
    images = torch.randn(number, 3, SIDE_PX, SIDE_PX, generator=source, dtype=torch.float64)
    images[torch.arange(number), targets] += 0.7
    return images.to(dtype), targets


def loaders(
    *, train: int = 20, valid: int = 13, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[ToyLoader, ToyLoader]:
    """A training and a validation loader over `train` and `valid` samples."""
    images, targets = samples(train, seed=1, dtype=dtype)
    first = loader(images, targets, train=True, **options)
    images, targets = samples(valid, seed=2, dtype=dtype)
    return first, loader(images, targets, train=False, **options)


def learner(
    *, model: nn.Module | None = None, data: tuple[ToyLoader, ToyLoader] | None = None, **options: Any
) -> Learner:
    """A Learner over a fresh ToyModel and fresh loaders, windows of 2 steps."""
    return Learner(model or ToyModel(), *(data or loaders()), **{"log_every": 2, **options})


def stream_hash(loader: ToyLoader, *, first: int = 0, steps: int) -> str:
    """What `Progress.stream_hash` must be, from the plan's definition and hashlib alone."""
    digest = b""
    n, b = loader.samples, loader.global_batch
    for step in range(first, first + steps):
        rows = [int(loader.order.at(np.array([i]))[1][0]) for i in range(step * b, (step + 1) * b)]
        ids = b"".join(int(ids_of(n)[row]).to_bytes(8, "little") for row in rows)
        digest = hashlib.sha256(digest + ids).digest()
    return digest.hex()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two snapshots are equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclass
class Watched(LocalContext):
    """Records what is published, and requests a stop in the `stop_at_ask`th call of `should_stop` (from 1).

    A window calls it once, at its end, and a validation between epochs once a batch.
    """

    stop_at_ask: int = 0
    asked: int = 0
    published: list[Any] = field(default_factory=list)

    def should_stop(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_at_ask

    def publish(self, rows: Sequence[Row]) -> None:
        self.published += rows


class Spy:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self.busy_s: list[float] = []
        self.rows: list[Any] = []

    def step(self, *, images: int, step_s: float, data_wait_s: float) -> None:
        self.steps.append((images, step_s, data_wait_s))

    def busy(self, *, busy_s: float) -> None:
        self.busy_s.append(busy_s)

    def observe(self, row: Mapping[str, object]) -> None:
        self.rows.append(dict(row))
