"""Schedules against closed forms written out in numpy, and fastai's published group maxima."""

import math
from typing import Any

import numpy as np
import pytest

from trainer.errors import RecipeError
from trainer.schedule import OneCycle, Phase, cosine, fine_tune_phases, one_cycle_phases, spread


def closed_form(low: float, high: float, final: float, p: np.ndarray, pct_start: float) -> np.ndarray:
    """low -> high over pct_start, high -> final over the rest, in the sine-squared form of the cosine."""
    knots = np.interp(p, [0, pct_start, 1], [0, 1, 2])
    rising = low + (high - low) * np.sin(np.pi / 2 * knots) ** 2
    falling = final + (high - final) * np.sin(np.pi / 2 * knots) ** 2
    return np.where(knots < 1, rising, falling)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1441])
@pytest.mark.parametrize("pct_start", [0.25, 0.3, 0.99])
def test_lr_and_momentum_equal_the_closed_form_at_every_step(steps: int, pct_start: float) -> None:
    maxima = (1e-5, 1e-4, 3e-3)
    cycle = OneCycle(maxima, steps, div=5.0, pct_start=pct_start)
    lrs, momenta = zip(*(cycle.at(step) for step in range(steps)), strict=True)
    p = np.arange(steps) / steps
    for group, peak in enumerate(maxima):
        expected = closed_form(peak / 5, peak, peak / 1e5, p, pct_start)
        np.testing.assert_allclose([lr[group] for lr in lrs], expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(momenta, closed_form(0.95, 0.85, 0.95, p, pct_start), rtol=1e-12)


def test_the_ends_and_the_peak_of_a_cycle() -> None:
    cycle = OneCycle((3e-3,), 100)
    for step, lr, momentum in ((0, 3e-3 / 25, 0.95), (25, 3e-3, 0.85)):
        assert cycle.at(step)[0] == pytest.approx((lr,))
        assert cycle.at(step)[1] == pytest.approx(momentum)
    (last,), momentum = cycle.at(99)
    assert 3e-3 / 1e5 < last < 3e-3 / 1e3, "the last step comes just before the end, as in fastai"
    assert 0.949 < momentum < 0.95
    assert max(range(100), key=lambda step: cycle.at(step)[0]) == 25


@pytest.mark.parametrize(("pct_start", "first"), [(0.0, 3e-3), (1.0, 3e-3 / 25)])
def test_a_cycle_may_have_no_warm_up_or_nothing_else(pct_start: float, first: float) -> None:
    cycle = OneCycle((3e-3,), 10, pct_start=pct_start)
    lrs = [cycle.at(step)[0][0] for step in range(10)]
    assert lrs[0] == pytest.approx(first)
    assert lrs == sorted(lrs, reverse=pct_start == 0)


def test_cosine_passes_through_its_ends_and_middle() -> None:
    assert [cosine(2.0, 4.0, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([2, 3, 4])


@pytest.mark.parametrize(
    ("lr", "groups", "expected"),
    [
        (3e-3, 3, (3e-3, 3e-3, 3e-3)),
        (slice(3e-3), 3, (3e-4, 3e-4, 3e-3)),
        (slice(3e-3), 1, (3e-3,)),
        (slice(1e-6, 1e-4), 3, (1e-6, 1e-5, 1e-4)),
        (slice(1e-6, 1e-4), 1, (1e-4,)),
        ([1e-6, 1e-3], 4, (1e-6, 1e-5, 1e-4, 1e-3)),
        ((1e-4, 1e-2), 2, (1e-4, 1e-2)),
        (1, 2, (1.0, 1.0)),
        (np.float32(0.5), 1, (0.5,)),
    ],
)
def test_spread_follows_fastai_s_slice_rules(lr: Any, groups: int, expected: tuple[float, ...]) -> None:
    assert spread(lr, groups) == pytest.approx(expected)


@pytest.mark.parametrize(
    "lr",
    [
        *(0.0, -1e-3, math.nan, math.inf, True, None, "1e-3"),
        *(slice(None), slice(1e-4, None), slice(0.0, 1e-3), slice(1e-4, 1e-3, 2)),
        *([], [1e-3], [1e-4, 1e-3, 1e-2], [1e-4, -1.0], [[1e-4, 1e-3], 1e-3]),
    ],
)
def test_a_learning_rate_that_makes_no_sense_gets_a_sentence(lr: Any) -> None:
    with pytest.raises(RecipeError, match=r"lr=.*; (give|.*, or one number)|lr=.*: give"):
        spread(lr, 3)


def test_fine_tune_gives_fastai_s_group_maxima() -> None:
    frozen, unfrozen = fine_tune_phases(5, 3e-3)
    assert spread(frozen.lr, 3) == pytest.approx((3e-4, 3e-4, 3e-3), rel=1e-12)
    assert spread(unfrozen.lr, 3) == pytest.approx((1.5e-5, 1.5e-4, 1.5e-3), rel=1e-12)
    assert (frozen.epochs, frozen.freeze_to, frozen.div, frozen.pct_start) == (1, -1, 25.0, 0.99)
    assert (unfrozen.epochs, unfrozen.freeze_to, unfrozen.div, unfrozen.pct_start) == (5, 0, 5.0, 0.3)
    assert frozen.div_final == unfrozen.div_final == 1e5


def test_fine_tune_without_frozen_epochs_is_its_second_phase() -> None:
    assert fine_tune_phases(5, 3e-3, frozen_epochs=0) == fine_tune_phases(5, 3e-3)[1:]


def test_one_cycle_is_one_phase_over_all_layer_groups() -> None:
    assert one_cycle_phases(12, slice(1e-6, 1e-4), div=10.0) == (
        Phase("one_cycle", 12, 0, slice(1e-6, 1e-4), div=10.0, div_final=1e5, pct_start=0.25),
    )


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: one_cycle_phases(0, 1e-3), "epochs=0"),
        (lambda: one_cycle_phases(1.5, 1e-3), "epochs=1.5"),  # type: ignore[arg-type]
        (lambda: one_cycle_phases(1, -1e-3), "lr=-0.001"),
        (lambda: one_cycle_phases(1, 1e-3, div=0), "div=0"),
        (lambda: one_cycle_phases(1, 1e-3, div_final=-1), "div_final=-1"),
        (lambda: one_cycle_phases(1, 1e-3, pct_start=1.5), "pct_start=1.5"),
        (lambda: fine_tune_phases(0), "epochs=0"),
        (lambda: fine_tune_phases(1, frozen_epochs=-1), "frozen_epochs=-1"),
        (lambda: fine_tune_phases(1, lr_mult=0), "lr_mult=0"),
        (lambda: fine_tune_phases(1, [1e-5, 1e-3]), "with fine_tune"),
        (lambda: OneCycle((), 10), "no layer group"),
        (lambda: OneCycle((1e-3, 0.0), 10), "lr=0.0"),
        (lambda: OneCycle((1e-3,), 0), "steps=0"),
        (lambda: OneCycle((1e-3,), 10, momenta=(0.95, 1.0, 0.95)), "momenta="),
        (lambda: OneCycle((1e-3,), 10).at(10), "step=10"),
        (lambda: OneCycle((1e-3,), 10).at(-1), "step=-1"),
    ],
)
def test_a_recipe_that_makes_no_sense_gets_a_sentence(make: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make()
