"""How do images of several requests share the model? They are decoded in threads and wait a few ms for one another.

The model runs in one thread, on whatever has been decoded by then. What a request is, and how it is refused, see app.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np

from thawline.cluster.errors import PredictError
from thawline.cluster.serve.endpoint.limits import Limits
from thawline.cluster.serve.endpoint.telemetry import Telemetry
from thawline.cluster.serve.predictor import Prediction, Predictor
from thawline.dataio.closing import Closing
from thawline.dataio.cores import usable_cores
from thawline.dataio.stream.render import Item, Sound, accepting
from thawline.models.bundle import Description

log = logging.getLogger(__name__)

_DECODED_BYTES = 512 << 20
"""Of decoded images that wait for the model: beyond, decoding waits, too."""


class BusyError(Exception):
    """Too much is under way."""


class ClosedError(Exception):
    """The endpoint ends."""


@dataclass(frozen=True)
class Options:
    """What a request asks for, see Predictor.predict."""

    top_k: int = 0
    threshold: float | None = None


class Said(NamedTuple):
    """What was said of an image, and by which model."""

    prediction: Prediction
    about: Description


@dataclass
class _Asked:
    """An image on its way to its answer."""

    name: str
    encoded: bytes
    options: Options
    answer: Future[Said] = field(default_factory=Future)
    since: float = field(default_factory=perf_counter)
    sound: Sound | None = None

    @property
    def bytes(self) -> int:
        return len(self.sound.encoded) if self.sound is not None else 0


class _Decoded:
    """Images that wait for the model: bounded in bytes, not in number."""

    def __init__(self) -> None:
        self._changed, self._waiting, self._bytes, self._closed = threading.Condition(), deque[_Asked](), 0, False

    def put(self, asked: _Asked) -> None:
        """Waits for room. Raises ClosedError."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting or self._bytes < _DECODED_BYTES)
            if self._closed:
                raise ClosedError
            self._waiting.append(asked)
            self._bytes += asked.bytes
            self._changed.notify_all()

    def take(self, most: int, wait_s: float) -> list[_Asked]:
        """At most so many, once there is one and `wait_s` have passed or the batch is full; none when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._waiting))
            self._changed.wait_for(lambda: self._closed or len(self._waiting) >= most, timeout=wait_s)
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            self._bytes -= sum(asked.bytes for asked in taken)
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Batcher(Closing):
    """Answers requests with a predictor, which it closes, and which another may follow."""

    def __init__(self, predictor: Predictor, limits: Limits, telemetry: Telemetry) -> None:
        self.limits, self._telemetry = limits, telemetry
        self._predictor, self._using = predictor, threading.Lock()
        self._under_way, self._counting = 0, threading.Lock()
        self._decoded = _Decoded()
        self._opened = ExitStack()
        self._accepts = {
            engine: self._opened.enter_context(accepting(max_pixels=limits.max_pixels, compare=engine == "dali"))
            for engine in ("dali", "reference")
        }
        self._decoders = ThreadPoolExecutor(usable_cores(), thread_name_prefix="thawline-decode")
        self._model = threading.Thread(target=self._run, name="thawline-model", daemon=True)
        self._model.start()

    @property
    def ready(self) -> bool:
        """Whether images are answered."""
        return self._model.is_alive()

    @property
    def predictor(self) -> Predictor:
        """Who answers now."""
        return self._predictor

    async def answers(self, images: Sequence[tuple[str, bytes]], options: Options) -> list[Said]:
        """What the model says of each (name, encoded file), in order. Never blocks the event loop.

        Raises: BusyError; TimeoutError; ClosedError; PredictError for options that do not fit the task.
        """
        self._count(len(images))
        asked = [_Asked(name, encoded, options) for name, encoded in images]
        for each in asked:
            try:
                self._decoders.submit(self._decode, each)
            except RuntimeError:  # it is shut down
                self._count(-1)
                each.answer.set_exception(ClosedError())
        try:
            async with asyncio.timeout(self.limits.answer_s):
                return list(await asyncio.gather(*(asyncio.wrap_future(each.answer) for each in asked)))
        except BaseException:
            for each in asked:  # nobody waits for them any more, and they may wait long for their turn
                each.encoded = b""
            raise

    def swap(self, predictor: Predictor) -> None:
        """Answer with another one from the next batch on, and close the one before. It should be `warmed`."""
        with self._using:
            before, self._predictor = self._predictor, predictor
        before.close()
        self._telemetry.swaps.inc()

    def close(self) -> None:
        """Answer what is decoded, refuse the rest, and end the threads."""
        self._decoded.close()
        self._decoders.shutdown()
        self._model.join()
        self._opened.close()
        self._predictor.close()

    # In threads -------------------------------------------------------------------------------------------

    def _count(self, images: int) -> None:
        """Raises BusyError."""
        with self._counting:
            if images > 0 and self._under_way and self._under_way + images > self.limits.queue:
                raise BusyError
            self._under_way += images
            self._telemetry.queue.set(self._under_way)

    def _decode(self, asked: _Asked) -> None:
        """Check and decode an image, and hand it to the model."""
        try:
            began = perf_counter()
            self._telemetry.queue_s.inc(began - asked.since)
            if asked.answer.cancelled():  # nobody waits for it any more
                return self._count(-1)
            predictor = self._predictor
            found = self._accepts[predictor.engine.engine](asked.encoded)
            asked.encoded, asked.since = b"", perf_counter()
            self._telemetry.decode_s.inc(asked.since - began)
            if isinstance(found, Sound):
                asked.sound = found
                return self._decoded.put(asked)
            self._telemetry.refused.inc()
            self._settle(asked, Said(Prediction(name=asked.name, error=found), predictor.about))
        except Exception as error:
            self._settle(asked, error)

    def _settle(self, asked: _Asked, answer: Said | Exception) -> None:
        self._count(-1)
        if asked.answer.set_running_or_notify_cancel():
            if isinstance(answer, Exception):
                asked.answer.set_exception(answer)
            else:
                asked.answer.set_result(answer)

    def _run(self) -> None:
        """The model's thread."""
        while taken := self._decoded.take(self.limits.batch, self.limits.wait_ms / 1000):
            now = perf_counter()
            for asked in taken:
                self._telemetry.queue_s.inc(now - asked.since)
            for options in dict.fromkeys(asked.options for asked in taken):
                self._answer([asked for asked in taken if asked.options == options], options)
            self._telemetry.model_s.inc(perf_counter() - now)

    def _answer(self, batch: list[_Asked], options: Options) -> None:
        """Settle images that are asked for in the same way."""
        gone = [asked for asked in batch if asked.answer.cancelled()]
        self._count(-len(gone))
        batch = [asked for asked in batch if asked not in gone]
        if not batch:
            return
        items = [Item(asked.name, asked.sound) for asked in batch if asked.sound is not None]
        try:
            with self._using:
                about = self._predictor.about
                said: list[Said | Exception] = [
                    Said(each, about) for each in _said(self._predictor, items, options, self.limits.batch)
                ]
        except PredictError as error:
            said = [error] * len(batch)
        except Exception as error:
            with self._using:
                self._predictor.close()  # its engine may be broken; the next image starts another
            if len(batch) > 1:  # one must not take the others with it
                for asked in batch:
                    self._answer([asked], options)
                return
            log.exception("an image could not be answered")
            said = [error]
        else:
            self._telemetry.batches.inc()
            self._telemetry.images.inc(len(batch))
        for asked, answer in zip(batch, said, strict=True):
            self._settle(asked, answer)


def _said(predictor: Predictor, items: list[Item], options: Options, batch: int) -> list[Prediction]:
    return list(predictor.stream(items, top_k=options.top_k, threshold=options.threshold, batch=batch))


def warmed(predictor: Predictor, *, batch: int) -> Predictor:
    """The same, with its engine started and its model tried. Raises what the first image would meet."""
    size = predictor.spec.size_px
    _said(predictor, [Item("a trial", np.zeros((size, size, 3), np.uint8))], Options(), batch)
    return predictor
