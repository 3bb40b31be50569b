"""How should the source be kept from aliasing in the warp? What each way costs and how good it is, by shrink.

The figures behind geometry's rule. A way may resize the source down first, blur it with a 3 x 3 kernel fitted to each
map, or take 2 x 2 samples an output pixel and average them; the source is interpolated once in each. Quality is told
by the reference engine's maths, rounded to bytes where DALI writes bytes; cost by DALI on the CPU, one thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.harness import BenchmarkError, check_positive, measure, report, say, spread, torch_threads
from benchmarks.peers import Views
from benchmarks.photos import real_photos, write_photos
from benchmarks.presize import HEIGHT, SEED, SPEC, WIDTH, ideal, psnr
from dataio import geometry, reference
from dataio.geometry import Floats

QUESTION = "how should the source be kept from aliasing in the warp?"
REAL_PX = 420
SIDES_PX = (REAL_PX // 2, REAL_PX, 750, 1500)
"""Square sources: real cuts where the photographs are large enough, else synthetic."""
SIZES_PX = (224, 160)
BATCH = 16
BLUR = 1 / 9
"""Variance of the blur as a share of an output pixel's: the box itself is 1/12, and bilinear adds least at centres."""


@dataclass(frozen=True)
class Way:
    """What happens to the source before or while the warp looks at it."""

    leaves: float = np.inf
    """Resize the source down until the warp shrinks by this, where it shrinks by more."""
    mild: float = 1.0
    """Resize the source down by this wherever the warp shrinks at all."""
    blur: float = 0.0
    """Blur (what is left of) the source by this part of the variance of an output pixel's footprint."""
    sub: int = 1
    """sub x sub samples an output pixel, averaged."""

    def factor(self, shrink: float) -> float:
        """How far the source is resized first."""
        return min(1.0, self.leaves / shrink, self.mild if shrink > 1 else 1.0)


WAYS = {
    "plain": Way(),
    "resize to 1.7": Way(leaves=1.7),
    "resize x .9": Way(mild=0.9),
    "resize x .9 to 1.7": Way(leaves=1.7, mild=0.9),
    "blur": Way(blur=BLUR),
    "blur, resize to 2": Way(blur=BLUR, leaves=2.0),
    "2x2": Way(sub=2),
    "2x2, resize to 2.4": Way(sub=2, leaves=2.4),
    "2x2, resize to 3.4": Way(sub=2, leaves=3.4),
    "2x2, blur": Way(sub=2, blur=BLUR),
}


def main(*, images: int = 8, repeats: int = 5, out: Path | None = None) -> dict[str, Any]:
    """Report the PSNR to the ideal of each way at each shrink, then what DALI takes for it on 500 x 375 JPEGs.

    Args:
        images: Photos of each size.
        repeats: Measured passes for the cost.
        out: Also write the JSON here.
    """
    check_positive(images=images)
    results = {}
    for side in SIDES_PX:
        make, kind = (real_photos, "real") if side <= REAL_PX else (write_photos, "synthetic")
        jpegs = make(images, width=side, height=side, seed=SEED)
        for size_px in SIZES_PX:
            say(f"{kind} photos of {side} x {side} to {size_px}")
            views = peers.draw(peers.resized(SPEC, size_px), width=side, height=side, **_who(images))
            found = _qualities(jpegs, views, size_px)
            steps = shrinks(views.totals, size_px=size_px)
            results[f"{side} to {size_px}, {kind}"] = {"shrink": spread(steps), **found}
    with torch_threads(1):
        results[f"CPU-ms, {WIDTH} x {HEIGHT} to {SPEC.size_px}"] = _costs(repeats)
    settings = {"images": images, "batch": BATCH, "unit": "PSNR, dB; the last row CPU-ms an image with DALI"}
    return report("prefilter", QUESTION, settings, results, out=out)


def _who(n: int) -> dict[str, Any]:
    return {"seed": SEED, "epochs": np.zeros(n, np.int64), "ids": np.arange(n)}


def _qualities(jpegs: list[NDArray[np.uint8]], views: Views, size_px: int) -> dict[str, Any]:
    """PSNR of each way over the images, as spreads."""
    seen = peers.interior(views, peers.resized(SPEC, size_px))
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for jpeg, total, where in zip(jpegs, views.totals, seen, strict=True):
        source = reference.decode(jpeg)
        best = ideal(source, total, size_px=size_px, border=SPEC.border)
        image = torch.from_numpy(source).float()
        for name, way in WAYS.items():
            found[name].append(psnr(render(image, total, way, size_px=size_px)[where], best[where]))
    return {name: spread(values) for name, values in found.items()}


def render(image: torch.Tensor, total: Floats, way: Way, *, size_px: int) -> Floats:
    """One way's picture of (H, W, 3) float, 0 to 255, through output -> source pixels: (size_px, size_px, 3)."""
    height, width = image.shape[:2]
    factor = way.factor(float(shrinks(total[None], size_px=size_px)[0]))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if factor < 1:
        image = reference.prefilter(image, size).round()
    total = np.diag([size[1] / width, size[0] / height, 1.0]) @ total
    if way.blur:
        image = _blur(image, kernels(total[None], size_px=size_px, way=way)[0])
    finer = total @ np.diag([1 / way.sub, 1 / way.sub, 1.0])
    warped = reference.warp(image, finer, size_px=way.sub * size_px, border=SPEC.border).round()
    out: Floats = F.avg_pool2d(warped.permute(2, 0, 1), way.sub).permute(1, 2, 0).round().double().numpy()
    return out


def _blur(image: torch.Tensor, kernel: NDArray[np.float32]) -> torch.Tensor:
    padded = F.pad(image.permute(2, 0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, torch.from_numpy(kernel)[None, None])[:, 0].permute(1, 2, 0).round().clamp(0, 255)


def kernels(totals: Floats, *, size_px: int, way: Way) -> NDArray[np.float32]:
    """The (n, 3, 3) blur whose variance is way.blur of an output pixel's footprint in the source, J J^T.

    What the samples of a pixel are spread by already is taken off. At most a variance of one half along an axis: three
    taps hold no wider bell.
    """
    steps = _jacobians(totals, size_px)
    spread_already = (way.sub**2 - 1) / (12 * way.sub**2)
    wanted = steps @ steps.transpose(0, 2, 1) * (way.blur - spread_already)
    side_x, side_y = (np.clip(wanted[:, i, i] / 2, 0, 0.25) for i in (0, 1))
    x, y = (np.stack([side, 1 - 2 * side, side], axis=1) for side in (side_x, side_y))
    found = y[:, :, None] * x[:, None, :]
    tilt = np.array([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]])
    corner = np.clip(wanted[:, 0, 1] / 4, -found[:, 0, 0], found[:, 0, 0])
    return (found + corner[:, None, None] * tilt).astype(np.float32)


def _jacobians(totals: Floats, size_px: int) -> Floats:
    """Source pixels an output pixel at the centre, (n, 2, 2); by differences."""
    step = 1e-3
    points = size_px / 2 + step * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    there = geometry.project(totals, np.tile(points, (len(totals), 1, 1)))
    found: Floats = np.stack([there[:, 0] - there[:, 1], there[:, 2] - there[:, 3]], axis=-1) / (2 * step)
    return found


def shrinks(homographies: Floats, *, size_px: int) -> Floats:
    """Source pixels an output pixel at the centre, along the steeper axis, (n,)."""
    largest: Floats = np.linalg.norm(_jacobians(homographies, size_px), ord=2, axis=(1, 2))
    return largest


def _costs(repeats: int) -> dict[str, Any]:
    """CPU-ms an image of each way, all images of the usual size; nothing is shared between ways but the files."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            "DALI is not installed: the ways' costs cannot be measured; install thawline whole"
        ) from error
    n = 2 * BATCH
    jpegs = write_photos(n, width=WIDTH, height=HEIGHT, seed=SEED)
    views = peers.draw(SPEC, width=WIDTH, height=HEIGHT, **_who(n))
    found = {"shrink": spread(shrinks(views.totals, size_px=SPEC.size_px))}
    for name, way in WAYS.items():
        say(f"measuring {name}")
        found[name] = _timed(_pipeline(jpegs, views, way), repeats)
    return found


def _timed(pipe: Any, repeats: int) -> dict[str, float]:
    """CPU-ms an image."""
    rounds = 4
    timing = measure(
        lambda: [pipe.run() for _ in range(rounds)],
        images_per_call=rounds * BATCH,
        device=torch.device("cpu"),
        repeats=repeats,
    )
    cost: dict[str, float] = timing.summary()["cpu_ms_per_image"]
    return cost


def _pipeline(jpegs: list[NDArray[np.uint8]], views: Views, way: Way) -> Any:
    """DALI's work for a way, decode to normalised, on the CPU in one thread."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    side, inputs = way.sub * SPEC.size_px, _inputs(jpegs, views, way)
    linear: dict[str, Any] = {"interp_type": types.INTERP_LINEAR}

    @pipeline_def(enable_conditionals=True)
    def pipeline() -> Any:
        encoded, resized, px, homography, *kernel = fn.external_source(
            source=inputs,
            num_outputs=5 if way.blur else 4,
            dtype=[types.UINT8, types.BOOL, *(types.FLOAT,) * (3 if way.blur else 2)],
            ndim=[1, 0, 1, 2, *(2,) * bool(way.blur)],
            batch=True,
            no_copy=True,
        )
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        if resized:
            images = fn.resize(images, size=px, antialias=True, **linear)
        if way.blur:
            images = fn.filter(images, *kernel)
        warped = fn.experimental.warp_perspective(
            images, matrix=homography, size=[side, side], border_mode=SPEC.border, pixel_origin="corner", **linear
        )
        if way.sub == 2:  # halving with the plain linear filter is the mean of 2 x 2
            warped = fn.resize(warped, size=[SPEC.size_px, SPEC.size_px], antialias=False, **linear)
        mean, std = (255 * np.array(v, np.float32) for v in (SPEC.mean, SPEC.std))
        return fn.crop_mirror_normalize(warped, mean=list(mean), std=list(std), dtype=types.FLOAT, output_layout="HWC")

    return pipeline(batch_size=BATCH, num_threads=1, device_id=None, set_affinity=False)


def _inputs(jpegs: list[NDArray[np.uint8]], views: Views, way: Way) -> Iterator[Any]:
    """Batches for ever: files, whether to resize and to what, homographies, kernels for those that blur."""
    factors = np.array([way.factor(step) for step in shrinks(views.totals, size_px=SPEC.size_px)])
    px = np.round(factors[:, None] * [HEIGHT, WIDTH])
    totals = np.array([np.diag([w / WIDTH, h / HEIGHT, 1.0]) for h, w in px]) @ views.totals
    blurs = kernels(totals, size_px=SPEC.size_px, way=way)
    finer = (totals @ np.diag([1 / way.sub, 1 / way.sub, 1.0])).astype(np.float32)
    parts = [slice(start, start + BATCH) for start in range(0, len(jpegs), BATCH)]
    inputs = [(jpegs[p], factors[p] < 1, px[p].astype(np.float32), finer[p], blurs[p]) for p in parts]
    return cycle([each if way.blur else each[:-1] for each in inputs])
