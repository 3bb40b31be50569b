"""How does one process serve? By uvicorn, until SIGTERM or Ctrl-C; then it answers what is under way, and ends."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from thawline.cluster.errors import ServeError
from thawline.cluster.serve.endpoint.limits import Limits

_MOST_CONNECTIONS = 1024
_BACKLOG = 512
_LEAST_TOKEN = 16


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ServeError."""
    if not 0 <= port <= 65535:  # the system would take it modulo 65536
        raise ServeError(f"--port {port} is no port: give one of 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ServeError(f"--host {host} is no address of this machine ({_reason(error)}): give another") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        raise ServeError(
            f"port {port} of {host} cannot be listened at ({_reason(error)}): nobody would be answered; give another "
            "--port, 0 for a free one"
        ) from error
    return made


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def check_reach(host: str, *, token: str | None, without: bool) -> None:
    """Raises ServeError where others could ask an endpoint that asks them for nothing."""
    if token is None and not without and not _is_loopback(host):
        raise ServeError(
            f"--host {host} lets whoever reaches this machine ask: give --token FILE, or say --no-token where only "
            "those you trust can reach it"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: str) -> str:
    """The token in a file that belongs to its user alone. Raises ServeError."""
    path = Path(file).expanduser()
    try:
        if path.stat().st_mode & 0o077:
            raise ServeError(f"--token {file} can be read by others: whoever does may ask; run chmod 600 {file}")
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise ServeError(f"--token {file} cannot be read ({_reason(error)}): give a file with one line") from error
    if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
        raise ServeError(
            f"--token {file} holds no token of at least {_LEAST_TOKEN} characters, which would be guessed: "
            f"openssl rand -hex 32 > {file}"
        )
    return token


@contextmanager
def _signals_end_in_peace() -> Iterator[None]:
    """uvicorn sends itself the signal again that ended it: here that means nothing more, the exit status is 0."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(app: FastAPI, at: socket.socket, limits: Limits, *, started: Callable[[], None]) -> None:
    """Answer at this socket until a signal comes. started: called once signals are heeded and requests answered."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(limits.receive_s + limits.answer_s) + 1,
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        telling = asyncio.create_task(_when_started(server, started))
        await server.serve(sockets=[at])
        telling.cancel()

    with _signals_end_in_peace():
        asyncio.run(run())


async def _when_started(server: uvicorn.Server, started: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    started()


def address(at: socket.socket) -> str:
    """The URL of a socket that listens."""
    host, port = at.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
