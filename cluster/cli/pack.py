"""What does `thawline pack` do? Pack a manifest into shards, or check shards that were packed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from thawline.dataio.reading.packing import pack, packed_from
from thawline.dataio.reading.shards import check
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest

MANIFEST = "manifest.arrow"


def pack_shards(
    manifest: str, dest: str, *, max_side_px: int | None, quality: int, shard_mib: int, max_bad: float
) -> Manifest:
    """Pack a manifest's files. Raises DataError as `dataio.reading.packing.pack` does."""
    with _bar("packing images", of_bytes=False) as progress:
        return pack(
            Manifest.load(manifest),
            dest,
            shard_bytes=shard_mib << 20,
            max_side_px=max_side_px,
            quality=quality,
            max_bad=max_bad,
            progress=progress,
        )


def check_shards(manifest: str, dest: str) -> list[str]:
    """What is wrong with the shards of a manifest, a sentence each. Raises DataError when none were packed there."""
    home = Root.of(dest)
    packed = Manifest.load(home.full(MANIFEST))
    damages = []
    if packed_from(dest) != Manifest.load(manifest).fingerprint():
        damages.append(f"{home} was packed from another manifest than {manifest} is now: pack into another DEST")
    with _bar("checking shards", of_bytes=True) as progress:
        return damages + check(packed, progress=progress)


@contextmanager
def _bar(what: str, *, of_bytes: bool) -> Iterator[Callable[[int, int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn() if of_bytes else MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
