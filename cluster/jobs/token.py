"""Who may use a cluster? Whoever has its token: where it is stored, who can read it, and how Ray gets it.

Whoever can submit to a cluster can run code on it. So every cluster that thawline starts requires a token, and every
submission sends one. Ray reads RAY_AUTH_MODE and the token when it is imported: call these functions first.
"""

import contextlib
import functools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from thawline.cluster.errors import TokenError

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Ray's own variables: "token" or "disabled"; the token itself; a file with it."""


def token_file() -> Path:
    """The file of this user's token: $RAY_AUTH_TOKEN_PATH, or Ray's default ~/.ray/auth_token. Raises TokenError."""
    path = os.environ.get(PATH, "")
    try:
        return Path(path) if path else Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        raise TokenError(
            f"HOME is not set, and the user {os.getuid()} has no name to look it up by: the token's file is not "
            f"known; give HOME or {PATH}"
        ) from None


def source() -> str:
    """The source of the token that Ray sends."""
    return f"${TOKEN}" if os.environ.get(TOKEN) else str(token_file())


def create_token() -> Path:
    """Write a new random token, readable only by its owner. Raises TokenError if there is one already."""
    file = token_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
            sink.write(secrets.token_hex(32))
    except FileExistsError:
        raise TokenError(
            f"{file} exists: a cluster that was started with it would refuse another one; remove it first if none was, "
            f"or give {PATH}"
        ) from None
    except OSError as error:
        raise TokenError(f"{file} cannot be written ({error.strerror}): there is no token; give {PATH}") from error
    return file


def use_token() -> None:
    """Have Ray send this user's token to the cluster that it connects to next, unless RAY_AUTH_MODE is disabled.

    Raises TokenError when there is none, or when others can read it.
    """
    if os.environ.setdefault(MODE, "token") != "token" or os.environ.get(TOKEN):
        return
    file = token_file()
    try:
        mode, token = file.stat().st_mode, file.read_text().strip()
    except FileNotFoundError:
        raise TokenError(
            f"{file} does not exist and {TOKEN} is not set: the cluster would refuse you; copy the cluster's token "
            f"there, or make one with `thawline token --create` before you start the cluster; {MODE}=disabled for a "
            "cluster without"
        ) from None
    except OSError as error:
        raise TokenError(
            f"{file} cannot be read ({error.strerror}): the cluster would refuse you; give {PATH}"
        ) from error
    if mode & 0o077:
        raise TokenError(
            f"{file} can be read by others (mode {mode & 0o777:04o}): whoever reads it can run code on the cluster; "
            f"`chmod 600 {file}`"
        )
    if not token:
        raise TokenError(f"{file} is empty: the cluster would refuse you; copy the cluster's token there")
    os.environ[PATH] = str(file)


@contextlib.contextmanager
def own_token() -> Iterator[None]:
    """Within, a cluster that this process starts requires a token that nobody else knows, and that is not stored."""
    if os.environ.get(MODE, "token") != "token" or os.environ.get(TOKEN):
        yield
        return
    before = os.environ.get(MODE)
    os.environ[MODE], os.environ[TOKEN] = "token", _own()
    try:
        yield
    finally:
        del os.environ[TOKEN]
        if before is None:
            del os.environ[MODE]


@functools.cache  # Ray reads the token once: a second cluster of this process must require the same one
def _own() -> str:
    return secrets.token_hex(32)
