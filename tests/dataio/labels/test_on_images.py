"""Are points and masks of the model's square found again in images of any shape? Closed forms."""

from typing import Any

import numpy as np
import pytest

from thawline.dataio.labels.on_images import masks_on_images, points_on_images
from thawline.dataio.pixels.geometry import Geometry, centred
from thawline.dataio.pixels.pictures import VOID
from thawline.dataio.pixels.spec import ImageSpec

SIDE = 8


def wide(presize: Any, scale: int) -> Geometry:
    """An image of 40 x 30 px, or so many times that, as validation sees it."""
    spec = ImageSpec(size_px=SIDE, presize_px=SIDE, presize=presize)
    return centred(spec, widths=np.array([40 * scale], np.int32), heights=np.array([30 * scale], np.int32))


# (left, top, width, height) of the square in the image
SQUARES = {"crop": (5, 0, 30, 30), "squish": (0, 0, 40, 30), "pad": (0, -5, 40, 40)}


@pytest.mark.parametrize("scale", [1, 9])
@pytest.mark.parametrize("presize", SQUARES)
def test_the_squares_points_and_pixels_lie_where_the_square_was_cut(presize: str, scale: int) -> None:
    """At scale 9 the image is filtered down first, which must not show."""
    left, top, width, height = (scale * side for side in SQUARES[presize])
    geometry = wide(presize, scale)
    points = np.array([[[-1, -1], [0, 0], [1, 0.5]]], np.float32)
    expected: list[list[float]] = [
        [left, top],
        [left + width / 2, top + height / 2],
        [left + width, top + 0.75 * height],
    ]
    np.testing.assert_allclose(points_on_images(points, geometry, SIDE)[0], expected, atol=1e-9)

    mask = np.random.default_rng(0).integers(0, 5, (SIDE, SIDE)).astype(np.uint8)
    (found,) = masks_on_images(mask[None], geometry, SIDE)
    y, x = np.mgrid[: 30 * scale, : 40 * scale] + 0.5
    row, column = np.floor((y - top) / height * SIDE).astype(int), np.floor((x - left) / width * SIDE).astype(int)
    inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    np.testing.assert_array_equal(found, np.where(inside, mask[row.clip(0, 7), column.clip(0, 7)], VOID))
    assert inside.all() == (presize != "crop")
