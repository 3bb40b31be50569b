"""How does a process answer whoever reads its numbers? Over HTTP, with bounds: nobody who asks can harm the run.

Every connection is a file and a thread of the process that trains. So there are few at a time, each has little time,
and where one too many comes, the oldest is closed: who reads as Prometheus does has been answered long before.
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
"""As WSGI has them."""

_MOST = 16
_SILENT_S = 5.0


class Answers:
    """`app` behind http://HOST:`port`, until `close`. `port` is used when free, any free one otherwise (0 asks for it).

    Raises:
        OSError: `host` is no address of this machine.
    """

    def __init__(self, app: App, *, host: str, port: int, name: str) -> None:
        """name: of the thread that listens."""
        try:
            self._server = _Server(host, port)
        except (OSError, OverflowError):  # taken, or beyond 65535
            self._server = _Server(host, 0)
        self._server.set_app(app)
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Asked(WSGIRequestHandler):
    timeout = _SILENT_S

    def log_message(self, *words: object) -> None:
        """Nobody reads it."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = _MOST

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._open: deque[Any] = deque()
        self._lock = Lock()
        super().__init__((host, port), _Asked)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # WSGIServer's would ask for the name of the address, of whoever answers that
        self.server_name, self.server_port = "thawline", int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.append(request)
            oldest = self._open[0] if len(self._open) > _MOST else None
        if oldest is not None:
            self._forget(oldest)
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes, and closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who broke off, or said nothing for too long, is no matter of this process."""

    def _forget(self, request: Any) -> None:
        with self._lock, suppress(ValueError):
            self._open.remove(request)
