"""Does the loader tell what its batches were waited for: each second once, and never less than before?"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from thawline.dataio.ahead import timed
from thawline.dataio.pixels.colours import finish
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream import loader
from thawline.dataio.stream.loader import loaders
from thawline.dataio.stream.renderer import EngineName
from thawline.dataio.table.manifest import Manifest

dali = pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
READ_S, DECODE_S, FINISH_S = 2.0, 5.0, 3.0


class Clock:
    """Stands still but for what a test says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("ahead", "pixels.dali", "pixels.reference"):
            patch.setattr(f"thawline.dataio.{module}.perf_counter", lambda: self.now)

    def during(self, call: Callable[..., Any], seconds: float, then: Callable[[], None] = lambda: None) -> Any:
        """`call`, taking that long."""

        def longer(*args: Any, **options: Any) -> Any:
            self.now += seconds
            then()
            return call(*args, **options)

        return longer


def test_a_second_within_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, spent = Clock(monkeypatch), {"inner": 1.0, "outer": 0.0}

    def inner() -> Iterator[int]:
        for i in range(3):
            clock.now += 2
            yield i
        clock.now += 0.5

    def outer() -> Iterator[int]:
        for i in timed(inner(), spent, "inner"):
            clock.now += 4
            yield i

    for i, seen in enumerate(timed(outer(), spent, "outer")):
        assert seen == i
        clock.now += 100  # what is done with them
    assert spent == {"inner": 1 + 6.5, "outer": 12}


def test_an_error_passes_and_its_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, spent = Clock(monkeypatch), {"read": 0.0}

    def broken() -> Iterator[int]:
        clock.now += 2
        raise OSError("gone")
        yield 0

    with pytest.raises(OSError, match="gone"):
        next(timed(broken(), spent, "read"))
    assert spent == {"read": 2}


@pytest.mark.parametrize("engine", ["dali", "reference"])
def test_batches_wait_for_files_for_decoding_and_for_colours(
    flat: Manifest, engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, snapshots = Clock(monkeypatch), list[dict[str, float]]()
    calls = {"read": 0, "decode": 0, "finish": 0}
    train, valid = loaders(flat, ImageSpec(size_px=16, presize_px=20), batch=8, engine=engine, threads=1)

    def at_once(make: Callable[[Any], Any], items: Iterator[Any], **_: int) -> Iterator[Any]:
        for item in items:
            clock.now += READ_S
            calls["read"] += 1
            yield make(item)

    def count(name: str) -> None:
        calls[name] += 1
        snapshots.append(dict(train.seconds))

    def told() -> dict[str, float]:
        decode_s = DECODE_S if engine == "dali" else DECODE_S / 8  # a batch, or one of its images
        each_s = {"read": READ_S, "decode": decode_s, "finish": FINISH_S}
        return {name: calls[name] * each_s[name] for name in calls}

    def built(made: Any) -> Any:
        pipe = build(made)
        pipe.run = clock.during(pipe.run, DECODE_S, lambda: count("decode"))
        return pipe

    def rendered(*args: Any) -> Any:
        return clock.during(render, DECODE_S / 8, lambda: count("decode"))(*args)

    build, render = dali.DaliEngine._built, ReferenceEngine._rendered
    monkeypatch.setattr(dali.DaliEngine, "_built", built)
    monkeypatch.setattr(ReferenceEngine, "_rendered", rendered)
    monkeypatch.setattr(loader, "read_ahead", at_once)
    monkeypatch.setattr(
        f"thawline.dataio.pixels.{engine}.finish", clock.during(finish, FINISH_S, lambda: count("finish"))
    )
    assert train.seconds == {"read": 0, "decode": 0, "finish": 0}
    for _ in range(2):  # the second throws away what the first has left in the queues: that takes time, too
        stream = train.stream()
        for _ in range(3):
            next(stream)
            clock.now += 1000  # training
            assert train.seconds == told()
        del stream
    assert train.seconds == told()
    assert set(valid.seconds.values()) == {0}, "each loader has its own"
    for before, after in pairwise(snapshots):
        assert all(after[name] >= before[name] for name in before), "a counter that falls looks like a restart"
