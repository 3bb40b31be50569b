"""Is a manifest's table what was written, and is every row of it possible?

That a file opens proves little: a table that was edited keeps its metadata, and with one wrong bit in an offset, Arrow
reads memory that is not the table's. So a loaded table is validated in full (by manifest_file.py), its values are
checked against their ranges, and all of it against the checksum that was written with it. That takes half a second for
ten million rows, so nothing is cached between two openings. Faults are ValueErrors here, without a subject: manifest.py
makes sentences of them. Nothing here stops somebody who writes a new checksum with the changes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from thawline.dataio.errors import quoted
from thawline.dataio.store.outputs import KEY
from thawline.dataio.table.schema import SPLITS
from thawline.dataio.table.subset import holds
from thawline.dataio.table.tasks import TASKS

_CODECS = ("dali", "pillow")
_MOST_PX = 1 << 24
"""Longest side; no format that is read here has a longer one, and a decoder that believes 2**31 - 1 crashes."""
_PIECE = 1 << 18  # rows at a time, so that copies stay small
_HASHED_ROWS = 65_536  # rows at a time of a fingerprint, which depends on this number


def shown(value: object) -> str:
    """A value for a message, as Python writes it."""
    return quoted(repr(value))


# Metadata ------------------------------------------------------------------------------------


def parsed(text: bytes) -> dict[str, Any]:
    """Metadata as a dict. Raises ValueError."""
    try:
        about = json.loads(text)
    except RecursionError:
        raise ValueError("its metadata are nested too deeply") from None
    if not isinstance(about, dict):
        raise ValueError(f"its metadata are {shown(about)}, not a table of names and values")
    return about


def root_of(metadata: dict[bytes, bytes] | None) -> str | None:
    """The root in a manifest's schema; None for the schema of any other table."""
    try:
        root = parsed((metadata or {})[KEY])["root"]
    except (KeyError, ValueError):
        return None
    return root if isinstance(root, str) else None


def check_about(about: dict[str, Any]) -> None:
    """Raises ValueError for invalid metadata: root, classes, values, shards."""
    root, classes, values = about["root"], about["classes"], about["values"]
    if not isinstance(root, str) or not root:
        raise ValueError(f"has {shown(root)} for a root")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"has classes that are no list of names: {shown(classes)}")
    _check_unique(classes, "class")
    if not isinstance(values, list) or not all(_is_int(value, 0, 255) for value in values):
        raise ValueError(f"has values that are no list of pixel values: {shown(values)}")
    _check_unique(values, "pixel value")
    if len(values) != (len(classes) if TASKS[about["task"]].masks else 0):
        raise ValueError(f"is for {about['task']} and has {len(values)} pixel values for {len(classes)} classes")
    if not isinstance(about["shards"], list):
        raise ValueError(f"has shards that are no list: {shown(about['shards'])}")
    for entry in about["shards"]:
        check_shard(entry)
    for name in ("fingerprint", "checksum"):
        if not isinstance(about.get(name, ""), str):
            raise ValueError(f"has {shown(about[name])} for a {name}")


def check_shard(entry: object) -> None:
    """Raises ValueError unless this is the JSON of a shard."""
    fits = (
        isinstance(entry, dict)
        and set(entry) - {"source"} == {"name", "first", "rows", "bytes", "hash"}
        and all(isinstance(entry.get(name, ""), str) for name in ("name", "hash", "source"))
        and all(_is_int(entry[name], 0, 1 << 62) for name in ("first", "rows", "bytes"))
        and entry["name"] not in ("", ".", "..")
        and not set("/\0") & set(entry["name"])
    )
    if not fits:
        raise ValueError(f"has a shard that is none: {shown(entry)}")


def check_bounds(shards: list[dict[str, Any]], rows: int) -> None:
    """Raises ValueError unless the shards hold all rows, one after another."""
    next_row = 0
    for shard in shards:
        if shard["first"] != next_row:
            raise ValueError(f"has a shard {shown(shard['name'])} that begins at row {shard['first']}, not {next_row}")
        next_row += shard["rows"]
    if shards and next_row != rows:
        raise ValueError(f"has {rows:,} rows, and shards of {next_row:,}")


def _is_int(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_unique(items: list[Any], kind: str) -> None:
    twice = next((item for item in items if items.count(item) > 1), None) if len(set(items)) < len(items) else None
    if twice is not None:
        raise ValueError(f"has the {kind} {shown(twice)} twice")


# Rows ----------------------------------------------------------------------------------------


def check_rows(rows: pa.Table, *, task: str, classes: list[str]) -> None:
    """Raises ValueError for impossible rows. rows: with schema.columns, in order of id, a chunk a column."""
    columns = {name: _chunk_of(rows[name]) for name in rows.column_names}
    for name, column in columns.items():
        words = column.dictionary.to_pylist() if pa.types.is_dictionary(column.type) else []
        if None in words or len(set(words)) < len(words):
            raise ValueError(f"has a column {name} whose words are null, or there twice")
    for name in ("id", "path", "status"):
        _refuse(columns, name, _nulls(columns[name]))
    for name, least, most in _RANGES:
        ends = pc.min_max(columns[name]).as_py()
        if ends["min"] is not None and not least <= ends["min"] <= ends["max"] <= most:
            values = columns[name].fill_null(least).to_numpy()
            _refuse(columns, name, (values < least) | (values > most))
    twice = np.append(np.diff(columns["id"].to_numpy()) == 0, False)
    _refuse(columns, "id", twice, why=" as the next row")
    _refuse(columns, "path", pc.binary_length(columns["path"]).to_numpy() == 0)
    if not _characters(columns["path"]).all():  # no file's name can hold it
        _refuse(columns, "path", pc.match_substring(columns["path"], "\0").to_numpy(zero_copy_only=False))
    for name, allowed in (("split", SPLITS), ("codec", _CODECS)):
        for word in columns[name].dictionary.to_pylist():
            if word not in allowed:
                _refuse(columns, name, holds(columns[name], word))
    usable = holds(columns["status"], "ok")
    _refuse(columns, "split", usable & _nulls(columns["split"]))
    unknown = usable & (_nulls(columns["width"]) | _nulls(columns["height"]))
    if unknown.sum() < usable.sum():  # files are verified all together, or not at all
        _refuse(columns, "width", unknown)
    _refuse(columns, "label", usable & TASKS[task].wrong(columns["label"], classes))


_RANGES = (
    ("id", 0, 2**63 - 1),
    ("width", 1, _MOST_PX),
    ("height", 1, _MOST_PX),
    ("bytes", 0, 2**63 - 1),
    ("orientation", 1, 8),
)


def _refuse(columns: dict[str, pa.Array], name: str, wrong: NDArray[np.bool_], *, why: str = "") -> None:
    """Raises ValueError naming the first row that is wrong."""
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"has {shown(columns[name][row].as_py())} for the {name} of row {row}{why}")


def _offsets(texts: pa.LargeStringArray) -> NDArray[np.int64]:
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]


def _characters(texts: pa.LargeStringArray) -> NDArray[np.uint8]:
    """All characters in UTF-8, one text after another."""
    offsets, data = _offsets(texts), texts.buffers()[2]
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data and len(offsets) else np.zeros(0, np.uint8)


def _nulls(column: pa.Array) -> NDArray[np.bool_]:
    if column.null_count == 0:
        return np.zeros(len(column), np.bool_)
    nulls: NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False).copy()
    return nulls


def _chunk_of(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


# Hashes --------------------------------------------------------------------------------


def checksum(rows: pa.Table, about: dict[str, Any]) -> str:
    """xxh3_128 of a whole manifest, hexadecimal: every column of every row, in their order, and the metadata.

    It is the same for equal tables, however dictionaries are coded and whatever lies below nulls, since Parquet and
    Arrow restore these differently; and it does not depend on how Arrow writes.
    """
    words = {name: value for name, value in about.items() if name != "checksum"}
    digest = xxhash.xxh3_128(json.dumps(words, sort_keys=True).encode())
    for name in rows.column_names:
        column = _chunk_of(rows[name])
        if pa.types.is_dictionary(column.type):
            digest.update(f"{name} {len(column)}".encode())
            _add_words(digest, column)
            continue
        for start in range(0, max(len(column), 1), _PIECE):
            digest.update(f"{name} {start}".encode())
            _add(digest, column.slice(start, _PIECE))
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, column: pa.Array) -> None:
    digest.update(f"{len(column)} {column.null_count}".encode())
    if column.null_count:
        digest.update(np.packbits(_nulls(column)).data)
    if pa.types.is_list(column.type):
        digest.update(column.value_lengths().fill_null(0).to_numpy().data)
        _add(digest, column.flatten())
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_string()).fill_null("")
        digest.update(np.diff(_offsets(column)).data)
        digest.update(_characters(column).data)
    else:
        digest.update(column.fill_null(0).to_numpy().data)


def _add_words(digest: xxhash.xxh3_128, column: pa.DictionaryArray) -> None:
    """By the rank of each word among those that are used: the numbers of a dictionary are arbitrary."""
    words, used = column.dictionary.to_pylist(), pc.unique(column.indices).drop_null().to_pylist()
    used.sort(key=words.__getitem__)
    digest.update(json.dumps([words[number] for number in used]).encode())
    ranks = np.zeros(len(words), np.int32)
    ranks[used] = np.arange(len(used))
    for start in range(0, len(column), _PIECE):
        numbers = column.indices.slice(start, _PIECE)
        digest.update(pa.array(ranks).take(numbers).fill_null(-1).to_numpy().data)


def fingerprint(rows: pa.Table, meaning: str, *, content: str) -> str:
    """xxh3_128 of all that decides a run's stream and targets, hexadecimal: not of paths, and in the order of the rows.

    content: the column that identifies the targets. Manifests, packs and runs on disk hold this number, so it must not
    change.
    """
    names = ["id", content, "split", "width", "height", "hash", "status"]
    digest = xxhash.xxh3_128(meaning.encode())
    for start in range(0, rows.num_rows, _HASHED_ROWS):
        piece = rows.select(names).slice(start, _HASHED_ROWS)
        plain = pa.table([_plain(column) for column in piece.columns], names)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain.combine_chunks())
        digest.update(memoryview(sink.getvalue()))
    return digest.hexdigest()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with the same bytes in equal tables, however dictionaries are coded and whatever lies below nulls."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if pa.types.is_list(column.type):
        return column
    return column.fill_null("" if pa.types.is_string(column.type) else 0)
