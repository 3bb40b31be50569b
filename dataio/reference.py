"""How does torch render the same spec? The oracle that DALI is tested against, and the way without DALI.

Decodes with Pillow, filters and warps with torch in float32, one sample at a time. Written to be right and
readable: for speed use DALI.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dataio.batch import Batch
from dataio.errors import EngineError
from dataio.spec import Border, ImageSpec
from dataio.work import Work

_PADDING: dict[Border, str] = {"reflect": "reflection", "replicate": "border", "constant": "zeros"}


def decode(encoded: NDArray[np.uint8], *, path: str = "the image") -> NDArray[np.uint8]:
    """Encoded file -> (H, W, 3) uint8 RGB, upright by its EXIF orientation. Raises EngineError, naming the path."""
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow's own sentence for what is no image names an object in memory.
        why = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise EngineError(
            f"{path} cannot be decoded ({why}): the batch cannot be made; remove or mend the file and index again"
        ) from error


def prefilter(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, 3) float -> (h, w, 3) float, antialiased with a triangle filter as wide as the shrink."""
    nchw = image.permute(2, 0, 1)[None]
    return F.interpolate(nchw, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def warp(image: torch.Tensor, homography: NDArray[np.float64], *, size_px: int, border: Border) -> torch.Tensor:
    """Resample once: (H, W, 3) float -> (size_px, size_px, 3) float, bilinear, through output -> source pixels."""
    height, width = image.shape[:2]
    centres = np.arange(size_px) + 0.5
    x, y = np.meshgrid(centres, centres)
    sx, sy, sz = np.moveaxis(np.stack([x, y, np.ones_like(x)], -1) @ homography.T, -1, 0)
    unit = np.stack([2 * sx / sz / width - 1, 2 * sy / sz / height - 1], -1)
    grid = torch.from_numpy(unit).to(image.dtype)[None]
    nchw = image.permute(2, 0, 1)[None]
    out = F.grid_sample(nchw, grid, mode="bilinear", padding_mode=_PADDING[border], align_corners=False)
    return out[0].permute(1, 2, 0)


def render(work: Work, i: int, spec: ImageSpec) -> torch.Tensor:
    """Sample i of the work, every step of it: (size_px, size_px, 3) float32, normalised."""
    image = torch.from_numpy(decode(work.encoded[i], path=work.paths[i])).float()
    height, width = (int(v) for v in work.geometry.prefilter_px[i])
    if height:
        image = prefilter(image, (height, width))
    image = warp(image, work.geometry.homographies[i], size_px=spec.size_px, border=spec.border)
    mean, std = work.geometry.folded(spec)
    return (image - torch.from_numpy(mean[i])) / torch.from_numpy(std[i])


class ReferenceEngine:
    """Renders work with torch, on the CPU; the finished batch is copied to `device`."""

    name = "reference"
    reusable = True

    def __init__(self, spec: ImageSpec, *, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        self._spec, self._device, self._dtype = spec, device, dtype
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="thawline-render")

    def run(self, works: Iterator[Work]) -> Iterator[Batch]:
        """One Batch a Work, in order."""
        for work in works:
            images = torch.stack(list(self._pool.map(lambda i, w=work: render(w, i, self._spec), range(len(work.ids)))))
            yield Batch(
                images=images.to(self._device, self._dtype).permute(0, 3, 1, 2),
                targets=torch.from_numpy(work.targets).to(self._device),
                ids=torch.from_numpy(work.ids),
            )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
