"""What does `thawline serve` do? Answer over HTTP what a finished run sees in images."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from thawline.cluster.cli.finished.verb import FinishedVerb
from thawline.cluster.cli.verbs import Flag
from thawline.cluster.errors import ServeError
from thawline.cluster.words import say

if TYPE_CHECKING:
    from socket import socket

    from thawline.cluster.serve.endpoint.limits import Limits
    from thawline.cluster.serve.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Serve(FinishedVerb):
    """Answer over HTTP what a finished run sees in images: POST /predict takes one, or a form with several; a page at /
    takes what is dropped on it. SIGTERM and Ctrl-C end it once what is under way is answered."""

    local: Flag = False
    """Serve in this process."""
    host: str = "127.0.0.1"
    """Address to listen at; one that others can reach wants --token, or --no-token."""
    port: int = 8000
    """0: any free one."""
    token: Annotated[str, arg(metavar="FILE")] = ""
    """Answer only requests with the header "Authorization: Bearer TOKEN"; FILE holds the token, and is yours alone."""
    no_token: Flag = False
    """Answer whoever reaches --host."""
    allow_urls: Annotated[tuple[str, ...], arg(metavar="HOST...")] = ()
    """Fetch images from URLs of these hosts, HOST or HOST:PORT, at public addresses only."""
    watch: Flag = False
    """Load the bundle again when it changes, and let it take over without losing a request."""
    batch: int = 32
    """Images that go through the model at once, at most."""
    wait_ms: float = 5.0
    """How long an image waits for others to share a batch with."""
    queue: int = 256
    """Images that may be under way; requests beyond get status 429."""
    max_mb: float = 32.0
    """Megabytes of a request; 413 beyond."""
    max_pixels: int = 50_000_000
    """Of an image; 422 beyond, and it is not decoded."""
    timeout_s: float = 30.0
    """For a request to arrive (408 beyond), and again for its answer (504)."""

    def run(self) -> int:
        """Serve until a signal comes; prints the address. Raises ServeError, and what loading the bundle raises."""
        if not self.local:
            raise ServeError("serving by Ray Serve is not there yet: give --local, which serves in this process")
        try:
            from thawline.cluster.serve.endpoint import server
            from thawline.cluster.serve.endpoint.fetching import allowed
        except ModuleNotFoundError as error:
            raise ServeError(
                f'serve needs {error.name}, which is not installed: nobody is answered; pip install "thawline[serve]"'
            ) from error
        limits = self._limits()
        token = server.read_token(self.token) if self.token else None
        allowed(self.allow_urls)
        server.check_reach(self.host, token=token, without=self.no_token)
        with ExitStack() as opened:
            at = opened.enter_context(server.listening(self.host, self.port))
            self._serve(opened, limits, token, at)
        return 0

    def _serve(self, opened: ExitStack, limits: "Limits", token: str | None, at: "socket") -> None:
        from thawline.cluster.serve.endpoint import server
        from thawline.cluster.serve.endpoint.app import make_app
        from thawline.cluster.serve.endpoint.batching import Batcher
        from thawline.cluster.serve.endpoint.fetching import Fetcher
        from thawline.cluster.serve.endpoint.telemetry import Telemetry
        from thawline.cluster.serve.endpoint.watching import Watch, fingerprint
        from thawline.models.bundle import FOLDER

        folder, served = Path(self.source).expanduser().resolve(), fingerprint(self.source)
        name = folder.parent.name if folder.name == FOLDER else folder.name
        telemetry = Telemetry(name)
        batcher = opened.enter_context(Batcher(self._loaded(), limits, telemetry))
        if self.watch:
            opened.enter_context(Watch(self.source, batcher, self._loaded, served=served, tell=say))
        fetch = Fetcher(self.allow_urls, limits) if self.allow_urls else None
        app = make_app(batcher, telemetry, run=name, token=token, fetch=fetch)
        server.serve(app, at, limits, started=partial(print, server.address(at), flush=True))

    def _loaded(self) -> "Predictor":
        from thawline.cluster.serve.endpoint.batching import warmed

        return warmed(self.predictor(), batch=self.batch)

    def _limits(self) -> "Limits":
        from thawline.cluster.serve.endpoint.limits import Limits

        if not 0 < self.max_mb <= 1e6:
            raise ServeError(f"--max-mb {self.max_mb:g} is no size of a request; give a number above 0, at most 1e6")
        request_bytes = int(self.max_mb * 1e6)
        return Limits(
            batch=self.batch,
            wait_ms=self.wait_ms,
            queue=self.queue,
            request_bytes=request_bytes,
            image_bytes=request_bytes,
            max_pixels=self.max_pixels,
            receive_s=self.timeout_s,
            answer_s=self.timeout_s,
        )
