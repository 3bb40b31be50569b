"""Can every file be read in one sitting, and every folder be seen at a glance?

No file of ours has more than 400 lines, no function more than 50, no folder of a package more than a dozen modules.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("thawline", "dataio", "models", "trainer", "cluster")
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


def test_no_folder_has_more_than_a_dozen_modules_and_every_room_says_what_it_answers() -> None:
    for room in (folder.parent for package in PACKAGES for folder in (ROOT / package).rglob("__init__.py")):
        modules = [file.name for file in room.glob("*.py") if not file.name.startswith("__")]
        assert len(modules) <= 12, f"{room} has {len(modules)} modules: make rooms of them"
        question, _, rest = (ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "").partition("?")
        assert (question and rest) or room.parent == ROOT, f"{room}: the first line says no question and no answer"


def test_one_line_too_many_is_seen() -> None:
    body = "    a = 1\n" * 49
    assert too_long("a.py", f"def f():\n{body}") == []
    assert too_long("a.py", f"def f():\n{body}    b = 2\n") == ["a.py::f has 51 lines"]
    assert too_long("a.py", "a = 1\n" * 401) == ["a.py has 401 lines"]
