"""Which blocks of code does a page show, and do they behave as it says? For README and docs/.

Every fence names its language. These are run, page by page from the top, in a folder of the page's own:

- `sh`: every command, which must end with status 0;
- `console`: every line after `$ `, and its output must be the lines below it;
- `python`: as one program with the page's other Python blocks;
- `toml`: must be a job.

A comment directly before the fence marks it:

- `<!-- not run: REASON -->`: it is only parsed: its commands must be valid for their command line;
- `<!-- file: NAME -->`: it is written into the page's folder under that name;
- `<!-- exits 1 -->`: the exit status of its last command;
- `<!-- printed -->`: a text: the output of the Python block before it;
- `<!-- given: NAME -->`: anywhere on a page: files that the page expects, see `tests/house/test_docs.py`;
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.kit.forked import thawline_process

RUN = ("sh", "console", "python", "toml")
SHOWN = ("text", "promql", "json", "yaml")
_FENCE = re.compile(
    r"(?P<marks>(?:^ *<!--[^\n]*-->\n)*)^(?P<indent> *)(?P<ticks>```+)(?P<language>[^\n]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=ticks)$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One fence of a page."""

    page: str
    line: int
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """The fences of a Markdown text, without Sphinx's directives."""
    fences = []
    for match in _FENCE.finditer(text):
        if match["language"].startswith("{"):
            continue
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.M)
        line = text.count("\n", 0, match.start("ticks")) + 1
        fences.append(Block(page, line, match["language"].strip(), code, _marks(match["marks"])))
    return fences


def given(text: str) -> set[str]:
    """The files that a page expects."""
    return {*re.findall(r"<!-- given: (\S+) -->", text)}


def problems(block: Block) -> list[str]:
    """Why a block might be skipped silently: a sentence each."""
    marks = {"not run", "file", "exits", "printed"}
    wrong = [f"{block.where}: the mark {mark!r} is not known" for mark in block.marks.keys() - marks]
    if block.language not in (*RUN, *SHOWN):
        wrong.append(f"{block.where}: the fence's language is {block.language!r}: name one of {RUN + SHOWN}")
    if len(block.marks.get("not run", "a good reason")) < 8:
        wrong.append(f"{block.where}: say why it is not run")
    if block.language in SHOWN and re.search(r"^(\$ |thawline |make |python )", block.code, re.M):
        wrong.append(f"{block.where}: these are commands: call them sh or console")
    return wrong


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a block, each with its output according to the page."""
    code = block.code.replace("\\\n", " ")
    if block.language == "sh":
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in code.splitlines()]
        return [(line, "") for line in lines if line]
    pieces = re.split(r"^\$ ", code, flags=re.M)[1:]
    return [(command.strip(), printed) for command, _, printed in (piece.partition("\n") for piece in pieces)]


def run(page: list[Block], folder: Path) -> Iterator[str]:
    """Run a page's blocks in `folder`, which is the working directory; yield a sentence for each difference."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in page:
        if "file" in block.marks:
            (folder / block.marks["file"]).write_text(block.code)
        if "not run" in block.marks:
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("\n" * block.line + block.code, block.page, "exec"), names)
            printed = output.getvalue()
        elif block.language == "toml":
            from thawline.cluster.job.checks import check
            from thawline.cluster.job.job import from_dict

            check(from_dict(tomllib.loads(block.code)))
        elif "printed" in block.marks:
            yield from _unlike(block.where, block.code, printed, folder)
        elif block.language in ("sh", "console"):
            yield from _run_commands(block, folder)


def _run_commands(block: Block, folder: Path) -> Iterator[str]:
    pairs = commands(block)
    for i, (command, expected) in enumerate(pairs):
        status, output = _run_command(command)
        expected_status = int(block.marks.get("exits", 0)) if i + 1 == len(pairs) else 0
        if status != expected_status:
            yield f"{block.where}: {command}: exit status {status}, not {expected_status}:\n{output}"
        elif block.language == "console":
            yield from _unlike(f"{block.where}: {command}", expected, output, folder)


def _run_command(command: str) -> tuple[int, str]:
    """Exit status and output. A single `thawline` command is called in this process, to save imports, or in a fork.

    A run of several workers is started as a user starts it.
    """
    words = shlex.split(command, comments=True)
    alone = not re.search(r"[|><;&*$]", re.sub(r"'[^']*'", "", command))
    if words[0] == "thawline" and alone and "--workers" not in words:
        return _forked(words) if words[1] == "train" else _in_process(words)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout


def _forked(words: list[str]) -> tuple[int, str]:
    process = thawline_process(words[1:], os.environ)
    out, talk = process.communicate()
    return process.returncode or 0, talk + out


def _in_process(words: list[str]) -> tuple[int, str]:
    from thawline.cluster.cli import main

    output = io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main.main()
            status: Any = 0
        except SystemExit as stop:
            status = stop.code
    return int(status or 0), output.getvalue()


def _unlike(where: str, expected: str, output: str, folder: Path) -> Iterator[str]:
    pattern = "".join(_pattern(line) for line in expected.strip("\n").splitlines())
    output = output.replace(str(folder), "/home/you")
    if not re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in output.strip("\n").splitlines())):
        yield f"{where}: the page shows\n{expected}\nbut this was printed:\n{output}"


def _pattern(line: str) -> str:
    """The pattern of a printed line: measured numbers (with a point, times, speeds) may differ; ... is anything."""
    if line.strip() == "...":
        return r"(?:.*\n)*?"
    measured = r"(-?\d*\.\d+(?:e-?\d+)?|\b\d\d:\d\d\b|\b[\d,]+(?= images/s)|\b\d+(?= s in all)|\.\.\.)"
    pieces = re.split(measured, line.rstrip())
    for i, piece in enumerate(pieces):
        pieces[i] = re.sub(r"(\\ )+", " +", re.escape(piece)) if i % 2 == 0 else _measured(piece)
    return "".join(pieces) + r"\n"


def _measured(piece: str) -> str:
    return ".*?" if piece == "..." else r"\d\d:\d\d" if ":" in piece else r"-?[\d,]*\.?\d+(?:e-?\d+)?"


def _marks(text: str) -> dict[str, str]:
    marks = {}
    for words in re.findall(r"<!-- *(.*?) *-->", text):
        name, _, value = words.partition(": ") if ": " in words else words.partition(" ")
        if name != "given":
            marks[name] = value
    return marks
