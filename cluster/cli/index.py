"""How do the words of `thawline index` become a manifest? Everything that needs no Python function of the user."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thawline.cluster.cli.bars import bar
from thawline.cluster.cli.index_options import IndexOptions
from thawline.dataio.checks import census, duplicates
from thawline.dataio.errors import LabelError, ManifestError, SourceError, SplitError, quoted
from thawline.dataio.labels import counts, labels
from thawline.dataio.store import files
from thawline.dataio.table import draws, lists, sources, splits
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.tasks import TASKS

_MANIFESTS = (".parquet", ".arrow")


def make_manifest(source: str | Path, **options: Any) -> Manifest:
    """List, label, check and split; writes nothing. options: fields of IndexOptions.

    Raises: SourceError, LabelError, SplitError, QuarantineError; ManifestError where the classes of another manifest
        are asked for and it cannot give them.
    """
    o = IndexOptions(**options)
    splitter = _splitter(o.valid, o.test, o.seed)
    table = labelled(source, **options)
    with bar("checking images") as progress:
        return splits.split(
            table,
            splitter,
            max_bad=o.max_bad,
            max_pixels=o.max_pixels,
            progress=progress,
        )


def labelled(source: str | Path, **options: Any) -> sources.Table:
    """What `make_manifest` lists and labels; no file is opened but a list. Raises as it does."""
    o = IndexOptions(**options)
    labeller, task = _labeller(o.label, o.delimiter)
    names, pixels, other = _vocabulary(o.classes, o.values)
    table = _table(str(source), o)
    pairs = _pairs(o.swap) if o.swap or other is None else other.swap
    table = labels.label(
        table, labeller, task=task, classes=names, values=pixels, swap=pairs, skip_unlabelled=o.skip_unlabelled
    )
    if other is not None and table.task != other.task:
        raise ManifestError(
            f"--classes {o.classes} is for {other.task} and --label {quoted(o.label)} gives {table.task}: their "
            "targets do not mean the same; label in the same way, or leave --classes out"
        )
    return table


def _table(source: str, o: IndexOptions) -> sources.Table:
    """The rows of a folder, or of a list. Raises SourceError for options that are the other's."""
    if _is_list(source):
        lists.check_kind(source)
        _refuse("a folder", source, folders=o.folders, extensions=o.extensions, no_recursive=not o.recursive)
        return _listed(source, o)
    for_lists = ("root", "path_column", "folder", "suffix", "separator", "column_names")
    _refuse("a CSV or table", source, **{name: getattr(o, name) for name in for_lists})
    kinds = [kind for words in o.extensions for kind in words.split(",")] or sources.IMAGE_EXTENSIONS
    return sources.from_folder(source, extensions=kinds, folders=o.folders or None, recursive=o.recursive)


def described(manifest: Manifest) -> str:
    """What to tell of a manifest that was made: its summary, its classes, and what was left out or looks wrong."""
    by_side = census.count(manifest)
    return "\n".join(
        filter(
            None,
            (
                replace(manifest, notes=()).summary(),
                *counts.table(by_side, manifest.classes),
                *manifest.notes,
                *counts.lacking(by_side, manifest.classes),
                *counts.too_many(by_side, manifest.classes),
                duplicates.report(manifest),
            ),
        )
    )


def _is_list(source: str) -> bool:
    """Whether a source is a file of rows, and no folder: what stands there says so, or in a store the ending."""
    if "://" in source:
        return lists.is_known(source)
    path = Path(source).expanduser()
    try:
        return path.is_file() or (lists.is_known(source) and not path.is_dir())
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise SourceError(f"{quoted(source)} cannot be looked at ({quoted(str(error))}): check the path") from error


def _listed(source: str, o: IndexOptions) -> sources.Table:
    if lists.ending(source) in lists.TEXTS:
        return sources.from_csv(
            source,
            path_column=o.path_column,
            root=o.root,
            folder=o.folder,
            suffix=o.suffix,
            delimiter={"tab": "\t", "\\t": "\t"}.get(o.separator or "", o.separator),
            column_names=[name for words in o.column_names for name in words.split(",")] or None,
        )
    _refuse("a CSV", source, column_names=o.column_names, separator=o.separator)
    return sources.from_file(source, path_column=o.path_column, root=o.root, folder=o.folder, suffix=o.suffix)


def _refuse(kind: str, source: str, **options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        verb = "go" if len(given) > 1 else "goes"
        raise SourceError(f"{' and '.join(given)} {verb} with {kind}, and {source} is none: leave it out")


# What the words mean --------------------------------------------------------------------------------------


def _labeller(words: str, delimiter: str | None) -> tuple[labels.Labeller, str | None]:
    """The labeller, and the task where it does not tell itself."""
    kind, _, value = words.partition(":")
    if delimiter is not None and kind not in ("column", "points-column"):
        raise LabelError(
            f"--delimiter splits a column's value, and --label is {quoted(repr(words))}: give column:C, or leave it out"
        )
    if words == "parent":
        return labels.by_parent(), None
    if kind in ("regex", "path-regex") and value:
        return labels.by_regex(value, whole_path=kind == "path-regex"), None
    if kind == "number" and value:
        return labels.numbers_by_columns(value.split(",")), None
    of_columns = {task.option: name for name, task in TASKS.items()}
    if kind in of_columns and value:
        return labels.by_column(value, delimiter=delimiter), None if kind == "column" else of_columns[kind]
    if kind == "mask" and value:
        return labels.mask_path(value), None
    if kind == "points" and value:
        return labels.points_by_columns(value.split(",")), None
    raise LabelError(
        f"--label {quoted(repr(words))} is not known: give parent, regex:PATTERN, path-regex:PATTERN, column:C, "
        "number:C,..., mask:TEMPLATE, mask-column:C, points:X0,Y0,... or points-column:C"
    )


def _vocabulary(
    classes: str | None, values: str | None
) -> tuple[Sequence[str] | None, Sequence[int] | None, Manifest | None]:
    """The classes, the values of masks, and the manifest that both come from."""
    pixels: Sequence[int] | None = None
    if values is not None:
        try:
            pixels = [int(value) for value in values.split(",")]
        except ValueError:
            raise LabelError(
                f"--values {quoted(repr(values))} are not numbers: give the pixel values, such as 0,1,2"
            ) from None
    if classes is None:
        return None, pixels, None
    if classes.endswith(_MANIFESTS):
        other = Manifest.load(classes)
        return other.classes, pixels or other.values or None, other
    if classes.endswith(".txt"):
        try:
            lines = files.text(classes).splitlines()
        except (OSError, ValueError) as error:
            raise LabelError(
                f"--classes {classes} cannot be read ({quoted(str(error))}): give a text file, a class a line"
            ) from error
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise LabelError(f"--classes {classes} holds no class: write one a line, or leave it out")
    else:
        names = [name.strip() for name in classes.split(",")]
    return names, pixels, None


def _pairs(words: Sequence[str]) -> list[tuple[str, str]] | None:
    """The points that change places in a mirror; None where nobody said."""
    if not words or list(words) == ["none"]:
        return [] if words else None
    pairs = [tuple(name.strip() for name in word.split(",")) for word in words]
    wrong = next((word for word, pair in zip(words, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise LabelError(
            f"--swap {quoted(repr(wrong))} is not two names with a comma between: give --swap left_eye,right_eye once "
            "for each pair, or --swap none where no point has a side"
        )
    return [(one, other) for one, other in pairs]


def _splitter(valid: str, test: str | None, seed: int) -> draws.Splitter:
    if test == "all":
        return lambda rows: np.full(rows.num_rows, "test", object)
    if test is None:
        return _divide(valid, seed, flag="--valid")
    (kind, value), (test_kind, test_value) = _kind(valid), _kind(test)
    if kind == test_kind == "folder":
        return splits.by_folder(value, test=test_value)
    if kind in ("fraction", "stratified") and test_kind in ("fraction", kind):
        return _draw(kind, _fraction(value, "--valid"), seed, test=_fraction(test_value, "--test"))
    if test_kind not in ("fraction", "stratified", "column", "folder"):
        raise SplitError(
            f"--test {quoted(repr(test))} is not known: give a fraction such as 0.1, stratified:F, column:C, folder:N "
            "or all"
        )
    return splits.hold_out(_divide(test, seed, flag="--test"), _divide(valid, seed, flag="--valid"))


def _divide(words: str, seed: int, *, flag: str) -> draws.Splitter:
    """The splitter of one flag."""
    kind, value = _kind(words)
    if kind in ("fraction", "stratified"):
        return _draw(kind, _fraction(value, flag), seed)
    if kind == "column" and value:
        return splits.by_column(value)
    if kind == "folder" and value:
        return splits.by_folder(value)
    fold = re.fullmatch(r"(\d+)/(\d+)", value)
    if kind in ("fold", "stratified-fold") and fold:
        return draws.k_fold(int(fold[2]), int(fold[1]), seed=seed, stratify=kind != "fold")
    raise SplitError(
        f"{flag} {quoted(repr(words))} is not known: give a fraction such as 0.2, stratified:F, fold:I/K, "
        "stratified-fold:I/K, column:NAME or folder:NAME"
    )


def _kind(words: str) -> tuple[str, str]:
    """What a word of --valid or --test is, and its value; a bare number is a fraction."""
    kind, colon, value = words.partition(":")
    if colon:
        return kind, value
    return ("fraction", words) if re.fullmatch(r"[-+.\deE]+|nan|inf", words) else (words, "")


def _fraction(words: str, flag: str) -> float:
    try:
        return float(words)
    except ValueError:
        raise SplitError(f"{flag} has {quoted(repr(words))} for a fraction: give a number such as 0.2") from None


def _draw(kind: str, valid: float, seed: int, *, test: float = 0.0) -> draws.Splitter:
    draw = draws.stratified if kind == "stratified" else draws.random_split
    return draw(valid=valid, test=test, seed=seed)
