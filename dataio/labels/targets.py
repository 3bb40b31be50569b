"""What is each image's target? Labels of a manifest as arrays; tasks.py says which of these a task has.

A mask is a picture: engines warp it (reference.py, dali.py), and this file only decodes it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageOps

from thawline.dataio.errors import EngineError, ManifestError
from thawline.dataio.labels.keypoints import Pairs, partners, points
from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.pixels.pictures import MOST_PIXELS, VOID, check_pixels, hush_pillow, why_undecodable

Targets = NDArray[np.int64] | NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """How the model sees n samples."""

    classes: tuple[str, ...]
    geometry: Geometry
    size_px: int
    swap: Pairs | None = None
    """Pairs of points that change places where an image is mirrored."""


def class_indices(labels: pa.Array, view: View) -> Targets:
    """Names of classes as indices into the classes, (n,) int64. Raises ManifestError for an unknown name."""
    return _indices(labels, view).to_numpy().astype(np.int64)


def class_flags(labels: pa.Array, view: View) -> Targets:
    """Lists of names as zeros and ones, (n, C) float32. Raises ManifestError for an unknown name."""
    targets = np.zeros((len(labels), len(view.classes)), np.float32)
    targets[pc.list_parent_indices(labels).to_numpy(), _indices(labels.flatten(), view).to_numpy()] = 1
    return targets


def _indices(names: pa.Array, view: View) -> pa.Array:
    indices = pc.index_in(names, pa.array(view.classes, pa.string()))
    if indices.null_count:
        raise ManifestError(
            f"{indices.null_count} labels are not among the {len(view.classes)} classes: the manifest "
            "was changed since it was made; make it again with thawline index"
        )
    return indices


def plain_numbers(labels: pa.Array, view: View) -> Targets:
    """Numbers as they are, in their own units, (n, C) float32."""
    return labels.flatten().to_numpy().reshape(len(labels), len(view.classes)).astype(np.float32)


def placed_points(labels: pa.Array, view: View) -> Targets:
    """Points as (n, K, 2) float32 x, y: [-1, 1] is the model's square, cropped points lie beyond, NaN is missing."""
    placed = view.geometry.place(points(labels, len(view.classes)), size_px=view.size_px)
    if view.swap:
        mirrored = view.geometry.mirrored[:, None, None]
        placed = np.where(mirrored, placed[:, partners(view.classes, view.swap)], placed)
    return placed.astype(np.float32)


def drawn_by_the_engine(labels: pa.Array, view: View) -> Targets:
    """(n,) int64 zeros instead of masks, which engines warp with their images."""
    return np.zeros(len(labels), np.int64)


def value_table(values: tuple[int, ...]) -> NDArray[np.uint8]:
    """(256,) uint8 from a mask's pixel value to the index of its class, VOID for values of no class."""
    table = np.full(256, VOID, np.uint8)
    table[list(values)] = np.arange(len(values))
    return table


def decode_mask(
    encoded: NDArray[np.uint8], *, path: str = "the mask", max_pixels: int = MOST_PIXELS
) -> NDArray[np.uint8]:
    """Encoded mask -> (h, w) uint8: grey values, or indices into a palette; upright.

    Raises: EngineError, naming the path, for what is no picture, or has colours, more than 8 bits or `max_pixels`.
    """
    hush_pillow()
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            check_pixels(image, max_pixels)
            image.load()
            if image.mode not in ("L", "P", "1"):
                raise ValueError(f"its mode is {image.mode}: save it as 8-bit grey or palette")
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(image).astype(np.uint8)
    except Exception as error:  # as pictures.decode
        raise EngineError(
            f"{path} cannot be read as a mask ({why_undecodable(error)}): its image cannot be used; mend the file and "
            "index again"
        ) from error
