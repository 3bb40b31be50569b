"""What do several test files share? Manifests that are made once a session, and must not be changed."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kit.forked import PICTURES
from tests.kit.images import flat_manifest
from thawline.dataio.pixels import probe
from thawline.dataio.table.manifest import Manifest


@pytest.fixture(scope="session", autouse=True)
def one_dali() -> Iterator[None]:
    """Whoever checks files asks the same children: to start one for each of hundreds of calls would take minutes."""

    class Shared(probe.Children):
        def close(self) -> None:
            """They go on."""

    shared = Shared()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "Children", lambda: shared)
        yield
    probe.Children.close(shared)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Nobody pulls the plug while tests run, and they write thousands of files: the disk need not be waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def light_runs() -> Iterator[None]:
    """See forked.light_runs; a run gives torch every core: two test processes with two threads each would spin."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError):  # on a GPU host that has no packages for jobs, nobody makes a run
            from thawline.cluster.results import report
            from thawline.cluster.run import run

            patch.setattr(run, "default_threads", lambda ranks: 1)
            patch.setattr(report, "SHOWN", PICTURES)
        yield


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """37 training and 11 validation images, one flat colour each: image i shows `images.flat_colour(i)`."""
    return flat_manifest(tmp_path_factory.mktemp("flat"), train=37, valid=11)


@pytest.fixture
def own_flat(tmp_path: Path) -> Manifest:
    """12 training and 4 validation images of which a test may remove or spoil files."""
    return flat_manifest(tmp_path, train=12, valid=4)
