"""Which decoder makes a mask of a body's feature maps? Our U-Net, or one of segmentation_models_pytorch by its name.

The only file that imports segmentation_models_pytorch (smp), an extra. Its decoders stand on our bodies: weights, layer
groups, freezing and normalisation stay ours, and nothing of its encoders is used.
"""

import difflib
import inspect
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thawline.models.bodies.body import Body, Stage, on_meta
from thawline.models.errors import ModelError
from thawline.models.unet import unet_head

OURS = "unet"
PREFIX = "smp:"
"""What the names of smp's decoders begin with here."""
_NOT_OVER_MAPS = ("DPT",)
"""Architectures of smp that take a plain transformer's tokens."""
_STAND_IN = "thawline"
"""What our maps are called in smp's list of encoders, while a decoder is made."""
_LEVELS = 5
"""smp's decoders go from 1/2 to 1/32 of the image's side."""


class _Maps(nn.Module):
    """In an encoder's place while smp makes a decoder: it says which maps there are, and has none."""

    def __init__(self, channels: Sequence[int], depth: int, output_stride: int) -> None:
        super().__init__()
        self.out_channels, self.depth, self.output_stride = list(channels), depth, output_stride

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Nothing here sees an image."""

    def make_dilated(self, output_stride: int) -> None:
        """`Decoder` enlarges the maps in its place."""


class Decoder(nn.Module):
    """(images (N, C, H, W), maps of the padded images, the largest first) -> logits (N, classes, H, W).

    Each map is given the size that smp expects; a level of which the body has no map gets one without channels.
    """

    multiple_px: int
    """The body is to be shown images whose sides are multiples of this: padded ones, right and below."""

    def __init__(self, name: str, stages: Sequence[Stage], classes: int) -> None:
        super().__init__()
        self.name = name
        at = [stage.stride for stage in stages]
        self.multiple_px = max(at)
        depth = self.multiple_px.bit_length() - 1
        self._sources = [at.index(2**level) if 2**level in at else None for level in range(1, depth + 1)]
        channels = [0 if i is None else stages[i].channels for i in self._sources]
        made = _made(name, [3, *channels], classes)
        stride = made.encoder.output_stride
        self._strides = [min(2**level, stride) for level in range(1, depth + 1)]
        self.decoder, self.segmentation_head = made.decoder, made.segmentation_head

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        count, _, height, width = images.shape
        tall, wide = (-(-side // self.multiple_px) * self.multiple_px for side in (height, width))
        features = [maps[0].new_zeros(count, 3, tall, wide)]  # in the place of the image, which no decoder looks at
        for source, stride in zip(self._sources, self._strides, strict=True):
            size = tall // stride, wide // stride
            features.append(
                maps[0].new_zeros(count, 0, *size) if source is None else _fitted(maps[source], size, corners=False)
            )
        logits = self.segmentation_head(self.decoder(features))
        return _fitted(logits, (tall, wide), corners=True)[..., :height, :width]


def padded(images: Tensor, multiple_px: int) -> Tensor:
    """Images with rows below and columns to the right, of zeros, up to sides that are multiples."""
    height, width = images.shape[-2:]
    below, right = -height % multiple_px, -width % multiple_px
    return F.pad(images, (0, right, 0, below)) if below or right else images


def mask_head(
    features: int,
    outputs: int,
    *,
    stages: Sequence[Stage],
    dropout: float = 0.5,
    in_channels: int = 3,
    decoder: str = OURS,
) -> nn.Module:
    """A decoder over a body with two stages or more: `unet`, or one of smp as `smp:FPN`, see `names`.

    `unet` has no dropout, those of smp have smp's own, and `dropout` says nothing to either.
    Raises: ModelError for fewer than two classes, an unknown decoder, smp that is not installed, a body that this
    decoder cannot stand on.
    """
    if decoder == OURS:
        return unet_head(features, outputs, stages=stages, dropout=dropout, in_channels=in_channels)
    if outputs < 2:
        raise ModelError(f"a mask of {outputs} classes has nothing to tell apart: give at least two")
    check_name(decoder)
    return Decoder(decoder, stages, outputs)


def names() -> tuple[str, ...]:
    """smp's decoders, as `create` and model.decoder take them. Raises ModelError where smp is not installed."""
    smp = _smp()
    kinds = {name: getattr(smp, name) for name in smp.__all__ if name not in _NOT_OVER_MAPS}
    base = smp.base.SegmentationModel
    return tuple(f"{PREFIX}{name}" for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, base))


def check_name(decoder: str) -> None:
    """Raises ModelError, with the nearest right names, for a decoder that is not known; or where smp is missing."""
    if decoder == OURS:
        return
    if decoder.startswith(PREFIX) and decoder in names():
        return
    lowered = {name.lower(): name for name in (OURS, *names())}
    asked = decoder.lower().removeprefix(PREFIX)
    by_end = {name.removeprefix(PREFIX): full for name, full in lowered.items() if name != OURS}
    found = [by_end[end] for end in difflib.get_close_matches(asked, by_end, n=3)]
    near = ", ".join([OURS] * bool(difflib.get_close_matches(asked, [OURS])) + found)
    raise ModelError(
        f"decoder={decoder[:80]!r} is not known: no mask could be made; give {near or ', '.join(lowered.values())}; "
        f"`thawline models 'smp:*'` lists them"
    )


def check_sizes(head: nn.Module, body: Body, sizes_px: Sequence[int]) -> None:
    """Whether a decoder of smp over a body works with images of these sides. Raises ModelError."""
    if not isinstance(head, Decoder):
        return
    ghost = on_meta(head)
    for size_px in dict.fromkeys(sizes_px):
        images = torch.zeros(1, 3, size_px, size_px, device="meta")
        maps = [images.new_zeros(1, stage.channels, *(-(-size_px // stage.stride),) * 2) for stage in body.stages]
        try:
            ghost(images, maps)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{head.name} over {body.name} cannot see images of {size_px} px ({_first_line(error)}): nothing could "
                "be trained; give another data.size_px, or another model.decoder"
            ) from error
    if body.bound and body.size_px % head.multiple_px:
        raise ModelError(
            f"{body.name} sees images of {body.size_px} px alone, and {head.name} needs sides that are multiples of "
            f"{head.multiple_px}: no model can be built; give another data.size_px"
        )


def _made(name: str, channels: Sequence[int], classes: int) -> Any:
    """smp's model around a decoder for maps of these channels, the image's first. Raises ModelError."""
    smp = _smp()
    kind = getattr(smp, name.removeprefix(PREFIX))
    depth, takes = len(channels) - 1, inspect.signature(kind).parameters
    options: dict[str, Any] = {"upsampling": 1} if "upsampling" in takes else {}  # `Decoder` does all of it at the end
    widths = takes["decoder_channels"].default if "decoder_channels" in takes else None
    if isinstance(widths, Sequence):  # one a level
        options["decoder_channels"] = tuple(widths[-depth:])
    encoder = {"encoder": _Maps, "pretrained_settings": {}, "params": {"channels": tuple(channels)}}
    smp.encoders.encoders[_STAND_IN] = encoder
    try:
        if depth > _LEVELS:
            raise ValueError(f"a map of 1/{2**depth} of the image's side, and smp goes to 1/{2**_LEVELS}")
        return kind(
            encoder_name=_STAND_IN, encoder_depth=depth, encoder_weights=None, in_channels=3, classes=classes, **options
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name} cannot stand on maps of {channels[1:]} channels ({_first_line(error)}): no model can be built; "
            f"give another decoder, such as {OURS}, or another body"
        ) from error
    finally:
        del smp.encoders.encoders[_STAND_IN]


def _fitted(value: Tensor, size: tuple[int, int], *, corners: bool) -> Tensor:
    """At another size. corners: as smp's own last step does it."""
    if value.shape[-2:] == size:
        return value
    return F.interpolate(value, size, mode="bilinear", align_corners=corners)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _smp() -> ModuleType:
    """The package. Raises ModelError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise ModelError(
            "decoders called smp: need segmentation_models_pytorch, which is not installed: no model can be built; "
            'pip install "thawline[smp]", or give model.decoder = "unet"'
        ) from error
    module: ModuleType = smp
    return module
