"""Where may a process keep files of its own? In folders that are private to this user: scratch, and the cache.

A folder that exists already below TMPDIR may be another user's, or a link to anywhere, and nothing in it can be
trusted. So ours are always made anew, or checked. A scratch folder is locked by the process that uses it: if that was
killed, the next start finds the lock free and removes the folder.
"""

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thawline.dataio.errors import PlaceError

_PREFIX = "thawline_"
_COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_LONGEST = 20
"""Bytes of the folder that scratch folders are made in: Ray puts sockets 86 below it, and a path of one has 107."""


@contextmanager
def scratch(folder: Path | None = None) -> Iterator[Path]:
    """A new folder, readable by this user alone, until the block ends; first, those of dead processes are removed.

    folder: a `scratch_path`, if others have to find it; one with a random name if not given.
    Raises PlaceError when it cannot be made.
    """
    folder = folder or scratch_path(secrets.token_hex(4))
    _clear_dead(folder.parent)
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=folder.parent))
        lock = os.open(made, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: its folders stay
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(folder)  # locked before others can find it
    except OSError as error:
        raise PlaceError(
            f"{folder} cannot be made ({error.strerror}): there is no place for sockets and Ray's files; "
            "give another TMPDIR"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def scratch_path(name: str) -> Path:
    """The path of a scratch folder of that name: in TMPDIR, or in /tmp where the paths of sockets must be shorter."""
    given = Path(tempfile.gettempdir())
    return (given if len(os.fsencode(given)) <= _LONGEST else Path("/tmp")) / f"{_PREFIX}{name}"


def check_own(folder: Path) -> None:
    """Raises PlaceError unless it is this user's folder, and no other's to write to; OSError where there is none."""
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o022:
        raise PlaceError(
            f"{folder} is a link, somebody else's, or can be written by others: what lies there cannot be trusted; "
            "remove it, or give another TMPDIR"
        )


def cache_home() -> Path:
    """Where this user's cached files lie: $XDG_CACHE_HOME, ~/.cache, or below TMPDIR for a user without a home."""
    if given := os.environ.get("XDG_CACHE_HOME", ""):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME, and the user has no name to look it up by
        return _cache_without_home()


def use_compile_cache() -> None:
    """Have torch keep compiled code, which it runs when it finds it, where nobody else can put any.

    By default torch keeps it below TMPDIR, whoever made that. It makes the folder when it is imported, even where
    nothing is compiled, and then sets the variable as a user would: so call this before that, and where something is
    compiled.
    Raises PlaceError where there is no private folder.
    """
    given = Path(os.environ.get(_COMPILE_CACHE, "") or "torchinductor_")
    if given.name.startswith("torchinductor_") and given.parent in (Path(), Path(tempfile.gettempdir())):
        os.environ[_COMPILE_CACHE] = str(compile_cache())


def compile_cache() -> Path:
    """This user's folder for compiled code, made if necessary. Raises PlaceError."""
    for home in (cache_home(), _cache_without_home()):
        folder = home / "thawline" / "torchinductor"
        with suppress(OSError, PlaceError):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            for each in (folder.parent, folder):
                check_own(each)
            return folder
    raise PlaceError(
        f"neither {cache_home()} nor {tempfile.gettempdir()} has a folder that this user alone can write to: torch "
        f"cannot keep what it compiles; give XDG_CACHE_HOME or {_COMPILE_CACHE}, a folder of yours"
    )


def _cache_without_home() -> Path:
    return Path(tempfile.gettempdir()) / f"thawline-{os.getuid()}"


def _clear_dead(base: Path) -> None:
    """Remove this user's scratch folders that no living process holds."""
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError, PlaceError):
            check_own(folder)
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
