"""How good are the pixels of a turned, zoomed and shrunk photograph, ours and others', against an ideal?

Real photographs, square cuts, by rotation, zoom and shrink: the engines, fastai's way and torchvision's (peers.py),
each through the same homography, compared over the pixels that all of them see. The ideal is a box over the output
pixel, 8 x 8 samples of it in float64. Two other ideals tell how far to trust it, on the first photograph: 16 x 16
samples, and a Lanczos filter as wide as the output pixel in place of the box. presize.py has the times.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torchmetrics.functional.image import structural_similarity_index_measure

from thawline.benchmarks import peers
from thawline.benchmarks.harness import check_positive, report, say, spread, torch_threads
from thawline.benchmarks.peers import Views
from thawline.benchmarks.photos import real_photos
from thawline.benchmarks.prefilter import shrinks
from thawline.benchmarks.presize import SUB, Jpegs, ideal, make_engine, make_work, psnr, rendered
from thawline.dataio.pixels import geometry, pictures, reference
from thawline.dataio.pixels.geometry import Floats
from thawline.dataio.pixels.spec import ImageSpec

QUESTION = "how good are the pixels of a turned, zoomed and shrunk photograph, against an ideal?"
SPEC = ImageSpec(size_px=224, presize_px=460)
SIZES_PX = ((224, 224), (375, 224), (420, 128))
"""Side of the source and of the output; the last as in progressive resizing."""
ROTATIONS_DEG = (0.0, 10.0, 30.0)
ZOOMS = (1.0, 1.1, 2.0)
SEED = 42
LANCZOS_LOBES = 3


def main(*, images: int = 2, out: Path | None = None) -> dict[str, Any]:
    """Report PSNR and SSIM of each way for each rotation, zoom and shrink, and their means over all.

    Args:
        images: Photographs a cell, of two in turn.
        out: Also write the JSON here.
    """
    check_positive(images=images)
    results: dict[str, dict[str, Any]] = {}
    with torch_threads(1):
        for (source_px, size_px), angle_deg, zoom in product(SIZES_PX, ROTATIONS_DEG, ZOOMS):
            say(f"{source_px} to {size_px}, turned by {angle_deg:g}, zoomed by {zoom:g}")
            name = f"{source_px} to {size_px}, {angle_deg:g} deg, x {zoom:g}"
            results[name] = _cell(images, source_px, size_px, angle_deg, zoom)
    results["mean"] = _means(results)
    settings = {"images": images, "presize_px": SPEC.presize_px, "sub": SUB, "unit": "PSNR, dB; SSIM"}
    return report("presize_quality", QUESTION, settings, results, out=out)


def _means(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    columns = next(iter(results.values()))
    return {key: float(np.mean([_middle(row[key]) for row in results.values()])) for key in columns}


def _middle(value: Any) -> float:
    return float(value["median"]) if isinstance(value, dict) else float(value)


def _cell(images: int, source_px: int, size_px: int, angle_deg: float, zoom: float) -> dict[str, Any]:
    """Spreads over the images: <way>_psnr_db, <way>_ssim, and how far the other two ideals are from the first."""
    jpegs = real_photos(images, width=source_px, height=source_px, seed=SEED)
    spec = peers.resized(SPEC, size_px)
    views = turned(images, source_px, spec, angle_deg=angle_deg, zoom=zoom)
    seen = peers.interior(views, spec)
    sources = [pictures.decode(jpeg) for jpeg in jpegs]
    options: dict[str, Any] = {"size_px": size_px, "border": spec.border}
    ideals = [ideal(s, total, **options) for s, total in zip(sources, views.totals, strict=True)]
    ways = _pictures(jpegs, views, spec)
    ways["ideal_16x16"] = ideal(sources[0], views.totals[0], sub=2 * SUB, **options)[None]
    ways["ideal_lanczos"] = lanczos(sources[0], views.totals[0], **options)[None]
    found: dict[str, Any] = {"shrink": float(shrinks(views.totals[:1], size_px=size_px)[0])}
    for name, rendered_by in ways.items():
        both = list(zip(rendered_by, ideals, seen, strict=False))
        found[f"{name}_psnr_db"] = spread([psnr(picture[k], best[k]) for picture, best, k in both])
        found[f"{name}_ssim"] = spread([ssim(picture, best, k) for picture, best, k in both])
    return found


def turned(n: int, source_px: int, spec: ImageSpec, *, angle_deg: float, zoom: float) -> Views:
    """n times the whole square of source_px, turned and zoomed about its middle, in colours as they are."""
    c, s = np.cos(np.deg2rad(angle_deg)) / zoom, np.sin(np.deg2rad(angle_deg)) / zoom
    turn = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    half, unit = source_px / 2, 2 / spec.size_px
    to_source = np.array([[half, 0.0, half], [0.0, half, half], [0.0, 0.0, 1.0]])
    from_output = np.array([[unit, 0.0, -1.0], [0.0, unit, -1.0], [0.0, 0.0, 1.0]])
    return Views(
        totals=np.tile(to_source @ turn @ from_output, (n, 1, 1)),
        crops=np.tile([0, 0, source_px], (n, 1)),
        windows=np.tile([0, 0, spec.presize_px, spec.presize_px], (n, 1)),
        turns=np.tile(turn, (n, 1, 1)),
        brightness=np.full(n, 0.5),
        contrast=np.ones(n),
    )


def _pictures(jpegs: Jpegs, views: Views, spec: ImageSpec) -> dict[str, Floats]:
    """Each way's (n, size_px, size_px, 3), 0 to 255."""
    n = len(jpegs)
    work = make_work(jpegs, _geometry(views, spec), np.arange(n), size_px=spec.size_px)
    found = {}
    for name in ("reference", "dali"):
        engine = make_engine(name, spec, max_batch=n, device=torch.device("cpu"), threads=1, dtype=torch.float32)
        found[name] = rendered(engine, work, spec)
        engine.close()
    found["fastai"] = 255 * peers.fastai_pixels(jpegs, views, spec).permute(0, 2, 3, 1).double().numpy()
    found["torchvision"] = (
        torch.stack(peers.torchvision_pixels(jpegs, views, spec)).permute(0, 2, 3, 1).double().numpy()
    )
    return found


def _geometry(views: Views, spec: ImageSpec) -> geometry.Geometry:
    """What the engines need for these views, under geometry's own rule against aliasing."""
    n = len(views.totals)
    sizes = views.crops[:, [2, 2]]
    side = sizes[:, 0].astype(np.int32)
    half = np.full(n, 0.5)
    maps = geometry._finish(spec, views.turns, sizes, half, half, spec.size_px)
    return replace(geometry.centred(spec, widths=side, heights=side), **maps)


def lanczos(source: NDArray[np.uint8], total: Floats, *, size_px: int, border: Any) -> Floats:
    """Another ideal: Lanczos in place of the box, its main lobe an output pixel to either side: (size_px, size_px, 3).

    8 x 8 samples an output pixel, weighted over three pixels to either side.
    """
    reach = LANCZOS_LOBES
    finer = total @ np.array([[1 / SUB, 0, -reach], [0, 1 / SUB, -reach], [0, 0, 1.0]])
    samples = reference.warp(
        torch.from_numpy(source).double(), finer, size_px=SUB * (size_px + 2 * reach), border=border
    ).permute(2, 0, 1)[:, None]
    away = (np.arange(2 * reach * SUB) + 0.5) / SUB - reach
    taps = torch.from_numpy(np.sinc(away) * np.sinc(away / reach))
    taps, trim = taps / taps.sum(), SUB // 2
    samples = samples[:, :, trim:-trim, trim:-trim]
    out = F.conv2d(
        F.conv2d(samples, taps[None, None, None], stride=(1, SUB)), taps[None, None, :, None], stride=(SUB, 1)
    )
    found: Floats = out[:, 0].permute(1, 2, 0).numpy()
    return found


def ssim(picture: Floats, best: Floats, seen: NDArray[np.bool_]) -> float:
    """Mean structural similarity over the pixels that all ways see."""
    a, b = (torch.from_numpy(each).float().permute(2, 0, 1)[None].contiguous() for each in (picture, best))
    _, local = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    return float(local[0].mean(dim=0).numpy()[seen].mean())
