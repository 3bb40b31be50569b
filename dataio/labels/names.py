"""Which labels are class names, and which names are the same class?

Nothing, spaces and NaN are no label. Names that differ only in spaces, in Unicode's form or in case are the same.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from thawline.dataio.errors import LabelError, listed, quoted

_EXAMPLES = 3
_NO_NAMES = ("nan", "null", "none", "<na>", "na", "n/a", "nat")


def class_names(
    labels: list[Any], paths: pa.ChunkedArray, name: str, task: str, vocabulary: tuple[str, ...] | None, *, lists: bool
) -> tuple[list[Any], list[str]]:
    """Labels as names of classes, or lists of them, checked and in one spelling for each class; and notes on them.

    name: of the labeller. vocabulary: the fixed one, if any. Raises LabelError.
    """
    column, notes = _classes(texts(labels, paths, name, task, lists=lists), vocabulary)
    occurring = list(dict.fromkeys(_each_label(column)))
    if vocabulary is not None:
        strange = sorted(set(occurring) - set(vocabulary))
        if strange:
            raise LabelError(
                f"{name} gives {len(strange)} labels that are not among the {len(vocabulary)} given classes "
                f"({listed(strange, most=3)}): a model could not predict them; correct one or the other"
            )
    elif not lists and len(occurring) == 1:
        raise LabelError(
            f"{name} gives one class only: all {len(column)} images are {quoted(repr(occurring[0]))}, so there is "
            "nothing to learn; give images of at least two classes"
        )
    return column, notes


def texts(labels: list[Any], paths: pa.ChunkedArray, name: str, task: str, *, lists: bool) -> list[Any]:
    """Labels as texts, or as lists of texts. Raises LabelError where a label is missing, or of another kind."""
    _check_kinds(labels, paths, name)
    column = [None if is_missing(value) else _text(value) for value in labels]
    missing = [index for index, value in enumerate(column) if value is None]
    if len(missing) == len(column) or not any(column):
        raise LabelError(
            f"{name} gives none of the {len(column)} images a label (tried {some(paths, range(len(column)))}): "
            "there is nothing to learn; correct it, or label in another way"
        )
    check_none_missing(missing, paths, name)
    others = [index for index, value in enumerate(column) if isinstance(value, list) != lists]
    if others:
        got, expected = ("one text", "a list") if lists else ("a list", "one text")
        raise LabelError(
            f"{name} gives {len(others)} of {len(column)} images {got} ({some(paths, others)}) where {task} needs "
            f"{expected}: give all of them the same kind"
        )
    return column


def check_lines(labels: list[Any], paths: pa.ChunkedArray, name: str) -> None:
    """Raises LabelError for a class label of several lines, naming its row."""
    for row, value in enumerate(labels):
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, str) and len(label.strip().splitlines()) > 1:
                raise LabelError(
                    f"{name} gives {quoted(paths[row].as_py())} in row {row + 1} a label with a line break "
                    f"({quoted(repr(label))}): a quote that does not close swallows rows like this; correct it"
                )


def _classes(column: list[Any], vocabulary: tuple[str, ...] | None) -> tuple[list[Any], list[str]]:
    """The column with one spelling for each class, and notes on the changes."""
    changed, notes = unify(Counter(_each_label(column)), vocabulary)
    if changed:
        column = [
            [changed.get(item, item) for item in value] if isinstance(value, list) else changed.get(value, value)
            for value in column
        ]
    return column, notes


def _each_label(column: list[Any]) -> Iterator[str]:
    for value in column:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def _check_kinds(labels: list[Any], paths: pa.ChunkedArray, name: str) -> None:
    for row, value in enumerate(labels):
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, dict | bytes):
                raise LabelError(
                    f"{name} gives {quoted(paths[row].as_py())} a label of kind {type(label).__name__} "
                    f"({quoted(label)}): classes are texts or numbers; take them from elsewhere, or write them as text"
                )


def _text(value: Any) -> str | list[str]:
    return [str(item) for item in value] if isinstance(value, list) else str(value)


def check_none_missing(missing: list[int], paths: pa.ChunkedArray, name: str) -> None:
    """Raises LabelError if there are images without a label, by their row numbers."""
    if missing:
        raise LabelError(
            f"{name} gives {len(missing)} of {len(paths)} images no label ({some(paths, missing)}): "
            "every image needs one; correct it, or leave these images out (--skip-unlabelled)"
        )


def some(paths: pa.ChunkedArray, indices: Sequence[int]) -> str:
    """The file names of the first three of these rows."""
    return ", ".join(quoted(paths[index].as_py().rpartition("/")[2]) for index in indices[:3])


def is_missing(value: Any) -> bool:
    """Whether a class label, or one of a list of them, is missing; an empty list means "none of them"."""
    if isinstance(value, list):
        return any(map(is_missing, value))
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def unify(counts: Mapping[str, int], vocabulary: Sequence[str] | None = None) -> tuple[dict[str, str], list[str]]:
    """The new spelling of every name that changes, and notes for people, a line each.

    counts: the number of images of each name; of spellings that differ in case, the most frequent stays. Single letters
    in two cases are kept apart, as in an alphabet. vocabulary: a fixed one, whose spelling is used.
    """
    spelling = {name: _plain(name) for name in counts}
    plain: dict[str, int] = {}
    for name, count in counts.items():
        plain[spelling[name]] = plain.get(spelling[name], 0) + count
    if vocabulary is None:
        cased, lines = _one_case(plain)
    else:
        cased, lines = _as_in_vocabulary(plain, vocabulary), []
    fixed = set(vocabulary or ())
    changed = {
        name: to for name in counts if name not in fixed and (to := cased.get(spelling[name], spelling[name])) != name
    }
    if changed:
        changes = "; ".join(f"{_visible(a, b)} is {quoted(repr(b))}" for a, b in list(changed.items())[:_EXAMPLES])
        images = sum(counts[name] for name in changed)
        lines.insert(
            0,
            f"WARNING: {len(changed):,} class names of {images:,} images are normalised in spaces, case or Unicode "
            f"form ({changes}{'; ...' if len(changed) > _EXAMPLES else ''}); --classes keeps its own names apart",
        )
    lines += [
        f"WARNING: {count:,} images have the class {quoted(repr(name))}, which looks like a missing value: index with "
        "--skip-unlabelled after emptying those cells, if it is one"
        for name, count in plain.items()
        if name.lower() in _NO_NAMES and name not in fixed
    ]
    return changed, lines


def _plain(name: str) -> str:
    """A name without spaces around it, with single ones within, in Unicode's composed form."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def _visible(name: str, other: str) -> str:
    """A name, written so that its difference from the other is visible."""
    alike = name.split() == other.split() or unicodedata.normalize("NFC", name) == other
    return quoted(ascii(name) if alike else repr(name))


def _one_case(counts: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """The spelling for each name that differs from others in case alone; and a note on those that are kept apart."""
    groups: dict[str, list[str]] = {}
    for name in counts:
        groups.setdefault(name.casefold(), []).append(name)
    several = [names for names in groups.values() if len(names) > 1]
    letters = [names for names in several if all(len(name) == 1 for name in names)]
    best = {
        name: min(names, key=lambda other: (-counts[other], other))
        for names in several
        if names not in letters
        for name in names
    }
    pairs = ", ".join("/".join(sorted(names)) for names in letters[:_EXAMPLES])
    lines = [f"WARNING: single letters in two cases are kept as classes of their own ({pairs})"] if letters else []
    return best, lines


def _as_in_vocabulary(counts: Mapping[str, int], vocabulary: Sequence[str]) -> dict[str, str]:
    """The vocabulary's spelling of each name, where exactly one is like it."""
    plain: dict[str, list[str]] = {}
    folded: dict[str, list[str]] = {}
    for name in vocabulary:
        for table, key in ((plain, _plain(name)), (folded, _plain(name).casefold())):
            table.setdefault(key, []).append(name)
    spelling = {}
    for name in counts:
        like = plain.get(name) or folded.get(name.casefold()) or []
        if len(like) == 1:
            spelling[name] = like[0]
    return spelling
