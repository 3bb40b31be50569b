"""What is the graph that goes into a file? The model, what its outputs mean, and which sizes of images it takes.

Which sizes those are, is tried: torch records the model on one size, and on another it must say what the model says.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from thawline.cluster.errors import ExportError, last_line
from thawline.cluster.serve.export.comparing import difference
from thawline.cluster.serve.export.made import Wish
from thawline.trainer.tasks import record_of

IMAGES = "images"
"""The name of the input."""
_STEP = 32
"""Sides that most networks halve without a remainder are multiples of this."""


class Answers(nn.Module):
    """Images (N, 3, H, W) float32, normalised -> what the model puts out, and the probabilities where it has such."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self._probabilities = model, record_of(task).probabilities

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        probabilities = self._probabilities(outputs)
        return (outputs,) if probabilities is outputs else (outputs, probabilities)


def names_of(answers: Sequence[Any]) -> tuple[str, ...]:
    """What the outputs are called, which `Answers` gives."""
    return ("logits", "probabilities") if len(answers) == 2 else ("predictions",)


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
class _Sizes:
    """Sizes of images that a network may take."""

    words: str
    shape: tuple[str | int, str | int]
    """Height and width in the file's description."""
    dims: Mapping[int, Any]
    recorded: tuple[int, int]
    """Height and width to record with."""
    tried: tuple[int, int]
    """And to try."""


def graph(wish: Wish) -> Recorded:
    """The model of a bundle for any number of images, of as many sizes as it takes.

    Raises ExportError where it cannot be recorded even for the size that it was validated with.
    """
    network, side_px = Answers(wish.bundle.model, wish.bundle.about.task).eval(), wish.spec.size_px
    error: Exception | None = None
    for sizes in _candidates(side_px):
        try:
            program = record(network, torch.zeros(2, 3, *sizes.recorded), {0: Dim.DYNAMIC, **sizes.dims})
            images = torch.randn(3, 3, *sizes.tried, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = network(images)
                wrong = difference(expected, program.module()(images)).why
        except Exception as raised:  # the network's own code, run on symbols and on a size that it may not take
            error = raised
            continue
        if wrong:
            error = ValueError(wrong)
            continue
        told = {"shape": ["batch", 3, *sizes.shape], "dtype": "float32"}
        return Recorded(program, IMAGES, told, names_of(expected), f"any number of {sizes.words}")
    why = last_line(error)
    raise ExportError(f"the model cannot be recorded as a graph ({why[:160]}): export its weights, --to safetensors")


def record(network: nn.Module, example: Tensor, dims: Mapping[int, Any]) -> ExportedProgram:
    """The network as torch records it on an example, its sides at `dims` open. Raises whatever torch raises."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, on its own code
        return torch.export.export(network, (example,), dynamic_shapes=(dict(dims),))


def _candidates(side_px: int) -> Sequence[_Sizes]:
    at = max(3 * _STEP, -(-side_px // _STEP) * _STEP)
    free = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    steps = {2: _STEP * Dim("height"), 3: _STEP * Dim("width")}
    own, wide, odd, tall = (side_px, side_px), (at, at + 2 * _STEP), (at + 5, at + _STEP + 13), (at + _STEP, at)
    multiples = f"images whose sides are multiples of {_STEP} px"
    return (
        _Sizes("images of any height and width", ("height", "width"), free, wide, odd),
        _Sizes(multiples, (f"{_STEP}*height", f"{_STEP}*width"), steps, wide, tall),
        _Sizes(f"images of {side_px} x {side_px} px alone", own, {}, own, own),
    )
