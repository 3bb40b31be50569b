"""A logging window against plain arithmetic, for one process; test_ranks has several."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from thawline.trainer.step.busy import Busy
from thawline.trainer.step.guard import Guard
from thawline.trainer.step.window import Reading, Window, extend_hash

CPU = torch.device("cpu")
IDS = [[5, 3, 300], [2**40, 0, 7]]


def close(window: Window, *, stop: bool = False) -> Reading:
    return window.close(guard=Guard(nn.Identity(), CPU), busy=Busy(CPU), stop=stop)


def test_the_hash_chains_each_step_s_ids_onto_the_digest_before_it() -> None:
    digest, expected = "", b""
    for step in IDS:
        digest = extend_hash(digest, np.array(step, np.int64))
        expected = hashlib.sha256(expected + b"".join(i.to_bytes(8, "little") for i in step)).digest()
    assert digest == expected.hex()


def test_the_hash_tells_orders_steps_and_byte_orders_apart() -> None:
    flat = np.array(IDS[0] + IDS[1], np.int64)
    whole = extend_hash("", flat)
    chained = extend_hash(extend_hash("", flat[:3]), flat[3:])
    swapped = extend_hash("", flat[::-1])
    assert len({whole, chained, swapped}) == 3
    assert extend_hash("", flat.astype(">i8")) == whole


def test_the_loss_is_the_mean_over_samples_summed_in_float64() -> None:
    window = Window()
    parts = [torch.full((1000,), 1e7), torch.full((1000,), 0.125)]  # in float32 the small ones would be lost
    for part in parts:
        window.add(ids=torch.arange(1000), losses=part, data_wait_s=0.0)
    reading = close(window)
    assert reading.loss == (1e10 + 125) / 2000
    assert (reading.steps, reading.images) == (2, 2000)


def test_a_window_gives_back_ids_in_stream_order_the_waits_and_the_wishes() -> None:
    window = Window()
    for ids, wait in zip(IDS, (0.25, 0.5), strict=True):
        window.add(ids=torch.tensor(ids), losses=torch.ones(3), data_wait_s=wait)
    assert len(window) == 2
    reading = close(window, stop=True)
    assert [list(ids) for ids in reading.ids] == IDS
    assert {ids.dtype for ids in reading.ids} == {np.dtype(np.int64)}
    assert (reading.data_wait_s, reading.stop) == (0.75, True)


def test_closing_starts_over() -> None:
    window = Window()
    window.add(ids=torch.tensor([1]), losses=torch.tensor([9.0]), data_wait_s=1.0)
    close(window)
    assert len(window) == 0
    window.add(ids=torch.tensor([2]), losses=torch.tensor([4.0]), data_wait_s=0.0)
    reading = close(window)
    assert (reading.loss, reading.data_wait_s, [list(i) for i in reading.ids]) == (4.0, 0.0, [[2]])
    assert not reading.stop


def test_time_runs_from_the_last_close_or_from_when_the_clock_was_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("thawline.trainer.step.window.time", SimpleNamespace(perf_counter=lambda: now))
    window = Window(began=now)

    def window_s() -> float:
        window.add(ids=torch.tensor([1]), losses=torch.ones(1), data_wait_s=0.0)
        return close(window).window_s

    now = 103.0
    assert window_s() == 3.0
    now = 108.0
    assert window_s() == 5.0
    now = 120.0
    window.restart_clock()
    now = 121.0
    assert window_s() == 1.0


def test_nothing_is_read_from_the_device_before_the_close() -> None:
    """The meta device has no values: whatever reads one, raises."""
    window = Window()
    for _ in range(3):
        window.add(ids=torch.tensor([1, 2]), losses=torch.ones(2, device="meta"), data_wait_s=0.0)
    assert isinstance(window.loss_sum, torch.Tensor)
    assert window.loss_sum.dtype == torch.float32
    assert all(isinstance(ids, torch.Tensor) for ids in window.ids)
    with pytest.raises(RuntimeError, match="meta"):
        close(window)
