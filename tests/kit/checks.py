"""How does a test check one file?"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.checks.verify import check_files


def written(folder: Path, contents: dict[str, bytes]) -> list[str]:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return list(contents)


def checked(folder: Path, data: bytes) -> dict[str, Any]:
    """The row of checks of one file."""
    row: dict[str, Any] = check_files(folder, written(folder, {"x": data})).to_pylist()[0]
    return row


# Masks ------------------------------------------------------------------------------------------------------


def grey(width: int, height: int, dtype: type = np.uint8) -> NDArray[Any]:
    """Values 3, 7 and 9."""
    return np.array([3, 7, 9], dtype)[np.arange(width * height) % 3].reshape(height, width)


def palette(width: int, height: int) -> Image.Image:
    image = Image.fromarray(grey(width, height)).convert("P")
    image.putdata(grey(width, height).ravel().tolist())
    return image
