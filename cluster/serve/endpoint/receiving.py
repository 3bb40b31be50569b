"""How does a request arrive? Within its limits of bytes and time, counted while it arrives, and by whoever may ask."""

import asyncio
import hmac
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from time import perf_counter
from typing import Any

from fastapi.responses import JSONResponse

from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.telemetry import Telemetry

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

_LINGER_S = 2.0
"""How long the rest of a refused body is thrown away: a connection closed at once would take the answer with it."""


class RefusedError(Exception):
    """A request that gets a status and a sentence instead of an answer."""

    def __init__(self, status: int, sentence: str, *, retry: bool = False) -> None:
        """retry: whether the same may work later."""
        super().__init__(sentence)
        self.status, self.retry = status, retry

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": "1"} if self.retry else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": str(self)}, self.status, headers)


class Guard:
    """An ASGI app around another, for requests whose path is in `guarded`: token, bytes, time."""

    def __init__(self, app: App, *, limits: Limits, telemetry: Telemetry, guarded: str, token: str | None) -> None:
        self._app, self._limits, self._telemetry = app, limits, telemetry
        self._guarded, self._token = guarded, token
        self._held, self._counting = 0, threading.Lock()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        if scope["type"] != "http" or scope["path"] != self._guarded:
            return await self._app(scope, receive, send)
        began, body = perf_counter(), _Body(receive, self._limits, self._hold)
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not body.complete:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif not body.complete and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.discard(_LINGER_S)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(headers)
            body.check_announced(headers.get(b"content-length", b"0"))
            await self._app(scope, body, answer)
        except RefusedError as error:
            await error.response()(scope, receive, answer)
        finally:
            self._hold(-body.bytes)
            self._telemetry.answered(status, perf_counter() - began)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        """Raises RefusedError."""
        if self._token is None:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise RefusedError(401, "this endpoint asks for its token: send the header Authorization: Bearer TOKEN")

    def _hold(self, more: int) -> None:
        """Raises RefusedError."""
        with self._counting:
            if more > 0 and self._held + more > self._limits.held_bytes:
                raise RefusedError(429, "too much is under way: nothing was looked at; send it again later", retry=True)
            self._held += more


class _Body:
    """What is received of a request, as ASGI's `receive`."""

    def __init__(self, receive: Receive, limits: Limits, hold: Callable[[int], None]) -> None:
        self._receive, self._limits, self._hold = receive, limits, hold
        self._until: float | None = None
        self.bytes, self.complete = 0, False

    def check_announced(self, length: bytes) -> None:
        """Raises RefusedError."""
        if length.isdigit() and int(length) > self._limits.request_bytes:
            self._refuse_size()

    async def __call__(self) -> Message:
        """The next message. Raises RefusedError."""
        if self.complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._until is None:
            self._until = loop.time() + self._limits.receive_s
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise RefusedError(
                408, f"the request did not arrive within {self._limits.receive_s:g} s: send it faster, or less"
            ) from None
        self.complete = not message.get("more_body", False)
        more = len(message.get("body", b""))
        if self.bytes + more > self._limits.request_bytes:
            self._refuse_size()
        self._hold(more)
        self.bytes += more
        return message

    async def discard(self, seconds: float) -> None:
        """Receive the rest and forget it, for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (await self._receive()).get("more_body", False):
                    pass

    def _refuse_size(self) -> None:
        raise RefusedError(
            413, f"the request has more than {self._limits.request_bytes:,} bytes: send fewer or smaller images"
        )
