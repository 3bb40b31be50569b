"""How do the words of `thawline index` become a manifest? Everything that needs no Python function of the user."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dataio import labels, sources, splits
from dataio.errors import LabelError, SourceError, SplitError
from dataio.manifest import Manifest


def make_manifest(
    source: Path,
    *,
    label: str = "parent",
    delimiter: str | None = None,
    valid: str = "0.2",
    seed: int = 42,
    root: Path | None = None,
    path_column: str | None = None,
) -> Manifest:
    """List, label, check and split. Raises SourceError, LabelError or SplitError; writes nothing."""
    labeller, splitter = _labeller(label, delimiter), _splitter(valid, seed)
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        table = sources.from_csv(source, path_column=path_column, root=root)
    elif root is not None or path_column is not None:
        raise SourceError(f"--root and --path-column go with a CSV, and {source} is none: leave them out")
    else:
        table = sources.from_folder(source)
    table = labels.label(table, labeller)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking images", total=table.rows.num_rows)
        return splits.split(table, splitter, progress=lambda done, total: bar.update(task, completed=done, total=total))


def _labeller(words: str, delimiter: str | None) -> labels.Labeller:
    kind, _, value = words.partition(":")
    if delimiter is not None and kind != "column":
        raise LabelError(
            f"--delimiter splits a column's value, and --label is {words!r}: give column:C, or leave it out"
        )
    if words == "parent":
        return labels.by_parent()
    if kind == "regex" and value:
        return labels.by_regex(value)
    if kind == "column" and value:
        return labels.by_column(value, delimiter=delimiter)
    raise LabelError(f"--label {words!r} is not known: give parent, regex:PATTERN or column:NAME")


def _splitter(words: str, seed: int) -> splits.Splitter:
    kind, _, value = words.partition(":")
    if kind == "column" and value:
        return splits.by_column(value)
    if kind == "folder" and value:
        return splits.by_folder(value)
    try:
        fraction = float(words)
    except ValueError:
        raise SplitError(
            f"--valid {words!r} is not known: give a fraction such as 0.2, column:NAME or folder:NAME"
        ) from None
    return splits.random_split(valid=fraction, seed=seed)
