"""Which engine turns work into batches? The choice of one, and engines that are lent to streams.

A stream borrows an engine for its first batch and returns it when it ends, however it ends. So one engine serves one
stream after another, and a new stream never waits for one that was abandoned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from thawline.dataio.ahead import timed
from thawline.dataio.batch import ImageBatch
from thawline.dataio.closing import Closing
from thawline.dataio.cores import usable_cores
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Engine, Mend, Work

EngineName = Literal["auto", "dali", "reference"]


@dataclass(frozen=True)
class Choice:
    """Which engine renders, and why."""

    engine: str
    reason: str


def choose_engine(wanted: EngineName = "auto") -> Choice:
    """Choose the engine. Raises EngineError if DALI is asked for and cannot be imported."""
    if wanted == "reference":
        return Choice("reference", "asked for")
    try:
        from thawline.dataio.pixels import dali  # noqa: F401
    except ImportError as error:
        if wanted == "dali":
            raise EngineError(
                f"engine='dali' was asked for, but DALI cannot be imported ({error}): nothing could decode; "
                "install nvidia-dali-cuda130, or give engine='reference'"
            ) from error
        return Choice("reference", f"DALI cannot be imported ({error})")
    return Choice("dali", "asked for" if wanted == "dali" else "DALI is installed")


def default_threads(world_size: int) -> int:
    """Decoding threads for a rank: its share of the usable cores, at most 8, at least 1."""
    return max(1, min(8, usable_cores() // world_size))


@dataclass(kw_only=True)
class Renderer(Closing):
    """Renders the work of one loader and its views, a stream at a time, with the chosen engine."""

    spec: ImageSpec
    local_batch: int
    """The most samples of a Work."""
    masks: bool = False
    """Whether all work has masks."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = 1
    choice: Choice = field(default_factory=choose_engine)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "finish"), 0.0))
    """Seconds spent waiting for batches so far, in whichever thread: read, encoded files; decode, decoding and warping
    that the engine had not done ahead; finish, colours and normalisation. Their sum is the whole wait."""

    def __post_init__(self) -> None:
        self._idle: list[Engine] = []
        self._closed = False

    def batches(self, works: Iterator[Work], mend: Mend) -> Iterator[ImageBatch]:
        """One batch for each Work that has a sample, in order. Raises EngineError once closed."""
        if self._closed:
            raise EngineError("the loader is closed: its engine and threads were released; make another one")
        engine = self._idle.pop() if self._idle else self._make()
        read = timed((work for work in works if len(work.ids)), self.seconds, "read")
        try:
            yield from timed(engine.run(read, mend), self.seconds, "decode")
        finally:
            if self._closed or self._idle:
                engine.close()
            else:
                self._idle.append(engine)

    def _make(self) -> Engine:
        if self.choice.engine == "reference":
            return ReferenceEngine(
                self.spec, device=self.device, dtype=self.dtype, threads=self.threads, spent=self.seconds
            )
        from thawline.dataio.pixels.dali import DaliEngine

        return DaliEngine(
            self.spec,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            max_batch=self.local_batch,
            masks=self.masks,
            spent=self.seconds,
        )

    def close(self) -> None:
        """Release threads and memory; a stream that is still open releases its engine when it ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
