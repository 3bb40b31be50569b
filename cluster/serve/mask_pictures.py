"""What does a predicted mask look like as a file? A PNG with the masks' own values, or colours over its image."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from thawline.cluster.serve.written import refused
from thawline.dataio.errors import EngineError, SourceError
from thawline.dataio.pixels.pictures import VOID, decode
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.dataio.stream.render import Item, Sound


class Masks:
    """A folder or URI of pictures of masks."""

    def __init__(self, where: str, *, values: tuple[int, ...], classes: int, overlay: bool) -> None:
        """values: of a mask's pixels, by class; the classes' indices where there are none. overlay: draw them over
        their images. Raises PredictError."""
        self._where, self._overlay, self._taken = where, overlay, set[str]()
        self._values = by_index(values, classes)
        try:
            self._root = Root.of(where)
        except SourceError as error:
            raise refused("--masks", where, error) from error

    def save(self, mask: NDArray[np.uint8], item: Item, short: str) -> str:
        """Write the mask of an image; returns where. short: what to call it. Raises PredictError."""
        name = short
        for number in range(2, 1_000_000):
            if name not in self._taken:
                break
            name = f"{short}-{number}"
        self._taken.add(name)
        folder, _, last = f"{name}.png".rpartition("/")
        root = self._root.child(folder) if folder else self._root
        data = io.BytesIO()
        (self._drawn(mask, item) if self._overlay else painted(mask, self._values)).save(data, "PNG")
        try:
            with atomic_write(root, last) as sink:
                sink.write(data.getvalue())
        except OSError as error:
            raise refused("--masks", self._where, error) from error
        return root.full(last)

    def _drawn(self, mask: NDArray[np.uint8], item: Item) -> Image.Image:
        """Half transparent over the image: not the first class, which is the ground, and not where nothing is said."""
        pixels = _decoded(item)
        over = ((mask != 0) & (mask != VOID))[..., None]
        return Image.fromarray(np.where(over, pixels // 2 + _PALETTE[mask] // 2, pixels).astype(np.uint8))


def by_index(values: tuple[int, ...], classes: int) -> NDArray[np.uint8]:
    """(256,) what is written for each index: the values of the run's masks; the indices where there are none."""
    table = np.full(256, VOID, np.uint8)
    table[:classes] = values or range(classes)
    return table


def painted(mask: NDArray[np.uint8], values: NDArray[np.uint8]) -> Image.Image:
    """The masks' own values, each in its colour. values: see `by_index`."""
    picture = Image.fromarray(values[mask])
    picture.putpalette(_PALETTE.ravel().tolist())
    return picture


def _decoded(item: Item) -> NDArray[np.uint8]:
    """The pixels of an image, read once more. Raises EngineError."""
    content = item.content() if callable(item.content) else item.content
    if isinstance(content, np.ndarray):
        return content
    if isinstance(content, str):
        raise EngineError(f"{item.name} cannot be read again ({content}): its mask cannot be drawn over it")
    return decode(content.encoded if isinstance(content, Sound) else files.as_array(content), path=item.name)


def _colours() -> NDArray[np.uint8]:
    """A colour for each value, (256, 3): bit k of a value's channels is bit 7 - k of its colour. Source: PASCAL VOC."""
    values, colours = np.arange(256), np.zeros((256, 3), int)
    for k in range(8):
        for channel in range(3):
            colours[:, channel] |= (values >> (3 * k + channel) & 1) << (7 - k)
    return colours.astype(np.uint8)


_PALETTE = _colours()
