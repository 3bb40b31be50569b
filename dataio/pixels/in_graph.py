"""What are validation's pixels as a graph? One image, decoded, to what a model sees of it, in torch's plain operations.

For files that are handed on with a model: the image's size is open, and nothing but sums, products and choices is used,
which every runtime has. Validation neither turns nor tilts, so that down and across are apart: filter and warp are one
matrix each, whose rows say which source pixels make an output pixel. To render many images, use an engine.
"""

import torch
from torch import Tensor, nn

from thawline.dataio.pixels.geometry import MAX_SHRINK, SAMPLES, SPREAD_SHRINK
from thawline.dataio.pixels.spec import ImageSpec


class Centred(nn.Module):
    """(H, W, 3) uint8, upright RGB -> (1, 3, size_px, size_px) float32: `geometry.centred` as engines render it."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self._spec = spec
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).reshape(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(spec.std).reshape(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[:2]
        rows, columns = (torch.arange(n, device=image.device, dtype=torch.float64) for n in (height, width))
        tall, wide = rows[-1] + 1, columns[-1] + 1
        side = torch.minimum(tall, wide) if self._spec.presize == "crop" else torch.maximum(tall, wide)
        down, across = (tall, wide) if self._spec.presize == "squish" else (side, side)
        shrink = torch.maximum(down, across) / self._spec.size_px
        left = torch.clamp(shrink, max=MAX_SHRINK)  # for the warp; what is above, the filter does
        low, high = SPREAD_SHRINK
        spread = torch.clamp((left - low) / (high - low), 0, 1)
        pixels = image.float().flatten(1)  # (H, 3W)
        total = torch.zeros(3, self._spec.size_px, self._spec.size_px)
        for dx, dy in SAMPLES.tolist():
            strips = self._weights(rows, tall, down, dy * spread, left / shrink) @ pixels
            planes = strips.reshape(-1, width, 3).permute(2, 0, 1)  # (3, size_px, W)
            total = total + planes @ self._weights(columns, wide, across, dx * spread, left / shrink).T
        return ((total / len(SAMPLES) - self.mean) / self.std)[None]

    def _weights(self, at: Tensor, length: Tensor, shown: Tensor, offset: Tensor, factor: Tensor) -> Tensor:
        """How much each source pixel counts in each output pixel, along one side: (size_px, n) float32.

        at: the n source pixels' numbers. length: how many they are. shown: how many of them the output shows, about
        their middle. offset: of the sample, in output pixels. factor: by which the source is filtered down first.
        """
        size_px = self._spec.size_px
        filtered = torch.where(factor < 1, torch.clamp(torch.round(length * factor), min=1), length)
        scale = length / filtered
        centres = torch.arange(size_px, device=at.device, dtype=torch.float64) + 0.5 + offset
        place = ((length - shown) / 2 + centres * shown / size_px) / scale - 0.5  # among the filtered pixels
        place = self._within(place, filtered)
        first = torch.floor(place)
        total = torch.zeros(())
        for pixel, share in ((first, first + 1 - place), (first + 1, place - first)):
            if self._spec.border == "constant":
                share = torch.where((pixel < 0) | (pixel > filtered - 1), 0.0, share)
            middle = (torch.minimum(torch.clamp(pixel, min=0), filtered - 1) + 0.5) * scale
            triangle = torch.clamp(1 - ((at + 0.5)[None] - middle[:, None]).abs() / scale, min=0)
            total = total + triangle / triangle.sum(1, keepdim=True) * share[:, None]
        return total.float()

    def _within(self, place: Tensor, filtered: Tensor) -> Tensor:
        """Where a place beyond the edges is read: at its mirror image, or on the edge. Source: torch's grid_sample."""
        if self._spec.border == "constant":
            return place
        if self._spec.border == "reflect":
            beyond = (place + 0.5).abs()
            turns = torch.floor(beyond / filtered)
            rest = beyond - turns * filtered
            place = torch.where(torch.remainder(turns, 2) < 0.5, rest, filtered - rest) - 0.5
        return torch.minimum(torch.clamp(place, min=0), filtered - 1)
