"""What should the model see? A frozen description, with no device, no file and no random number in it."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from math import ceil, inf
from typing import Annotated, Any, Literal, Self, get_args

from thawline.dataio.errors import SpecError, quoted
from thawline.dataio.ranges import Range, between, check

Presize = Literal["crop", "squish", "pad"]
Border = Literal["reflect", "replicate", "constant"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PRESETS: dict[str, dict[str, Any]] = {
    # fastai's aug_transforms, which are the fields' own defaults.
    "default": {},
    # Seen from above there is no up: all eight symmetries. Height, light and angle of view change little.
    "satellite": {"dihedral": True, "max_zoom": 1.05, "max_warp": 0.0, "max_lighting": 0.1},
    # What is left is the crop's random place, and that only where presize="crop" and the image is no square.
    "plain": {"flip": False, "rotate_deg": 0.0, "max_zoom": 1.0, "max_warp": 0.0, "max_lighting": 0.0},
    # A mirrored digit is none, and a 6 turned far is a 9. Hands write small as well as large and lean a little, and a
    # zoom that only comes closer would cut strokes. Past the edge the paper goes on; reflection would repeat strokes.
    "digits": {"flip": False, "min_zoom": 0.9, "max_warp": 0.1, "border": "replicate"},
}
"""By name, the fields of an `ImageSpec` that differ from the defaults: `ImageSpec.preset("satellite")`."""


_FACTOR = between(0.1, 10, "it is a factor; 1 is none")
_PROBABILITY = between(0, 1, "it is a probability")
_ALPHA = Range(lambda v: 0 <= v <= 100, "0 <= _ <= 100, where 0 is none", "it is a Beta distribution's alpha")
SIDE = Range(lambda v: v >= 8, "_ >= 8", "nothing could be seen")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Squares: the one that the model sees, and the one that augmentation works on."""

    size_px: Annotated[int, SIDE] = 224
    """Side of the square that the model sees."""
    stages: tuple[tuple[float, int], ...] = ()
    """Progressive resizing: ((0, 128), (3, 224)) is side 128 from epoch 0 and 224 from epoch 3, which may be fractions;
    the last side is size_px. Empty: size_px throughout."""
    presize_px: int = 460
    """Side of the square that augmentation is thought to work on: fastai's item size. Nothing is resampled to it, since
    one warp goes straight from the decoded image to size_px; it only has to be large enough to make that honest."""
    presize: Presize = "crop"
    """How a rectangle becomes the square: crop (random in training), squish, or pad with the border."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training images go through; validation images never do. Defaults are fastai's `aug_transforms`."""

    flip: bool | Literal["auto"] = "auto"
    """Mirror left and right, with probability one half; without effect beside `dihedral`, which mirrors too. auto: yes,
    but images with points only where their manifest says which points change places (`swap`)."""
    dihedral: bool = False
    """One of the square's eight symmetries, quarter turns and mirrors, each equally likely; images with points need
    `swap` for it. (fastai's flip_vert leaves half of the images alone and draws for the other half.)"""
    rotate_deg: Annotated[float, between(0, 180, "it is in degrees, either way")] = 10.0
    """Rotate by up to this, either way."""
    min_zoom: Annotated[float, _FACTOR] = 1.0
    """Zoom by this to `max_zoom`, about a random point; below 1 shrinks the image into its border."""
    max_zoom: Annotated[float, _FACTOR] = 1.1
    """The most to zoom in by; 1 is none."""
    max_warp: Annotated[float, between(0, 0.5, "it is a part of half the side; above 0.5 the image folds over")] = 0.2
    """Perspective: tilt each axis by up to this, as a part of half the side."""
    max_lighting: Annotated[float, between(0, 0.9, "it is a share; 0 is none")] = 0.2
    """Brightness and contrast: how far from neutral."""
    max_saturation: Annotated[float, between(0, 0.9, "it is a share; 0 is none")] = 0.0
    """Saturation: how far from the image's own colours. Zero in fastai's `aug_transforms`, which has it apart."""
    p_affine: Annotated[float, _PROBABILITY] = 0.75
    """Probability of each of rotation, zoom and perspective."""
    p_lighting: Annotated[float, _PROBABILITY] = 0.75
    """Probability of each of brightness, contrast and saturation."""
    min_scale: Annotated[float, between(0.01, 1, "it is a share of the area; 1 is the whole")] = 1.0
    """Below 1: a random resized crop of at least this share of the area, its aspect within `ratio`; a side that would
    be longer than the square's is cut."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect (width / height) of the random resized crop: the least and the largest."""
    border: Border = "reflect"
    """What lies outside the image."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How two training images become mixtures of both: see `dataio.stream.mix`."""

    mixup: Annotated[float, _ALPHA] = 0.0
    """alpha of the Beta distribution by which two images are blended; 0 = never."""
    cutmix: Annotated[float, _ALPHA] = 0.0
    """alpha of the same for a rectangle of one image pasted into another; 0 = never."""


@dataclass(frozen=True, kw_only=True)
class ImageSpec(Augmentation, Sizes):
    """What an image becomes: geometry, lighting and normalisation.

    Training draws everything of `Augmentation` at random for each sample, a function of (seed, epoch, id); validation
    takes the centre and leaves the rest out. Raises SpecError on values out of range or that contradict one another.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted per channel, in [0, 1] units: what the backbone was trained with."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by, per channel."""

    def __post_init__(self) -> None:
        check(self, SpecError)
        if self.presize_px < self.size_px:
            raise SpecError(
                f"presize_px={self.presize_px} is smaller than size_px={self.size_px}: the warp would invent "
                f"pixels; give presize_px >= {self.size_px}"
            )
        _one_of("presize", self.presize, get_args(Presize))
        if self.flip not in (True, False, "auto"):
            raise SpecError(f"flip={quoted(repr(self.flip))} is not known: give True, False or 'auto'")
        _one_of("border", self.border, get_args(Border))
        self._check_zoom()
        self._check_stages()
        if not 0 < self.ratio[0] <= self.ratio[1] < inf:
            raise SpecError(f"ratio={self.ratio} is not a range of aspects: give (low, high), 0 < low <= high")
        if not all(-inf < value < inf for value in self.mean):
            raise SpecError(f"mean={self.mean} has a value that is no number: no pixel would be one; give three")
        if not all(0 < value < inf for value in self.std):
            raise SpecError(f"std={self.std} has a value not above 0: pixels would be divided by it; give all > 0")

    def _check_zoom(self) -> None:
        if self.min_zoom > self.max_zoom:
            raise SpecError(
                f"min_zoom={self.min_zoom} is above max_zoom={self.max_zoom}: there is no zoom between them; "
                f"give min_zoom <= {self.max_zoom}"
            )
        # The perspective divides by 1 + a x + b y, |a| and |b| <= max_warp, in coordinates of the unit square, and its
        # horizon is where that is 0. The window that a zoom shows reaches as far as |x| + |y| = 4 / zoom - 2.
        if self.max_warp * (4 / min(self.min_zoom, 1) - 2) > 1:
            least = ceil(4000 / (1 / self.max_warp + 2)) / 1000
            raise SpecError(
                f"min_zoom={self.min_zoom} with max_warp={self.max_warp} would show what lies behind the perspective's "
                f"horizon, where the image folds over: give min_zoom >= {least}, or less max_warp"
            )

    def _check_stages(self) -> None:
        if not self.stages:
            return
        starts, sides = [start for start, _ in self.stages], [side for _, side in self.stages]
        if starts[0] != 0 or not all(a < b < inf for a, b in pairwise(starts)):
            raise SpecError(
                f"stages={self.stages} do not begin at epoch 0 and rise from there: an epoch would have no size, or "
                "two; give ((0, side), (later epoch, side), ...)"
            )
        if not 8 <= min(sides) <= max(sides) <= self.presize_px:
            raise SpecError(
                f"stages={self.stages} have a side outside [8, presize_px={self.presize_px}]: too little would be "
                "seen, or pixels invented; give sides within"
            )
        if sides[-1] != self.size_px:
            raise SpecError(
                f"stages={self.stages} end with side {sides[-1]}, but size_px={self.size_px} is what the model would "
                f"be used at afterwards; give size_px={sides[-1]}, or a last stage of side {self.size_px}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The spec of `PRESETS[name]`, with `changes` on top: `preset("satellite", size_px=64)`. Raises SpecError."""
        if name not in PRESETS:
            close = get_close_matches(name, PRESETS, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(PRESETS)}"
            raise SpecError(f"preset={quoted(repr(name))} is not known, so it says nothing of augmentation: {remedy}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def flips(self) -> bool:
        """Whether `flip` mirrors; auto does, until a loader of points says otherwise."""
        return self.flip is not False

    def unmirrored(self) -> Self:
        """This spec for images with points of which nobody said which change places in a mirror: without `flip`.

        Raises: SpecError where it asks for mirror images by name.
        """
        asked = next((name for name in ("flip", "dihedral") if getattr(self, name) is True), None)
        if asked is not None:
            raise SpecError(
                f"{asked}=True mirrors images, and the manifest names no points that change places: a mirrored left "
                "eye would still be called left; index again with --swap LEFT,RIGHT (--swap none where no point has a "
                f"side), or give {asked}=False (--augment.no-{asked})"
            )
        return replace(self, flip=False)

    @property
    def effects(self) -> tuple[str, ...]:
        """What engines do to the warped image besides the colour map: names of Geometry's fields, in order."""
        return ("saturation",) if self.max_saturation else ()

    def size_at(self, epoch: float) -> int:
        """Side in pixels of a training image at an epoch >= 0, fractions included."""
        return [side for start, side in self.stages or ((0, self.size_px),) if start <= epoch][-1]


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={quoted(repr(value))} is not known: give one of {', '.join(choices)}")
