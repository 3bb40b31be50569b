"""How do packed bytes lie for speed, and how are they read? Arrow IPC files, mapped into memory, nothing copied.

A shard holds consecutive rows of a manifest: its columns (texts in place of dictionaries), `data`, the encoded bytes,
and for the task mask `mask`; what could not be used is null there. Arrow is not asked for a value a sample: its
buffers are taken as arrays once, and a sample is a slice of one. How shards are made is packing.py's question, how they
come over a network cache.py's.

Records are not hashed when they are read, as loose files are: a shard is written once, checked against its hash when it
is downloaded or by `check`, and nobody edits it; hashing would double the cost of a read. What is damaged all the
same and cannot be decoded, the engines report.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dataio import cache as caches
from dataio import files
from dataio.errors import ShardError
from dataio.manifest import Manifest, Shard, columns
from dataio.part import Rows
from dataio.readers import Encoded, FileReader, Reader, Reason

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""

_CHUNK_BYTES = 8 << 20

_Column = list[tuple[NDArray[np.int64], NDArray[np.uint8]]]
"""A binary column as it lies: offsets (rows + 1,) and bytes, a pair for each record batch."""


def schema(task: str) -> pa.Schema:
    """The columns of a shard."""
    fields = [
        pa.field(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type)
        for field in columns(task)
    ]
    names = ("data", "mask") if task == "mask" else ("data",)
    return pa.schema([*fields, *(pa.field(name, pa.large_binary()) for name in names)])


def open_reader(
    manifest: Manifest, *, cache: str | Path | None = None, cache_gib: float = 100.0, progress: Progress | None = None
) -> Reader:
    """What reads a manifest's samples: its loose files one by one, or its shards.

    Shards in an object store are first brought into `cache` (by default ~/.cache/thawline/shards), all of them, once
    for all processes of this machine; `progress` is told how far that is.
    Raises: ShardError for shards that are missing, not what was packed, or that the cache cannot hold.
    """
    masks = manifest.task == "mask"
    if not manifest.shards:
        return FileReader(manifest.root, masks=masks)
    if not files.is_remote(manifest.home):
        paths = [Path(files.below(manifest.home, shard.name)) for shard in manifest.shards]
        return ShardReader(manifest.shards, paths, masks=masks)
    held = caches.hold(manifest.home, manifest.shards, folder=cache, limit_gib=cache_gib, progress=progress)
    return ShardReader(manifest.shards, held.paths, masks=masks, release=held.release)


class ShardReader:
    """Samples as views into mapped files. A shard is mapped when it is first read from."""

    threads = 1

    def __init__(
        self,
        shards: Sequence[Shard],
        paths: Sequence[Path],
        *,
        masks: bool = False,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """paths: where each shard lies on this machine; `release` is called by `close`.

        Raises: ShardError when one is missing or has not its size.
        """
        self._shards, self._paths, self._masks, self._release = shards, paths, masks, release
        self._firsts = [shard.first for shard in shards]
        self._open: list[_Mapped | None] = [None] * len(shards)
        self._lock = threading.Lock()
        for shard, path in zip(shards, paths, strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size:,} bytes in place of {shard.bytes:,}"
                raise ShardError(f"{path} {state}: its {shard.rows:,} samples cannot be read; pack again")

    def read(self, rows: Rows, i: int) -> Encoded | Reason:
        """The sample's bytes where they lie, read-only; or the reason in a few words."""
        number = int(rows.numbers[i])
        k = bisect_right(self._firsts, number) - 1
        shard = self._open[k] or self._map(k)
        row = number - shard.first
        if not 0 <= row < shard.rows:
            return "its row is in no shard"
        b = bisect_right(shard.batches, row) - 1
        row -= shard.batches[b]
        offsets, data = shard.data[b]
        image = data[offsets[row] : offsets[row + 1]]
        if not len(image):
            return "it was not packed: its bytes are missing in the shard"
        if not self._masks:
            return Encoded(image)
        offsets, data = shard.masks[b]
        mask = data[offsets[row] : offsets[row + 1]]
        return Encoded(image, mask) if len(mask) else "its mask was not packed"

    def where(self, rows: Rows, i: int) -> str:
        """The shard, and what the file was called."""
        return f"{self._paths[bisect_right(self._firsts, int(rows.numbers[i])) - 1]}: {rows.paths[i]}"

    def close(self) -> None:
        """Let go of the maps; arrays that were handed out keep theirs."""
        self._open = [None] * len(self._shards)
        self._release()

    def _map(self, k: int) -> _Mapped:
        with self._lock:
            mapped = self._open[k] or _map(self._paths[k], self._shards[k], masks=self._masks)
            self._open[k] = mapped
            return mapped


@dataclass(frozen=True)
class _Mapped:
    """A shard in memory."""

    first: int
    rows: int
    batches: list[int]
    """The first row of each record batch, counted within the shard."""
    data: _Column
    masks: _Column


def _map(path: Path, shard: Shard, *, masks: bool) -> _Mapped:
    """Raises: ShardError for what is no shard, or another one."""
    starts, rows = list[int](), 0
    found: dict[str, _Column] = {"data": [], "mask": []}
    try:
        # closed at once: the buffers keep the map, and thousands of shards need no thousands of open files
        with pa.memory_map(str(path)) as file:
            arrow = pa.ipc.open_file(file)
            for b in range(arrow.num_record_batches):
                batch = arrow.get_batch(b)
                starts.append(rows)
                rows += batch.num_rows
                for name in ("data", "mask") if masks else ("data",):
                    found[name].append(_views(batch.column(name)))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ShardError(f"{path} is not the shard that was packed ({error}): pack again") from error
    if rows != shard.rows:
        raise ShardError(f"{path} has {rows:,} rows in place of {shard.rows:,}: it is another shard; pack again")
    return _Mapped(shard.first, rows, starts, found["data"], found["mask"])


def _views(array: pa.LargeBinaryArray) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    _, offsets, data = array.buffers()
    return np.frombuffer(offsets, np.int64), np.frombuffer(data or b"", np.uint8)


def check(manifest: Manifest, *, progress: Progress | None = None) -> list[str]:
    """Read every shard of a packed manifest where it lies, and compare it with its hash: a sentence for each damage.

    Raises: ShardError when the manifest was not packed.
    """
    if not manifest.shards:
        raise ShardError("the manifest has no shards: there is nothing to check; pack it with thawline pack")
    total, before, damaged = sum(shard.bytes for shard in manifest.shards), 0, []

    def tell(size: int) -> None:
        if progress is not None:
            progress(before + min(size, shard.bytes), total)

    for shard in manifest.shards:
        name, size, digest, found = files.below(manifest.home, shard.name), 0, "", ""
        try:
            size, digest = hashed(manifest.home, shard.name, tell=tell)
        except OSError as error:
            found = files.why_unreadable(error)
        if not found and size != shard.bytes:
            found = f"it has {size:,} bytes in place of {shard.bytes:,}"
        if not found and digest != shard.hash:
            found = f"its xxh3_128 is {digest} in place of {shard.hash}"
        if found:
            last = shard.first + shard.rows - 1
            damaged.append(f"{name} is damaged ({found}): rows {shard.first} to {last} cannot be trusted; pack again")
        before += shard.bytes
    return damaged


def hashed(root: str, name: str, *, tell: Callable[[int], None] = lambda size: None) -> tuple[int, str]:
    """Bytes and xxh3_128 of a file below a root; `tell` hears how many are read. Raises OSError."""
    filesystem, base = files.open_root(root)
    digest, size = xxhash.xxh3_128(), 0
    with filesystem.open_input_stream(f"{base}/{name}") as source:
        while len(chunk := source.read_buffer(_CHUNK_BYTES)):
            digest.update(chunk)
            size += len(chunk)
            tell(size)
    return size, digest.hexdigest()
