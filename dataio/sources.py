"""Which images are there?

A source lists paths and nothing more: no image is opened (verify.py) or labelled (labels.py; `from_lists`
only hands its labels on). Row order is the same on every machine, since the row number becomes the sample's
id, and all randomness is a function of that id.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import csv

from dataio import files
from dataio.errors import SourceError
from dataio.keypoints import Pairs

if TYPE_CHECKING:
    import pandas as pd

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""What Pillow decodes and people keep pictures in; verify.py finds out which of them DALI decodes too."""

_STORE = re.compile(r"\w[\w+.-]*://[^/]*")


@dataclass(frozen=True)
class Table:
    """Images, one a row, before they are checked and split.

    `rows` has `path` (string, posix, relative to root, or absolute when outside a local one), the columns of its
    source, and after labelling `label` (typed as labels.LABEL_TYPES has it). `task` is None until then. `root` is an
    absolute folder or a URI. `classes` is the vocabulary if it is fixed already, and `values` are the pixel values of a
    mask's classes, one for each; None where both are still to be found in the data. `counted`: nobody gave
    any, so they are 0, 1, 2, ... `swap` are the points that change
    places in a mirror image; None where nobody said. `notes` are sentences on what was seen while it was made.
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
    root = files.normal_root(folder)
    endings = tuple("." + extension.lower().lstrip(".") for extension in extensions)
    names = _remote_names(root) if files.is_remote(root) else _local_names(Path(root), recursive=recursive)
    if not recursive:
        names = [name for name in names if "/" not in name]
    if folders is not None:
        starts = tuple(f"{name.strip('/')}/" for name in folders)
        names = [name for name in names if name.startswith(starts)]
    images = sorted(name for name in names if name.lower().endswith(endings))
    if not images:
        others = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names).most_common(5)
        seen = ", ".join(f"{count} {suffix}" for suffix, count in others)
        where = root if folders is None else f"{', '.join(folders)} of {root}"
        raise SourceError(
            f"no images in {where}: it holds {len(names)} other files{f' ({seen})' if seen else ''}; "
            f"give a folder with files that end in {' '.join(endings)}"
        )
    return Table(pa.table({"path": _strings(images)}), root)


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
    names with folder="train" and suffix=".jpg" names train/NAME.jpg. `delimiter` is a comma (a tab for .tsv).
    `column_names` are for a file that does not begin with them.

    Raises: SourceError for a missing or malformed file, a missing column, no rows, or a path given twice.
    """
    home, name = _place(file)
    # a name may hold a line break, between quotes
    parse = csv.ParseOptions(
        delimiter=delimiter or ("\t" if name.lower().endswith(".tsv") else ","), newlines_in_values=True
    )
    header = csv.ReadOptions(column_names=None if column_names is None else list(column_names))
    data = _bytes(home, name, "CSV file")
    try:
        names = csv.open_csv(pa.BufferReader(data), header, parse).schema.names
        as_text = csv.ConvertOptions(column_types={name: pa.string() for name in names})
        rows = csv.read_csv(pa.BufferReader(data), header, parse, as_text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as CSV: {error}; check its delimiter and encoding") from error
    return _table(rows, path_column, str(file), root=root, home=home, folder=folder, suffix=suffix)


def from_file(
    file: str | Path,
    *,
    path_column: str | None = None,
    root: str | Path | None = None,
    folder: str = "",
    suffix: str = "",
) -> Table:
    """List the images that a Parquet or Arrow file (or the URI of one) names, in its order, keeping other columns.

    The rest as `from_csv`. A manifest is such a file, with a root of its own.

    Raises: SourceError as `from_csv`.
    """
    from dataio.manifest import root_of  # manifest.py stands on this file

    home, name = _place(file)
    data = _bytes(home, name, "Parquet or Arrow file")
    try:
        rows = pa.ipc.open_file(pa.BufferReader(data)).read_all() if data[:6] == b"ARROW1" else files.as_table(data)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as Parquet or Arrow: {error}; check what it is") from error
    own = root_of(rows.schema.metadata) or home
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
    # pathlib.Path objects are welcome, Arrow knows only text
    frame = frame.assign(**{column: frame[column].map(str, na_action="ignore")})
    try:
        rows = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SourceError(f"the data frame does not fit an Arrow table: {error}; give each column one type") from error
    return _table(rows, column, "the data frame", root=root, home=None, folder=folder, suffix=suffix)


def from_lists(
    paths: Sequence[str | Path],
    labels: Sequence[Any] | None = None,
    *,
    root: str | Path | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    values: Sequence[int] | None = None,
) -> Table:
    """Pair paths with labels: a text or a list of texts each, the path of a mask (task="mask"), or (k, 2) points in px
    of the upright image (task="points"). The table comes labelled, `label` explains task, classes and values; without
    labels it is as every other source's.

    Raises: SourceError as `from_csv`, or when the lengths differ; LabelError as `label`.
    """
    from dataio.labels import by_list, label  # labels.py stands on this file

    rows = pa.table({"path": _strings([str(path) for path in paths])})
    table = _table(rows, "path", "the list of paths", root=root, home=None)
    if labels is None:
        return table
    if len(paths) != len(labels):
        raise SourceError(f"{len(paths)} paths but {len(labels)} labels: they cannot be paired; give one label a path")
    return label(table, by_list(labels), task=task, classes=classes, values=values)


def tidy(paths: Iterable[Any], root: str, source: str) -> list[str]:
    """Return posix paths relative to root, or absolute ones when they lie outside a local root.

    Raises: SourceError for what is no path, or one that does not lie where the root says.
    """
    clean = _below_uri if files.is_remote(root) else _below_folder
    beginning = root.partition("?")[0].rstrip("/")
    tidied = []
    for row, path in enumerate(paths):
        if not isinstance(path, str) or not path or "\0" in path:
            raise SourceError(f"{source} has no usable path in row {row + 1} ({path!r}): fill it in, or drop the row")
        name = clean(path, beginning)
        if name is None:
            raise SourceError(
                f"{source} has a path in row {row + 1} that is not below the root {root} ({path}): a manifest has one "
                "root; give one that holds them all, or index each store by itself"
            )
        tidied.append(name)
    return tidied


def _below_folder(path: str, root: str) -> str | None:
    if path.startswith("file://"):
        path = urlsplit(path).path
    if "://" in path:
        return None
    full = posixpath.normpath(path if path.startswith("/") else f"{root}/{path}")
    return full.removeprefix(f"{root}/")


def _below_uri(path: str, root: str) -> str | None:
    if "://" in path:
        if not path.startswith(f"{root}/"):
            return None
        path = path[len(root) + 1 :]
    path = posixpath.normpath(path)
    return None if path.startswith(("/", "../")) or path in (".", "..") else path


def _local_names(root: Path, *, recursive: bool) -> list[str]:
    if not root.exists():
        raise SourceError(f"folder {root} does not exist: there is nothing to list; check the path")
    if not root.is_dir():
        raise SourceError(
            f"{root} is a file, not a folder: give the folder with the images, or use from_csv or from_file"
        )
    return _walk(root, recursive=recursive)


def _remote_names(root: str) -> list[str]:
    try:
        names = [name for name, _ in files.names_below(root)]
    except FileNotFoundError as error:
        raise SourceError(f"{root} does not exist: there is nothing to list; check the URI") from error
    except OSError as error:
        raise SourceError(
            f"{root} cannot be listed ({error}): check the URI, the network, and that you may read there"
        ) from error
    return [name for name in names if not name.startswith(".") and "/." not in name]


def _walk(root: Path, *, recursive: bool) -> list[str]:
    """Return the paths below root of all files in it, relative and posix, in no promised order."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    try:
        while folders or links:  # real folders first: a link never takes the place of the name it leads to
            folder = folders.pop() if folders else links.pop(0)
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            below = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
            for entry in sorted(folder.iterdir()):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if recursive:
                        (links if entry.is_symlink() else folders).append(entry)
                else:  # a broken link too: verify.py reports it, rather than nobody
                    found.append(below + entry.name)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be listed ({error.strerror}): allow reading, or move it") from error
    return found


def _place(file: str | Path) -> tuple[str, str]:
    """The root of a file's folder, and its name in there."""
    text = str(file)
    if not files.is_remote(text):
        path = Path(text).expanduser()
        return files.normal_root(path.parent), path.name
    return files.normal_root(files.above(text)), files.last(text)


def _bytes(home: str, name: str, kind: str) -> pa.Buffer:
    """A file's contents; a local one is mapped."""
    place = files.below(home, name)
    try:
        if not files.is_remote(home) and Path(place).stat().st_size:
            return pa.memory_map(place).read_buffer()
        return pa.py_buffer(files.read(home, name))
    except FileNotFoundError as error:
        raise SourceError(f"no {kind} at {place}: there is nothing to list; check the path") from error
    except OSError as error:
        raise SourceError(f"{place} cannot be read ({files.why_unreadable(error)}): check what it is") from error


def _table(
    rows: pa.Table,
    path_column: str | None,
    source: str,
    *,
    root: str | Path | None,
    home: str | None,
    folder: str = "",
    suffix: str = "",
) -> Table:
    """A table over the paths of a column; `home` is the root where none is given and the paths do not tell."""
    names = rows.column_names
    column = _path_column(path_column, names, source)
    if len(set(names)) < len(names):
        raise SourceError(f"{source} has two columns of one name ({', '.join(names)}): rename one")
    if column != "path" and "path" in names:
        raise SourceError(f"{source} has a column 'path' beside the path column {column!r}: rename it")
    if rows.num_rows == 0:
        raise SourceError(f"{source} has no rows: there is nothing to list; give at least one image")
    before = f"{folder.rstrip('/')}/" if folder else ""
    given = [f"{before}{path}{suffix}" if isinstance(path, str) and path else path for path in rows[column].to_pylist()]
    where = files.normal_root(_common_root(given, home, source) if root is None else root)
    if files.is_remote(where):
        files.open_root(where)  # a store that is unknown here is told before thousands of files fail one by one
    paths = tidy(given, where, source)
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{source} names {len(repeated)} paths more than once ({', '.join(repeated[:3])}): "
            "an image could be in train and in valid; keep one row an image"
        )
    return Table(rows.drop_columns([column]).add_column(0, "path", _strings(paths)), where)


def _common_root(paths: list[Any], home: str | None, source: str) -> str:
    """Where paths start when nobody says: the store of URIs, else home, else the folder above absolute ones."""
    texts = [path for path in paths if isinstance(path, str) and path]
    stores = {found.group() for found in map(_STORE.match, texts) if found} - {"file://"}
    if len(stores) > 1:
        raise SourceError(
            f"{source} names files of {len(stores)} stores ({', '.join(sorted(stores)[:3])}): a manifest has one root; "
            "index each store by itself, or copy the files under one"
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
    if column is None or column not in names:
        raise SourceError(f"{source} has no column {column!r}; it has {', '.join(names)}: name one of these")
    return column


def _strings(values: list[str]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise SourceError(f"the file name {error.object!r} is not UTF-8: rename the file") from error
