"""How does torch render the same spec? The oracle that DALI is tested against, and the engine where there is no DALI.

Pillow decodes, torch filters and warps in float32, one sample at a time. It is written to be right and readable: for
speed use DALI.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from thawline.dataio.batch import ImageBatch
from thawline.dataio.closing import Closing
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.colours import finish
from thawline.dataio.pixels.geometry import SAMPLES
from thawline.dataio.pixels.pictures import VOID, decode
from thawline.dataio.pixels.spec import Border, ImageSpec
from thawline.dataio.pixels.work import Mend, Work

_PADDING: dict[Border, str] = {"reflect": "reflection", "replicate": "border", "constant": "zeros"}


def prefilter(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, 3) float -> (h, w, 3) float, antialiased with a triangle filter as wide as the shrink."""
    if size[1] == 1 < size[0]:  # torch 2.15 repeats the first row where the output is one pixel wide
        return prefilter(image.transpose(0, 1), (1, size[0])).transpose(0, 1)
    nchw = image.permute(2, 0, 1)[None]
    return F.interpolate(nchw, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def warp(
    image: torch.Tensor, homography: NDArray[np.float64], *, size_px: int, border: Border, nearest: bool = False
) -> torch.Tensor:
    """Resample once: (H, W, C) float -> (size_px, size_px, C) float, bilinear, through output -> source pixels."""
    height, width = image.shape[:2]
    centres = np.arange(size_px) + 0.5
    x, y = np.meshgrid(centres, centres)
    sx, sy, sz = np.moveaxis(np.stack([x, y, np.ones_like(x)], -1) @ homography.T, -1, 0)
    unit = np.stack([2 * sx / sz / width - 1, 2 * sy / sz / height - 1], -1)
    grid = torch.from_numpy(unit).to(image.dtype)[None]
    nchw = image.permute(2, 0, 1)[None]
    mode = "nearest" if nearest else "bilinear"
    out = F.grid_sample(nchw, grid, mode=mode, padding_mode=_PADDING[border], align_corners=False)
    return out[0].permute(1, 2, 0)


def render(work: Work, i: int, spec: ImageSpec) -> list[torch.Tensor]:
    """Sample i of the work before its colours: for each of geometry.SAMPLES (size_px, size_px, 3) float32, 0..255."""
    image = torch.from_numpy(decode(work.encoded[i], path=work.paths[i])).float()
    height, width = (int(v) for v in work.geometry.prefilter_px[i])
    if height:
        image = prefilter(image, (height, width))
    maps = (work.geometry.sampled(k)[i] for k in range(len(SAMPLES) if work.geometry.sampling[i] else 1))
    return [warp(image, to_source, size_px=work.size_px, border=spec.border) for to_source in maps]


def render_mask(work: Work, i: int, spec: ImageSpec) -> torch.Tensor:
    """The mask of sample i through the same map, nearest neighbour: (size_px, size_px) int64 class indices."""
    assert work.masks is not None
    mask = torch.from_numpy(work.masks[i])[..., None].float() - VOID  # so that a constant border's zeros are VOID
    size = np.array([mask.shape[:2]])
    to_mask = work.geometry.onto(np.repeat(size, len(work.ids), axis=0))[i]
    return (warp(mask, to_mask, size_px=work.size_px, border=spec.border, nearest=True)[..., 0] + VOID).long()


class ReferenceEngine(Closing):
    """Renders work with torch, on the CPU; the finished batch is copied to `device`."""

    def __init__(
        self,
        spec: ImageSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        spent: dict[str, float] | None = None,
    ) -> None:
        """spent: seconds by name; what `finish` takes is added to its "finish"."""
        self._spec, self._device, self._dtype = spec, device, dtype
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="thawline-render")
        self._spent = {"finish": 0.0} if spent is None else spent

    def run(self, works: Iterator[Work], mend: Mend | None = None) -> Iterator[ImageBatch]:
        """One batch for each Work, in order. Files that cannot be decoded go to `mend`, or raise EngineError."""
        for work in works:
            yield self._batch(work, mend)

    def _batch(self, work: Work, mend: Mend | None) -> ImageBatch:
        while True:
            done = list(self._pool.map(lambda i, w=work: self._rendered(w, i), range(len(work.ids))))
            broken = {i: error for i, error in enumerate(done) if isinstance(error, EngineError)}
            if not broken:
                break
            if mend is None:
                raise next(iter(broken.values()))
            work = mend(work, {i: str(error) for i, error in broken.items()})
        # the same number for each: a sample that needs the centre alone repeats it
        whole = [(image * len(SAMPLES))[: len(SAMPLES)] for image in done if isinstance(image, list)]
        samples = [torch.stack(images) for images in zip(*whole, strict=True)]
        if work.masks is None:
            targets = torch.from_numpy(work.targets)
        else:
            targets = torch.stack([render_mask(work, i, self._spec) for i in range(len(work.ids))])
        began = perf_counter()
        images = finish(samples, work.geometry, self._spec, dtype=self._dtype).to(self._device).permute(0, 3, 1, 2)
        self._spent["finish"] += perf_counter() - began
        return ImageBatch(
            inputs=images,
            targets=targets.to(self._device),
            ids=torch.from_numpy(work.ids),
        )

    def _rendered(self, work: Work, i: int) -> list[torch.Tensor] | EngineError:
        try:
            return render(work, i, self._spec)
        except EngineError as error:
            return error

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
