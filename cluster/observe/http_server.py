"""How does a process serve its numbers over HTTP? Within limits, so that no client can harm the run.

Every connection takes a file descriptor and a thread of the process that trains. So there are few at a time, each with
a short timeout; beyond the limit the oldest is closed, whose client, if it reads as Prometheus does, was served long
before.
"""

import socket
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from threading import Lock, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

App = Callable[..., Iterable[bytes]]
"""A WSGI application."""

_MAX_CONNECTIONS = 16
_TIMEOUT_S = 5.0


class HttpServer:
    """Serves `app` at http://HOST:`port` until `close`; on any free port if `port` is taken, or 0.

    Raises:
        OSError: `host` is not an address of this machine.
    """

    def __init__(self, app: App, *, host: str, port: int, name: str) -> None:
        """name: of the listening thread."""
        try:
            self._server = _Server(host, port)
        except (OSError, OverflowError):  # taken, or beyond 65535
            self._server = _Server(host, 0)
        self._server.set_app(app)
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT_S

    def log_message(self, *words: object) -> None:
        """Requests are not logged."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._open: deque[Any] = deque()
        self._lock = Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # WSGIServer's would look up the host's name, which may take long
        self.server_name, self.server_port = "thawline", int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.append(request)
            oldest = self._open[0] if len(self._open) > _MAX_CONNECTIONS else None
        if oldest is not None:
            self._forget(oldest)
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that broke off or timed out is ignored."""

    def _forget(self, request: Any) -> None:
        with self._lock, suppress(ValueError):
            self._open.remove(request)
