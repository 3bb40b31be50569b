"""Which images are there?

A source only lists paths: no image is opened (see verify.py) or labelled (see labels.py, which also pairs lists of
paths and labels). Folders are walked in folders.py, files of rows are read in lists.py. The order of rows is the same
on every machine, since the row number becomes the sample's id, and all randomness is a function of that id.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from thawline.dataio.checks.integrity import root_of
from thawline.dataio.errors import SourceError, listed, quoted
from thawline.dataio.labels.keypoints import Pairs
from thawline.dataio.store.folders import list_files
from thawline.dataio.store.root import Root
from thawline.dataio.table.lists import JSONS, contents, csv_rows, ending, json_rows, table_rows, usual_separator
from thawline.dataio.table.paths import as_texts, tidy

if TYPE_CHECKING:
    import pandas as pd

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Formats that Pillow decodes and people use; verify.py tests which of them DALI decodes, too."""

_BESIDE = (
    *(".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".parquet", ".arrow", ".gz"),
)
"""Endings of files that often lie beside pictures."""

_STORE = re.compile(r"\w[\w+.-]*://[^/]*")
_INDEX_NAMES = ("", "index", "Unnamed: 0", "__index_level_0__")
_INSPECTED = 50


@dataclass(frozen=True)
class Table:
    """Images, one a row, before they are checked and split.

    `rows` has `path` (string, posix, relative to root, or absolute when outside a local one), the columns of its
    source, and after labelling `label` (of the task's type). `task` is None until then. `root` is an absolute folder or
    a URI. `classes` is the vocabulary if it is already fixed, and `values` are the pixel values of a mask's classes,
    one for each; None where both are to be found in the data. `counted`: no values were given, so they are 0, 1, 2, ...
    `swap` are the pairs of points that change places in a mirror image; None if they were not given. `notes` are lines
    for people on what was left out or changed; harmful ones begin with WARNING.
    """

    rows: pa.Table
    root: str
    task: str | None = None
    classes: tuple[str, ...] | None = None
    values: tuple[int, ...] | None = None
    counted: bool = False
    swap: Pairs | None = None
    notes: tuple[str, ...] = ()


def from_folder(
    folder: str | Path,
    *,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    folders: Sequence[str] | None = None,
    recursive: bool = True,
) -> Table:
    """List the images below `folder` (or a URI), sorted by path; names that begin with a dot are skipped.

    `folders`: the folders directly below it to list, if not all. Symbolic links are followed. A folder that two names
    lead to is listed once, under its own name if that is below `folder`, so that links neither loop nor put one image
    into train and valid at once.

    Raises: SourceError for a missing folder, one without images, or one that cannot be read.
    """
    root = Root.of(folder)
    endings = tuple("." + extension.lower().lstrip(".") for extension in extensions)
    listing = list_files(root, endings=endings, recursive=recursive)
    names = listing.names if recursive else [name for name in listing.names if "/" not in name]
    if folders is not None:
        starts = tuple(f"{name.strip('/')}/" for name in folders)
        names = [name for name in names if name.startswith(starts)]
    images = sorted(name for name in names if name.lower().endswith(endings))
    others = [name for name in names if not name.lower().endswith(endings)]
    if not images:
        where = root.text if folders is None else f"{listed(folders)} of {root}"
        raise SourceError(
            f"no images in {where}: it holds {len(names)} other files{f' ({_endings(others)})' if others else ''}; "
            f"give a folder with files that end in {' '.join(map(quoted, endings[:20]))}"
        )
    notes = (listing.note(), _left_out_note(others, images, loud=tuple(extensions) == IMAGE_EXTENSIONS))
    return Table(pa.table({"path": as_texts(images)}), root.text, notes=tuple(filter(None, notes)))


def _left_out_note(others: list[str], images: list[str], *, loud: bool) -> str:
    """A note on files without an image's ending: a warning, unless they are of a kind that often lies beside images."""
    strange = [name for name in others if not name.lower().endswith(_BESIDE)]
    if not others or not (strange and loud):
        return f"{len(others):,} files are left out for their endings ({_endings(others)})" if others else ""
    with_images = {name.rpartition("/")[0] for name in images}
    without_images = sorted({name.rpartition("/")[0] for name in strange} - with_images - {""})
    consequence = (
        f": no image is left of {listed([f'{folder}/' for folder in without_images], most=3)}" if without_images else ""
    )
    return (
        f"WARNING: {len(others):,} files are left out for their endings ({_endings(others)}){consequence}; if they are "
        "images, convert or rename them, or name their endings with --extensions"
    )


def _endings(names: list[str]) -> str:
    """The number of files of each ending, the most frequent first."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "without one" for name in names).most_common(6)
    return ", ".join(f"{count:,} {quoted(ending)}" for ending, count in counts[:5]) + (", ..." if counts[5:] else "")


def from_csv(
    file: str | Path,
    *,
    path_column: str | None = None,
    root: str | Path | None = None,
    folder: str = "",
    suffix: str = "",
    delimiter: str | None = None,
    column_names: Sequence[str] | None = None,
) -> Table:
    """List the images that a CSV (or the URI of one) names, in its order; every column is text, so "007" stays "007".

    `path_column` is the first column by default; its values may be URIs, all of one store. `root` is where they start:
    by default the CSV's own folder, or the store. `folder` and `suffix` are put before and after each value: a CSV of
    bare names with folder="train" and suffix=".jpg" names train/NAME.jpg. `delimiter` is detected if it is not given.
    `column_names` are for a file that does not begin with them. A CSV may be gzipped.

    Raises: SourceError for a missing or malformed file, a missing column, no rows, or a path given twice.
    """
    home, name = Root.holding(file)
    rows, separator = csv_rows(
        contents(home, name, "CSV file"), str(file), separator=delimiter, column_names=column_names
    )
    if column_names is None and any(column.lower().endswith(IMAGE_EXTENSIONS) for column in rows.column_names):
        raise SourceError(
            f"{file} begins with a row ({listed(rows.column_names, most=3)}) and not with its columns' names: that "
            "image would be lost; name them (--column-names path,label)"
        )
    table = _table(rows, path_column, str(file), root=root, home=home.text, folder=folder, suffix=suffix, one_line=True)
    if delimiter is None and separator != usual_separator(name):
        return replace(table, notes=(f"{name}: columns are separated by {separator!r}",))
    return table


def from_file(
    file: str | Path,
    *,
    path_column: str | None = None,
    root: str | Path | None = None,
    folder: str = "",
    suffix: str = "",
) -> Table:
    """List the images that a Parquet, Arrow or JSON-lines file (or its URI) names, in its order, with its other
    columns.

    The rest as `from_csv`. A manifest is such a file, with a root of its own.

    Raises: SourceError as `from_csv`.
    """
    home, name = Root.holding(file)
    if ending(name) in JSONS:
        rows, own = json_rows(contents(home, name, "file of JSON lines"), str(file)), home.text
    else:
        rows = table_rows(contents(home, name, "Parquet or Arrow file"), str(file))
        own = root_of(rows.schema.metadata) or home.text
    rows = rows.replace_schema_metadata(None)
    return _table(rows, path_column, str(file), root=root, home=own, folder=folder, suffix=suffix)


def from_table(
    frame: pa.Table | pd.DataFrame,
    *,
    path_column: str | None = None,
    root: str | Path | None = None,
    folder: str = "",
    suffix: str = "",
) -> Table:
    """List the images that a pandas or Arrow table names, in its order, with its other columns.

    The rest as `from_csv`; without a root, the paths are absolute, or URIs of one store.

    Raises: SourceError as `from_csv`.
    """
    if isinstance(frame, pa.Table):
        return _table(frame, path_column, "the table", root=root, home=None, folder=folder, suffix=suffix)
    frame = frame.rename(columns=str)
    column = _path_column(path_column, list(frame.columns), "the data frame")
    # Arrow knows only text, not pathlib.Path objects; pictures in dicts are refused by `_table`
    as_text = frame[column].map(
        lambda value: value if isinstance(value, dict | list | bytes) else str(value), na_action="ignore"
    )
    frame = frame.assign(**{column: as_text})
    try:
        rows = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SourceError(
            f"the data frame does not fit an Arrow table: {quoted(str(error))}; give each column one type"
        ) from error
    return _table(rows, column, "the data frame", root=root, home=None, folder=folder, suffix=suffix)


def from_paths(paths: Sequence[str | Path], *, root: str | Path | None = None) -> Table:
    """List these images, in this order. Raises: SourceError as `from_csv`."""
    rows = pa.table({"path": as_texts([str(path) for path in paths])})
    return _table(rows, "path", "the list of paths", root=root, home=None)


def _table(
    rows: pa.Table,
    path_column: str | None,
    source: str,
    *,
    root: str | Path | None,
    home: str | None,
    folder: str = "",
    suffix: str = "",
    one_line: bool = False,
) -> Table:
    """A table over the paths of a column; `home` is the root if none is given and the paths have none of their own.

    one_line: refuse a path with a line break, which an open quote has swallowed.
    """
    names = rows.column_names
    column = _path_column(path_column, names, source)
    if len(set(names)) < len(names):
        raise SourceError(f"{source} has two columns of one name ({listed(names)}): rename one")
    if rows.num_rows == 0:
        raise SourceError(f"{source} has no rows: there is nothing to list; give at least one image")
    _check_paths(rows, column, source, named=path_column is not None or bool(suffix))
    if column != "path" and "path" in names:
        raise SourceError(
            f"{source} has a column 'path' beside the path column {quoted(repr(column))}: rename it, or "
            "name it as the one that holds paths (--path-column path)"
        )
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    full_paths = [f"{prefix}{path}{suffix}" if path else path for path in rows[column].to_pylist()]
    broken = next((i for i, path in enumerate(full_paths) if one_line and path and len(path.splitlines()) > 1), None)
    if broken is not None:
        raise SourceError(
            f"{source} has a path with a line break in row {broken + 1} ({quoted(repr(full_paths[broken]))}): a quote "
            "that does not close swallows rows like this; correct it"
        )
    home_root = Root.of(_common_root(full_paths, home, source) if root is None else root)
    if home_root.remote:
        _ = home_root.opened  # an unknown store is an error at once, before thousands of files fail one by one
    paths = tidy(full_paths, home_root.text, source)
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{source} names {len(repeated)} paths more than once ({', '.join(map(quoted, repeated[:3]))}): "
            "an image could be in train and in valid; keep one row an image"
        )
    return Table(rows.drop_columns([column]).add_column(0, "path", as_texts(paths)), home_root.text)


def _check_paths(rows: pa.Table, column: str, source: str, *, named: bool) -> None:
    """Raises SourceError for a column without texts, and, unless it was named, for pandas' index."""
    kind = rows.schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    candidates = [name for name in rows.column_names if name != column and _names_images(rows[name])]
    remedy = f"name the column that holds paths (--path-column {quoted(candidates[0]) if candidates else 'NAME'})"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise SourceError(
            f"column {quoted(repr(column))} of {source} holds {quoted(str(kind))}, the pictures themselves and no "
            f"paths: write each into a file and list those, or {remedy}"
        )
    first = [str(value) for value in rows[column].slice(0, _INSPECTED).to_pylist()]
    counted = first in ([str(i) for i in range(len(first))], [str(i + 1) for i in range(len(first))])
    unnamed = column in _INDEX_NAMES and all(value.isdecimal() for value in first)
    if not named and (counted or unnamed):
        raise SourceError(
            f"the first column of {source}, {quoted(repr(column))}, counts rows ({quoted(', '.join(first[:3]))}), as "
            f"pandas' index does, and holds no paths: {remedy}"
        )
    if not is_text:
        raise SourceError(f"column {quoted(repr(column))} of {source} holds {quoted(str(kind))} and no paths: {remedy}")


def _names_images(column: pa.ChunkedArray) -> bool:
    """Whether most of a column's first values are names of images."""
    first = column.slice(0, _INSPECTED).to_pylist()
    return 2 * sum(isinstance(value, str) and value.lower().endswith(IMAGE_EXTENSIONS) for value in first) > len(first)


def _common_root(paths: list[Any], home: str | None, source: str) -> str:
    """The default root of paths: the store of URIs, else home, else the folder above absolute ones."""
    texts = [path for path in paths if isinstance(path, str) and path]
    stores = {match.group() for match in map(_STORE.match, texts) if match} - {"file://"}
    if len(stores) > 1:
        raise SourceError(
            f"{source} names files of {len(stores)} stores ({listed(sorted(stores), most=3)}): a manifest has one "
            "root; index each store by itself, or copy the files under one"
        )
    if stores or home is not None:
        return stores.pop() if stores else str(home)
    texts = [path.removeprefix("file://") for path in texts]
    if texts and all(path.startswith("/") for path in texts):
        return posixpath.commonpath({posixpath.dirname(path) for path in texts})
    raise SourceError(f"{source} has relative paths and no root: they cannot be resolved; give root, where they start")


def _path_column(column: str | None, names: list[str], source: str) -> str:
    if column is None and names:
        return str(names[0])
    if not names:
        raise SourceError(f"{source} has no columns: there is nothing to list; give one with paths")
    if column is None or column not in names:
        raise SourceError(f"{source} has no column {quoted(repr(column))}; it has {listed(names)}: name one of these")
    return column
