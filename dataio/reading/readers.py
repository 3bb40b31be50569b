"""How do a sample's bytes reach memory, and are they what was indexed? Loose files here; packed ones in shards.py.

What is no regular file of the size that was indexed is not read at all (Root.read). What is read is hashed (10 GB/s,
microseconds a photo) and compared with the manifest: what was cut short or replaced since is found before a decoder
sees it, and told to the loader as a reason. Raised is only what is no file's fault: ResourceError.
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
    """(bytes,) uint8, of a file that DALI and Pillow decode."""
    mask: NDArray[np.uint8] | None = None
    """(bytes,) uint8 of the mask's file."""


Reason = str


class Reader(Protocol):
    """Where a loader gets bytes from. Called from several threads at once."""

    @property
    def threads(self) -> int:
        """Samples worth reading at the same time: more where each read waits for a network."""

    def read(self, rows: Rows, i: int) -> Encoded | Reason:
        """The bytes of sample i of the rows, or why they cannot be used."""

    def where(self, rows: Rows, i: int) -> str:
        """What to call sample i in messages: the place of its file."""

    def close(self) -> None:
        """Give back what is open."""


@dataclass(frozen=True)
class FileReader(Closing):
    """One file an image, below a folder or a URI."""

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
        """The file's bytes, and its mask's; or the reason in a few words."""
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
        """Nothing stays open."""


def for_engines(encoded: NDArray[np.uint8], *, pillow: bool) -> NDArray[np.uint8] | Reason:
    """The file itself; or transcoded, where only Pillow can decode it; or the reason why it cannot."""
    try:
        return transcode(encoded) if pillow else encoded
    except EngineError as error:
        return str(error)
