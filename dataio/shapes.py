"""Which pictures show at once whether a task is learned? Drawn shapes whose truth is known, for each of five tasks.

Discs, squares, triangles and crosses of any colour, size and turn on a noisy ground, 64 px. Each picture is a function
of (seed, its number) alone.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.errors import SourceError

SIDE_PX = 64
CSV = "shapes.csv"
_KINDS = ("disc", "square", "triangle", "cross")
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """One shape of a picture."""

    kind: str
    x: float
    """px from the left edge to its middle; y from the upper one."""
    y: float
    radius: float
    turn: float


@dataclass(frozen=True)
class _Set:
    """What is drawn for a task, and what is written of it."""

    draw: Callable[[np.random.Generator], Sequence[Shape]]
    columns: tuple[str, ...]
    """Of the list, besides that of the paths."""
    cells: Callable[[Sequence[Shape]], Sequence[object]]
    """What stands in them."""
    index: str
    """What `thawline index` is given."""
    train: str = ""
    """What `thawline train` is given, besides `TRAIN`."""
    masks: bool = False


TRAIN = (
    f"--model.name tiny --model.weights none --model.dropout 0 --data.size-px {SIDE_PX} --data.presize-px {SIDE_PX} "
    "--augment.preset plain --fit.recipe one_cycle --fit.epochs 8 --fit.lr 1e-2"
)
"""Options of `thawline train` with which shapes are learned from nothing, in minutes and without a GPU."""


def write_shapes(folder: str | Path, task: str, *, count: int = 6000, seed: int = 0) -> tuple[str, str]:
    """Write `count` pictures for a task below `folder`, and their list; return what to give index and train.

    images/00000.png and so on, masks/ where the task is mask, and shapes.csv. What is there is written over.
    Raises: SourceError for another task, no pictures, a negative seed, or a folder that cannot be written.
    """
    if task not in SETS:
        raise SourceError(f"there are no shapes for task {task!r}: give {', '.join(SETS)}")
    if count < 1 or seed < 0:
        raise SourceError(f"count={count} and seed={seed} make no pictures: give at least 1, and a seed of 0 or more")
    folder, of = Path(folder).expanduser(), SETS[task]
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        if of.masks:
            (folder / "masks").mkdir(exist_ok=True)
        with (folder / CSV).open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(("path", *of.columns))
            for number in range(count):
                pixels, mask, shapes = picture(task, seed=seed, number=number)
                name = f"{number:05}.png"
                Image.fromarray(pixels).save(folder / "images" / name)
                if of.masks:
                    Image.fromarray(mask).save(folder / "masks" / name)
                lines.writerow((f"images/{name}", *(f"masks/{name}",) * of.masks, *of.cells(shapes)))
    except OSError as error:
        raise SourceError(
            f"shapes cannot go to {folder} ({error.strerror or error}): give a folder that you can write to"
        ) from error
    return of.index, f"{TRAIN} {of.train}".rstrip()


def picture(task: str, *, seed: int, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[Shape]]:
    """(pixels (64, 64, 3), mask (64, 64) of 0 for the ground and 1 to 4 for the kinds, what is drawn) of a picture."""
    draw = np.random.default_rng([seed, number])
    shapes = SETS[task].draw(draw)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] + 0.5
    ground = draw.uniform(0, 0.35, 3)
    tilt = draw.uniform(-0.15, 0.15, (2, 3))
    pixels = ground + (x[..., None] * tilt[0] + y[..., None] * tilt[1]) / SIDE_PX
    mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    for shape in shapes:
        colour = draw.uniform(0.35, 1, 3)
        colour[draw.integers(3)] = draw.uniform(0.75, 1)  # stands out from any ground
        outside = _DISTANCES[shape.kind](*_turned(x - shape.x, y - shape.y, shape.turn), shape.radius)
        cover = np.clip(0.5 - outside, 0, 1)[..., None]
        pixels = pixels * (1 - cover) + colour * cover
        mask[outside < 0] = 1 + _KINDS.index(shape.kind)
    pixels = pixels + draw.normal(0, 0.03, pixels.shape)
    return np.clip(pixels * 255, 0, 255).astype(np.uint8), mask, shapes


# Shapes: distances in px from their edges, below 0 within ------------------------------------------------


def _turned(x: _Floats, y: _Floats, turn: float) -> tuple[_Floats, _Floats]:
    c, s = np.cos(turn), np.sin(turn)
    return c * x + s * y, c * y - s * x


def _disc(x: _Floats, y: _Floats, radius: float) -> _Floats:
    return np.hypot(x, y) - radius


def _square(x: _Floats, y: _Floats, radius: float) -> _Floats:
    return np.maximum(abs(x), abs(y)) - 0.8 * radius


def _triangle(x: _Floats, y: _Floats, radius: float) -> _Floats:
    sides = [np.cos(a) * x + np.sin(a) * y for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    return np.max(sides, axis=0) - 0.55 * radius


def _cross(x: _Floats, y: _Floats, radius: float) -> _Floats:
    arm = 0.3 * radius
    return np.minimum(
        np.maximum(abs(x) - radius, abs(y) - arm),
        np.maximum(abs(x) - arm, abs(y) - radius),
    )


_DISTANCES: Mapping[str, Callable[[_Floats, _Floats, float], _Floats]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


# What each task shows -------------------------------------------------------------------------------------


def _one(draw: np.random.Generator, kind: str, low: float, high: float) -> Shape:
    """A shape that lies within the picture."""
    radius = draw.uniform(low, high)
    x, y = draw.uniform(radius, SIDE_PX - radius, 2)
    return Shape(kind, x, y, radius, draw.uniform(0, 2 * np.pi))


def _apart(draw: np.random.Generator, kinds: Sequence[str]) -> list[Shape]:
    """One shape of each kind, each in a quarter of the picture of its own."""
    quarter, shapes = SIDE_PX / 2, list[Shape]()
    for kind, place in zip(kinds, draw.permutation(4), strict=False):
        radius = draw.uniform(9, 14)
        x, y = draw.uniform(radius, quarter - radius, 2) + quarter * np.array([place % 2, place // 2])
        shapes.append(Shape(kind, float(x), float(y), radius, draw.uniform(0, 2 * np.pi)))
    return shapes


def _some(draw: np.random.Generator) -> list[Shape]:
    """Each kind in four pictures of ten."""
    return _apart(draw, [kind for kind in _KINDS if draw.uniform() < 0.4])


def _share(shapes: Sequence[Shape]) -> float:
    """What the disc covers, in percent of the picture."""
    return 100 * np.pi * shapes[0].radius ** 2 / SIDE_PX**2


SETS: Mapping[str, _Set] = {
    "single_label": _Set(
        draw=lambda draw: [_one(draw, _KINDS[draw.integers(4)], 12, 22)],
        columns=("shape",),
        cells=lambda shapes: [shapes[0].kind],
        index="--label column:shape",
    ),
    "multi_label": _Set(
        draw=_some,
        columns=("shapes",),
        cells=lambda shapes: [";".join(shape.kind for shape in shapes)],
        index="--label column:shapes --delimiter ';'",
        train="--fit.metrics f_beta accuracy_multi",
    ),
    "number": _Set(
        draw=lambda draw: [_one(draw, "disc", 6, 26)],
        columns=("area",),
        cells=lambda shapes: [f"{_share(shapes):.4f}"],
        index="--label number:area",
        train="--fit.loss l1",
    ),
    "points": _Set(
        draw=lambda draw: _apart(draw, ("disc", "cross")),
        columns=("disc_x", "disc_y", "cross_x", "cross_y"),
        cells=lambda shapes: [f"{at:.3f}" for shape in shapes for at in (shape.x, shape.y)],
        index="--label points:disc_x,disc_y,cross_x,cross_y --swap none",
        train="--fit.loss l1",
    ),
    "mask": _Set(
        draw=lambda draw: _apart(draw, ("disc", "cross")),
        columns=("mask",),
        cells=lambda shapes: [],
        index="--label mask-column:mask --classes ground,disc,cross --values 0,1,4",
        train="--fit.loss cross_entropy_dice --fit.epochs 6 --data.global-batch 16",
        masks=True,
    ),
}
"""By the tasks' names."""
