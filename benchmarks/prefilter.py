"""How should the source be kept from aliasing in the warp? What each way costs and how good it is, by shrink.

The figures behind geometry's constants: how many samples an output pixel is the mean of, where in it they lie, and how
far the source is filtered down first. Quality is told by the reference engine's maths, rounded to bytes where DALI
writes bytes; cost by DALI on the CPU and the mean in torch, as the engine has them (finish.py), in one thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from thawline.benchmarks import peers
from thawline.benchmarks.harness import BenchmarkError, check_positive, measure, report, say, spread, torch_threads
from thawline.benchmarks.photos import real_photos, write_photos
from thawline.benchmarks.presize import HEIGHT, SEED, SPEC, WIDTH, Jpegs, ideal, psnr
from thawline.dataio.pixels import geometry, pictures, reference
from thawline.dataio.pixels.colours import finish
from thawline.dataio.pixels.geometry import Floats, Geometry
from thawline.dataio.pixels.spec import ImageSpec

QUESTION = "how should the source be kept from aliasing in the warp?"
SOURCES_PX = ((210, 210), (WIDTH, HEIGHT), (420, 420), (750, 750), (1500, 1500))
"""Width and height: real cuts where the photographs are large enough, else synthetic."""
REAL_PX = 427
"""Height of the real photographs."""
SIZES_PX = (224, 160)
BATCH = 16
RADII_PX = (0.30, 0.34, 0.38, 0.42)
RESIDUALS = (1.7, 2.0, 2.5, 3.0, 3.4)


@dataclass(frozen=True)
class Way:
    """What happens to the source before and while the warp looks at it."""

    samples: Floats
    """(k, 2): where the samples of an output pixel lie, x and y from its centre, in output pixels."""
    leaves: float = geometry.MAX_SHRINK
    """Filter the source down until the warp shrinks by this, where it shrinks by more."""
    always: bool = False
    """Spread the samples in maps that do not shrink, too."""

    def applied(self, drawn: Geometry, *, size_px: int) -> Geometry:
        """The geometry with this way's prefilter and spread in place of its own."""
        totals = peers.from_source(drawn)
        shrink = shrinks(totals, size_px=size_px)
        factor = np.minimum(1.0, self.leaves / shrink)[:, None]
        prefilter_px = np.where(factor < 1, np.maximum(1, np.round(drawn.source_px * factor)), 0).astype(np.int64)
        low, high = geometry.SPREAD_SHRINK
        grown = np.clip((shrink * factor[:, 0] - low) / (high - low), 0.0, 1.0)
        sampling = np.ones_like(grown) if self.always else grown
        bare = replace(drawn, homographies=totals, prefilter_px=np.zeros_like(prefilter_px), sampling=sampling)
        seen_px = np.where(prefilter_px > 0, prefilter_px, drawn.source_px)
        return replace(bare, homographies=bare.onto(seen_px), prefilter_px=prefilter_px)

    def maps(self, applied: Geometry) -> Floats:
        """Output pixel -> pixel of the filtered source for each sample: (k, n, 3, 3)."""
        moves = np.tile(np.eye(3), (len(self.samples), len(applied.sampling), 1, 1))
        moves[..., :2, 2] = self.samples[:, None] * applied.sampling[:, None]
        found: Floats = applied.homographies @ moves
        return found


def circle(radius_px: float) -> Floats:
    """geometry.SAMPLES on a circle of another radius."""
    return geometry.SAMPLES * radius_px / np.linalg.norm(geometry.SAMPLES, axis=1, keepdims=True)


ONE = np.zeros((1, 2))
WAYS = {
    "one, no prefilter": Way(ONE, leaves=np.inf),
    "one, leaves 1.7": Way(ONE, leaves=1.7),
    "two on a diagonal": Way(np.array([[0.25, 0.25], [-0.25, -0.25]])),
    **{f"three at {radius}": Way(circle(radius)) for radius in RADII_PX},
    "three, always spread": Way(geometry.SAMPLES, always=True),
    "three, no prefilter": Way(geometry.SAMPLES, leaves=np.inf),
    **{f"three, leaves {leaves}": Way(geometry.SAMPLES, leaves=leaves) for leaves in RESIDUALS},
    "four, rotated grid": Way(np.array([[0.125, 0.375], [-0.375, 0.125], [-0.125, -0.375], [0.375, -0.125]])),
    "four, 2 x 2": Way(np.array([[0.25, 0.25], [-0.25, 0.25], [-0.25, -0.25], [0.25, -0.25]])),
}


def main(*, images: int = 8, repeats: int = 5, out: Path | None = None) -> dict[str, Any]:
    """Report the PSNR to the ideal of each way, and fastai's, at each shrink; then the ways' cost on 500 x 375 JPEGs.

    Args:
        images: Photos of each size.
        repeats: Measured passes for the cost.
        out: Also write the JSON here.
    """
    check_positive(images=images)
    results = {}
    with torch_threads(1):
        for width, height in SOURCES_PX:
            make, kind = (real_photos, "real") if height <= REAL_PX else (write_photos, "synthetic")
            jpegs = make(images, width=width, height=height, seed=SEED)
            for size_px in SIZES_PX:
                name = f"{width} x {height} to {size_px}, {kind}"
                say(name)
                results[name] = _qualities(jpegs, width, height, size_px)
        results[f"CPU-ms, {WIDTH} x {HEIGHT} to {SPEC.size_px}"] = _costs(repeats)
    unit = "PSNR, dB; the last row CPU-ms an image with DALI"
    settings = {"images": images, "batch": BATCH, "max_shrink": geometry.MAX_SHRINK, "unit": unit}
    return report("prefilter", QUESTION, settings, results, out=out)


def shrinks(homographies: Floats, *, size_px: int) -> Floats:
    """Source pixels an output pixel at the centre, along the steeper axis, (n,); by differences."""
    step = 1e-3
    points = size_px / 2 + step * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    there = geometry.project(homographies, np.tile(points, (len(homographies), 1, 1)))
    jacobians = np.stack([there[:, 0] - there[:, 1], there[:, 2] - there[:, 3]], axis=-1) / (2 * step)
    largest: Floats = np.linalg.norm(jacobians, ord=2, axis=(1, 2))
    return largest


def draw(spec: ImageSpec, n: int, *, width: int, height: int) -> Geometry:
    """The training geometry of n sources of width x height."""
    sizes: dict[str, Any] = {"widths": np.full(n, width, np.int32), "heights": np.full(n, height, np.int32)}
    return geometry.draw(spec, **_who(n), **sizes)


def _who(n: int) -> dict[str, Any]:
    return {"seed": SEED, "epochs": np.zeros(n, np.int64), "ids": np.arange(n)}


def _qualities(jpegs: Jpegs, width: int, height: int, size_px: int) -> dict[str, Any]:
    """The shrink and the PSNR of each way over the images, as spreads."""
    spec = peers.resized(SPEC, size_px)
    drawn = draw(spec, len(jpegs), width=width, height=height)
    views = peers.draw(spec, width=width, height=height, **_who(len(jpegs)))
    seen = peers.interior(views, spec)
    sources = [pictures.decode(jpeg) for jpeg in jpegs]
    ideals = [
        ideal(source, total, size_px=size_px, border=spec.border)
        for source, total in zip(sources, views.totals, strict=True)
    ]
    rendered = {name: render(sources, drawn, way, size_px=size_px) for name, way in WAYS.items()}
    rendered["fastai"] = list(255 * peers.fastai_pixels(jpegs, views, spec).permute(0, 2, 3, 1).double().numpy())
    found = {"shrink": spread(shrinks(views.totals, size_px=size_px))}
    for name, shown in rendered.items():
        found[name] = spread([psnr(a[k], b[k]) for a, b, k in zip(shown, ideals, seen, strict=True)])
    return found


def render(sources: list[NDArray[np.uint8]], drawn: Geometry, way: Way, *, size_px: int) -> list[Floats]:
    """One way's pictures of the decoded sources, as many as `drawn` has: each (size_px, size_px, 3), 0 to 255."""
    applied = way.applied(drawn, size_px=size_px)
    done: list[Floats] = []
    for source, filter_px, maps in zip(sources, applied.prefilter_px, way.maps(applied).swapaxes(0, 1), strict=True):
        image = torch.from_numpy(source).float()
        if filter_px[0]:
            image = reference.prefilter(image, (int(filter_px[0]), int(filter_px[1]))).round()
        samples = [reference.warp(image, to, size_px=size_px, border=SPEC.border).round() for to in maps]
        done.append(torch.stack(samples).mean(dim=0).double().numpy())
    return done


def _costs(repeats: int) -> dict[str, Any]:
    """CPU-ms an image of each way, all images of the usual size, real."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            "DALI is not installed: the ways' costs cannot be measured; install thawline whole"
        ) from error
    jpegs = real_photos(BATCH, width=WIDTH, height=HEIGHT, seed=SEED)
    drawn = draw(SPEC, BATCH, width=WIDTH, height=HEIGHT)
    found: dict[str, Any] = {"shrink": spread(shrinks(peers.from_source(drawn), size_px=SPEC.size_px))}
    for name, way in WAYS.items():
        say(f"measuring {name}")
        found[name] = _timed(stream(jpegs, drawn, way), repeats)
    return found


def _timed(batches: Iterator[torch.Tensor], repeats: int) -> dict[str, float]:
    """CPU-ms an image."""
    rounds = 8
    timing = measure(
        lambda: [next(batches) for _ in range(rounds)],
        images_per_call=rounds * BATCH,
        device=torch.device("cpu"),
        repeats=repeats,
    )
    cost: dict[str, float] = timing.summary()["cpu_ms_per_image"]
    return cost


def stream(jpegs: Jpegs, drawn: Geometry, way: Way) -> Iterator[torch.Tensor]:
    """A way's work with DALI, decode to normalised, on the CPU in one thread: the same batch for ever."""
    applied = way.applied(drawn, size_px=SPEC.size_px)
    pipe = _pipeline(jpegs, applied, way.maps(applied))
    while True:
        samples = [from_dlpack(sample.as_tensor()) for sample in pipe.run()]
        yield finish(samples, applied, SPEC, dtype=torch.float32)


def _pipeline(jpegs: Jpegs, applied: Geometry, maps: Floats) -> Any:
    """DALI's share: decode what is read of each image, filter it, warp it once a sample."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def
    from nvidia.dali.pipeline import do_not_convert

    starts, shapes = applied.windows(SPEC.size_px)
    to_window = np.tile(np.eye(3), (len(jpegs), 1, 1))
    to_window[:, :2, 2] = -starts[:, ::-1]
    filtered, filter_px = applied.prefilter_px[:, 0] > 0, np.maximum(applied.prefilter_px, 1).astype(np.float32)
    inputs = [jpegs, starts.astype(np.int32), shapes.astype(np.int32), filtered, filter_px]
    inputs += [np.ascontiguousarray(to_window @ each, np.float32) for each in maps]
    kinds = [types.UINT8, types.INT32, types.INT32, types.BOOL, *(types.FLOAT,) * (1 + len(maps))]
    ndim = [1, 1, 1, 0, 1, *(2,) * len(maps)]
    linear: dict[str, Any] = {"interp_type": types.INTERP_LINEAR}
    warping: dict[str, Any] = {"size": [SPEC.size_px] * 2, "border_mode": SPEC.border, "pixel_origin": "corner"}

    @do_not_convert
    def warped(images: Any, matrices: list[Any]) -> tuple[Any, ...]:
        return tuple(fn.experimental.warp_perspective(images, matrix=each, **warping, **linear) for each in matrices)

    @pipeline_def(enable_conditionals=True)
    def pipeline() -> Any:
        encoded, start, shape, small, px, *matrices = fn.external_source(
            source=lambda: inputs, num_outputs=len(inputs), dtype=kinds, ndim=ndim, batch=True, no_copy=True
        )
        options: dict[str, Any] = {"start": start, "shape": shape, "axis_names": "HW", "output_type": types.RGB}
        images = fn.decoders.image_slice(encoded, device="cpu", **options)
        if small:
            images = fn.resize(images, size=px, antialias=True, **linear)
        return warped(images, matrices)

    return pipeline(batch_size=len(jpegs), num_threads=1, device_id=None, set_affinity=False, exec_dynamic=True)
