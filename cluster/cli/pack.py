"""What does `thawline pack` do? Pack a manifest into shards, or check shards that were packed."""

from thawline.cluster.cli.bars import bar
from thawline.dataio.reading.packing import pack, packed_from
from thawline.dataio.reading.shards import check
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest

MANIFEST = "manifest.arrow"


def pack_shards(
    manifest: str, dest: str, *, max_side_px: int | None, quality: int, shard_mib: int, max_bad: float
) -> Manifest:
    """Pack a manifest's files. Raises DataError as `dataio.reading.packing.pack` does."""
    with bar("packing images") as progress:
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
    with bar("checking shards", of_bytes=True) as progress:
        return damages + check(packed, progress=progress)
