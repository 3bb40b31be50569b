"""Are the commands in deploy/ valid? They are found in scripts, YAML and Markdown, and parsed by their own CLI.

`thawline ...` is parsed by our own command line, `ray ...` by Ray's. Nothing is run. In prose and comments, only text
in backticks or in a fence is a command.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PROGRAMS = ("thawline", "ray")


def in_file(file: Path) -> list[list[str]]:
    """Every command of PROGRAMS in a file, word by word; variables are replaced by their names."""
    text = file.read_text()
    if file.suffix == ".md":
        return [words for code in code_of(text) for words in in_shell(code)]
    if file.suffix in (".yaml", ".yml"):
        return [words for document in yaml.safe_load_all(text) for words in _in_value(document)]
    return [*in_shell(text)]


def code_of(markdown: str) -> list[str]:
    """The code in a Markdown text: its fences, unless they name another language than sh, and text in backticks.

    Two words in backticks name a command instead of giving one: --help is appended, which every command accepts.
    """
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    blocks = [code for language, code in fence.findall(markdown) if language in ("", "sh")]
    spans = re.findall(r"`([^`\n]+)`", fence.sub("", markdown))
    return [*blocks, *(f"{span} --help" if len(span.split()) == 2 else span for span in spans)]


def _in_value(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _in_value(inner)
    elif isinstance(value, list):
        words = [str(word) for word in value]
        words = words[1:] if words[:1] == ["CMD"] else words
        if words[:1] and words[0] in PROGRAMS:
            yield words
        else:
            for inner in value:
                yield from _in_value(inner)
    elif isinstance(value, str):
        text = re.sub(r"\{\{ *\$labels\.(\w+) *\}\}", r"\1", value)  # Prometheus fills it in
        for code in code_of(text) if "`" in text else [text]:
            yield from in_shell(code)


def in_shell(text: str) -> Iterator[list[str]]:
    """The commands of PROGRAMS in a piece of shell, also those within another's quoted words and substitutions."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n`")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        tokens = [*lexer]
    except ValueError:  # a quote that is not closed: prose with an apostrophe
        return
    words = list[str]()
    for token in [*tokens, ";"]:
        if set(token) <= set("();<>|&\n`"):
            yield from _of_words(words)
            words = []
        else:
            words.append(token)


def _of_words(words: list[str]) -> Iterator[list[str]]:
    """The command in these words, perhaps after a launcher and its options; and those within its words."""
    starts = [i for i, word in enumerate(words) if word in PROGRAMS and _may_follow(words[:i])]
    if starts and len(words) > starts[0] + 1:
        yield [_filled(word) for word in words[starts[0] :] if word != "$@"]
    for word in words:
        if re.search(rf"\b({'|'.join(PROGRAMS)}) ", word):
            yield from in_shell(re.sub(r"\$\(|\)", ";", word))


def _may_follow(before: list[str]) -> bool:
    """Whether a program's name may follow these words: none, or `exec`, --, or NAME=value, also as an option."""
    return not before or before[-1] in ("exec", "--") or "=" in before[-1]


_NUMBERS = {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "8"}


def _filled(word: str) -> str:
    """`word` with its variables replaced: by a number where a number is needed, else by their names."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: _NUMBERS.get(match[1], match[1]), word)


def parse_command(words: list[str]) -> list[str]:
    """The problems of a command, by its own command line."""
    return _thawline(words[1:]) if words[0] == "thawline" else _ray(words[1:])


def _thawline(arguments: list[str]) -> list[str]:
    from thawline.cluster.cli.main import check_arguments

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            check_arguments(arguments)
    except SystemExit as end:
        if end.code:
            return [f"thawline {shlex.join(arguments)}: {output.getvalue().strip() or end.code}"]
    except Exception as error:  # any error of the command line is a problem of the file
        return [f"thawline {shlex.join(arguments)}: {error}"]
    return []


def _ray(arguments: list[str]) -> list[str]:
    import click
    from ray.scripts.scripts import cli
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    name, options = arguments[0], arguments[1:]
    if name not in cli.commands:
        return [f"ray {name} is no command of Ray's"]
    try:
        if name == "symmetric-run":
            options = options[: options.index("--")]
            cli.commands[name].make_context(name, [*options])
            name, options = (
                "start",
                curate_and_validate_ray_start_args(options),
            )  # the remaining ones are for every node
        with contextlib.redirect_stdout(io.StringIO()):
            cli.commands[name].make_context(name, [*options])
    except click.exceptions.Exit:  # --help
        return []
    except (click.ClickException, ValueError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return [f"ray {shlex.join(arguments)}: {message}"]
    return []
