"""What is a checked data set, and how does it lie on disk?

A manifest is a table with one row an image, classes and a task; on disk it is a Parquet file that any tool
reads. It holds no pixels and no order (plan.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from dataio.errors import ManifestError
from dataio.labels import LABEL_TYPES
from dataio.sources import absolute

VERSION = 1
_KEY = b"thawline"


@dataclass(frozen=True)
class Part:
    """The usable rows of one split, in id order, ready to index.

    `ids` (N,) int64; `paths` N absolute paths; `targets` (N,) int64 indices into the classes for
    single_label, (N, C) float32 zeros and ones for multi_label; `widths` and `heights` (N,) int32 in px
    after EXIF orientation, 0 where the files were not verified.
    """

    ids: np.ndarray
    paths: list[str]
    targets: np.ndarray
    widths: np.ndarray
    heights: np.ndarray


@dataclass(frozen=True)
class Manifest:
    """Checked, labelled and split images.

    `rows` has the columns of `columns(task)`: id counts from 0 in the source's order, split is 'train',
    'valid' or null for an image whose status is not 'ok'. `root` is absolute; `classes` are sorted.
    """

    rows: pa.Table
    root: Path
    task: str
    classes: tuple[str, ...]

    def save(self, file: str | Path) -> None:
        """Write Parquet, whole or not at all.

        Raises: ManifestError when the file cannot be written.
        """
        file = Path(file).expanduser()
        about = {"version": VERSION, "task": self.task, "classes": self.classes, "root": str(self.root)}
        rows = self.rows.replace_schema_metadata({_KEY: json.dumps(about)})
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as sink:
                pq.write_table(rows, sink, compression="zstd")
                sink.flush()
                os.fsync(sink.fileno())
            temporary.replace(file)
        except OSError as error:
            raise ManifestError(
                f"manifest {file} cannot be written ({error.strerror or error}): nothing was changed; "
                "give a file in a folder that you may write to"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    @classmethod
    def load(cls, file: str | Path, *, root: str | Path | None = None) -> Manifest:
        """Read what `save` wrote; `root` is where the images lie now, if they moved.

        Raises: ManifestError for a missing file, one that is no manifest, or one from a newer version.
        """
        file = Path(file).expanduser()
        if not file.is_file():
            raise ManifestError(f"no manifest at {file}: check the path, or make one with thawline index")
        try:
            with pq.ParquetFile(file, memory_map=True) as parquet:
                about = _about(parquet.schema_arrow.metadata, file)
                wanted = columns(about["task"])
                missing = [name for name in wanted.names if name not in parquet.schema_arrow.names]
                if missing:
                    raise ManifestError(
                        f"manifest {file} lacks columns {', '.join(missing)}: it was changed since "
                        "it was made; make it again with thawline index"
                    )
                rows = parquet.read(columns=wanted.names).select(wanted.names).cast(wanted)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ManifestError(
                f"{file} cannot be read as Parquet ({error}): it is no manifest, or a broken one; "
                "make one with thawline index"
            ) from error
        where = Path(about["root"] if root is None else root).expanduser().absolute()
        return cls(rows.replace_schema_metadata(None), where, about["task"], tuple(about["classes"]))

    def part(self, split: str) -> Part:
        """Return the usable images of 'train' or 'valid'.

        Raises: ManifestError when there are none, or when a label is not among the classes.
        """
        rows = self._usable()
        rows = rows.filter(pc.equal(rows["split"], split)).sort_by("id")
        if rows.num_rows == 0:
            splits = ", ".join(sorted(filter(None, self.rows["split"].unique().to_pylist()))) or "none"
            raise ManifestError(
                f"the manifest has no usable images in split {split!r} (its splits: {splits}): there is "
                "nothing to load; split again with thawline index"
            )
        return Part(
            ids=rows["id"].to_numpy().copy(),  # Arrow lends read-only memory, of which torch warns
            paths=absolute(self.root, rows["path"]).to_pylist(),
            targets=self._targets(rows["label"].combine_chunks()),
            widths=rows["width"].fill_null(0).to_numpy().copy(),
            heights=rows["height"].fill_null(0).to_numpy().copy(),
        )

    def check_paths(self, *, most: int = 1000) -> None:
        """Look whether the usable files are still where they were; an evenly spaced sample of at most `most`.

        Raises: ManifestError naming how many are missing, the first three, and what to do.
        """
        rows = self._usable()
        sample = np.linspace(0, rows.num_rows - 1, min(rows.num_rows, most)).round().astype(np.int64)
        paths = absolute(self.root, rows["path"].take(sample)).to_pylist()
        missing = [path for path in paths if not _exists(path)]
        if missing:
            raise ManifestError(
                f"{len(missing)} of {len(paths)} files looked at (of {rows.num_rows}) are not where the "
                f"manifest says, under root {self.root}: {', '.join(missing[:3])}; training would fail; "
                "give their new place with --data.root, or index again"
            )

    def fingerprint(self) -> str:
        """A hash of what decides a run's stream and targets: ids, contents, labels, splits, sizes; not of paths."""
        rows = self.rows.drop_columns(["path", "bytes"]).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        return xxhash.xxh3_128_hexdigest(memoryview(sink.getvalue()))

    def summary(self) -> str:
        """Return a few lines for people: splits, classes, sizes, and what is quarantined and why."""
        usable = self._usable()
        counts = Counter(usable["split"].to_pylist())
        shown = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        lines = [
            f"{usable.num_rows:,} images: " + ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts)),
            f"{len(self.classes)} classes ({self.task}): {shown}",
        ]
        width, height = (pc.min_max(usable[name]).as_py() for name in ("width", "height"))
        if width["min"] is not None:
            lines.append(f"{width['min']} to {width['max']} px wide, {height['min']} to {height['max']} px high")
        bad = self.rows.filter(pc.not_equal(self.rows["status"], "ok")).select(["path", "status"])
        if bad.num_rows:
            first = "; ".join(f"{row['path']} ({row['status']})" for row in bad.slice(0, 3).to_pylist())
            more = "; ..." if bad.num_rows > 3 else ""
            lines.append(f"{bad.num_rows:,} quarantined, not used: {first}{more}")
        return "\n".join([*lines, f"root {self.root}"])

    def _usable(self) -> pa.Table:
        return self.rows.filter(pc.equal(self.rows["status"], "ok"))

    def _targets(self, labels: pa.Array) -> np.ndarray:
        single = self.task == "single_label"
        indices = pc.index_in(labels if single else pc.list_flatten(labels), pa.array(self.classes, pa.string()))
        if indices.null_count:
            raise ManifestError(
                f"{indices.null_count} labels are not among the {len(self.classes)} classes: the manifest "
                "was changed since it was made; make it again with thawline index"
            )
        if single:
            return indices.to_numpy().astype(np.int64)
        targets = np.zeros((len(labels), len(self.classes)), np.float32)
        targets[pc.list_parent_indices(labels).to_numpy(), indices.to_numpy()] = 1
        return targets


def columns(task: str) -> pa.Schema:
    """Return the schema of a manifest's rows."""
    return pa.schema(
        {
            "id": pa.int64(),
            "path": pa.string(),
            "label": LABEL_TYPES[task],
            "split": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "bytes": pa.int64(),
            "hash": pa.string(),
            "status": pa.string(),
        }
    )


def _about(metadata: dict[bytes, bytes] | None, file: Path) -> dict[str, Any]:
    try:
        about = json.loads((metadata or {})[_KEY])
        version, _, _, _ = int(about["version"]), about["root"], about["task"], tuple(about["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{file} is not a thawline manifest; make one with thawline index") from error
    if version > VERSION or about["task"] not in LABEL_TYPES:
        raise ManifestError(
            f"manifest {file} (version {version}, task {about['task']!r}) is from a newer thawline: this one "
            f"reads version {VERSION} with {' or '.join(LABEL_TYPES)}; upgrade, or index again"
        )
    return about


def _exists(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:
        return False
