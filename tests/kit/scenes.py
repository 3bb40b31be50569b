"""How do tests check where points and masks lie? With scenes whose colours determine the targets."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.kit.images import Pixels
from thawline.dataio.checks.verify import check_files
from thawline.dataio.table.manifest import Manifest, build

COLOURS = np.array([[40, 60, 90], [210, 60, 50], [60, 190, 80], [70, 90, 230]], np.uint8)
"""Background and three shapes: different enough to be distinguished after a warp's blending."""
NAMES = ("background", "disc", "bar", "ring")
POINTS = ("disc", "bar", "ring")


def scene(width: int, height: int, *, seed: int) -> tuple[Pixels, Pixels, NDArray[np.float64]]:
    """(image (h, w, 3), mask (h, w) of 0..3, centres (3, 2) x, y px): a disc, a bar and a ring on a flat ground."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    side = min(width, height)
    centres = np.stack(
        [draw.uniform(0.25, 0.75, 3) * width, np.array([0.2, 0.5, 0.8])[draw.permutation(3)] * height], 1
    )
    (dx, dy), (bx, by), (rx, ry) = centres
    mask = np.zeros((height, width), np.uint8)
    mask[np.hypot(x - dx, y - dy) < side / 9] = 1
    mask[(abs(x - bx) < side / 6) & (abs(y - by) < side / 14)] = 2
    ring = np.hypot(x - rx, y - ry)
    mask[(ring < side / 8) & (ring > side / 20)] = 3
    drawn = np.array([[x[mask == shape].mean(), y[mask == shape].mean()] for shape in (1, 2, 3)])  # of whole pixels
    return COLOURS[mask], mask, drawn


def write(pixels: Pixels, file: Path, *, orientation: int = 1) -> None:
    """A PNG (or a JPEG without chroma subsampling) that shows `pixels` when turned by its EXIF orientation."""
    image = Image.fromarray(pixels)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if file.suffix == ".jpg" else {}
    if orientation != 1:
        image = image.transpose(turn[orientation])
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, {".jpg": "JPEG", ".png": "PNG"}[file.suffix], **options)
    file.write_bytes(buffer.getvalue())


def scenes(folder: Path, task: str, *, count: int = 12) -> Manifest:
    """`count` scenes of several sizes, some turned by EXIF, the last quarter for validation, with points or masks.

    Masks are grey, a palette's, or of half the image's size, in turn. No point has a side.
    """
    paths, masks, labels = list[str](), list[str](), list[Any]()
    for i in range(count):
        width, height = [(96, 72), (72, 96), (300, 200), (64, 64)][i % 4]
        pixels, mask, centres = scene(width, height, seed=i)
        paths.append(f"{i:02}{('.jpg', '.png')[i % 2]}")
        write(pixels, folder / paths[-1], orientation=[1, 6, 3, 8][i % 4] if i % 2 == 0 else 1)
        masks.append(f"{i:02}_mask.png")
        drawn = Image.fromarray(mask)
        if i % 3 == 1:
            drawn.putpalette(COLOURS.tobytes())
        if i % 3 == 2:
            drawn = drawn.resize((width // 2, height // 2), Image.Resampling.NEAREST)
        drawn.save(folder / masks[-1])
        labels.append(centres.ravel().astype(np.float32).tolist())
    checks = check_files(str(folder), paths, masks=masks if task == "mask" else None)
    columns = {name: checks[name] for name in checks.column_names}
    columns |= {"id": np.arange(count), "path": paths, "label": masks if task == "mask" else labels}
    columns["split"] = ["train"] * (count - count // 4) + ["valid"] * (count // 4)
    classes, values = (NAMES, (0, 1, 2, 3)) if task == "mask" else (POINTS, ())
    swap = () if task == "points" else None
    return build(columns, root=str(folder), task=task, classes=classes, values=values, swap=swap)
