"""What does `python:package.module:name` stand for? A user's own code, imported here and nowhere else.

What a file names so may be a stranger's: whoever reads a file asks first whether its reader wants that code, and tells
what is imported. Here nobody is asked any more. Without torch, so that whoever reads a job need not wait for it.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from thawline.models.errors import CodeError

PREFIX = "python:"


def is_code(name: object) -> bool:
    """Whether a name stands for a user's own code."""
    return isinstance(name, str) and name.startswith(PREFIX)


def target(name: str) -> Any:
    """What lies under a name that `is_code`; its module is imported, and what that prints goes to stderr.

    Raises CodeError: no such module, none of that name in it, a module that fails.
    """
    module, attribute = _parts(name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # only data belongs on stdout
            found = import_module(module)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and (module == missing or module.startswith(f"{missing}.")):
            raise CodeError(
                f"{name}: there is no module {missing!r}, neither in the working folder nor among what is installed: "
                "nothing can be imported; start thawline in the folder that it lies in, or set PYTHONPATH"
            ) from error
        raise CodeError(f"{name}: importing {module} raised {said(error)}: it cannot be used; mend it there") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=1)
            raise CodeError(
                f"{name}: {module} has no {part!r}: there is nothing to call; "
                + (f"did you mean {near[0]!r}?" if near else f"see {getattr(found, '__file__', module)}")
            )
        found = getattr(found, part)
    return found


def called(name: str, **arguments: Any) -> Any:
    """What the function under a name returns. Raises CodeError, as `target` does, and where the call fails."""
    function = target(name)
    is_module = hasattr(function, "named_parameters") and not isinstance(function, type)
    if is_module or not callable(function):
        raise CodeError(
            f"{name} is a {type(function).__name__} and no function: each call must make a new one; put it into a "
            "function that returns it, and name that"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return function(**arguments)
    except Exception as error:
        raise CodeError(f"{name} raised {said(error)}: nothing was made; mend it there") from error


def said(error: BaseException) -> str:
    """An error of a user's code, in a line: its type and the beginning of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0][:160]}' if lines else ''}"


def look_here() -> None:
    """Let names stand for code in the working folder, too: after all that is installed, which it cannot hide."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def place(name: str) -> Path | None:
    """The file, or the package's folder, that the first part of a name stands for; nothing is imported.

    None where it is not found, or no file. Raises CodeError for a name that cannot be one.
    """
    top = _parts(name)[0].partition(".")[0]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):  # in sys.modules, without a spec
        return None
    if spec is None:
        return None
    folders = [*(spec.submodule_search_locations or ())]
    if folders:
        return Path(folders[0])
    return Path(spec.origin) if spec.has_location and spec.origin else None


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of the file behind each name that `is_code`, "" where there is no file. Raises CodeError."""
    return {name: _sha256(name) for name in names if is_code(name)}


def _sha256(name: str) -> str:
    target(name)
    file = getattr(sys.modules.get(_parts(name)[0]), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def notices(names: Iterable[str]) -> Iterator[str]:
    """What to say before names are imported: a line each, with the place that they come from."""
    for name in names:
        yield f"importing {name} from {place(name) or 'a place that is not known'}"


def _parts(name: str) -> tuple[str, str]:
    """Module and attribute. Raises CodeError."""
    module, _, attribute = name.removeprefix(PREFIX).partition(":")
    if not all(part.isidentifier() for text in (module, attribute) for part in text.split(".")):
        raise CodeError(
            f"{name[:80]!r} does not say what to import: give {PREFIX}MODULE:NAME, such as {PREFIX}nets.mine:body"
        )
    return module, attribute
