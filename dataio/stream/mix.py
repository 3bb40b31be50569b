"""How do the images of a batch become mixtures of two? MixUp and CutMix, on the batch's own device.

Stream position i is mixed with its neighbour i ^ 1: the stream is shuffled, so neighbours are random pairs, and no
sample needs an image that another rank holds. The two exchange the same share: what one gives away the other gets,
so that a batch keeps every pixel and its classes stay as balanced as they were drawn. Everything random is a
function of (seed, step, pair), drawn on the host for the whole global batch, of which a rank uses its own rows.

Nothing here knows of losses: they must accept a row of class shares, (N, C), as a target.
Source: H. Zhang et al., "mixup" (2018); S. Yun et al., "CutMix" (2019).
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.dataio.batch import Batch, ImageBatch
from thawline.dataio.errors import SpecError
from thawline.dataio.hashing import hash64, uniforms
from thawline.dataio.stream.plan import rank_bounds

# Keys beside (seed, step); beyond any id or round, so that no other draw of the data path is ever repeated here.
_MIXUP, _CUTMIX, _WHICH, _CENTRE_X, _CENTRE_Y = (0x6D69_7800_0000_0000 + i for i in range(5))


@dataclass(frozen=True)
class Pairs:
    """What the pairs of a global batch exchange; pair p are its samples 2p and 2p + 1."""

    weight: NDArray[np.float64]
    """(pairs,) the partner's share of each target, in [0, 1]."""
    box: NDArray[np.int64]
    """(pairs, 4) left, top, right, bottom in px, the ends excluded: what CutMix exchanges; zeros where it is MixUp."""
    cut: NDArray[np.bool_]
    """(pairs,) CutMix, not MixUp."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixes a local batch. Where both `mixup` and `cutmix` are above zero, each pair tosses a coin.

    The coin is tossed for each pair, not for each step, so that every step has some of both and the loss stays smooth.
    A resumed run draws the same numbers only with the same numpy, whose Beta sampler may change between versions.

    Raises SpecError on values that leave nothing to do or cut a pair in two.
    """

    mixup: float
    """alpha of MixUp's Beta(alpha, alpha); zero or less is off."""
    cutmix: float
    """alpha of CutMix's Beta(alpha, alpha); zero or less is off."""
    classes: int
    """Columns of the targets."""
    global_batch: int
    """Samples a step, over all ranks."""
    seed: int
    """Of the run."""
    rank: int = 0
    """Whose local batch this mixes."""
    world_size: int = 1

    def __post_init__(self) -> None:
        if not (isfinite(self.mixup) and isfinite(self.cutmix)):
            raise SpecError(
                f"mixup={self.mixup}, cutmix={self.cutmix} is no Beta distribution: nothing can be drawn; "
                "give finite numbers, 0 for off"
            )
        if self.mixup <= 0 and self.cutmix <= 0:
            raise SpecError(
                f"mixup={self.mixup} and cutmix={self.cutmix} are both off: nothing would be mixed; "
                "give one above 0, or leave the mixing out"
            )
        if self.classes < 1:
            raise SpecError(f"classes={self.classes} leaves no column for the targets: give at least 1")
        if not 0 <= self.rank < self.world_size:
            raise SpecError(
                f"rank={self.rank} is not below world_size={self.world_size}: it has no local batch; "
                "give 0 to world_size - 1"
            )
        if self.global_batch < 1 or self.global_batch % (2 * self.world_size):
            raise SpecError(
                f"global_batch={self.global_batch} is not a multiple of 2 * world_size={2 * self.world_size}: two "
                "samples that mix with each other would lie on different ranks; give such a multiple, or give "
                "mixup = 0 and cutmix = 0"
            )

    def draw(self, step: int, *, width_px: int, height_px: int) -> Pairs:
        """What the pairs of the whole global batch exchange at this step; the same on every rank."""
        pairs = self.global_batch // 2
        index = np.arange(pairs)
        cut = np.full(pairs, self.cutmix > 0)
        if self.mixup > 0 and self.cutmix > 0:
            cut = uniforms(self.seed, step, _WHICH, index) < 0.5
        weight, box = np.zeros(pairs), np.zeros((pairs, 4), np.int64)
        if self.mixup > 0:
            weight = 1 - self._beta(self.mixup, step, _MIXUP)
        if self.cutmix > 0:
            side = np.sqrt(1 - self._beta(self.cutmix, step, _CUTMIX))  # of a box of area 1 - lambda
            left, right = _span(side, uniforms(self.seed, step, _CENTRE_X, index), width_px)
            top, bottom = _span(side, uniforms(self.seed, step, _CENTRE_Y, index), height_px)
            box = np.where(cut[:, None], np.stack([left, top, right, bottom], axis=1), 0)
            area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
            weight = np.where(cut, area / (width_px * height_px), weight)
        return Pairs(weight, box, cut)

    def _beta(self, alpha: float, step: int, tag: int) -> NDArray[np.float64]:
        generator = np.random.Generator(np.random.Philox(key=int(hash64(self.seed, step, tag))))
        return generator.beta(alpha, alpha, self.global_batch // 2)

    def __call__(self, batch: Batch, step: int) -> ImageBatch:
        """The mixed local batch; the given one is unchanged.

        Images keep dtype, device and memory format; targets become (N, C) float32, class shares. The host does not
        wait for the device: one small copy is queued. Raises SpecError for targets that are neither class indices
        (N,) int64 nor floating-point rows of C shares, for inputs that are not images, and for a batch of another
        size than this rank's local batch.
        """
        lo, hi = rank_bounds(self.global_batch, self.rank, self.world_size)
        (images, *others) = batch.arguments
        if others or images.ndim != 4 or not images.is_floating_point():
            shapes = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in batch.arguments)
            raise SpecError(
                f"inputs of {shapes} are not images (N, C, H, W): they cannot be mixed; give mixup = 0 and cutmix = 0"
            )
        if len(images) != hi - lo:
            raise SpecError(
                f"{len(images)} images came where rank {self.rank}'s local batch is {hi - lo}: they would be "
                "mixed by other samples' numbers; mix training batches only, with the loader's global_batch"
            )
        shares = self._shares(batch.targets)
        height_px, width_px = images.shape[-2:]
        drawn = self.draw(step, width_px=width_px, height_px=height_px)
        mine = slice(lo // 2, hi // 2)
        weight = drawn.weight[mine, None]
        outside = np.where(drawn.cut[mine, None], 0, weight)  # outside its box CutMix shows nothing of the partner
        packed = torch.from_numpy(np.hstack([weight, outside, drawn.box[mine]]).astype(np.float32))
        if images.device.type == "cuda":
            packed = packed.pin_memory()  # from pageable memory the copy would wait for the stream
        packed = packed.to(images.device, non_blocking=True)
        mixed = _exchange(images, _seen(packed[:, 1:], height_px, width_px).to(images.dtype))
        return ImageBatch(inputs=mixed, targets=_exchange(shares, packed[:, :1]), ids=batch.ids)

    def _shares(self, targets: Tensor) -> Tensor:
        """Targets as (N, C) float32."""
        if targets.ndim == 1 and targets.dtype == torch.int64:
            shares = torch.zeros(len(targets), self.classes, device=targets.device)
            return shares.scatter_(1, targets[:, None], 1.0)
        if targets.ndim == 2 and targets.shape[1] == self.classes and targets.is_floating_point():
            return targets.float()
        raise SpecError(
            f"targets of shape {tuple(targets.shape)} and type {targets.dtype} are not labels of {self.classes} "
            "classes: they cannot be mixed; give mixup = 0 and cutmix = 0"
        )


def _span(side: NDArray[np.float64], u: NDArray[np.float64], size_px: int) -> tuple[NDArray[np.int64], ...]:
    """One axis of the boxes: `side` of the axis long, centred at a uniform pixel, clipped to [0, size_px]."""
    centre = (u * size_px).astype(np.int64)
    half = (side * size_px / 2).astype(np.int64)
    return np.maximum(centre - half, 0), np.minimum(centre + half, size_px)


def _seen(packed: Tensor, height_px: int, width_px: int) -> Tensor:
    """The weight of the partner in each pixel: 1 inside the box, the pair's share outside; (pairs, 1, H, W).

    packed: (pairs, 5) float32, the share outside and the box.
    """
    outside, left, top, right, bottom = packed[:, :, None, None, None].unbind(1)
    x = torch.arange(width_px, device=packed.device)
    y = torch.arange(height_px, device=packed.device)[:, None]
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    return torch.where(inside, 1.0, outside)


def _exchange(values: Tensor, weight: Tensor) -> Tensor:
    """Blend every even row with the odd one after it by `weight`, and the odd one with the even one likewise."""
    mixed = torch.empty_like(values)  # keeps the memory format
    even, odd = values[0::2], values[1::2]
    torch.lerp(even, odd, weight, out=mixed[0::2])  # exact at 0 and at 1: boxes are the partner's own pixels
    torch.lerp(odd, even, weight, out=mixed[1::2])
    return mixed
