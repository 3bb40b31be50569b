"""Which images are there?

A source lists paths and nothing more: no image is opened (verify.py) or labelled (labels.py, where lists of paths and
labels are paired, too). Folders are walked in folders.py, files of rows are read in lists.py. Row order is the same on
every machine, since the row number becomes the sample's id, and all randomness is a function of that id.
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
"""What Pillow decodes and people keep pictures in; verify.py finds out which of them DALI decodes too."""

_BESIDE = (
    *(".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".parquet", ".arrow", ".gz"),
)
"""What lies beside pictures and is none."""

_STORE = re.compile(r"\w[\w+.-]*://[^/]*")
_INDEX_NAMES = ("", "index", "Unnamed: 0", "__index_level_0__")
_LOOKED_AT = 50


@dataclass(frozen=True)
class Table:
    """Images, one a row, before they are checked and split.

    `rows` has `path` (string, posix, relative to root, or absolute when outside a local one), the columns of its
    source, and after labelling `label` (typed as tasks.py has it). `task` is None until then. `root` is an absolute
    folder or a URI. `classes` is the vocabulary if it is fixed already, and `values` are the pixel values of a mask's
    classes, one for each; None where both are still to be found in the data. `counted`: nobody gave any, so they are
    0, 1, 2, ... `swap` are the points that change places in a mirror image; None where nobody said. `notes` tell
    people, a line each, what was seen, left out or changed on the way; where it may hurt they begin with WARNING.
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
    """List the images below `folder` (or a URI), sorted by path; what begins with a dot is skipped.

    `folders` are those directly below it to look into, if not all. Symbolic links are followed. A folder that two names
    lead to is listed once, under its own name if that is below `folder`, so that links neither loop nor put one image
    into train and valid at once.

    Raises: SourceError for a missing folder, one without images, or one that cannot be read.
    """
    root = Root.of(folder)
    endings = tuple("." + extension.lower().lstrip(".") for extension in extensions)
    found = list_files(root, endings=endings, recursive=recursive)
    names = found.names if recursive else [name for name in found.names if "/" not in name]
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
    notes = (found.note(), _left_out(others, images, loud=tuple(extensions) == IMAGE_EXTENSIONS))
    return Table(pa.table({"path": as_texts(images)}), root.text, notes=tuple(filter(None, notes)))


def _left_out(others: list[str], images: list[str], *, loud: bool) -> str:
    """What to say of files that do not end as images do: loud, unless they lie beside images everywhere."""
    strange = [name for name in others if not name.lower().endswith(_BESIDE)]
    if not others or not (strange and loud):
        return f"{len(others):,} files are left out for their endings ({_endings(others)})" if others else ""
    kept = {name.rpartition("/")[0] for name in images}
    lost = sorted({name.rpartition("/")[0] for name in strange} - kept - {""})
    gone = f": no image is left of {listed([f'{folder}/' for folder in lost], most=3)}" if lost else ""
    return (
        f"WARNING: {len(others):,} files are left out for their endings ({_endings(others)}){gone}; if they are "
        "images, convert or rename them, or name their endings with --extensions"
    )


def _endings(names: list[str]) -> str:
    """How many files have which ending, the most frequent first."""
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

    `path_column` is the first column unless named; its values may be URIs, all of one store. `root` is where they
    start: the CSV's own folder, or the store. `folder` and `suffix` are put before and behind each value: a CSV of bare
    names with folder="train" and suffix=".jpg" names train/NAME.jpg. `delimiter` is found if it is not given.
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
    """List the images that a Parquet, Arrow or JSON-lines file (or the URI of one) names, in its order, keeping other
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
    """List the images that a pandas or Arrow table names, in its order, keeping its other columns.

    The rest as `from_csv`; without a root, the paths are absolute, or URIs of one store.

    Raises: SourceError as `from_csv`.
    """
    if isinstance(frame, pa.Table):
        return _table(frame, path_column, "the table", root=root, home=None, folder=folder, suffix=suffix)
    frame = frame.rename(columns=str)
    column = _path_column(path_column, list(frame.columns), "the data frame")
    # pathlib.Path objects are welcome, Arrow knows only text; pictures in dicts are left for `_table` to refuse
    as_text = frame[column].map(lambda it: it if isinstance(it, dict | list | bytes) else str(it), na_action="ignore")
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
    """A table over the paths of a column; `home` is the root where none is given and the paths do not tell.

    one_line: a path with a line break is refused, as what a quote swallowed.
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
    before = f"{folder.rstrip('/')}/" if folder else ""
    given = [f"{before}{path}{suffix}" if path else path for path in rows[column].to_pylist()]
    broken = next((i for i, path in enumerate(given) if one_line and path and len(path.splitlines()) > 1), None)
    if broken is not None:
        raise SourceError(
            f"{source} has a path with a line break in row {broken + 1} ({quoted(repr(given[broken]))}): a quote that "
            "does not close swallows rows like this; correct it"
        )
    place = Root.of(_common_root(given, home, source) if root is None else root)
    if place.remote:
        _ = place.opened  # a store that is unknown here is told before thousands of files fail one by one
    paths = tidy(given, place.text, source)
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{source} names {len(repeated)} paths more than once ({', '.join(map(quoted, repeated[:3]))}): "
            "an image could be in train and in valid; keep one row an image"
        )
    return Table(rows.drop_columns([column]).add_column(0, "path", as_texts(paths)), place.text)


def _check_paths(rows: pa.Table, column: str, source: str, *, named: bool) -> None:
    """Raises SourceError where a column holds no texts, or, unless it was named, pandas' index."""
    kind = rows.schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    others = [name for name in rows.column_names if name != column and _names_images(rows[name])]
    remedy = f"name the column that holds paths (--path-column {quoted(others[0]) if others else 'NAME'})"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise SourceError(
            f"column {quoted(repr(column))} of {source} holds {quoted(str(kind))}, the pictures themselves and no "
            f"paths: write each into a file and list those, or {remedy}"
        )
    first = [str(value) for value in rows[column].slice(0, _LOOKED_AT).to_pylist()]
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
    """Whether the first values of a column are mostly names of images."""
    first = column.slice(0, _LOOKED_AT).to_pylist()
    return 2 * sum(isinstance(it, str) and it.lower().endswith(IMAGE_EXTENSIONS) for it in first) > len(first)


def _common_root(paths: list[Any], home: str | None, source: str) -> str:
    """Where paths start when nobody says: the store of URIs, else home, else the folder above absolute ones."""
    texts = [path for path in paths if isinstance(path, str) and path]
    stores = {found.group() for found in map(_STORE.match, texts) if found} - {"file://"}
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
    raise SourceError(f"{source} has relative paths and no root: they lead nowhere; give root, where they start")


def _path_column(column: str | None, names: list[str], source: str) -> str:
    if column is None and names:
        return str(names[0])
    if not names:
        raise SourceError(f"{source} has no columns: there is nothing to list; give one with paths")
    if column is None or column not in names:
        raise SourceError(f"{source} has no column {quoted(repr(column))}; it has {listed(names)}: name one of these")
    return column
