"""Which images are there?

A source lists paths and nothing more: no image is opened (verify.py) or labelled (labels.py; `from_lists`
only hands its labels on). Row order is the same on every machine, since the row number becomes the sample's
id, and all randomness is a function of that id.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from dataio.errors import SourceError

if TYPE_CHECKING:
    import pandas as pd

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Table:
    """Images, one a row, before they are checked and split.

    `rows` has `path` (string, posix, relative to root, or absolute when outside it), the columns of its
    source, and after labelling `label` (string, or list<string> for multi_label). `task` is None until then.
    """

    rows: pa.Table
    root: Path
    task: str | None = None


def from_folder(folder: str | Path, *, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> Table:
    """List the images below `folder`, sorted by path; what begins with a dot is skipped.

    Symbolic links are followed. A folder that two names lead to is listed once, under its own name if that
    is below `folder`, so that links neither loop nor put one image into train and valid at once.

    Raises: SourceError for a missing folder, one without images, or one that cannot be read.
    """
    root = Path(folder).expanduser().resolve()
    if not root.exists():
        raise SourceError(f"folder {root} does not exist: there is nothing to list; check the path")
    if not root.is_dir():
        raise SourceError(f"{root} is a file, not a folder: give the folder with the images, or use from_csv")
    endings = tuple("." + extension.lower().lstrip(".") for extension in extensions)
    names = _walk(root)
    images = sorted(name for name in names if name.lower().endswith(endings))
    if not images:
        others = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names).most_common(5)
        seen = ", ".join(f"{count} {suffix}" for suffix, count in others)
        raise SourceError(
            f"no images in {root}: it holds {len(names)} other files{f' ({seen})' if seen else ''}; "
            f"give a folder with files that end in {' '.join(endings)}"
        )
    return Table(pa.table({"path": _strings(images)}), root)


def from_csv(
    file: str | Path,
    *,
    path_column: str | None = None,
    root: str | Path | None = None,
    delimiter: str | None = None,
) -> Table:
    """List the images that a CSV names, in its order; every column is read as text, so "007" stays "007".

    `path_column` is the first column unless named, `root` the CSV's own folder, `delimiter` a comma
    (a tab for .tsv).

    Raises: SourceError for a missing or malformed file, a missing column, no rows, or a path given twice.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise SourceError(f"no CSV file at {file}: there is nothing to list; check the path")
    parse = csv.ParseOptions(delimiter=delimiter or ("\t" if file.suffix.lower() == ".tsv" else ","))
    try:
        names = csv.open_csv(file, parse_options=parse).schema.names
        as_text = csv.ConvertOptions(column_types={name: pa.string() for name in names})
        rows = csv.read_csv(file, parse_options=parse, convert_options=as_text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as CSV: {error}; check its delimiter and encoding") from error
    return _table(rows, names[0] if path_column is None else path_column, root or file.parent, str(file))


def from_table(frame: pa.Table | pd.DataFrame, *, path_column: str, root: str | Path) -> Table:
    """List the images that a pandas or Arrow table names, in its order, keeping its other columns.

    Raises: SourceError as `from_csv`.
    """
    if isinstance(frame, pa.Table):
        return _table(frame, path_column, root, "the table")
    _require(path_column, list(map(str, frame.columns)), "the data frame")
    # pathlib.Path objects are welcome, Arrow knows only text
    frame = frame.assign(**{path_column: frame[path_column].map(str, na_action="ignore")})
    try:
        rows = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SourceError(f"the data frame does not fit an Arrow table: {error}; give each column one type") from error
    return _table(rows.replace_schema_metadata(None), path_column, root, "the data frame")


def from_lists(paths: Sequence[str | Path], labels: Sequence[Any], *, root: str | Path) -> Table:
    """Pair paths with labels, one text or one list of texts each; the table comes labelled.

    Raises: SourceError as `from_csv`, or when the lengths differ; LabelError as `label`.
    """
    from dataio.labels import by_column, label  # labels.py stands on this file

    if len(paths) != len(labels):
        raise SourceError(f"{len(paths)} paths but {len(labels)} labels: they cannot be paired; give one label a path")
    texts = [_text(value) for value in labels]
    if len({type(text) for text in texts if text is not None}) > 1:
        raise SourceError("labels mix texts and lists: the task is unclear; give every path the same kind")
    rows = pa.table({"path": _strings([str(path) for path in paths]), "label": pa.array(texts)})
    return label(_table(rows, "path", root, "the list of paths"), by_column("label"))


def _walk(root: Path) -> list[str]:
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
                    (links if entry.is_symlink() else folders).append(entry)
                else:  # a broken link too: verify.py reports it, rather than nobody
                    found.append(below + entry.name)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be listed ({error.strerror}): allow reading, or move it") from error
    return found


def _table(rows: pa.Table, path_column: str, root: str | Path, source: str) -> Table:
    names = rows.column_names
    _require(path_column, names, source)
    if len(set(names)) < len(names):
        raise SourceError(f"{source} has two columns of one name ({', '.join(names)}): rename one")
    if path_column != "path" and "path" in names:
        raise SourceError(f"{source} has a column 'path' beside the path column {path_column!r}: rename it")
    if rows.num_rows == 0:
        raise SourceError(f"{source} has no rows: there is nothing to list; give at least one image")
    folder = Path(root).expanduser().resolve()
    paths = _tidy(rows[path_column].to_pylist(), folder.as_posix().rstrip("/"), source)
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{source} names {len(repeated)} paths more than once ({', '.join(repeated[:3])}): "
            "an image could be in train and in valid; keep one row an image"
        )
    others = rows.drop_columns([path_column])
    return Table(others.add_column(0, "path", _strings(paths)), folder)


def _require(column: str, names: list[str], source: str) -> None:
    if column not in names:
        raise SourceError(f"{source} has no column {column!r}; it has {', '.join(names)}: name one of these")


def _tidy(paths: list[Any], root: str, source: str) -> list[str]:
    """Return posix paths relative to root, or absolute ones when they lie outside."""
    tidy = []
    for row, path in enumerate(paths):
        if not isinstance(path, str) or not path or "\0" in path:
            raise SourceError(f"{source} has no usable path in row {row + 1} ({path!r}): fill it in, or drop the row")
        full = posixpath.normpath(path if path.startswith("/") else f"{root}/{path}")
        tidy.append(full.removeprefix(f"{root}/"))
    return tidy


def _text(value: Any) -> str | list[str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, Mapping | bytes):
        return [str(item) for item in value]
    return str(value)


def _strings(values: list[str]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise SourceError(f"the file name {error.object!r} is not UTF-8: rename the file") from error


def absolute(root: Path, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the paths (strings, as `Table` has them) as absolute ones."""
    joined = pc.binary_join_element_wise(root.as_posix().rstrip("/"), paths, "/")
    return pc.if_else(pc.starts_with(paths, "/"), paths, joined)
