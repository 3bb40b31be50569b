"""What shall the model say of each image? Labels of a manifest to arrays, for the tasks that need no pixels.

A mask is a picture: engines warp it (reference.py, dali.py), and this file only reads it.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageOps

from thawline.dataio.errors import EngineError, ManifestError
from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.pixels.pictures import MOST_PIXELS, check_pixels, hush_pillow, why_undecodable
from thawline.dataio.table.keypoints import Pairs, partners
from thawline.dataio.table.part import Rows

VOID = 255
"""The value of a mask's pixels that belong to no class: never trained on, never counted."""

Targets = NDArray[np.int64] | NDArray[np.float32]


def make_targets(
    rows: Rows, *, task: str, classes: tuple[str, ...], geometry: Geometry, size_px: int, swap: Pairs | None = None
) -> Targets:
    """The targets of n samples as the model sees them.

    single_label: (n,) int64 indices into the classes. multi_label: (n, C) float32 zeros and ones. points: (n, K, 2)
    float32 x, y, where [-1, 1] is the model's square and what crop or augmentation left outside lies beyond; NaN where
    there is none. mask: (n,) int64 zeros, since the engine makes them.
    swap: points that change places where an image is mirrored.
    Raises: ManifestError when a label is not among the classes.
    """
    if task == "points":
        placed = geometry.place(points(rows.labels, len(classes)), size_px=size_px)
        if swap:
            placed = np.where(geometry.mirrored[:, None, None], placed[:, partners(classes, swap)], placed)
        return placed.astype(np.float32)
    if task == "mask":
        return np.zeros(len(rows), np.int64)
    single = task == "single_label"
    indices = pc.index_in(rows.labels if single else rows.labels.flatten(), pa.array(classes, pa.string()))
    if indices.null_count:
        raise ManifestError(
            f"{indices.null_count} labels are not among the {len(classes)} classes: the manifest "
            "was changed since it was made; make it again with thawline index"
        )
    if single:
        return indices.to_numpy().astype(np.int64)
    targets = np.zeros((len(rows), len(classes)), np.float32)
    targets[pc.list_parent_indices(rows.labels).to_numpy(), indices.to_numpy()] = 1
    return targets


def points(labels: pa.Array, count: int) -> NDArray[np.float64]:
    """Lists x0, y0, x1, y1, ... as (n, count, 2) float64 px, NaN where a list is shorter or a value null."""
    out = np.full((len(labels), 2 * count), np.nan)
    values = labels.flatten().fill_null(np.nan).to_numpy(zero_copy_only=False)
    lengths = labels.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(labels)), lengths)
    out[row, np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)] = values
    return out.reshape(len(labels), count, 2)


def value_table(values: tuple[int, ...]) -> NDArray[np.uint8]:
    """(256,) uint8 from a mask's pixel value to the index of its class, VOID for values of no class."""
    table = np.full(256, VOID, np.uint8)
    table[list(values)] = np.arange(len(values))
    return table


def decode_mask(
    encoded: NDArray[np.uint8], *, path: str = "the mask", max_pixels: int = MOST_PIXELS
) -> NDArray[np.uint8]:
    """Encoded mask -> (h, w) uint8: grey values as they stand, or indices into a palette; upright.

    Raises: EngineError, naming the path, for what is no picture, or one with colours, more than 8 bits or `max_pixels`.
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
    except Exception as error:  # as reference.decode
        raise EngineError(
            f"{path} cannot be read as a mask ({why_undecodable(error)}): its image cannot be used; mend the file and "
            "index again"
        ) from error
