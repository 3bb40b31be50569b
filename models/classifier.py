"""How does a body become a classifier? With a head on it, its layers in groups, and weights in both.

Normalisation is no part of the model: the data path applies it.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thawline.models.bodies.body import Body, Names, feature_maps, on_meta, shape_of
from thawline.models.bodies.libraries import body_of, check_name, library_of, sketch
from thawline.models.decoders import OURS, check_sizes, padded
from thawline.models.errors import ModelError
from thawline.models.groups import Part, gathered
from thawline.models.heads import check_options, head_of, kind_of, on_stages
from thawline.models.settings import Grouping
from thawline.models.weights.loading import load_file


class Classifier(nn.Module):
    """A body under a head: images (N, 3, H, W) float -> what its task asks for, such as logits (N, classes).

    The body's tensors have their library's names, so a ResNet's state dict is torchvision's without `fc`.
    """

    name: str
    """The body's name, as `create` takes it."""
    classes: int
    """How many logits, numbers or points come out."""
    options: dict[str, Any]
    """Further arguments of `create` that shaped it."""
    scale: tuple[float, ...] | None
    """The units of the numbers that come out: a standard deviation each; None where they are no numbers."""
    on_stages: bool
    """The head is given the images and the maps of all stages, and not the last map alone."""
    multiple_px: int
    """The body of such a head is shown images padded to sides that are multiples of this."""
    origin: str
    """Where the weights came from, in words; for the log."""
    pretrained: bool
    """Whether the body has been trained before: frozen, it gives the head something to learn from."""
    group_names: Names
    """The body's parameters by layer group, stem first."""
    fixed_groups: int
    """So many of the first layer groups never train, see groups.freeze_to."""
    lora_scale: float
    """By how much what LoRA's adapters add counts; 0 where there are none, see lora."""

    def __init__(self, body: nn.Module, head: nn.Module, *, name: str, classes: int, groups: Names) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.name, self.classes, self.origin, self.pretrained = name, classes, "random weights", False
        self.options, self.scale, self.on_stages = {}, None, False
        self.multiple_px = getattr(head, "multiple_px", 1)
        self.group_names, self.fixed_groups, self.lora_scale = groups, 0, 0.0

    def forward(self, images: Tensor) -> Tensor:
        if self.on_stages:
            return self.head(images, feature_maps(self.body, padded(images, self.multiple_px)))
        return self.head(self.body(images))

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        """Body and head: one after the other they are the model. Raises ModelError where the head sees more."""
        if self.on_stages:
            raise ModelError(
                "the head of a mask sees the images and the maps of all stages, which are too large to be kept: there "
                "is nothing to cache; leave features uncached (fit.cache_features = 0)"
            )
        return self.body, self.head

    def groups(self) -> list[list[Part]]:
        """The body's layer groups, stem first, and the head. Of a ResNet fastai's: to layer2, to layer4, head."""
        return [*gathered(self.body, self.group_names), [self.head]]


def check(
    name: str,
    *,
    task: str = "single_label",
    decoder: str = OURS,
    groups: Grouping = "three",
    sizes_px: Sequence[int] = (),
    checkpointing: bool = False,
) -> int:
    """Whether `create` can make such a model, and it can see images of each of these sides; how many groups it has.

    Raises: UnknownModelError, ModelError.
    """
    _head_options(task, decoder=decoder)
    body = sketch(name, size_px=sizes_px[-1] if sizes_px else None)
    computes = library_of(name).computes
    ghost = body.module.eval() if computes else on_meta(body.module)
    for size_px in dict.fromkeys(sizes_px):
        shape_of(ghost, channels=3, size_px=size_px, name=name, device="cpu" if computes else "meta")
    if checkpointing:
        checkpoint_gradients(ghost, name=name)
    if decoder != OURS:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            _head_over(body, task, 2, sizes_px=sizes_px, decoder=decoder)
    return len(body.groups(groups)) + 1


def checkpoint_gradients(module: nn.Module, *, name: str) -> None:
    """Have a body compute its features again in the backward pass, to keep fewer. Raises ModelError if it cannot."""
    network: Any = module
    if not hasattr(network, "set_grad_checkpointing"):
        raise ModelError(
            f"{name} has no gradient checkpointing: all its features would be kept; leave model.checkpointing out, or "
            "give a model of timm that has it"
        )
    try:
        network.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError) as error:
        raise ModelError(f"{name} has no gradient checkpointing ({error}): leave model.checkpointing out") from error


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
    groups: Grouping = "three",
    in_channels: int = 3,
    size_px: int | None = None,
    checkpointing: bool = False,
    decoder: str = OURS,
) -> Classifier:
    """Build a model on the CPU, in training mode, everything trainable.

    name: of a classification network of torchvision; `timm/NAME` or `hf-hub:ORG/MODEL`, with timm installed; `tiny`; or
    `python:MODULE:FUNCTION`, which imports it and calls it for your own, see as_body.
    `weights` is "imagenet" (the published ones of that name, downloaded once; a job's default too), "none" (as its
    library starts it), a file, or the folder of a run or a checkpoint. A head of ours in there is taken where its
    shapes agree and, if `class_names` are given, where it was trained on these. `tiny` was never trained on ImageNet:
    there "imagenet" is "none", and `origin` says so. Of your own, "imagenet" are those that the function gave it.
    label_mean, label_std, y_range: see number_head. decoder: see mask_head. checkpointing: see checkpoint_gradients.
    A convolutional body is given fastai's head, a transformer a normed linear one. groups: how layers are grouped for
    freezing and for two rates; "three" is fastai's. size_px: the side of the images, for networks that take one only.
    in_channels other than 3, for loaders of your own: the first layer is RGB's in fastai's way.
    With a seed, what is initialised is a function of the seed alone, and the caller's random state is left as
    it was (bit for bit among CPUs with AVX2; without it the last bits of torch's normal numbers differ).
    Raises: UnknownModelError, CodeError, WeightsError, ModelError (no classes, a wrong dropout, ...).
    """
    check_name(name)  # which imports a user's own: what that draws at random, it draws before the seed counts
    of_labels = {"label_mean": label_mean, "label_std": label_std, "y_range": y_range}
    options = _head_options(task, decoder=decoder, dropout=dropout, **of_labels)
    with torch.device("cpu"), torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # torch.manual_seed would reseed the GPUs too, and fork_rng guards only the CPU here.
            torch.default_generator.manual_seed(seed)
        body = body_of(name, in_channels=in_channels, size_px=size_px, maps=on_stages(head_of(task)))
        head = _head_over(body, task, classes, in_channels=in_channels, **options)
    model = Classifier(body.module, head, name=name, classes=classes, groups=body.groups(groups))
    model.options = options | _shaping(groups=groups, in_channels=in_channels, size_px=size_px if body.bound else None)
    model.scale, model.on_stages = options.get("label_std"), on_stages(head_of(task))
    if checkpointing:
        checkpoint_gradients(body.module, name=name)
    _fill(model, body, weights, class_names)
    return model


def _head_options(
    task: str, *, decoder: str, dropout: float | None = None, **given: Sequence[float] | None
) -> dict[str, Any]:
    """What to tell a head, of what was given. Raises ModelError for what it does not take."""
    options: dict[str, Any] = {name: tuple(value) for name, value in given.items() if value is not None}
    options |= {"dropout": dropout} if dropout is not None else {}
    options |= {"decoder": decoder} if decoder != OURS else {}
    check_options(task, options)
    return options


def _head_over(
    body: Body, task: str, outputs: int, *, in_channels: int = 3, sizes_px: Sequence[int] = (), **options: Any
) -> nn.Module:
    """The head of a task over a body that sees images of these sides. Raises ModelError where it cannot stand there."""
    make_head = head_of(task)
    head = make_head(body.features, outputs, **options, **kind_of(make_head, body, task=task, in_channels=in_channels))
    check_sizes(head, body, sizes_px)
    return head


def _fill(model: Classifier, body: Body, weights: str | Path, class_names: Sequence[str] | None) -> None:
    """Give a model its weights, and say where they came from. Raises WeightsError."""
    if weights == "none":
        return
    library = library_of(body.name)
    if weights != "imagenet":
        model.origin = load_file(model, weights, classes=class_names, foreign=library.foreign(body))
    elif library.load_published is None:
        model.origin = "random weights: nobody trained it on ImageNet"
        return
    else:
        model.origin = library.load_published(model, body)
    model.pretrained = True


def _shaping(**given: Any) -> dict[str, Any]:
    """Of `create`'s arguments those that are not its defaults: a bundle need not say the others."""
    default = inspect.signature(create).parameters
    return {name: value for name, value in given.items() if value != default[name].default}
