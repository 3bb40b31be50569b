"""How much may be asked of an endpoint? What is beyond these is refused before it costs anything."""

from dataclasses import dataclass, fields

from thawline.cluster.errors import ServeError

_MOST = 1e12
"""Of any of them: waiting for longer, or for ever, is beyond what the system can do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises ServeError for one that nothing could be answered within."""

    batch: int = 32
    """Images that go through the model at once."""
    wait_ms: float = 5.0
    """How long the first image of a batch waits for others."""
    queue: int = 256
    """Images under way; a request beyond is answered with 429."""
    held_bytes: int = 1 << 30
    """Of requests under way, all together; 429 beyond."""
    request_bytes: int = 32 << 20
    """413 beyond."""
    image_bytes: int = 16 << 20
    """413 beyond."""
    images: int = 64
    """In a request; 413 beyond."""
    max_pixels: int = 50_000_000
    """Of an image, which is not decoded beyond: 422."""
    receive_s: float = 30.0
    """For a request to arrive: 408 beyond."""
    answer_s: float = 30.0
    """From its arrival to the answer: 504 beyond."""
    fetch_s: float = 10.0
    """For an image to be fetched from its URL: 504 beyond."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            flag = f"--{field.name.replace('_', '-')}"
            if value <= 0 and (field.name != "wait_ms" or value < 0):
                raise ServeError(f"{flag} {value:g} leaves nothing to answer with; give a number above 0")
            if not value <= _MOST:
                raise ServeError(f"{flag} {value:g} is no limit; give a number of at most {_MOST:g}")
