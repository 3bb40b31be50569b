"""What shall be trained? [model] of a job: a body, its weights, and how much of it trains."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated

from thawline.dataio.ranges import Range, above_zero, at_least, below_one, given
from thawline.models.settings import Grouping


@dataclass(frozen=True)
class Lora:
    """Adapters beside frozen linear layers of the body, which train in its place; the head trains as ever."""

    rank: Annotated[int, at_least(0, "it is a number of columns; 0 is no LoRA")] = 0
    """Columns of an adapter's two matrices, such as 8; 0 = no LoRA: the body itself trains."""
    alpha: Annotated[float | None, above_zero("what the adapters learn would not count")] = None
    """What the adapters add counts alpha / rank; None = rank."""
    targets: Annotated[tuple[str, ...], given("ends of layers' names such as 'qkv'", "no layer is called so")] = ()
    """Ends of the names of the layers that get one, such as qkv or attn.proj; empty = all linear layers."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: Annotated[str, given("a body such as 'resnet34'", "there is nothing to train")] = "resnet34"
    """Body: one of torchvision, timm/NAME, hf-hub:ORG/MODEL, tiny, or your own as python:MODULE:FUNCTION."""
    weights: Annotated[str, given("none, imagenet or a file", "it would be no choice")] = "imagenet"
    """Weights to start from: none, imagenet, a file, an address, or the folder of a run or a checkpoint."""
    dropout: Annotated[float, below_one("it is a probability, and at 1 nothing passes")] = 0.5
    """Dropout before the last layer; half of it before the layer ahead."""
    y_range: Annotated[tuple[float, float] | None, Range(isfinite, "two finite numbers", "it is a range")] = None
    """Least and largest number that the model can say, in their own units; None = no limit; task number only."""
    decoder: Annotated[str, given("unet or a name such as 'smp:FPN'", "it would be no choice")] = "unet"
    """Decoder of a mask: unet, or one of segmentation_models_pytorch as smp:NAME, such as smp:DeepLabV3Plus."""
    groups: Grouping = "three"
    """Layer groups for freezing and for two learning rates: fastai's three, one a stage, or one a block."""
    checkpointing: bool = False
    """Compute features again in the backward pass, to keep fewer in memory; timm only."""
    lora: Lora = field(default_factory=Lora)
