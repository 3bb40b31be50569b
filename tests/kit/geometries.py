"""Which specs and draws do tests of the geometry share?"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kit.images import EVERYTHING, PLAIN
from thawline.dataio.pixels.geometry import Geometry, draw, project
from thawline.dataio.pixels.spec import ImageSpec

SEED, EPOCH = 42, 3
Floats = NDArray[np.float64]

SIZE = 32

SPEC = ImageSpec(size_px=SIZE, presize_px=48, p_affine=0.6, p_lighting=0.6, **EVERYTHING)

CORNERS = np.array([[0, 0], [SIZE, 0], [SIZE, SIZE], [0, SIZE]], np.float64)

GRID = np.stack(np.meshgrid(np.linspace(0, SIZE, 5), np.linspace(0, SIZE, 5)), -1).reshape(-1, 2)

ALONE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flip": {"flip": True},
    "rotation": {"rotate_deg": 30.0},
    "zoom": {"max_zoom": 1.5},
    "perspective": {"max_warp": 0.3},
    "random resized crop": {"min_scale": 0.3},
    "symmetries": {"dihedral": True, "flip": True},
    "zoom in and out": {"min_zoom": 0.7, "max_zoom": 1.2},
}


def alone(name: str, **others: Any) -> ImageSpec:
    return replace(SPEC, **{**PLAIN, "min_scale": 1.0, "p_affine": 1.0, **ALONE[name], **others})


def drawn(spec: ImageSpec, n: int = 400, *, width: int = 40, height: int = 30, epoch: int = EPOCH) -> Geometry:
    ids, size = np.arange(n, dtype=np.int64), (np.full(n, width, np.int32), np.full(n, height, np.int32))
    return draw(spec, seed=SEED, epochs=np.full(n, epoch, np.int64), ids=ids, widths=size[0], heights=size[1])


def unfiltered(g: Geometry, width: int, height: int, points: Floats) -> Floats:
    """Output points (k, 2) -> points of the source as decoded, (n, k, 2), whether or not it is filtered first."""
    factor = np.where(g.prefilter_px > 0, np.array([height, width]) / np.maximum(g.prefilter_px, 1), 1.0)
    found: Floats = project(g.homographies, np.tile(points, (len(factor), 1, 1))) * factor[:, None, ::-1]
    return found
