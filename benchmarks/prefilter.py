"""When must a source be filtered down before the warp, and how far? The figures behind geometry's MAX_SHRINK.

Photos from slightly to far larger than the model's input go through the reference engine's maths with each choice of
what the prefilter leaves to the warp, under the training stream's own geometry. Quality only: see presize.py for cost.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import check_positive, report, say, spread
from benchmarks.photos import write_photos
from benchmarks.presize import from_source, ideal, psnr
from dataio import geometry, reference
from dataio.geometry import Floats, Ints
from dataio.spec import ImageSpec

QUESTION = "when must a source be filtered down before the warp, and how far?"
SHRINKS = (1.2, 1.5, 1.7, 2.0, 2.5, 750 / 224, 1500 / 224)
RESIDUALS = (1.0, 1.25, 1.5, 1.7, 2.0)
SPEC = ImageSpec()
SEED = 42


def main(*, images: int = 8, out: Path | None = None) -> dict[str, Any]:
    """Report the PSNR to the ideal without a prefilter and with one that leaves each residual shrink to the warp.

    Args:
        images: Photos of each size.
        out: Also write the JSON here.
    """
    check_positive(images=images)
    results = {}
    for shrink in SHRINKS:
        height = round(shrink * SPEC.size_px)
        say(f"photos of {height * 4 // 3} x {height}")
        results[f"shrink {shrink:.2f}"] = _compare(images, height * 4 // 3, height)
    settings = {"images": images, "size_px": SPEC.size_px, "unit": "PSNR, dB"}
    return report("prefilter", QUESTION, settings, results, out=out)


def _compare(images: int, width: int, height: int) -> dict[str, Any]:
    ids, zeros = np.arange(images), np.zeros(images, np.int64)
    sizes: dict[str, Any] = {"widths": np.full(images, width, np.int32), "heights": np.full(images, height, np.int32)}
    drawn = geometry.draw(SPEC, seed=SEED, epochs=zeros, ids=ids, **sizes)
    homographies = from_source(drawn, width, height)
    steps = shrinks(homographies, size_px=SPEC.size_px)
    found: dict[str, list[float]] = {"none": [], **{f"to {residual}": [] for residual in RESIDUALS}}
    for jpeg, homography, shrink in zip(
        write_photos(images, width=width, height=height, seed=SEED), homographies, steps, strict=True
    ):
        source = reference.decode(jpeg)
        best = ideal(source, homography, size_px=SPEC.size_px, border=SPEC.border)
        image = torch.from_numpy(source).float()
        for name, residual in zip(found, (shrink, *RESIDUALS), strict=True):
            if residual <= shrink:
                found[name].append(psnr(_render(image, homography, residual / shrink), best))
    measured = {name: spread(values) for name, values in found.items() if len(values) == images}
    return {"actual": spread(steps), **measured}


def _render(image: torch.Tensor, homography: Floats, factor: float) -> Floats:
    """Filter (H, W, 3) down by `factor` (1 for not at all), then warp once, as the engines do."""
    height, width = image.shape[:2]
    size: Ints = np.maximum(1, np.round(np.array([height, width]) * factor)).astype(np.int64)
    if factor < 1:
        image = reference.prefilter(image, (int(size[0]), int(size[1])))
    homography = np.diag([size[1] / width, size[0] / height, 1.0]) @ homography
    out: Floats = reference.warp(image, homography, size_px=SPEC.size_px, border=SPEC.border).double().numpy()
    return out


def shrinks(homographies: Floats, *, size_px: int) -> Floats:
    """Source pixels an output pixel at the centre, along the steeper axis, (n,); by differences."""
    step = 1e-3
    points = size_px / 2 + step * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    there = geometry.project(homographies, np.tile(points, (len(homographies), 1, 1)))
    jacobian = np.stack([there[:, 0] - there[:, 1], there[:, 2] - there[:, 3]], axis=-1) / (2 * step)
    largest: Floats = np.linalg.norm(jacobian, ord=2, axis=(1, 2))
    return largest
