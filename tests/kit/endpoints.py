"""How do tests ask an endpoint? In this process, or over a socket of loopback, by an untrained bundle."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

import thawline
from tests.kit.bundles import write_bundle
from thawline.cluster.serve.endpoint.app import make_app
from thawline.cluster.serve.endpoint.batching import Batcher
from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.telemetry import Telemetry

TASKS = {"single_label": 3, "multi_label": 2, "number": 1, "points": 2, "mask": 3}


def bundle_of(folder: Path, task: str = "single_label", **options: Any) -> Path:
    """An untrained model's bundle, made once in this folder."""
    made = folder / task
    return made if made.exists() else write_bundle(made, "tiny", task, TASKS[task], size_px=32, **options)


@contextmanager
def answering(bundle: Path, limits: Limits | None = None, **options: Any) -> Iterator[tuple[Any, Batcher]]:
    """(the app, its batcher); options: of make_app."""
    telemetry = Telemetry("the run")
    with Batcher(thawline.load(bundle), limits or Limits(), telemetry) as batcher:
        yield make_app(batcher, telemetry, run="the run", **options), batcher


@contextmanager
def over_loopback(app: Any) -> Iterator[int]:
    """The port where uvicorn serves the app, in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def read_answer(connection: socket.socket, *, seconds: float = 20) -> bytes:
    """All that comes until the other side closes."""
    connection.settimeout(seconds)
    received = b""
    while more := connection.recv(65536):
        received += more
    return received
