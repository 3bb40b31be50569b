"""How does Pillow turn a picture file into pixels? Shared by reading, verifying and masks; no torch."""

import io
import re
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from thawline.dataio.errors import EngineError
from thawline.dataio.store import files

MAX_PIXELS = 120_000_000
"""Of an image or mask, unless --max-pixels says otherwise. Nearly all cameras stay below 102 megapixels; decoded, this
many take 360 MB, and a batch holds many images."""
MOST_PIXELS = 178_956_970
"""Pillow refuses to decode more, by its own default: twice Image.MAX_IMAGE_PIXELS."""
MOST_BYTES = 1 << 30
"""Of a file. A TIFF of MAX_PIXELS with four channels of 16 bits has 960 MB."""
VOID = 255
"""The value of a mask's pixels that belong to no class: never trained on, never counted."""

_PILLOW = re.compile(r"PIL\.")


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """An opened image, decoded in full: (H, W, 3) uint8, upright. Raises whatever Pillow raises; ValueError."""
    load(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        ImageOps.exif_transpose(image, in_place=True)
        # Pillow would clip at 255. DALI scales and rounds, to the same values as this.
        grey = ((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError("its values have 32 bits or a sign, and nothing says which is white; save it with 8 or 16")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image.apply_transparency()  # else Pillow warns, once for every image
    ImageOps.exif_transpose(image, in_place=True)  # in place, and no conversion to itself: each is a copy
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def load(image: Image.Image) -> None:
    """Decode an opened image. Raises whatever Pillow raises; ValueError for EPS, which it would run."""
    if image.format == "EPS":
        raise ValueError("EPS is a program, and programs are not run")
    image.load()


def check_pixels(image: Image.Image, most: int) -> None:
    """Raises ValueError for an opened image of more than `most` pixels, before they are decoded."""
    if (pixels := image.width * image.height) > most:
        raise ValueError(f"too large: {pixels:,} pixels, more than --max-pixels {most:,}")


def why_undecodable(error: BaseException) -> str:
    """What an error of Pillow's means, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image"  # Pillow's own sentence names an object in memory
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: decompression bomb, more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, MemoryError):
        return "too large: not enough memory to decode it"
    return " ".join(str(error).split()) or type(error).__name__


def hush_pillow() -> None:
    """Ignore Pillow's warnings from now on: of odd metadata, and of sizes above half of what it refuses.

    The user has to mend such files; a run need not warn of them. Warning filters belong to the process, so threads that
    change and restore them would undo one another: this adds one rule, once, for Pillow's modules alone.
    """
    if ("ignore", None, Warning, _PILLOW, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def decode(encoded: NDArray[np.uint8], *, path: str = "the image") -> NDArray[np.uint8]:
    """Encoded file -> (H, W, 3) uint8 RGB, upright by its orientation. Raises EngineError, naming the path.

    As DALI does it: transparency is dropped, the first of several pictures is decoded, 16 bits are scaled to 8.
    """
    hush_pillow()
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise EngineError(
            f"{path} cannot be decoded ({why_undecodable(error)}): the batch cannot be made; remove or mend the file "
            "and index again"
        ) from error


def transcode(encoded: NDArray[np.uint8], *, kind: str = "PPM", path: str = "the image") -> NDArray[np.uint8]:
    """A file that only Pillow decodes, as one that DALI decodes too: the same pixels, upright, (bytes,) uint8.

    PPM costs nothing to write or read, and is as large as the pixels; PNG is for storage. Raises EngineError.
    """
    return as_file(decode(encoded, path=path), kind=kind)


def as_file(pixels: NDArray[np.uint8], *, kind: str = "PPM") -> NDArray[np.uint8]:
    """Pixels, (H, W, 3) uint8, as a file that every engine decodes to just these, (bytes,) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return files.as_array(file.getvalue())
