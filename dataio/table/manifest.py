"""What is a checked data set? A table with one row an image, classes and a task.

It holds no pixels (shards beside it may) and no order (see plan.py). Its file format, see manifest_file.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thawline.dataio.checks import integrity
from thawline.dataio.errors import ManifestError, kind_of, quoted
from thawline.dataio.labels.keypoints import Pairs, check_pairs
from thawline.dataio.labels.numbers import Moments
from thawline.dataio.store import files
from thawline.dataio.store.outputs import KEY, check_output
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest_file import VERSION, located, read_about, read_moments, read_table, write_table
from thawline.dataio.table.schema import SPLITS, columns, in_order
from thawline.dataio.table.subset import Subset, holds
from thawline.dataio.table.tasks import TASKS

_UNSURE = ("PPM", "BMP", "TIFF", "JPEG2000")


@dataclass(frozen=True)
class Shard:
    """A file of packed samples, beside the manifest: rows [first, first + rows) of it."""

    name: str
    first: int
    rows: int
    bytes: int
    hash: str
    """xxh3_128 of the file, hexadecimal."""
    source: str = ""
    """The fingerprint of the manifest that it was packed from, also in the file; older packs have none."""


@dataclass(frozen=True)
class Manifest:
    """Checked, labelled and split images.

    `rows` has the columns of `columns(task)`, in rising order of id; split is 'train', 'valid', 'test', or null for an
    image whose status is not 'ok'. `root` is where the paths start: an absolute folder or a URI. `classes` name what
    targets mean: sorted class names, the names of the points, or the names of a mask's values in their order.
    `values` are a mask's pixel values, one for each class; any other value belongs to no class.
    `swap` are the pairs of points that change places in a mirror image; None if they were not given: no image is then
    mirrored. `moments` standardise numbers; None for those of its own training images; they are given where the
    manifest continues an older one. `notes` are sentences from when it was made, for `summary`; they are not saved.
    `shards` hold the files' bytes, if they were packed; `home` is the folder or URI of this manifest.
    """

    rows: pa.Table
    root: str
    task: str
    classes: tuple[str, ...]
    values: tuple[int, ...] = ()
    shards: tuple[Shard, ...] = ()
    home: str = ""
    swap: Pairs | None = None
    moments: Moments | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    _fingerprint: str = field(default="", init=False, repr=False, compare=False)
    """Read from the file; `replace` leaves it out, so another table is hashed anew."""

    def save(self, file: str | Path) -> None:
        """Write Parquet or Arrow, by the ending .parquet or .arrow; whole or not at all, to a file or a URI.

        Raises: ManifestError when the file cannot be written, or exists and is no manifest.
        """
        check_output(file)
        rows = in_order(self.rows)
        about = {
            "version": VERSION,
            "task": self.task,
            "classes": self.classes,
            "values": self.values,
            "root": self.root,
            "fingerprint": self.fingerprint(),
            "shards": [asdict(shard) for shard in self.shards],
            **({} if self.swap is None else {"swap": self.swap}),
            **({} if self.moments is None else {"moments": self.moments}),
        }
        about["checksum"] = integrity.checksum(rows, about)
        write_table(rows.replace_schema_metadata({KEY: json.dumps(about)}), file)

    @classmethod
    def load(cls, file: str | Path, *, root: str | Path | None = None) -> Manifest:
        """Read what `save` wrote; `root` is where the images are now, if they moved.

        Raises: ManifestError for a missing file, one that is no manifest, or one of another version; for impossible
            values; and for rows or metadata that were changed since they were written.
        """
        file = files.plain(file)
        rows = read_table(file)
        about = read_about(rows.schema.metadata, file)
        schema = columns(about["task"])
        missing = [name for name in schema.names if name not in rows.column_names]
        if missing:
            raise ManifestError(
                f"manifest {file} lacks columns {', '.join(missing)}: it was changed since "
                "it was made; make it again with thawline index"
            )
        try:
            rows = rows.select(schema.names).replace_schema_metadata(None).cast(schema)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise ManifestError(
                f"manifest {file} has a column of another type ({quoted(str(error))}): it was changed since it was "
                "made; make it again with thawline index"
            ) from error
        manifest = cls(
            in_order(rows),
            Root.of(about["root"] if root is None else root).text,
            about["task"],
            tuple(about["classes"]),
            tuple(about["values"]),
            tuple(Shard(**shard) for shard in about["shards"]),
            located(file)[0].text,
            _pairs(about, file),
            read_moments(about, file),
        )
        _check(manifest, about, rows, file)
        if "checksum" not in about:
            manifest = replace(manifest, rows=_decoded_by_pillow(manifest.rows))
        object.__setattr__(manifest, "_fingerprint", about["fingerprint"])
        return manifest

    def subset(self, split: str) -> Subset:
        """Return the usable images of 'train', 'valid' or 'test'.

        Raises: ManifestError when there are none.
        """
        rows = np.flatnonzero(self.usable() & _equals(self.rows["split"], split))
        if len(rows) == 0:
            splits = ", ".join(self.splits()) or "none"
            raise ManifestError(
                f"the manifest has no usable images in split {quoted(repr(split))} (its splits: {splits}): there is "
                "nothing to load; split again with thawline index"
            )
        return Subset(self.rows, rows, self.task)

    def splits(self) -> list[str]:
        """Which of 'train', 'valid' and 'test' have images."""
        present = pc.unique(self.rows["split"]).to_pylist()
        return [split for split in SPLITS if split in present]

    def check_paths(self, *, most: int = 1000, allowed: float = 0.0) -> None:
        """Check that the usable files are still where they were; an evenly spaced sample of at most `most`.

        For a pack, all shards are checked instead of the files. `allowed`: the share of files that may be missing,
        since loaders fill such holes; a shard may not.

        Raises: ManifestError naming how many are missing, the first three, and what to do.
        """
        if self.shards:
            names, root = [shard.name for shard in self.shards], Root.of(self.home)
        else:
            usable = np.flatnonzero(self.usable())
            sample = usable[np.linspace(0, len(usable) - 1, min(len(usable), most)).round().astype(np.int64)]
            names, root = self.rows["path"].take(pa.array(sample)).to_pylist(), Root.of(self.root)
        missing = root.missing(names)
        if len(missing) > (0 if self.shards else math.ceil(allowed * len(names))):
            examples = ", ".join(map(quoted, missing[:3]))
            total = f"{len(self.shards)} shards" if self.shards else f"{len(names)} files checked (of {len(usable)})"
            remedy = "pack again" if self.shards else "give their new place with --data.root, or index again"
            raise ManifestError(
                f"{len(missing)} of {total} are not where the manifest says, under root {root}: {examples}; training "
                f"would fail; {remedy}"
            )

    def check_vocabulary(self, other: Manifest, *, name: str = "the other manifest") -> None:
        """Raises ManifestError unless `other` has the same task and classes, in the same order."""
        if other.task != self.task:
            raise ManifestError(
                f"{name} is for {other.task}, this one for {self.task}: their targets do not mean the same; index one "
                "of them again with the other's kind of labels"
            )
        if (other.classes, other.values) != (self.classes, self.values):
            lacking = [f"-{c}" for c in self.classes if c not in other.classes]
            extra = [f"+{c}" for c in other.classes if c not in self.classes]
            differ = ", ".join(map(quoted, (lacking + extra)[:6])) or "the same in another order"
            raise ManifestError(
                f"{name} has other classes than this one ({differ}): a target would mean one thing here and another "
                "there; index it again with this one's classes (--classes)"
            )

    def fingerprint(self) -> str:
        """A hash of all that decides a run's stream and targets: ids, contents, labels, splits, sizes; not of paths."""
        if self._fingerprint:
            return self._fingerprint
        meaning = [self.task, self.classes, self.values, *([] if self.swap is None else [self.swap])]
        return integrity.fingerprint(self.rows, json.dumps(meaning), content=TASKS[self.task].content)

    def quarantined(self) -> pa.Table:
        """The rows that cannot be used: path and status, a row each."""
        return self.rows.filter(pa.array(~self.usable())).select(["path", "status"])

    def summary(self) -> str:
        """Return a few lines for people: splits, classes, sizes, quarantined files and why."""
        usable = self.usable()
        counts = {row["values"]: row["counts"] for row in pc.value_counts(self.rows["split"]).to_pylist()}
        classes = ", ".join(map(quoted, self.classes[:8])) + (", ..." if len(self.classes) > 8 else "")
        lines = [
            f"{int(usable.sum()):,} images: " + ", ".join(f"{counts[split]:,} {split}" for split in self.splits()),
            f"{len(self.classes)} {TASKS[self.task].classes_word} ({self.task}): {classes}",
        ]
        width, height = (pc.min_max(self.rows[name]).as_py() for name in ("width", "height"))
        if width["min"] is not None:
            lines.append(f"{width['min']} to {width['max']} px wide, {height['min']} to {height['max']} px high")
        bad = self.quarantined()
        if bad.num_rows:
            reasons = Counter(map(kind_of, bad["status"].to_pylist())).most_common()
            lines.append(
                f"{bad.num_rows:,} quarantined, not used: " + ", ".join(f"{n:,} {reason}" for reason, n in reasons)
            )
            lines += [f"  {quoted(row['path'])}: {quoted(row['status'])}" for row in bad.slice(0, 10).to_pylist()]
            lines += [f"  and {bad.num_rows - 10:,} more"] if bad.num_rows > 10 else []
        if self.shards:
            size = sum(shard.bytes for shard in self.shards)
            return "\n".join([*lines, f"{len(self.shards)} shards, {size:,} bytes, in {self.home}"])
        return "\n".join([*lines, f"root {self.root}", *self.notes])

    def usable(self) -> NDArray[np.bool_]:
        """Which rows can be used, (N,)."""
        return _equals(self.rows["status"], "ok")


def build(
    columns_by_name: dict[str, Any],
    *,
    root: str,
    task: str,
    classes: Sequence[str],
    values: Sequence[int] = (),
    swap: Pairs | None = None,
    notes: Sequence[str] = (),
) -> Manifest:
    """A manifest from columns (Arrow or plain sequences), one for each of `columns(task)`."""
    schema = columns(task)
    arrays = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        column = columns_by_name[name]
        if not isinstance(column, pa.Array | pa.ChunkedArray):
            column = pa.array(column, kind.value_type if pa.types.is_dictionary(kind) else kind)
        arrays.append(column.cast(kind))
    rows = in_order(pa.table(arrays, schema))
    return Manifest(rows, root, task, tuple(classes), tuple(values), swap=swap, notes=tuple(notes))


def _check(manifest: Manifest, about: dict[str, Any], stored: pa.Table, file: str | Path) -> None:
    """Raises ManifestError unless the rows are possible, and those that `about` was written with."""
    try:
        integrity.check_rows(manifest.rows, task=manifest.task, classes=about["classes"])
        integrity.check_bounds(about["shards"], manifest.rows.num_rows)
    except ValueError as error:
        raise ManifestError(
            f"manifest {file} {error}: it is damaged, or was made by other means; make it again with thawline index"
        ) from error
    if "checksum" in about:
        same = about["checksum"] == integrity.checksum(manifest.rows, about)
    else:  # an older manifest; its fingerprint leaves out paths and codecs, and depends on the order of rows
        same = about["fingerprint"] in ("", replace(manifest, rows=stored).fingerprint())
    if not same:
        raise ManifestError(
            f"manifest {file} was changed after thawline wrote it (its checksum is another): a run could not say what "
            f"it trained on; index the images again, or, if the change was meant, this table: thawline index {file} "
            f"--path-column path --label {TASKS[manifest.task].option}:label --valid column:split --out NEW.parquet"
        )


def _decoded_by_pillow(rows: pa.Table) -> pa.Table:
    """The rows of a manifest made before DALI's pixels were compared: it decodes some of these formats differently."""
    index = rows.schema.get_field_index("codec")
    field, unsure = rows.schema.field(index), pc.is_in(rows["format"].cast(pa.string()), pa.array(_UNSURE))
    codecs = pc.if_else(pc.fill_null(unsure, False), "pillow", rows["codec"].cast(pa.string()))
    return rows.set_column(index, field, codecs.cast(field.type)).combine_chunks()


def _pairs(about: dict[str, Any], file: str | Path) -> Pairs | None:
    try:
        return None if about.get("swap") is None else check_pairs(about["swap"], about["classes"])
    except (TypeError, ValueError) as error:
        raise ManifestError(
            f"manifest {file} names pairs of points that cannot change places ({error}): it was changed since it was "
            "made; make it again with thawline index"
        ) from error


def _equals(column: pa.ChunkedArray, word: str) -> NDArray[np.bool_]:
    """Which rows of a dictionary column hold the word; decoding ten million texts would take a second."""
    return holds(column.chunk(0), word) if column.num_chunks else np.zeros(0, np.bool_)
