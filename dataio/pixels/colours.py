"""How do warped samples become what the model sees? Their mean, its colours and normalisation, for both engines.

On the device where the samples lie. Not in DALI's graph, whose arithmetic takes five times as long on a CPU for the
mean of three images; on a GPU it makes no difference. The host never waits for the device here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.pixels.spec import ImageSpec

# What is neither a homography nor an affine colour map, by its name in the spec and in Geometry, in this order: a
# function of (n, H, W, 3) float pixels in 0..255 and (n, 1, 1, 1) float values.
_EFFECTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "saturation": lambda pixels, by: torch.lerp(_grey(pixels), pixels, by).clamp_(0, 255),
}


def finish(samples: Sequence[Tensor], geometry: Geometry, spec: ImageSpec, *, dtype: torch.dtype) -> Tensor:
    """(n, H, W, 3) uint8 or float in 0..255, each the image at one of geometry.SAMPLES -> (n, H, W, 3) normalised."""
    device = samples[0].device
    mean, std = geometry.folded(spec)
    scale, shift = (_sent(values, device) for values in (1 / std, -mean / std))
    values = {name: _sent(getattr(geometry, name)[:, None], device) for name in spec.effects}
    if device.type != "cpu":
        return torch.addcmul(shift, _with_effects(_sum(samples) / len(samples), values), scale).to(dtype)
    out = torch.empty(samples[0].shape, dtype=torch.float32)
    for i in range(len(out)):
        pixels = _sum_on_cpu([sample[i].numpy() for sample in samples])
        if values:
            mean_of = torch.from_numpy(pixels.astype(np.float32) / len(samples))[None]
            pixels = _with_effects(mean_of, {name: v[i : i + 1] for name, v in values.items()})[0].numpy()
        _affine(pixels, scale[i] if values else scale[i] / len(samples), shift[i], out=out[i].numpy())
    return out.to(dtype)


# On a CPU numpy takes half of torch's time for these, image by image: bytes are summed as short integers, an image fits
# into a core's cache and a batch does not, and whole rows fill vector registers as three channels do not.


def _sum_on_cpu(samples: Sequence[NDArray[Any]]) -> NDArray[Any]:
    kind = np.uint16 if samples[0].dtype == np.uint8 else np.float32
    total: NDArray[Any] = np.add(samples[0], samples[1] if len(samples) > 1 else 0, dtype=kind)
    for sample in samples[2:]:
        np.add(total, sample, out=total)
    return total


def _affine(pixels: NDArray[Any], scale: Tensor, shift: Tensor, *, out: NDArray[np.float32]) -> None:
    height, width, _ = out.shape
    row_scale, row_shift = (np.tile(t.numpy().ravel(), width) for t in (scale, shift))
    rows = out.reshape(height, -1)
    np.multiply(pixels.reshape(height, -1), row_scale, out=rows)
    np.add(rows, row_shift, out=rows)


def _sum(samples: Sequence[Tensor]) -> Tensor:
    total = samples[0].to(torch.float32, copy=True)
    for sample in samples[1:]:
        total = total.add_(sample)
    return total


def _with_effects(pixels: Tensor, values: dict[str, Tensor]) -> Tensor:
    for name, by in values.items():
        pixels = _EFFECTS[name](pixels, by)
    return pixels


def _grey(pixels: Tensor) -> Tensor:
    """(n, H, W, 1): luma as in JPEG."""
    red, green, blue = pixels.unbind(-1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[..., None]


def _sent(values: object, device: torch.device) -> Tensor:
    """(n, k) numbers as (n, 1, 1, k) float32 on the device."""
    return sent(torch.as_tensor(values, dtype=torch.float32)[:, None, None], device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
