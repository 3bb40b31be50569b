"""Do ten million rows cost a rank no more than they must? Memory, and what is read; time is a benchmark's.

The real number of rows, over a hundred small files: `python -m benchmarks scale` times the same.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from thawline.benchmarks.scale import make
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import split_loader
from thawline.dataio.stream.plan import Training
from thawline.dataio.table.manifest import Manifest

pytestmark = pytest.mark.slow
ROWS = 10_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """0.7 GB, removed at once: pytest keeps the folders of three runs."""
    file = tmp_path_factory.mktemp("large") / "large.arrow"
    make(file.parent, ROWS).save(file)
    yield file
    file.unlink()


def test_a_rank_of_ten_million_rows_stays_under_300_mb(large: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scale", str(large), "20"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert found["own_memory_mb"] < 300


def test_a_batch_of_ten_million_rows_is_what_the_columns_say(large: Path) -> None:
    """Row r: file r % 100, class r % 1000, validation where r % 5 == 0."""
    manifest = Manifest.load(large)
    train = split_loader(manifest, ImageSpec(size_px=16, presize_px=16), "train", global_batch=64, threads=1)
    assert train.samples == ROWS * 4 // 5
    work = train.source.work(np.arange(123_456_789, 123_456_789 + 64))  # in the sixteenth epoch
    assert len(set(work.ids.tolist())) == 64
    assert (work.ids % 5 > 0).all()
    np.testing.assert_array_equal(work.targets, work.ids % 1000)
    assert [Path(path).name for path in work.paths] == [f"{i % 100:03}.jpg" for i in work.ids]
    assert work.ids.max() > ROWS // 2


def test_an_epoch_of_ten_million_is_a_permutation() -> None:
    plan, seen = Training(n=ROWS, global_batch=1 << 18, seed=3), np.zeros(ROWS, np.int8)
    for start in range(0, ROWS, 1 << 18):
        rows = plan.at(np.arange(start, min(start + (1 << 18), ROWS)) + 5 * ROWS)[1]
        seen[rows] += 1
    assert (seen == 1).all()
