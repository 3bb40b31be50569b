"""Which labels are class names, and which of the names are one?

Nothing, spaces alone and NaN are no label. Names that differ only in spaces, in Unicode's form or in case are one.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from thawline.dataio.errors import LabelError, listed, quoted

_SHOWN = 3
_NO_NAMES = ("nan", "null", "none", "<na>", "na", "n/a", "nat")


def class_names(
    labels: list[Any], paths: pa.ChunkedArray, name: str, task: str, known: tuple[str, ...] | None, *, lists: bool
) -> tuple[list[Any], list[str]]:
    """Labels as names of classes, or lists of them, each checked and in one spelling; and what to say of them.

    name: of the labeller. known: the fixed vocabulary, if there is one. Raises LabelError.
    """
    column, notes = _classes(texts(labels, paths, name, task, lists=lists), known)
    occurring = list(dict.fromkeys(_each_label(column)))
    if known is not None:
        strange = sorted(set(occurring) - set(known))
        if strange:
            raise LabelError(
                f"{name} gives {len(strange)} labels that are not among the {len(known)} given classes "
                f"({listed(strange, most=3)}): a model for these could not say them; correct one or the other"
            )
    elif not lists and len(occurring) == 1:
        raise LabelError(
            f"{name} gives one class only: all {len(column)} images are {quoted(repr(occurring[0]))}, so there is "
            "nothing to learn; give images of at least two classes"
        )
    return column, notes


def texts(labels: list[Any], paths: pa.ChunkedArray, name: str, task: str, *, lists: bool) -> list[Any]:
    """Labels as texts, or as lists of texts. Raises LabelError where one is missing, or of another kind."""
    _check_kinds(labels, paths, name)
    column = [None if is_missing(value) else _text(value) for value in labels]
    missing = [index for index, value in enumerate(column) if value is None]
    if len(missing) == len(column) or not any(column):
        raise LabelError(
            f"{name} gives none of the {len(column)} images a label (tried {some(paths, range(len(column)))}): "
            "there is nothing to learn; correct it, or label in another way"
        )
    complain_of(missing, paths, name)
    others = [index for index, value in enumerate(column) if isinstance(value, list) != lists]
    if others:
        got, wanted = ("one text", "a list") if lists else ("a list", "one text")
        raise LabelError(
            f"{name} gives {len(others)} of {len(column)} images {got} ({some(paths, others)}) where {task} needs "
            f"{wanted}: give all of them the same kind"
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


def _classes(column: list[Any], known: tuple[str, ...] | None) -> tuple[list[Any], list[str]]:
    """The column with one spelling for each class, and notes on it."""
    changed, notes = unify(Counter(_each_label(column)), known)
    if changed:
        column = [
            [changed.get(part, part) for part in value] if isinstance(value, list) else changed.get(value, value)
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


def complain_of(missing: list[int], paths: pa.ChunkedArray, name: str) -> None:
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
    """Whether a class label says nothing; a list does if one of its labels does, an empty one says "none of them"."""
    if isinstance(value, list):
        return any(map(is_missing, value))
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def unify(counts: Mapping[str, int], known: Sequence[str] | None = None) -> tuple[dict[str, str], list[str]]:
    """The one spelling of every name that is to be written otherwise, and notes for people, a line each.

    counts: how many images each name has; of spellings that differ in case, the most frequent stays. Single letters in
    two cases are kept apart, as alphabets have them. known: a fixed vocabulary, whose spelling is taken.
    """
    spelling = {name: _plain(name) for name in counts}
    plain: dict[str, int] = {}
    for name, count in counts.items():
        plain[spelling[name]] = plain.get(spelling[name], 0) + count
    if known is None:
        cased, lines = _one_case(plain)
    else:
        cased, lines = _as_known(plain, known), []
    fixed = set(known or ())
    changed = {
        name: to for name in counts if name not in fixed and (to := cased.get(spelling[name], spelling[name])) != name
    }
    if changed:
        changes = "; ".join(f"{_visible(a, b)} is {quoted(repr(b))}" for a, b in list(changed.items())[:_SHOWN])
        images = sum(counts[name] for name in changed)
        lines.insert(
            0,
            f"WARNING: {len(changed):,} class names of {images:,} images are normalised in spaces, case or Unicode "
            f"form ({changes}{'; ...' if len(changed) > _SHOWN else ''}); --classes keeps those apart that it gives",
        )
    lines += [
        f"WARNING: {count:,} images have the class {quoted(repr(name))}, which looks like a missing value: index with "
        "--skip-unlabelled after emptying those cells, if it is one"
        for name, count in plain.items()
        if name.lower() in _NO_NAMES and name not in fixed
    ]
    return changed, lines


def _plain(name: str) -> str:
    """Without spaces around it, with single ones within, in Unicode's composed form."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def _visible(name: str, other: str) -> str:
    """A name so that its difference from the other is seen."""
    alike = name.split() == other.split() or unicodedata.normalize("NFC", name) == other
    return quoted(ascii(name) if alike else repr(name))


def _one_case(counts: Mapping[str, int]) -> tuple[dict[str, str], list[str]]:
    """Which spelling each name takes of those that differ in case alone; and what of them are kept apart."""
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
    pairs = ", ".join("/".join(sorted(names)) for names in letters[:_SHOWN])
    lines = [f"WARNING: single letters in two cases are kept as classes of their own ({pairs})"] if letters else []
    return best, lines


def _as_known(counts: Mapping[str, int], known: Sequence[str]) -> dict[str, str]:
    """The known spelling of each name, where exactly one is like it."""
    plain: dict[str, list[str]] = {}
    folded: dict[str, list[str]] = {}
    for name in known:
        for table, key in ((plain, _plain(name)), (folded, _plain(name).casefold())):
            table.setdefault(key, []).append(name)
    spelling = {}
    for name in counts:
        like = plain.get(name) or folded.get(name.casefold()) or []
        if len(like) == 1:
            spelling[name] = like[0]
    return spelling
