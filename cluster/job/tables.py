"""How do nested tables become frozen dataclasses? Every name known, every type right, or a sentence that says where.

What a value means is not known here; neither is whether it lies in its range.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from thawline.cluster.errors import JobError
from thawline.cluster.words import cut, quoted

T = TypeVar("T")


def build(cls: type[T], table: Mapping[str, Any], *, source: str) -> T:
    """A `cls` from nested tables, a tuple of dataclasses from a list of tables; `source` is what errors call them.

    Raises:
        JobError: an unknown field, a wrong type, an unknown choice.
    """
    return _build(cls, table, prefix="", source=source, root=cls)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every value in a dataclass by its dotted name, in order, None included: {"fit.lr": 3e-3, "phases[0].lr": None}.

    A list of tables that has none has no name here.
    """
    if is_dataclass(value):
        parts = [(known, hint, getattr(value, known)) for known, hint in get_type_hints(type(value)).items()]
        inner = {f"{name}.{known}".lstrip("."): part for known, hint, part in parts if part or not _row_type(hint)}
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        inner = {f"{name}[{i}]": part for i, part in enumerate(value)}
    else:
        return {name: value}
    return {dotted: leaf for name, part in inner.items() for dotted, leaf in flat(part, name).items()}


def _build(cls: type[T], table: Mapping[str, Any], *, prefix: str, source: str, root: Any) -> T:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in table.items():
        dotted = prefix + name
        where = f"{cut(dotted)}={quoted(value)} in {source}"
        if name not in hints:
            near = _nearest(name, {known: prefix + known for known in hints}, root)
            raise JobError(f"unknown field {cut(dotted)} in {source}: nothing would read it; {near}")
        if row := _row_type(hints[name]):
            if not (isinstance(value, list | tuple) and all(isinstance(part, Mapping) for part in value)):
                raise JobError(f"{where} is not a list of tables: its fields cannot be read; write [[{dotted}]]")
            values[name] = tuple(
                _build(row, part, prefix=f"{dotted}[{i}].", source=source, root=root) for i, part in enumerate(value)
            )
        elif not is_dataclass(hints[name]):
            values[name] = _value_as(hints[name], value, where=where)
        elif isinstance(value, Mapping):
            values[name] = _build(hints[name], value, prefix=f"{dotted}.", source=source, root=root)
        else:
            raise JobError(f"{where} is not a table: its fields cannot be read; write them under [{dotted}]")
    return cls(**values)


def _row_type(hint: Any) -> Any:
    """The dataclass of which a field holds any number, or None."""
    first, *rest = get_args(hint) or (None,)
    return first if get_origin(hint) is tuple and rest == [Ellipsis] and is_dataclass(first) else None


def _nearest(word: str, here: dict[str, str], root: Any) -> str:
    """What somebody who wrote `word` probably meant: a similar word in the same section, or else anywhere."""
    anywhere = {name.split(".")[-1]: name for name in reversed(_names(root))}
    for known in (here, anywhere):
        if close := get_close_matches(word, known, n=1):
            return f"did you mean {known[close[0]]}?"
    return f"there are {', '.join(here.values())}"


def _names(cls: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, hint in get_type_hints(cls).items():
        names += _names(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return names


def _value_as(hint: Any, value: Any, *, where: str) -> Any:
    """`value` as `hint` has it: a whole number is fine for a float, and a TOML array for a tuple."""
    accepted = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in accepted:
        with suppress(TypeError, ValueError):
            return _converted(kind, value)
    choices = [choice for kind in accepted if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and (isinstance(value, str) or get_origin(hint) is Literal):
        close = get_close_matches(str(value), choices, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"give one, {choices[0]!r} for instance"
        raise JobError(f"{where} is not one of {', '.join(choices)}: nothing could run; {remedy}")
    words = [_WORDS.get(kind, str(kind)) for kind in accepted if kind is not NoneType and get_origin(kind) != Literal]
    wanted = " or ".join([*words, *map(repr, choices)])
    raise JobError(f"{where} is of type {type(value).__name__}, which does not fit there: give {wanted}")


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple[str, ...]: "strings in [ ]",
    tuple[float, ...]: "numbers in [ ]",
    tuple[float, float]: "two numbers in [ ]",
    tuple[int, int]: "two whole numbers in [ ]",
    dict[str, float]: "names with numbers in { }",
    tuple[float, float, float]: "three numbers in [ ]",
    tuple[tuple[float, int], ...]: "[ ] of pairs, each [a number, a whole number]",
}


def _converted(kind: Any, value: Any) -> Any:
    """`value` as a `kind`. Raises TypeError or ValueError where it is not one."""
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_converted(*pair) for pair in zip(kinds, value, strict=True))
    if get_origin(kind) is dict and isinstance(value, dict):
        _, inner = get_args(kind)
        return {name: _converted(inner, number) for name, number in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:  # isinstance would take True for a count
        raise TypeError
    return value
