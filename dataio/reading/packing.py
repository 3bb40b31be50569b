"""How do a manifest's files become shards? In order, read in parallel, and so that a kill costs one shard at most.

DEST holds shard-00000.arrow and so on (see shards.py), each with consecutive rows of the manifest; the journal
pack.json, which says what is packed, with which settings, and which shards are complete (a shard is entered before it
appears); and manifest.arrow, which is written last. Where one shard ends and the next begins follows from the manifest
alone, so packing twice, or with interruptions, gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.ahead import read_ahead
from thawline.dataio.checks.integrity import check_shard, parsed
from thawline.dataio.cores import usable_cores
from thawline.dataio.errors import EngineError, ManifestError, QuarantineError, ShardError
from thawline.dataio.pixels.pictures import decode, transcode
from thawline.dataio.reading.readers import Reader
from thawline.dataio.reading.shards import hashed, open_reader, schema
from thawline.dataio.store.atomic import atomic_write, sweep
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest, Shard, build
from thawline.dataio.table.schema import columns
from thawline.dataio.table.subset import Rows, Subset
from thawline.dataio.table.tasks import TASKS

SHARD_BYTES = 512 << 20
"""Five seconds of a 100 MB/s link: the most that a kill or a broken download costs."""

_BATCH_BYTES = 16 << 20  # of a record batch, which packing holds in memory beside the files that are being read
_BATCH_ROWS = 4096
_LOOKUP_ROWS = 1024  # at a time
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
_JOURNAL = "pack.json"

Progress = Callable[[int, int], None]
"""(rows done, rows in all)"""


@dataclass(frozen=True)
class _Settings:
    """What the bytes of a shard depend on, besides the manifest."""

    fingerprint: str
    shard_bytes: int
    max_side_px: int | None
    quality: int
    version: int = 2
    """1: without `data_hash`."""


@dataclass(frozen=True)
class _Sample:
    """A row of a shard: its bytes, and what changes in the manifest with them."""

    data: bytes | None = None
    mask: bytes | None = None
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def data_hash(self) -> int | None:
        return None if self.data is None else xxhash.xxh3_64_intdigest(self.data)


def pack(
    manifest: Manifest,
    dest: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    max_side_px: int | None = None,
    quality: int = 92,
    max_bad: float = 0.01,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the manifest's files into shards in `dest`, a folder or URI, and return the manifest of these shards.

    Files are stored unchanged, except those that only Pillow decodes, which become PNG. Hashes stay those of the files,
    so that runs on the packed and on the loose images are the same. With `max_side_px`, larger images are scaled down,
    antialiased and upright, and stored as JPEG of that `quality` where they were lossy, else as PNG; points are scaled
    with them, masks are not. Those rows get new sizes and hashes: runs on them are other runs.

    A file that is gone or has changed is quarantined in the returned manifest. Shards that are complete already are
    kept, unless they are damaged or lack such a file.
    Raises: QuarantineError when more than `max_bad` of the usable files are gone; ShardError when `dest` holds
    something else or cannot be written; ManifestError when the images were never verified.
    """
    _check_options(shard_bytes, max_side_px, quality)
    place = Root.of(dest)
    settings = _Settings(manifest.fingerprint(), shard_bytes, max_side_px, quality)
    bounds = _bounds(manifest, settings)
    try:
        journal = _open_dest(place, settings)
        sweep(place)
        packer = _Packer(manifest, place, settings, open_reader(manifest), threads, max_bad, progress, journal)
        try:
            for k, (first, rows) in enumerate(bounds):
                packer.shard(f"shard-{k:05}.arrow", first, rows)
        finally:
            packer.reader.close()
        packed = packer.manifest_of_all()
        packed.save(place.full("manifest.arrow"))
        return packed
    except OSError as error:
        raise ShardError(
            f"{place} cannot be written ({error.strerror or error}): the shards there are complete; make room, or "
            "allow writing, and give the same command again, which goes on"
        ) from error


def packed_from(dest: str | Path) -> str:
    """The fingerprint of the manifest that was packed into `dest`. Raises ShardError when none was."""
    place = Root.of(dest)
    try:
        return str(parsed(place.read(_JOURNAL))["how"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"nothing was packed into {place}: there is nothing to check; check the path") from error


def _check_options(shard_bytes: int, max_side_px: int | None, quality: int) -> None:
    if shard_bytes < 1:
        raise ShardError(f"shard_bytes={shard_bytes} holds no image: give a size such as {SHARD_BYTES}")
    if max_side_px is not None and max_side_px < 1:
        raise ShardError(f"max_side_px={max_side_px} leaves no pixels: give a side such as 512")
    if not 1 <= quality <= 100:
        raise ShardError(f"quality={quality} is not one of JPEG's, 1 to 100: give one such as 92")


def _bounds(manifest: Manifest, settings: _Settings) -> list[tuple[int, int]]:
    """(first, rows) of each shard: a function of the manifest, so that no shard depends on another's bytes.

    Raises: ManifestError when the files were never verified.
    """
    unknown = int((manifest.usable() & manifest.rows["bytes"].is_null().to_numpy()).sum())
    if unknown:
        raise ManifestError(
            f"{unknown} images have no size in the manifest (it was made with verify=False): they cannot be divided "
            "among shards, nor trained on; split again with verify=True, or index again"
        )

    def filled(name: str) -> NDArray[np.float64]:
        numbers: NDArray[np.float64] = manifest.rows[name].fill_null(0).to_numpy().astype(np.float64)
        return numbers

    size = filled("bytes")
    if settings.max_side_px is not None:
        side = np.maximum(filled("width"), filled("height"))
        size = size * np.minimum(1, settings.max_side_px / np.maximum(side, 1)) ** 2
    number = np.floor((np.cumsum(size) - size) / settings.shard_bytes)
    firsts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [(a, b - a) for a, b in zip(firsts, [*firsts[1:], len(size)], strict=True)]


# One shard ------------------------------------------------------------------------------------------------


class _Packer:
    """Keeps the shards that are complete and makes the rest, one by one; its lists grow with them."""

    def __init__(
        self,
        manifest: Manifest,
        dest: Root,
        settings: _Settings,
        reader: Reader,
        threads: int | None,
        max_bad: float,
        progress: Progress | None,
        journal: dict[str, dict[str, Any]],
    ) -> None:
        self.journal = journal
        self.manifest, self.dest, self.settings, self.reader, self.progress = manifest, dest, settings, reader, progress
        self.threads = threads or max(reader.threads, usable_cores())
        self.done: list[Shard] = []
        self.tables: list[pa.Table] = []
        self.rows_done = 0
        self.bad: list[str] = []
        self.usable = manifest.usable()
        self.names = columns(manifest.task).names
        self.allowed = math.ceil(max_bad * int(self.usable.sum()))
        self.max_bad = max_bad

    def shard(self, name: str, first: int, rows: int) -> None:
        """Keep it if it is complete, else make it."""
        known = self.journal.get(name)
        if known is not None and _is_complete(self.dest, known):
            self.tables.append(_columns_of(self.dest, name, self.names))
        else:
            known = self._make(name, first, rows)
        self.done.append(Shard(**known))
        self.rows_done = first + rows
        self._report()

    def _make(self, name: str, first: int, rows: int) -> dict[str, Any]:
        with atomic_write(self.dest, name) as sink:
            bad_before = len(self.bad)
            layout = schema(self.manifest.task)
            about = {"thawline": json.dumps({"first": first, **asdict(self.settings)})}
            with pa.ipc.new_file(sink, layout.with_metadata(about)) as writer:
                for batch in self._batches(first, rows, layout):
                    writer.write_batch(batch)
                    self.tables.append(pa.Table.from_batches([batch]).select(self.names).replace_schema_metadata(None))
            made = asdict(Shard(name, first, rows, sink.bytes, sink.digest.hexdigest(), self.settings.fingerprint))
            self.journal[name] = made
            if len(self.bad) > bad_before:  # the next attempt makes it anew: the files may have been brought back
                del self.journal[name]
            _write_journal(self.dest, self.settings, self.journal)
        return made

    def _batches(self, first: int, rows: int, layout: pa.Schema) -> Iterator[pa.RecordBatch]:
        pending, size, start = list[_Sample](), 0, first
        for sample in self._samples(first, rows):
            pending.append(sample)
            size += len(sample.data or b"") + len(sample.mask or b"")
            self._count(sample, start + len(pending) - 1)
            if size >= _BATCH_BYTES or len(pending) == _BATCH_ROWS:
                yield _batch(self.manifest.rows.slice(start, len(pending)), pending, layout)
                pending, size, start = [], 0, start + len(pending)
        if pending:
            yield _batch(self.manifest.rows.slice(start, len(pending)), pending, layout)

    def _samples(self, first: int, rows: int) -> Iterator[_Sample]:
        """One for every row of a shard, in order; empty for a row that is not usable."""
        usable = np.flatnonzero(self.usable[first : first + rows]) + first
        subset = Subset(self.manifest.rows, usable, self.manifest.task)

        def requests() -> Iterator[tuple[Rows, Rows, int]]:
            for start in range(0, len(usable), _LOOKUP_ROWS):
                rows = subset.take(np.arange(start, min(start + _LOOKUP_ROWS, len(usable))))
                plain = replace(rows, pillow=np.zeros_like(rows.pillow))  # as they are on disk
                yield from ((rows, plain, i) for i in range(len(rows)))

        read = read_ahead(self._sample, requests(), ahead=4 * self.threads, threads=self.threads)
        for is_usable in self.usable[first : first + rows]:
            yield next(read) if is_usable else _Sample()

    def _sample(self, request: tuple[Rows, Rows, int]) -> _Sample:
        rows, plain, i = request
        file = self.reader.read(plain, i)
        if isinstance(file, str):
            return _Sample(changed={"status": file, "split": None})
        mask = None if file.mask is None else file.mask.tobytes()
        try:
            side = max(int(rows.widths[i]), int(rows.heights[i]))
            if self.settings.max_side_px is not None and side > self.settings.max_side_px:
                return replace(_shrunk(file.image, rows, i, self.settings, self.manifest.task), mask=mask)
            if rows.pillow[i]:
                data = transcode(file.image, kind="PNG").tobytes()
                return _Sample(data, mask, {"codec": "dali", "format": "PNG", "orientation": 1, "bytes": len(data)})
        except EngineError as error:
            return _Sample(changed={"status": str(error), "split": None})
        return _Sample(file.image.tobytes(), mask)

    def _count(self, sample: _Sample, row: int) -> None:
        self.rows_done += 1
        self._report()
        if "status" not in sample.changed:
            return
        name = self.manifest.rows["path"][row].as_py()
        self.bad.append(f"{Root.of(self.manifest.root).full(name)}: {sample.changed['status']}")
        if len(self.bad) > self.allowed:
            raise QuarantineError(
                f"{len(self.bad)} files cannot be packed ({'; '.join(self.bad[:3])}), more than the {self.allowed} "
                f"that max_bad={self.max_bad:g} allows: mend them, or index again, or give a higher --max-bad"
            )

    def manifest_of_all(self) -> Manifest:
        """The manifest of the shards, once all are complete."""
        old = self.manifest
        rows = pa.concat_tables(self.tables).select(self.names) if self.tables else old.rows
        columns_by_name = {name: rows[name] for name in self.names}
        packed = build(columns_by_name, root=old.root, task=old.task, classes=old.classes, values=old.values)
        return replace(packed, shards=tuple(self.done), home=self.dest.text, swap=old.swap)

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.rows_done, self.manifest.rows.num_rows)


def _shrunk(image: NDArray[np.uint8], rows: Rows, i: int, settings: _Settings, task: str) -> _Sample:
    """The image scaled until its longer side has max_side_px; Lanczos, whose support grows with the shrink."""
    assert settings.max_side_px is not None
    with Image.open(io.BytesIO(image.tobytes())) as opened:
        kind = "JPEG" if opened.format in _LOSSY else "PNG"
    picture = Image.fromarray(decode(image))
    scale = settings.max_side_px / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    file = io.BytesIO()
    options = {"quality": settings.quality} if kind == "JPEG" else {}
    picture.resize((width, height), Image.Resampling.LANCZOS).save(file, kind, **options)
    data = file.getvalue()
    changed = {
        "width": width,
        "height": height,
        "bytes": len(data),
        "hash": xxhash.xxh3_64_intdigest(data),
        "format": kind,
        "orientation": 1,
        "codec": "dali",
    }
    if resized := TASKS[task].resized:
        changed["label"] = resized(rows.labels[i].as_py(), (width / picture.width, height / picture.height))
    return _Sample(data, None, changed)


def _batch(rows: pa.Table, samples: list[_Sample], layout: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for target in layout:
        if target.name in ("data", "mask", "data_hash"):
            arrays.append(pa.array([getattr(sample, target.name) for sample in samples], target.type))
            continue
        changed = {i: sample.changed[target.name] for i, sample in enumerate(samples) if target.name in sample.changed}
        column = rows[target.name].cast(target.type).combine_chunks()
        if changed:
            values = column.to_pylist()
            for i, value in changed.items():
                values[i] = value
            column = pa.array(values, target.type)
        arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, schema=layout)


# What lies in DEST ---------------------------------------------------------------------------------------


def _open_dest(dest: Root, settings: _Settings) -> dict[str, dict[str, Any]]:
    """The journal's entries of the shards there, by name. Raises ShardError when something else lies there."""
    there = [name for name in dest.listing() if not name.startswith(".")]
    if _JOURNAL not in there:
        if there:
            raise ShardError(
                f"{dest} holds {len(there)} other files or folders ({', '.join(sorted(there)[:3])}): shards need a "
                "folder of their own; give another DEST"
            )
        _write_journal(dest, settings, {})
        return {}
    try:
        journal = parsed(dest.read(_JOURNAL))
        other = sorted(name for name, value in asdict(settings).items() if journal["how"].get(name) != value)
        for shard in journal["shards"]:
            check_shard(shard)
        shards = {shard["name"]: shard for shard in journal["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{dest}/{_JOURNAL} cannot be understood ({error}): remove {dest}, or give another") from error
    if other:
        what = "from another manifest" if "fingerprint" in other else f"with another {', '.join(other)}"
        raise ShardError(f"{dest} was packed {what}: the two would mix; give another DEST, or remove it")
    return shards


def _is_complete(dest: Root, known: dict[str, Any]) -> bool:
    """Whether a shard is there as it was made; in an object store only its size is compared."""
    if dest.size(known["name"]) != known["bytes"]:
        return False
    return dest.remote or hashed(dest, known["name"]) == (known["bytes"], known["hash"])


def _write_journal(dest: Root, settings: _Settings, journal: dict[str, dict[str, Any]]) -> None:
    shards = sorted(journal.values(), key=lambda shard: int(shard["first"]))
    with atomic_write(dest, _JOURNAL) as sink:
        sink.write(json.dumps({"how": asdict(settings), "shards": shards}, indent=1).encode())


def _columns_of(dest: Root, name: str, names: list[str]) -> pa.Table:
    """The columns of a shard; the bytes of its images are not read."""
    options = pa.ipc.IpcReadOptions(included_fields=list(range(len(names))))
    with dest.open(name) as file:
        return pa.ipc.open_file(file, options=options).read_all().replace_schema_metadata(None)
