"""Can every file be read in one sitting? No file of ours has more than 400 lines, no function more than 50."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("thawline", "dataio", "models", "trainer", "cluster", "benchmarks", "tests", "deploy")


def too_long(path: str, source: str) -> list[str]:
    """What of a file is longer than it may be."""
    lines = source.count("\n")
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{path}::{f.name} has {n} lines" for f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > 50]
    return [f"{path} has {lines} lines", *long] if lines > 400 else long


def test_no_file_has_more_than_400_lines_and_no_function_more_than_50() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    texts = [(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]
    assert [sentence for path, source in texts for sentence in too_long(path, source)] == []


def test_one_line_too_many_is_seen() -> None:
    body = "    a = 1\n" * 49
    assert too_long("a.py", f"def f():\n{body}") == []
    assert too_long("a.py", f"def f():\n{body}    b = 2\n") == ["a.py::f has 51 lines"]
    assert too_long("a.py", "a = 1\n" * 401) == ["a.py has 401 lines"]
