"""What of the reference is made from the code? The table of a job's fields, and what each verb's --help prints.

`{job-fields}` reads the dataclasses of a job: a field's meaning is the comment behind it, or the text below it.
"""

import ast
import inspect
import io
import tokenize
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class JobFields(SphinxDirective):
    """`{job-fields}`: a section for each table of a job file, with a row for each field."""

    def run(self) -> list[nodes.Node]:
        from cluster.job import Job, PhaseJob

        text = "\n".join([*_section("", Job, "## At the top"), *_section("phases.", PhaseJob, "## `[[phases]]`")])
        return list(self.parse_text_to_nodes(text, allow_section_headings=True))


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
    """What the source says of each field: the comment behind it, or the text below it."""
    source = inspect.cleandoc("\n" + inspect.getsource(owner))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    said = {}
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
    return {"parallel_read_safe": True}
