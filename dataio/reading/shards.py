"""How are shards laid out and read? As Arrow IPC files that are mapped into memory, with nothing copied.

A shard holds consecutive rows of a manifest: the manifest's columns (strings in place of dictionaries); `data`, the
encoded bytes; `mask`, for the task mask; and `data_hash`, the xxh3_64 of `data`. These are null for unusable files.
Arrow's buffers are wrapped as arrays once, and a sample is a slice of one. Shards are made by packing.py, and fetched
over a network by store/cache.py.

Everything is checked. When a reader opens, each shard must say that it was packed from the same manifest. When one is
mapped, the ids and hashes of its rows must be the manifest's. Before each sample, the file must still be the one that
was mapped, since reading beyond the end of a truncated file kills the process; and the sample's bytes must match their
hash. Only a file that is truncated between this check and its decoding, a few batches later, goes unnoticed.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from thawline.dataio.checks.integrity import parsed
from thawline.dataio.closing import Closing
from thawline.dataio.errors import ShardError
from thawline.dataio.reading.readers import Encoded, FileReader, Reader, Reason, for_engines
from thawline.dataio.store import cache as caches
from thawline.dataio.store import files
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.schema import columns
from thawline.dataio.table.subset import Rows
from thawline.dataio.table.tasks import TASKS

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""

_CHUNK_BYTES = 8 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of a file: while they are unchanged, so is what is mapped."""

_Column = list[tuple[NDArray[np.int64], NDArray[np.uint8]]]
"""A binary column: offsets (rows + 1,) and bytes, a pair for each record batch."""


def schema(task: str) -> pa.Schema:
    """The columns of a shard."""
    fields = [
        pa.field(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type)
        for field in columns(task)
    ]
    names = ("data", "mask") if TASKS[task].masks else ("data",)
    return pa.schema([*fields, *(pa.field(name, pa.large_binary()) for name in names), ("data_hash", pa.uint64())])


def open_reader(
    manifest: Manifest, *, cache: str | Path | None = None, cache_gib: float = 100.0, progress: Progress | None = None
) -> Reader:
    """A reader of a manifest's samples, from its loose files or its shards.

    Shards in an object store are first downloaded to `cache` (by default ~/.cache/thawline/shards), all of them, once
    for all processes of this machine; `progress` is called meanwhile.
    Raises: ShardError for shards that are missing, not what was packed, another pack's, or too large for the cache.
    """
    if not manifest.shards:
        return FileReader(Root.of(manifest.root), masks=TASKS[manifest.task].masks)
    home = Root.of(manifest.home)
    if not home.remote:
        return ShardReader(manifest, [home.folder / shard.name for shard in manifest.shards])
    held = caches.hold(home, manifest.shards, folder=cache, limit_gib=cache_gib, progress=progress)
    try:
        return ShardReader(manifest, held.paths, release=held.release, remedy="remove it, to have it fetched again")
    except BaseException:
        held.release()
        raise


class ShardReader(Closing):
    """Reads samples as views of mapped files. A shard is mapped when the first of its samples is read."""

    threads = 1

    def __init__(
        self,
        manifest: Manifest,
        paths: Sequence[Path],
        *,
        release: Callable[[], None] = lambda: None,
        remedy: str = "pack again",
    ) -> None:
        """paths: of each shard on this machine. release: called by `close`. remedy: for a bad shard, in errors.

        Raises: ShardError when one is missing, has not its size, or is another pack's.
        """
        self._manifest, self._paths, self._release, self._remedy = (
            manifest,
            paths,
            release,
            remedy,
        )
        self._masks = TASKS[manifest.task].masks
        self._firsts = [shard.first for shard in manifest.shards]
        self._open: list[_Mapped | None] = [None] * len(paths)
        self._lock = threading.Lock()
        for k in range(len(paths)):
            self._check_shard(k)

    def read(self, rows: Rows, i: int) -> Encoded | Reason:
        """The sample's bytes, a read-only view; or why it cannot be used, in a few words.

        Raises: ShardError when the shard is not what was packed, or no longer.
        """
        number = int(rows.numbers[i])
        k = bisect_right(self._firsts, number) - 1
        shard = self._mapped(k)
        row = number - self._firsts[k]
        if not 0 <= row < shard.rows:
            return "its row is in no shard"
        b = bisect_right(shard.batches, row) - 1
        row -= shard.batches[b]
        image = _slice(shard.data[b], row)
        if not len(image):
            return "it was not packed: its bytes are missing in the shard"
        if not (shard.hashes[b][row] == _hash(image) if shard.hashes else _matches_file(rows, i, image)):
            return f"damaged since it was packed; {self._remedy}"
        ready = for_engines(image, pillow=bool(rows.pillow[i]))  # transcoded only in packs of older manifests
        if isinstance(ready, str):
            return ready
        if not self._masks:
            return Encoded(ready)
        mask = _slice(shard.masks[b], row)
        if not len(mask):
            return "its mask was not packed"
        if rows.mask_hashes[i] and rows.mask_hashes[i] != _hash(mask):
            return f"its mask was damaged since it was packed; {self._remedy}"
        return Encoded(ready, mask)

    def where(self, rows: Rows, i: int) -> str:
        """The shard, and the name that the file had."""
        return f"{self._paths[bisect_right(self._firsts, int(rows.numbers[i])) - 1]}: {rows.paths[i]}"

    def close(self) -> None:
        """Release the mapped files; arrays that were handed out keep theirs mapped."""
        self._open = [None] * len(self._paths)
        self._release()

    def _mapped(self, k: int) -> _Mapped:
        """The mapped shard; it is mapped and compared again if its file has changed."""
        mapped = self._open[k]
        try:
            if mapped is not None and mapped.stamp == _stamp(self._paths[k]):
                return mapped
        except OSError:
            pass  # reported below
        with self._lock:
            mapped = self._open[k] = _map(self._paths[k], self._size(k), self._manifest, k, self._remedy)
            return mapped

    def _check_shard(self, k: int) -> None:
        """Raises ShardError unless the shard is there, has its size, and says that it is this pack's."""
        shard, path = self._manifest.shards[k], self._paths[k]
        self._size(k)
        if not shard.source:  # an older pack, which does not say: its rows have to be compared
            self._mapped(k)
            return
        try:
            with pa.memory_map(str(path)) as file:
                about = parsed((pa.ipc.open_file(file).schema.metadata or {})[b"thawline"])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ShardError(f"{path} is not the shard that was packed ({error}): {self._remedy}") from error
        if (about.get("fingerprint"), about.get("first")) != (shard.source, shard.first):
            raise ShardError(_wrong_shard(path, self._remedy))

    def _size(self, k: int) -> _Stamp:
        """The file's stamp. Raises ShardError when it is missing or has another size than it was packed with."""
        shard, path = self._manifest.shards[k], self._paths[k]
        try:
            stamp = _stamp(path)
            state = f"has {stamp[2]:,} bytes in place of {shard.bytes:,}" if stamp[2] != shard.bytes else ""
        except OSError as error:
            state = f"is {files.why_unreadable(error)}"
        if state:
            raise ShardError(f"{path} {state}: its {shard.rows:,} samples cannot be read; {self._remedy}")
        return stamp


@dataclass(frozen=True)
class _Mapped:
    """A shard in memory."""

    stamp: _Stamp
    rows: int
    batches: list[int]
    """The first row of each record batch, counted within the shard."""
    data: _Column
    masks: _Column
    hashes: list[NDArray[np.uint64]]
    """Of `data`, an array for each record batch; empty for packs of older versions, which have none."""


def _stamp(path: Path) -> _Stamp:
    """Raises OSError."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _map(path: Path, stamp: _Stamp, manifest: Manifest, k: int, remedy: str) -> _Mapped:
    """Map a shard and check its rows. Raises ShardError for a file that is no shard, or another one."""
    shard, starts, rows = manifest.shards[k], list[int](), 0
    binary: dict[str, _Column] = {"data": [], "mask": []}
    hashes = list[NDArray[np.uint64]]()
    try:
        # closed at once: the buffers keep the mapping, so thousands of shards need not stay open
        with pa.memory_map(str(path)) as file:
            arrow = pa.ipc.open_file(file)
            wanted = [field for field in schema(manifest.task) if field.name in (*_KEYS, *binary, "data_hash")]
            if "data_hash" not in arrow.schema.names:
                wanted.pop()
            for b in range(arrow.num_record_batches):
                batch = arrow.get_batch(b).select([field.name for field in wanted])
                if batch.schema.types != [field.type for field in wanted]:
                    raise ValueError("its columns are of other types")
                batch.validate(full=True)  # that offsets lie within their buffers; the bytes are not read
                if not _same(batch, manifest.rows, shard.first + rows):
                    raise ShardError(_wrong_shard(path, remedy))
                starts.append(rows)
                rows += batch.num_rows
                for name in binary:
                    if name in batch.schema.names:
                        binary[name].append(_views(batch.column(name)))
                if "data_hash" in batch.schema.names:
                    hashes.append(np.frombuffer(batch.column("data_hash").buffers()[1], np.uint64))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ShardError(f"{path} is not the shard that was packed ({error}): {remedy}") from error
    if rows != shard.rows:
        raise ShardError(f"{path} has {rows:,} rows in place of {shard.rows:,}: it is another shard; {remedy}")
    return _Mapped(stamp, rows, starts, binary["data"], binary["mask"], hashes)


_KEYS = ("id", "hash", "mask_hash")
"""The columns that tell one image from another."""


def _same(batch: pa.RecordBatch, rows: pa.Table, first: int) -> bool:
    """Whether a batch holds the manifest's images from row `first` on."""
    names = [name for name in _KEYS if name in batch.schema.names]
    return all(batch.column(name).equals(rows[name].chunk(0).slice(first, batch.num_rows)) for name in names)


def _wrong_shard(path: Path, remedy: str) -> str:
    return (
        f"{path} holds other images than the manifest says (another pack's shard, or a damaged one): they would be "
        f"trained on with this manifest's labels; {remedy}"
    )


def _views(array: pa.LargeBinaryArray) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    _, offsets, data = array.buffers()
    return np.frombuffer(offsets, np.int64), np.frombuffer(data or b"", np.uint8)


def _hash(data: NDArray[np.uint8]) -> int:
    digest: int = xxhash.xxh3_64_intdigest(data.data)
    return digest


def _slice(column: tuple[NDArray[np.int64], NDArray[np.uint8]], row: int) -> NDArray[np.uint8]:
    offsets, data = column
    return data[offsets[row] : offsets[row + 1]]


def _matches_file(rows: Rows, i: int, image: NDArray[np.uint8]) -> bool:
    """For packs without `data_hash`: whether a sample is its file, or an intact PNG that was made from it."""
    if rows.hashes[i] in (0, _hash(image)):
        return True
    data, at = image.tobytes(), len(_PNG)
    while data.startswith(_PNG) and at + 12 <= len(data):  # each chunk: length, kind, content, CRC of the last two
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at = end + 4
    return False


def check(manifest: Manifest, *, progress: Progress | None = None) -> list[str]:
    """Read every shard of a packed manifest and compare it with its hash: a sentence for each damaged one.

    Raises: ShardError when the manifest was not packed.
    """
    if not manifest.shards:
        raise ShardError("the manifest has no shards: there is nothing to check; pack it with thawline pack")
    home = Root.of(manifest.home)
    total, before, damaged = sum(shard.bytes for shard in manifest.shards), 0, []

    def report(size: int) -> None:
        if progress is not None:
            progress(before + min(size, shard.bytes), total)

    for shard in manifest.shards:
        name, size, digest, damage = home.full(shard.name), 0, "", ""
        try:
            size, digest = hashed(home, shard.name, on_read=report)
        except OSError as error:
            damage = files.why_unreadable(error)
        if not damage and size != shard.bytes:
            damage = f"it has {size:,} bytes in place of {shard.bytes:,}"
        if not damage and digest != shard.hash:
            damage = f"its xxh3_128 is {digest} in place of {shard.hash}"
        if damage:
            last = shard.first + shard.rows - 1
            damaged.append(f"{name} is damaged ({damage}): rows {shard.first} to {last} cannot be trusted; pack again")
        before += shard.bytes
    return damaged


def hashed(root: Root, name: str, *, on_read: Callable[[int], None] = lambda size: None) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of a file below a root; on_read(bytes so far) is called meanwhile. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    with root.stream(name) as source:
        while len(chunk := source.read_buffer(_CHUNK_BYTES)):
            digest.update(chunk)
            size += len(chunk)
            on_read(size)
    return size, digest.hexdigest()
