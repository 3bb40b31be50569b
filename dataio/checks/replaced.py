"""Which files of a manifest are gone, or hold other bytes by now? Asked of their status; few are read again.

Only of files of this machine: a store would have to be asked for each. What has changed there turns up when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.tasks import TASKS

_CLOCK_S = 2.0
"""How coarse a file system's times may be."""


def replaced(manifest: Manifest, *, since_s: float) -> tuple[set[str], set[str]]:
    """The paths of images whose file is gone, and of those that have other bytes, or whose mask does.

    since_s: when the manifest was written, in Unix time. A file of the same size is read again only if it was written
    since.
    """
    if manifest.shards or Root.of(manifest.root).remote:
        return set(), set()
    gone, other = set[str](), set[str]()
    for image, files in _files(manifest):
        for file, size, digest in files:
            try:
                now = file.stat()
                written = now.st_mtime > since_s - _CLOCK_S
                if (size and now.st_size != size) or (written and _digest(file) != digest):
                    other.add(image)
            except OSError:
                if digest:
                    gone.add(image)
    return gone, other - gone


def _files(manifest: Manifest) -> Iterator[tuple[str, list[tuple[Path, int | None, int | None]]]]:
    """Each image's path, and of its file and its mask's: where it is, its size and its hash, as far as known."""
    root, rows = Root.of(manifest.root), manifest.rows
    masked = TASKS[manifest.task].masks
    columns = ("path", "bytes", "hash", *(("label", "mask_hash") if masked else ()))
    for path, size, digest, *mask in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        files = [(Path(root.full(path)), size, digest)]
        yield path, [*files, (Path(root.full(mask[0])), None, mask[1])] if mask else files


def _digest(file: Path) -> int | None:
    """None for what is no regular file, whose bytes might never end. Raises OSError."""
    return xxhash.xxh3_64_intdigest(file.read_bytes()) if file.is_file() else None
