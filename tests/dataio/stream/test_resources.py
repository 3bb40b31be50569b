"""Is everything given back: engines, threads and open files, by streams that end, are abandoned or fail?"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.images import EVERYTHING, first
from thawline.dataio.errors import EngineError, ManifestError
from thawline.dataio.labels.labels import by_parent, label
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.reading.readers import FileReader
from thawline.dataio.stream.loader import ImageLoader, loaders, split_loader
from thawline.dataio.stream.renderer import EngineName
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import by_folder, split

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
SPEC = ImageSpec(size_px=16, presize_px=20, **EVERYTHING)
both_engines = pytest.mark.parametrize("engine", ["dali", "reference"])


def held() -> dict[str, int]:
    """What this process holds. No garbage is collected for it: who waits for the collector has given nothing back."""
    from nvidia.dali import Pipeline

    return {
        "pipelines": sum(issubclass(type(each), Pipeline) for each in gc.get_objects()),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def settled(expected: dict[str, int]) -> dict[str, int]:
    """What is held once reading threads, which nobody waits for, have ended."""
    deadline = time.monotonic() + 20
    while (found := held()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def three_streams(train: ImageLoader, valid: ImageLoader, view: int) -> None:
    """A stream that is abandoned, one to its end, and one of a view."""
    first(train, 2, step=view)
    assert len(list(valid.stream())) == 3
    with valid.augmented(view) as other:
        assert len(list(islice(other.stream(), 1 + view % 3))) == 1 + view % 3


@pytest.mark.slow
@both_engines
def test_fifty_streams_hold_no_more_than_three(flat: Manifest, engine: EngineName) -> None:
    with no_collector():
        nothing = held()
        with_all = loaders(flat, SPEC, global_batch=4, engine=engine, threads=1)
        train, valid = with_all
        three_streams(train, valid, 0)
        time.sleep(0.2)
        three = held()
        for view in range(1, 18):
            three_streams(train, valid, view)
        fifty = settled(three)
        for loader in with_all:
            loader.close()
        after = settled(nothing)
    assert fifty == three
    assert after == nothing


@both_engines
def test_what_an_abandoned_stream_left_is_in_no_later_one(flat: Manifest, engine: EngineName) -> None:
    with loaders(flat, SPEC, global_batch=4, engine=engine, threads=1)[0] as fresh:
        expected = first(fresh, 3, step=5)
    with loaders(flat, SPEC, global_batch=4, engine=engine, threads=1)[0] as used:
        for count in (1, 4):
            first(used, count)
        found = first(used, 3, step=5)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


@both_engines
def test_two_streams_of_one_loader_do_not_disturb_each_other(flat: Manifest, engine: EngineName) -> None:
    with loaders(flat, SPEC, global_batch=4, engine=engine, threads=1)[0] as train:
        alone = [batch.ids.tolist() for batch in first(train, 6)]
        one, other = train.stream(), train.stream(2)
        seen = [(next(one).ids.tolist(), next(other).ids.tolist()) for _ in range(4)]
        assert seen == list(zip(alone[:4], alone[2:], strict=True))


@both_engines
def test_a_closed_loader_says_so_and_closing_again_is_no_error(flat: Manifest, engine: EngineName) -> None:
    train, valid = loaders(flat, SPEC, global_batch=4, engine=engine, threads=1)
    with valid.augmented(1) as view:
        next(view.stream())
    assert len(list(valid.stream())) == 3, "a view gives back nothing of its loader's"
    half_read = train.stream()
    next(half_read)
    for loader in (train, valid):
        loader.close()
        loader.close()
        with pytest.raises(EngineError, match=r"the loader is closed.*make another one"):
            next(loader.stream())
    made: Any = train.renderer._make()
    made.close()
    made.close()


def test_a_loader_that_cannot_be_made_keeps_no_reader_open(flat: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = list[FileReader]()
    monkeypatch.setattr(FileReader, "close", lambda reader: closed.append(reader))
    unsized = split(label(from_folder(flat.root), by_parent()), by_folder("valid"), verify=False)
    with pytest.raises(ManifestError, match="have no size"):
        split_loader(unsized, SPEC, "valid", global_batch=4)
    assert len(closed) == 1
    labelled = replace(unsized, classes=flat.classes)
    with pytest.raises(ManifestError, match="have no size"):
        loaders(flat, SPEC, global_batch=4, valid=labelled)
    assert len(closed) == 3, "its own, and the training loader's that was there already"


# First in, first out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 3, 4), "DALI returned 3 images where the next batch has 4.*wrong targets"),
        ((4, 4, 4), "DALI ended without returning 1 of its batches.*wrong targets"),
    ],
)
def test_a_batch_that_dali_loses_is_noticed_by_the_number_of_samples(
    flat: Manifest, sizes: tuple[int, ...], words: str
) -> None:
    """Targets and ids stay outside: what DALI returns has to be what it was given, in order."""
    _, valid = loaders(flat, SPEC, global_batch=4, engine="dali", threads=1)
    made: Any = valid.renderer._make()
    run = made._pipe.run
    losing = iter([lambda: [run(), run()][1]])
    made._pipe.run = lambda: next(losing, run)()
    with made, pytest.raises(EngineError, match=words):
        list(made.run(valid.source.work(np.arange(count)) for count in sizes))
