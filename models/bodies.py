"""Which bodies are there, and how does one become a classifier?

Normalisation is no part of the model: the data path applies it.
"""

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from thawline.models.errors import UnknownModelError
from thawline.models.heads import check_options, head_of
from thawline.models.tiny import FEATURES, tiny_body
from thawline.models.tiny import NAME as TINY
from thawline.models.weights import load_file, load_imagenet

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet: `tiny` has them too, so that it is given the pixels that a ResNet is."""


class Classifier(nn.Module):
    """A body under fastai's head: images (N, 3, H, W) float -> what its task asks for, such as logits (N, classes).

    The body's children have torchvision's names, so a ResNet's state dict is torchvision's without `fc`.
    """

    name: str
    """The backbone's name, as `create` takes it."""
    classes: int
    """How many logits, numbers or points come out."""
    options: dict[str, Any]
    """Further arguments of `create` that shaped its head."""
    scale: tuple[float, ...] | None
    """The units of the numbers that come out: a standard deviation each; None where they are no numbers."""
    origin: str
    """Where the weights came from, in words; for the log."""
    pretrained: bool
    """Whether the body has been trained before: frozen, it gives the head something to learn from."""

    def __init__(self, body: nn.Sequential, head: nn.Module, *, name: str, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.name, self.classes, self.origin, self.pretrained = name, classes, "random weights", False
        self.options, self.scale = {}, None

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def groups(self) -> list[list[nn.Module]]:
        """Stem to layer2, layer3 and layer4, head: fastai's split of a ResNet."""
        layers = list(self.body)
        return [layers[:-2], layers[-2:], [self.head]]


def names() -> list[str]:
    """The backbones that `create` knows: torchvision's ResNet family, and `tiny`."""
    every = torchvision.models.list_models(module=torchvision.models)
    family = torchvision.models.resnet.__name__
    return [*(name for name in every if torchvision.models.get_model_builder(name).__module__ == family), TINY]


def check_name(name: str) -> None:
    """Raises UnknownModelError, with the nearest right names, if `create` does not know this one."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3) or names()
        raise UnknownModelError(
            f"{name[:80]!r} is neither a ResNet of torchvision nor {TINY!r}: no model can be built; give one of "
            f"{', '.join(near)}"
        )


def normalisation(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel, of pixels in [0, 1], that the backbone's weights were trained with.

    Raises: UnknownModelError.
    """
    check_name(name)
    if name == TINY:
        return _IMAGENET
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    (m0, m1, m2), (s0, s1, s2) = preset.mean, preset.std
    return (m0, m1, m2), (s0, s1, s2)


def create(
    name: str,
    classes: int,
    *,
    task: str = "single_label",
    weights: str | Path = "imagenet",
    dropout: float = 0.5,
    seed: int | None = None,
    class_names: Sequence[str] | None = None,
    label_mean: Sequence[float] | None = None,
    label_std: Sequence[float] | None = None,
    y_range: Sequence[float] | None = None,
) -> Classifier:
    """Build a model on the CPU, in training mode, everything trainable.

    `weights` is "imagenet" (downloaded once, checked; a job's default too), "none" (torchvision's own initialisation),
    a file, or the folder of a run or a checkpoint. A head of ours in there is taken where its shapes agree and, if
    `class_names` are given, where it was trained on these. `tiny` was never trained on ImageNet: there "imagenet" is
    "none", and `origin` says so.
    label_mean, label_std, y_range: of task number alone, see heads.number_head.
    With a seed, what is initialised is a function of the seed alone, and the caller's random state is left as
    it was (bit for bit among CPUs with AVX2; without it the last bits of torch's normal numbers differ).
    Raises: UnknownModelError, ModelError (no classes, a wrong dropout, a task without a head), WeightsError.
    """
    check_name(name)
    make_head = head_of(task)
    options: dict[str, Any] = {"dropout": dropout}
    numbers = {"label_mean": label_mean, "label_std": label_std, "y_range": y_range}
    options |= {key: tuple(value) for key, value in numbers.items() if value is not None}
    check_options(task, options)
    with torch.device("cpu"), torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would reseed the GPUs too, and fork_rng guards only the CPU here.
            torch.default_generator.manual_seed(seed)
        body, features = _untrained_body(name)
        head = make_head(features, classes, **options)
    model = Classifier(body, head, name=name, classes=classes)
    model.options, model.scale = options, options.get("label_std")
    if weights == "imagenet" and name == TINY:
        model.origin = "random weights: nobody trained it on ImageNet"
        return model
    if weights == "imagenet":
        model.origin = load_imagenet(model, name)
    elif weights != "none":
        model.origin = load_file(model, weights, classes=class_names)
    model.pretrained = weights != "none"
    return model


def _untrained_body(name: str) -> tuple[nn.Sequential, int]:
    """A body as initialised, and the channels of its feature map."""
    if name == TINY:
        return tiny_body(), FEATURES
    network = torchvision.models.get_model(name, weights=None)
    children = [child for child in network.named_children() if child[0] not in ("avgpool", "fc")]
    return nn.Sequential(OrderedDict(children)), network.fc.in_features
