"""What does making an export come to? Its files, and how to ask them what the model was asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from thawline.cluster.serve.export.answers import Answers
from thawline.dataio.pixels.spec import ImageSpec
from thawline.models.bundle import Bundle


@dataclass(frozen=True)
class Wish:
    """What is to be made of a bundle."""

    source: str
    """The run, or the bundle."""
    bundle: Bundle
    model: nn.Module
    """The bundle's in float32, whatever it was kept in."""
    with_preprocessing: bool = False
    license: str = ""

    @property
    def answers(self) -> Answers:
        """What is to be said of normalised images."""
        return Answers(self.model, self.bundle.about.task).eval()

    @property
    def spec(self) -> ImageSpec:
        """How the last validation saw images."""
        return ImageSpec(**self.bundle.about.image)


@dataclass(frozen=True)
class Made:
    """An export that is not yet written."""

    files: Mapping[str, bytes]
    """By name, in the order to write them in: where the last is, the others are."""
    answers: Callable[[Tensor], Sequence[Tensor]]
    """What the model that is read from these bytes says of normalised images (N, 3, H, W) float32, or with its
    preprocessing of one (H, W, 3) uint8: its outputs, and the probabilities where it has such."""
    words: str
    """What it is, in a line."""


def description(wish: Wish, *, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """What whoever uses the file has to know: which pixels go in, what comes out."""
    about, spec = wish.bundle.about, wish.spec
    inside: dict[str, Any] = {"preprocessing": "inside"} if wish.with_preprocessing else {}
    return {
        "thawline": about.thawline,
        "model": about.model,
        "task": about.task,
        "classes": about.classes,
        **({"values": about.values} if about.values else {}),
        "inputs": {**inputs, **inside},
        "outputs": list(outputs),
        "image": {
            "size_px": spec.size_px,
            "fit": spec.presize,
            "border": spec.border,
            "mean": spec.mean,
            "std": spec.std,
            "channels": "RGB",
            "range": [0.0, 1.0],
        },
        "metrics": about.metrics,
        "step": about.step,
    }
