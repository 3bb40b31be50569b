"""Which bodies are there, and whose are they? One record for each library; every name is one library's."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from thawline.models import code
from thawline.models.bodies import from_code, from_timm, from_torchvision, tiny
from thawline.models.bodies.body import Body, Origin
from thawline.models.errors import ModelError, UnknownModelError
from thawline.models.weights.loading import load_body, load_imagenet


@dataclass(frozen=True)
class Library:
    """How bodies are made of one library's networks, by their names."""

    has: Callable[[str], bool]
    """Whether a name is one of this library's, whether or not it has such a network."""
    check_name: Callable[[str], None]
    """Raises UnknownModelError, with the nearest right names, where the library has no such network."""
    origin: Callable[[str], Origin]
    """What is known of the published weights without building the network."""
    body_of: Callable[..., Body]
    """(name, in_channels=, size_px=, maps=) -> the body, see `body_of`."""
    load_published: Callable[[nn.Module, Body], str] | None
    """(model, body): fill `model.body` with the published weights, and return what was loaded; None: there are none."""
    computes: bool = False
    """What is to be known of its networks, running them tells: on the meta device they may fail."""
    foreign: Callable[[Body], tuple[str, ...]] = lambda body: body.foreign
    """What the names of the classifier's tensors begin with in the library's own weights."""
    shapes: Callable[[str], Mapping[str, tuple[int, ...]]] | None = None
    """The tensors of a network with its own classifier; None where nobody else has such networks."""
    making: str = ""
    """How the library itself makes a network of that {name} without a classifier."""


def _load_timm(model: nn.Module, body: Body) -> str:
    load_body(model, from_timm.published(body), where=body.name)
    return f"{body.name}: body, as it is published; head as initialised"


def _check_torchvision(name: str) -> None:
    if name not in from_torchvision.names():
        near = ", ".join(difflib.get_close_matches(name, names(), n=3))
        raise UnknownModelError(
            f"{name[:80]!r} is neither a network of torchvision nor {tiny.NAME!r}: no model can be built; give "
            f"{f'one of {near}' if near else 'one that `thawline models` lists'}, timm/NAME, or your own as "
            f"{code.PREFIX}MODULE:FUNCTION"
        )


def _check_code(name: str) -> None:
    code.target(name)


LIBRARIES: dict[str, Library] = {
    "code": Library(
        has=code.is_code,
        check_name=_check_code,
        origin=from_code.origin,
        body_of=from_code.body_of,
        load_published=lambda model, body: "weights as it was made with",
        computes=True,
    ),
    "timm": Library(
        has=from_timm.is_ours,
        check_name=from_timm.check_name,
        origin=from_timm.origin,
        body_of=from_timm.body_of,
        load_published=_load_timm,
        foreign=from_timm.foreign,
        shapes=from_timm.shapes,
        making="timm.create_model({name!r}, num_classes=0)",
    ),
    "tiny": Library(
        has=lambda name: name == tiny.NAME,
        check_name=lambda name: None,
        origin=lambda name: Origin(),
        body_of=tiny.body_of,
        load_published=None,
    ),
    "torchvision": Library(  # the last: whatever is nobody else's
        has=lambda name: True,
        check_name=_check_torchvision,
        origin=from_torchvision.origin,
        body_of=from_torchvision.body_of,
        load_published=lambda model, body: load_imagenet(model, body.name, foreign=body.foreign),
        shapes=from_torchvision.shapes,
        making="torchvision.models.get_model({name!r})",
    ),
}


def library_of(name: str) -> Library:
    """Whose network a name stands for."""
    return next(library for library in LIBRARIES.values() if library.has(name))


def names() -> tuple[str, ...]:
    """The bodies that every installation has: torchvision's classification networks, and `tiny`."""
    return (*from_torchvision.names(), tiny.NAME)


def check_name(name: str) -> None:
    """Raises UnknownModelError, with the nearest right names, if `create` does not know this one; CodeError."""
    library_of(name).check_name(name)


def origin(name: str) -> Origin:
    """What is known of a body's published weights without building it, unless it is the user's own.

    Raises UnknownModelError, CodeError.
    """
    check_name(name)
    return library_of(name).origin(name)


def normalisation(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel, of pixels in [0, 1], that the body's weights were trained with.

    Raises: UnknownModelError.
    """
    about = origin(name)
    return about.mean, about.std


def body_of(name: str, *, in_channels: int = 3, size_px: int | None = None, maps: bool = False) -> Body:
    """A body on the CPU with random weights, as its library starts them, and all that is known of it.

    size_px: the side of the images, which networks that take one size only are built for; None is what the published
    weights were trained with. in_channels: where it is not 3, the first convolution starts anew.
    maps: only `feature_maps` will be asked for, so that layers behind them are left out.
    Raises: UnknownModelError, ModelError.
    """
    check_name(name)
    if in_channels < 1:
        raise ModelError(f"in_channels={in_channels}: there would be no image to see; give 1 or more")
    return library_of(name).body_of(name, in_channels=in_channels, size_px=size_px, maps=maps)


def sketch(name: str, *, size_px: int | None = None) -> Body:
    """`body_of`, on torch's meta device: all that is known of a body, in a moment, and nothing that computes.

    A user's own is made as it is, see Library.computes.
    """
    if library_of(name).computes:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return body_of(name, size_px=size_px)
    try:
        with torch.device("meta"):
            return body_of(name, size_px=size_px)
    except UnknownModelError:
        raise
    except ModelError:  # a few networks ask for numbers while they are built
        return body_of(name, size_px=size_px)
