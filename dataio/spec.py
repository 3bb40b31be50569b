"""What should the model see? A frozen description, with no device, no file and no random number in it."""

from dataclasses import dataclass
from typing import Literal

from dataio.errors import SpecError

Presize = Literal["crop", "squish", "pad"]
Border = Literal["reflect", "replicate", "constant"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What an image becomes: geometry, lighting and normalisation. Defaults are fastai's `aug_transforms`.

    Training draws everything below at random, a function of (seed, epoch, id); validation takes the centre
    and leaves the rest out. Raises SpecError on values that contradict one another.
    """

    size_px: int = 224
    """Side of the square the model sees."""
    presize_px: int = 460
    """fastai's item size: the square that augmentation is thought to work on. Nothing is resampled to it here, since
    one warp goes straight from the decoded image to size_px; it only has to be large enough to make that honest."""
    presize: Presize = "crop"
    """How a rectangle becomes the square: crop (random in training), squish, or pad with the border."""
    flip: bool = True
    """Mirror left and right, with probability one half."""
    rotate_deg: float = 10.0
    """Rotate by up to this, either way."""
    max_zoom: float = 1.1
    """Zoom in by 1 to this, about a random point."""
    max_warp: float = 0.2
    """Perspective: tilt each axis by up to this, as a part of half the side."""
    p_affine: float = 0.75
    """Probability of each of rotation, zoom and perspective."""
    max_lighting: float = 0.2
    """Brightness and contrast: how far from neutral."""
    p_lighting: float = 0.75
    """Probability of each of brightness and contrast."""
    min_scale: float = 1.0
    """Below 1: a random resized crop of at least this share of the area, its aspect within `ratio`."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect (width / height) of the random resized crop."""
    border: Border = "reflect"
    """What lies outside the image."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted per channel, in [0, 1] units: what the backbone was trained with."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by, per channel."""

    def __post_init__(self) -> None:
        if self.size_px < 8:
            raise SpecError(f"size_px={self.size_px} is below 8: nothing could be seen; give size_px >= 8")
        if self.presize_px < self.size_px:
            raise SpecError(
                f"presize_px={self.presize_px} is smaller than size_px={self.size_px}: the warp would invent "
                f"pixels; give presize_px >= {self.size_px}"
            )
        _one_of("presize", self.presize, ("crop", "squish", "pad"))
        _one_of("border", self.border, ("reflect", "replicate", "constant"))
        _within("rotate_deg", self.rotate_deg, 0, 180, "degrees either way")
        _within("max_zoom", self.max_zoom, 1, 10, "a factor; 1 is none")
        _within("max_warp", self.max_warp, 0, 0.5, "a part of half the side; above .5 the image folds over")
        _within("max_lighting", self.max_lighting, 0, 0.9, "a share; 0 is none")
        _within("p_affine", self.p_affine, 0, 1, "a probability")
        _within("p_lighting", self.p_lighting, 0, 1, "a probability")
        _within("min_scale", self.min_scale, 0.01, 1, "a share of the area; 1 is the whole")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise SpecError(f"ratio={self.ratio} is not a range of aspects: give (low, high), 0 < low <= high")
        if min(self.std) <= 0:
            raise SpecError(f"std={self.std} has a value <= 0: pixels would be divided by it; give all > 0")


def _within(name: str, value: float, low: float, high: float, meaning: str) -> None:
    if not low <= value <= high:  # catches NaN too
        raise SpecError(f"{name}={value} lies outside [{low}, {high}] ({meaning}): give a value within")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={value!r} is not known: give one of {', '.join(choices)}")
