"""Where in its image lies what a model said of the square that it saw? Points and masks, out of the square again."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.pixels.pictures import VOID


def points_on_images(points: NDArray[np.float32], geometry: Geometry, size_px: int) -> list[NDArray[np.float64]]:
    """Points (n, K, 2) x, y in [-1, 1] -> of each image (K, 2) x, y in its own pixels, upright."""
    return list(geometry.taken_back(points.astype(np.float64), size_px=size_px))


def masks_on_images(masks: NDArray[np.uint8], geometry: Geometry, size_px: int) -> list[NDArray[np.uint8]]:
    """Classes (n, size_px, size_px) -> of each image (height, width), upright; VOID where the model saw nothing of it.

    A pixel has the class of the square's pixel that its centre lies in.
    """
    from_images = np.linalg.inv(geometry.onto(geometry.source_px))
    return [
        _warped(mask, from_image / from_image[2, 2], height=int(height), width=int(width))
        for mask, from_image, (height, width) in zip(masks, from_images, geometry.source_px, strict=True)
    ]


def _warped(mask: NDArray[np.uint8], from_image: NDArray[np.float64], *, height: int, width: int) -> NDArray[np.uint8]:
    warped = Image.fromarray(mask).transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        from_image.ravel()[:8].tolist(),
        Image.Resampling.NEAREST,
        fillcolor=VOID,
    )
    return np.asarray(warped)
