"""Which images does somebody mean? Files, folders, patterns, URIs, manifests and lines of stdin, as items to render.

Folders, patterns and manifests are listed at once, so that a wrong one costs nothing; a file is looked at when its turn
comes.
"""

import glob
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np

from thawline.cluster.serve.predictor import as_item
from thawline.dataio.ahead import READERS
from thawline.dataio.errors import SourceError, quoted
from thawline.dataio.pixels.pictures import MOST_BYTES
from thawline.dataio.reading.readers import FileReader, Reader, Reason
from thawline.dataio.reading.shards import open_reader
from thawline.dataio.store.root import Root
from thawline.dataio.stream.render import Content, Item, Sound
from thawline.dataio.table import lists
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import IMAGE_EXTENSIONS, from_folder
from thawline.dataio.table.subset import Rows, Subset

STDIN = "-"
_REMOTE = 16  # a read over the network waits tens of milliseconds, see readers
_ROWS = 256


@dataclass(frozen=True)
class Named:
    """An image, and what a file about it may be called."""

    item: Item
    short: str
    """Its path below what was asked for, without an ending; a plain name otherwise. Never out of a folder."""


@dataclass(frozen=True)
class Asked:
    """All images that are meant."""

    images: Iterable[Named]
    total: int | None
    """How many; None where they come from stdin."""
    reading: int
    """How many to read at the same time."""


def asked(places: Sequence[str]) -> Asked:
    """What these places mean, in their order.

    Raises: SourceError for a folder without images, a pattern that matches nothing, a list that is no manifest;
        ManifestError, ShardError.
    """
    parts = [_part(place) for place in places]
    totals = [total for _, total in parts if total is not None]
    remote = any("://" in place for place in places)
    return Asked(
        chain.from_iterable(images for images, _ in parts),
        sum(totals) if len(totals) == len(parts) else None,
        _REMOTE if remote else READERS,
    )


_Part = tuple[Iterable[Named], int | None]


def _part(place: str) -> _Part:
    if place == STDIN:
        return _lines(), None
    if lists.is_known(place):
        return _manifest(place)
    if "://" in place:
        is_file = place.partition("?")[0].lower().endswith(IMAGE_EXTENSIONS)
        return ([_file(place)], 1) if is_file else _folder(place)
    path = Path(place).expanduser()
    if not os.path.lexists(path) and glob.has_magic(place):
        return _matching(str(path))
    return _folder(place) if path.is_dir() else ([_file(place)], 1)


def _file(place: str) -> Named:
    return Named(as_item(place), _below(PurePosixPath(place).name))


def _lines() -> Iterator[Named]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a name may have bytes of no script
    for line in sys.stdin:
        if place := line.rstrip("\r\n"):
            yield _file(place)


def _matching(pattern: str) -> _Part:
    everything = glob.iglob(pattern, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    found = sorted(path for path in everything if not Path(path).is_dir())
    if not found:
        raise SourceError(f"no file matches {quoted(pattern)}: there is nothing to predict; correct the pattern")
    return [_file(path) for path in found], len(found)


def _folder(place: str) -> _Part:
    table = from_folder(place)
    root = Root.of(table.root)
    names = table.rows["path"].to_pylist()
    of_root = (Named(Item(root.full(name), partial(root.read, name, most=MOST_BYTES)), _below(name)) for name in names)
    return of_root, len(names)


def _below(name: str) -> str:
    """A path without its ending, which leads into a folder wherever it is put."""
    path = PurePosixPath(name)
    plain = path.is_absolute() or ".." in path.parts
    return (PurePosixPath(path.name) if plain else path).with_suffix("").as_posix()


# Manifests ------------------------------------------------------------------------------------------------


def _manifest(place: str) -> _Part:
    """The images of a manifest, read as a run reads them: they were checked when it was made."""
    if lists.ending(place) not in (".parquet", ".arrow"):
        raise SourceError(
            f"{place} is a list and no manifest: which of its columns holds paths cannot be known; give the paths "
            "alone, one a line (thawline predict RUN - < paths.txt)"
        )
    manifest = Manifest.load(place)
    # their masks need not be read
    reader: Reader = open_reader(manifest) if manifest.shards else FileReader(Root.of(manifest.root))
    return _rows(manifest, reader), len(manifest.rows)


def _rows(manifest: Manifest, reader: Reader) -> Iterator[Named]:
    everything = Subset(manifest.rows, np.arange(len(manifest.rows)), manifest.task)
    for start in range(0, len(everything), _ROWS):
        rows = everything.take(np.arange(start, min(start + _ROWS, len(everything))))
        states = manifest.rows["status"].slice(start, len(rows)).to_pylist()
        for i, state in enumerate(states):
            content = partial(_sample, reader, rows, i) if state == "ok" else partial(str, state)
            yield Named(Item(reader.where(rows, i), content), _below(rows.paths[i]))


def _sample(reader: Reader, rows: Rows, i: int) -> Content | Reason:
    found = reader.read(rows, i)
    if isinstance(found, str):
        return found
    width, height = int(rows.widths[i]), int(rows.heights[i])
    if not width:  # it was not checked
        return found.image.tobytes()
    return Sound(found.image, width, height, int(rows.hashes[i]))
