"""When checkpoints are due once a machine's end is announced: at once, and again while there is just time."""

from pathlib import Path

import pytest
import torch

from thawline.trainer.checkpoints.keeper import Keeper
from thawline.trainer.context import LocalContext

PARTS = {"state": {"x": torch.zeros(1)}}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A wall clock that tests set."""
    clock = [1000.0]
    monkeypatch.setattr("thawline.trainer.checkpoints.keeper.time.time", lambda: clock[0])
    return clock


def kept(folder: Path, *, rank: int = 0, every_s: float = 3600.0) -> Keeper:
    return Keeper(LocalContext(run_dir=folder, rank=rank), every_s=every_s, keep=3, best=None)


def test_a_warning_makes_one_due_at_once_and_one_just_in_time(tmp_path: Path, now: list[float]) -> None:
    keep = kept(tmp_path)
    due = []
    for second in range(120):
        now[0] = 1000.0 + second
        keep.warn(1100.0 if second >= 10 else None, window_s=4.0)
        if keep.due():
            due.append(second)
            keep.save(second, PARTS, {})
            keep.finished(all_of_them=True)
    keep.close()
    # Two windows of 4 s, a write of milliseconds and a margin of 2 s before the end at 100.
    assert due == [10, 90]


def test_another_warning_begins_anew_and_only_the_first_rank_writes(tmp_path: Path, now: list[float]) -> None:
    keep, other = kept(tmp_path), kept(tmp_path, rank=1)
    for each in (keep, other):
        each.warn(1100.0, window_s=1.0)
    assert (keep.due(), other.due()) == (True, False)
    keep.save(1, PARTS, {})
    assert not keep.due()
    keep.warn(1050.0, window_s=1.0)
    assert keep.due()
    keep.close()


def test_one_stays_due_until_it_is_saved_however_often_one_asks(tmp_path: Path, now: list[float]) -> None:
    keep = kept(tmp_path)
    for step, taken_at in enumerate((1100.0, 1000.5)):  # announced, and then just in time
        keep.warn(taken_at, window_s=1.0)
        assert [keep.due() for _ in range(3)] == [True, True, True]
        keep.save(step, PARTS, {})
        assert not keep.due()
    keep.close()


def test_a_slow_write_is_given_its_time(tmp_path: Path, now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    keep = kept(tmp_path)
    keep._slowest_s = 20.0
    keep.warn(1100.0, window_s=1.0)
    assert keep.due()
    keep.save(1, PARTS, {})
    now[0] = 1065.0
    keep.warn(1100.0, window_s=1.0)
    assert not keep.due()
    now[0] = 1066.5
    keep.warn(1100.0, window_s=1.0)
    assert keep.due()
    keep.close()
