"""What of the reference is made from the code? The tables of a job's fields and of the command line's options.

Both are dataclasses. What a field means is the comment behind it, or the text below it.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro
from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class JobFields(SphinxDirective):
    """`{job-fields}`: a section for each table of a job file, with a row for each field."""

    def run(self) -> list[nodes.Node]:
        from thawline.cluster.job.job import Job, PhaseJob

        text = "\n".join([*_section("", Job, "## At the top"), *_section("phases.", PhaseJob, "## `[[phases]]`")])
        return list(self.parse_text_to_nodes(text, allow_section_headings=True))


class Verbs(SphinxDirective):
    """`{verbs}`: a section for each verb of the command line; a job's fields are left out."""

    def run(self) -> list[nodes.Node]:
        from thawline.cluster.cli.main import VERBS

        text = "\n".join(line for name, verb in VERBS.items() for line in _verb(name, verb))
        return list(self.parse_text_to_nodes(text, allow_section_headings=True))


def _verb(name: str, verb: type) -> list[str]:
    from thawline.cluster.job.job import Job

    usage, rows, of_job = [f"thawline {name}"], [], False
    for owner, field, kind in _options(verb):
        of_job = of_job or kind is Job
        if kind is Job or field.name == "debug":
            continue
        metavar = next((meta.metavar for meta in _meta(kind) if getattr(meta, "metavar", None)), None)
        meaning = _cell(meanings(owner).get(field.name, ""))
        if _POSITIONAL in _meta(kind):
            word = metavar or "|".join(map(str, get_args(_bare(kind)))) or field.name.upper()
            usage.append(word)
            rows.append(f"| `{word}` | | {meaning} |".replace("`" + word + "`", "`" + word.replace("|", "\\|") + "`"))
        else:
            flag = f"--{field.name.replace('_', '-')}"
            needed = field.default is MISSING and field.default_factory is MISSING
            rows.append(f"| `{flag}` | {'required' if needed else _default(field)} | {meaning} |")
            usage += [f"{flag} {metavar or 'VALUE'}"] if needed else []
    more = ["", "Every [field of a job](job.md) is a flag, too."] if of_job else []
    text = _cell(inspect.getdoc(verb) or "")
    table = ["| | default | meaning |", "| --- | --- | --- |", *rows] if rows else []
    return [f"## `thawline {name}`", "", "```text", " ".join([*usage, "..."]), "```", "", text, "", *table, *more, ""]


_POSITIONAL = get_args(tyro.conf.Positional[str])[1]


def _options(verb: type) -> Iterator[tuple[type, "Field[Any]", Any]]:
    """(the class that has it, field, annotated type) of what can be typed."""
    from thawline.cluster.job.job import Job

    types = get_type_hints(verb, include_extras=True)
    for field in fields(verb):
        kind, owner = (
            types[field.name],
            next(c for c in verb.__mro__ if field.name in vars(c).get("__annotations__", {})),
        )
        if _bare(kind) is Job:
            yield owner, field, Job
        elif is_dataclass(_bare(kind)):
            yield from _options(_bare(kind))
        else:
            yield owner, field, kind


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _meta(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _section(prefix: str, owner: type, heading: str) -> list[str]:
    types, said = get_type_hints(owner), meanings(owner)
    tables = {field.name: types[field.name] for field in fields(owner) if is_dataclass(types[field.name])}
    rows = [
        f"| `{prefix}{field.name}` | {_default(field)} | {_cell(said.get(field.name, ''))} |"
        for field in fields(owner)
        if field.name not in tables and field.name != "phases"
    ]
    lines = [heading, "", *_cell(inspect.getdoc(owner) or "").splitlines(), ""]
    lines += ["| field | default | meaning |", "| --- | --- | --- |", *rows, ""]
    for name, table in tables.items():
        lines += _section(f"{prefix}{name}.", table, f"## `[{prefix}{name}]`")
    return lines


def meanings(owner: type) -> dict[str, str]:
    """What the source says of each field, inherited ones too: the comment behind it, or the text below it."""
    said: dict[str, str] = {}
    for base in owner.__bases__:
        if is_dataclass(base):
            said |= meanings(base)
    source = inspect.cleandoc("\n" + inspect.getsource(owner))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = comments.get(node.end_lineno or 0, "")
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value))
            said[node.target.id] = text
    return said


def _default(field: "Field[Any]") -> str:
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    return "" if value is None or value == "" else f"`{list(value) if isinstance(value, tuple) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[").replace("<", "\\<").replace("*", "\\*")


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("job-fields", JobFields)
    app.add_directive("verbs", Verbs)
    return {"parallel_read_safe": True}
