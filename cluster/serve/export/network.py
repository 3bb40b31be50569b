"""What is the graph that goes into a file? The model, what its outputs mean, and which sizes of images it takes.

Which sizes those are, is tried: torch records the model on one size, and on another it must say what the model says.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from thawline.cluster.errors import ExportError, last_line
from thawline.cluster.serve.export.answers import Answers, names_of
from thawline.cluster.serve.export.comparing import difference
from thawline.cluster.serve.export.made import Wish
from thawline.dataio.pixels.in_graph import Centred
from thawline.dataio.pixels.spec import ImageSpec

_STEP = 32
"""Sides that most networks halve without a remainder are multiples of this."""


class FromPixels(nn.Module):
    """One decoded image (H, W, 3) uint8 -> what `Answers` gives of it, as validation would have seen it."""

    def __init__(self, spec: ImageSpec, answers: Answers) -> None:
        super().__init__()
        self.pixels, self.answers = Centred(spec), answers

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        answers: tuple[Tensor, ...] = self.answers(self.pixels(image))
        return answers


@dataclass(frozen=True)
class Recorded:
    """A network as torch recorded it."""

    program: ExportedProgram
    input: str
    """The name of its input."""
    images: Mapping[str, Any]
    """What that is: shape, its axes by name or number, and dtype."""
    outputs: tuple[str, ...]
    """The names of what comes out."""
    words: str
    """Which images it takes."""


@dataclass(frozen=True)
class _Input:
    """Images that a network may take."""

    words: str
    name: str
    shape: tuple[str | int, ...]
    """For the file's description: what is open by its name."""
    dims: Mapping[int, Any]
    """The open ones, as torch takes them."""
    of: Callable[[int, int], Tensor]
    """(height, width) -> an example."""
    recorded: tuple[int, int]
    """The size to record with."""
    tried: tuple[int, int]
    """And to try."""


def graph(wish: Wish) -> Recorded:
    """The model of a bundle for any number of images, of as many sizes as it takes; or for one, from its pixels on.

    Raises ExportError where it cannot be recorded even for the size that it was validated with.
    """
    if wish.with_preprocessing:
        return _first_that_fits(FromPixels(wish.spec, wish.answers), [_PIXELS])
    return _first_that_fits(wish.answers, _candidates(wish.spec.size_px))


def _first_that_fits(network: nn.Module, candidates: Sequence[_Input]) -> Recorded:
    """The network, recorded for the first of these inputs that it takes. Raises ExportError."""
    error: Exception | None = None
    for each in candidates:
        try:
            program = record(network, each.of(*each.recorded), each.dims)
            example = each.of(*each.tried)
            with torch.no_grad():
                expected = network(example)
                wrong = difference(expected, program.module()(example)).why
        except Exception as raised:  # the network's own code, run on symbols and on a size that it may not take
            error = raised
            continue
        if not wrong:
            about = {"shape": each.shape, "dtype": str(example.dtype).removeprefix("torch.")}
            return Recorded(program, each.name, about, names_of(expected), each.words)
        error = ValueError(wrong)
    why = last_line(error)
    raise ExportError(f"the model cannot be recorded as a graph ({why[:160]}): export its weights, --to safetensors")


def record(network: nn.Module, example: Tensor, dims: Mapping[int, Any]) -> ExportedProgram:
    """The network as torch records it on an example, its sides at `dims` open. Raises whatever torch raises."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, on its own code
        return torch.export.export(network, (example,), dynamic_shapes=(dict(dims),))


def _images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def _pixels(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


_PIXELS = _Input(
    words="one decoded image of any size; its preprocessing is inside",
    name="image",
    shape=("height", "width", 3),
    dims={0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    of=_pixels,
    recorded=(231, 317),
    tried=(180, 70),
)


def _candidates(side_px: int) -> Sequence[_Input]:
    """The normalised images of a network, as many sizes as there may be first."""
    at = max(3 * _STEP, -(-side_px // _STEP) * _STEP)
    batch, own, wide = {0: Dim.DYNAMIC}, (side_px, side_px), (at, at + 2 * _STEP)
    free = {**batch, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    steps = {**batch, 2: _STEP * Dim("height"), 3: _STEP * Dim("width")}

    def some(
        words: str, sides: tuple[str | int, str | int], dims: Mapping[int, Any], *sizes: tuple[int, int]
    ) -> _Input:
        return _Input(f"any number of images {words}", "images", ("batch", 3, *sides), dims, _images, *sizes)

    return (
        some("of any height and width", ("height", "width"), free, wide, (at + 5, at + _STEP + 13)),
        some(
            f"whose sides are multiples of {_STEP} px",
            (f"{_STEP}*height", f"{_STEP}*width"),
            steps,
            wide,
            (at + _STEP, at),
        ),
        some(f"of {side_px} x {side_px} px alone", own, batch, own, own),
    )
