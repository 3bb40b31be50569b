"""How do warped samples become what the model sees? Their mean, its colours and normalisation: torch, for both engines.

On the device where they lie. Here, and not in DALI's graph, since its arithmetic takes five times as long for the mean
of three images on a CPU, and a GPU does not mind who asks. Nothing here makes the host wait.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dataio.geometry import Geometry
from dataio.spec import ImageSpec

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
        return torch.addcmul(shift, _with_effects(_mean(samples), values), scale).to(dtype)
    # Image by image and row by row, since an image fits into a core's cache and a row into its registers: a third of
    # the time that whole batches take.
    out = torch.empty(samples[0].shape, dtype=dtype)
    _, height, width, _ = out.shape
    for i in range(len(out)):
        one = slice(i, i + 1)
        pixels = _with_effects(_mean([sample[one] for sample in samples]), {n: v[one] for n, v in values.items()})
        row_shift, row_scale = (t[i].expand(1, width, 3).reshape(1, -1) for t in (shift, scale))
        out[i].view(height, -1).copy_(torch.addcmul(row_shift, pixels.view(height, -1), row_scale))
    return out


def _mean(samples: Sequence[Tensor]) -> Tensor:
    total = samples[0].to(torch.float32, copy=True)
    for sample in samples[1:]:
        total = total.add_(sample)
    return total.div_(len(samples))


def _with_effects(pixels: Tensor, values: dict[str, Tensor]) -> Tensor:
    for name, by in values.items():
        pixels = _EFFECTS[name](pixels, by)
    return pixels


def _grey(pixels: Tensor) -> Tensor:
    """(n, H, W, 1): luma as in JPEG."""
    red, green, blue = pixels.unbind(-1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[..., None]


def _sent(values: object, device: torch.device) -> Tensor:
    """(n, k) numbers as (n, 1, 1, k) float32 on the device, without waiting for it."""
    tensor = torch.as_tensor(values, dtype=torch.float32)[:, None, None]
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
