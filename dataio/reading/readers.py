"""How do a sample's bytes reach memory, and are they what was indexed? Loose files here; packed ones in shards.py.

Only a regular file of the size that was indexed is read at all (Root.read). Its hash (10 GB/s, microseconds a photo) is
compared with the manifest's, so that a file that was truncated or replaced since then never reaches a decoder: the
loader gets the reason instead. An exception is raised only where no single file is to blame: ResourceError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from thawline.dataio.closing import Closing
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.pictures import MOST_BYTES, transcode
from thawline.dataio.store import files
from thawline.dataio.store.root import Root
from thawline.dataio.table.subset import Rows


@dataclass(frozen=True)
class Encoded:
    """The bytes of one sample."""

    image: NDArray[np.uint8]
    """(bytes,) uint8, of a file that both DALI and Pillow can decode."""
    mask: NDArray[np.uint8] | None = None
    """(bytes,) uint8 of the mask's file."""


Reason = str


class Reader(Protocol):
    """What a loader reads bytes with; called from several threads at once."""

    @property
    def threads(self) -> int:
        """Samples to read at the same time: more where each read waits for a network."""

    def read(self, rows: Rows, i: int) -> Encoded | Reason:
        """The bytes of sample i of the rows, or why it cannot be used."""

    def where(self, rows: Rows, i: int) -> str:
        """Where the file of sample i lies, for messages."""

    def close(self) -> None:
        """Close what is open."""


@dataclass(frozen=True)
class FileReader(Closing):
    """Reads loose files, one for each image, below a folder or a URI."""

    root: Root
    masks: bool = False

    @property
    def threads(self) -> int:
        """More for a store over the network, where a read waits tens of milliseconds."""
        return 16 if self.root.remote else 1

    def where(self, rows: Rows, i: int) -> str:
        """The file's full name."""
        return self.root.full(rows.paths[i])

    def read(self, rows: Rows, i: int) -> Encoded | Reason:
        """The file's bytes, and its mask's; or why they cannot be used, in a few words."""
        image = self._file(rows.paths[i], int(rows.hashes[i]), int(rows.sizes[i]) or None)
        if isinstance(image, str):
            return image
        image = for_engines(image, pillow=bool(rows.pillow[i]))
        if isinstance(image, str):
            return image
        if not self.masks:
            return Encoded(image)
        mask = self._file(rows.labels[i].as_py(), int(rows.mask_hashes[i]))
        return f"its mask {rows.labels[i].as_py()}: {mask}" if isinstance(mask, str) else Encoded(image, mask)

    def _file(self, name: str, expected: int, size: int | None = None) -> NDArray[np.uint8] | Reason:
        try:
            data = self.root.read(name, size=size, most=MOST_BYTES)
        except OSError as error:
            return files.why_unreadable(error)
        if expected and xxhash.xxh3_64_intdigest(data) != expected:
            return f"changed since it was indexed (it has {len(data):,} bytes now)"
        return files.as_array(data)

    def close(self) -> None:
        """Nothing to do: no file stays open."""


def for_engines(encoded: NDArray[np.uint8], *, pillow: bool) -> NDArray[np.uint8] | Reason:
    """The file itself; transcoded where only Pillow can decode it; or why Pillow cannot."""
    try:
        return transcode(encoded) if pillow else encoded
    except EngineError as error:
        return str(error)
