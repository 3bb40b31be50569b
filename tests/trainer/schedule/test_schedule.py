"""Is every schedule fastai's at every step, and does every phase say what it is?"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from thawline.trainer.errors import RecipeError
from thawline.trainer.schedule.phases import (
    Find,
    Phase,
    constant_phases,
    doubts,
    fine_tune_phases,
    flat_cos_phases,
    length,
    one_cycle_phases,
)
from thawline.trainer.schedule.shapes import Constant, FlatCos, OneCycle, cosine, spread

# fastai's formulas, of shared/fastai.md, as they stand there -----------------------------------------------

Curve = Callable[[float], float]


def s(a: float, b: float, p: float) -> float:
    return b + (1 + math.cos(math.pi * p)) * (a - b) / 2


def one_cycle(lr: float, *, div: float = 25, div_final: float = 1e5, pct: float = 0.25) -> Curve:
    """Cosine lr/div -> lr over the first pct, cosine lr -> lr/div_final after."""
    return lambda p: s(lr / div, lr, p / pct) if p < pct else s(lr, lr / div_final, (p - pct) / (1 - pct))


def momentum(start: float = 0.95, middle: float = 0.85, end: float = 0.95, *, pct: float = 0.25) -> Curve:
    return lambda p: s(start, middle, p / pct) if p < pct else s(middle, end, (p - pct) / (1 - pct))


def flat_cos(lr: float, *, div_final: float = 1e5, pct: float = 0.75) -> Curve:
    """lr until pct, cosine lr -> lr/div_final after."""
    return lambda p: lr if p < pct else s(lr, lr / div_final, (p - pct) / (1 - pct))


def warmed(lr: float, after: Curve, *, warmup: float, div: float = 25) -> Curve:
    """A line through (0, lr/div) and (warmup, lr), then what comes after."""
    return lambda p: np.interp(p, [0, warmup], [lr / div, lr]).item() if p < warmup else after(p)


def flat(lr: float) -> Curve:
    return lambda p: lr


TABLE: dict[str, tuple[Phase, list[Curve], Curve | None]] = {
    # A phase, the curve of each layer group, and that of momentum; p = step / total steps.
    "one_cycle": (one_cycle_phases(1, 3e-3)[0], [one_cycle(3e-3)], momentum()),
    "one_cycle, 2 groups": (one_cycle_phases(1, 3e-3)[0], [one_cycle(3e-3)] * 2, momentum()),
    "one_cycle, slice(b)": (
        one_cycle_phases(1, slice(3e-3))[0],
        [one_cycle(3e-4), one_cycle(3e-4), one_cycle(3e-3)],
        momentum(),
    ),
    "one_cycle, slice(a, b)": (
        one_cycle_phases(1, slice(1e-6, 1e-4))[0],
        [one_cycle(1e-6), one_cycle(1e-5), one_cycle(1e-4)],
        momentum(),
    ),
    "one_cycle, a pair": (one_cycle_phases(1, [1e-6, 1e-4])[0], [one_cycle(1e-6), one_cycle(1e-4)], momentum()),
    "one_cycle, div, div_final": (
        one_cycle_phases(1, 1e-2, div=10, div_final=1e3)[0],
        [one_cycle(1e-2, div=10, div_final=1e3)],
        momentum(),
    ),
    "one_cycle, no division": (one_cycle_phases(1, 1.0, div=1, div_final=1)[0], [flat(1.0)], momentum()),
    "one_cycle, pct_start": (
        one_cycle_phases(1, 1e-2, pct_start=0.6)[0],
        [one_cycle(1e-2, pct=0.6)] * 3,
        momentum(pct=0.6),
    ),
    "one_cycle, no warm-up": (
        one_cycle_phases(1, 1e-2, pct_start=0.0)[0],
        [lambda p: s(1e-2, 1e-7, p)],
        lambda p: s(0.85, 0.95, p),
    ),
    "one_cycle, only warm-up": (
        one_cycle_phases(1, 1e-2, pct_start=1.0)[0],
        [lambda p: s(4e-4, 1e-2, p)],
        lambda p: s(0.95, 0.85, p),
    ),
    "one_cycle, momenta": (
        one_cycle_phases(1, 1e-2, momenta=(0.9, 0.5, 0.7))[0],
        [one_cycle(1e-2)],
        momentum(0.9, 0.5, 0.7),
    ),
    # fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=.99), then fit_one_cycle(epochs, slice(half / 100, half),
    # pct_start=.3, div=5) with half = base_lr / 2; the maxima of three groups are fastai.md's check values.
    "fine_tune, frozen": (
        fine_tune_phases(5, 3e-3)[0],
        [one_cycle(3e-4, pct=0.99), one_cycle(3e-4, pct=0.99), one_cycle(3e-3, pct=0.99)],
        momentum(pct=0.99),
    ),
    "fine_tune, unfrozen": (
        fine_tune_phases(5, 3e-3)[1],
        [one_cycle(lr, div=5, pct=0.3) for lr in (1.5e-5, 1.5e-4, 1.5e-3)],
        momentum(pct=0.3),
    ),
    "fine_tune, its default lr, one group": (
        fine_tune_phases(5)[1],
        [one_cycle(1e-3, div=5, pct=0.3)],
        momentum(pct=0.3),
    ),
    "fine_tune, options, two groups": (
        fine_tune_phases(5, 1e-2, lr_mult=50, pct_start=0.4, div=10, div_final=1e4, momenta=(0.9, 0.8, 0.9))[1],
        [one_cycle(lr, div=10, div_final=1e4, pct=0.4) for lr in (1e-4, 5e-3)],
        momentum(0.9, 0.8, 0.9, pct=0.4),
    ),
    "flat_cos": (flat_cos_phases(1, 3e-3)[0], [flat_cos(3e-3)], None),
    "flat_cos, slice, options": (
        flat_cos_phases(1, slice(1e-4, 1e-2), div_final=1e2, pct_start=0.5)[0],
        [flat_cos(lr, div_final=1e2, pct=0.5) for lr in (1e-4, 1e-3, 1e-2)],
        None,
    ),
    "flat_cos, nothing flat": (flat_cos_phases(1, 1e-2, pct_start=0.0)[0], [lambda p: s(1e-2, 1e-7, p)], None),
    "flat_cos, warm-up": (
        flat_cos_phases(1, slice(1e-2), warmup=0.1, div=20)[0],
        [warmed(lr, flat_cos(lr), warmup=0.1, div=20) for lr in (1e-3, 1e-2)],
        None,
    ),
    "flat_cos, warm-up to the fall": (
        flat_cos_phases(1, 1e-2, warmup=0.75)[0],
        [warmed(1e-2, flat_cos(1e-2), warmup=0.75)],
        None,
    ),
    "constant": (constant_phases(1, 1e-3)[0], [flat(1e-3)] * 3, None),
    "constant, warm-up": (
        constant_phases(1, [1e-3, 1e-1], warmup=0.3, div=4)[0],
        [warmed(lr, flat(lr), warmup=0.3, div=4) for lr in (1e-3, 1e-2, 1e-1)],
        None,
    ),
    "constant, only warm-up": (constant_phases(1, 1.0, warmup=1.0)[0], [lambda p: 0.04 + 0.96 * p], None),
    # What a Find comes to when the finder suggests 3e-3.
    "found": (one_cycle_phases(1, Find())[0], [one_cycle(3e-3)] * 2, momentum()),
    "found, frozen": (
        fine_tune_phases(5, Find())[0],
        [one_cycle(3e-4, pct=0.99), one_cycle(3e-3, pct=0.99)],
        momentum(pct=0.99),
    ),
    "found, unfrozen": (
        fine_tune_phases(5, Find())[1],
        [one_cycle(lr, div=5, pct=0.3) for lr in (1.5e-5, 1.5e-4, 1.5e-3)],
        momentum(pct=0.3),
    ),
    "found, a third of it": (flat_cos_phases(1, Find([1e-2 / 3, 1 / 3]))[0], [flat_cos(1e-5), flat_cos(1e-3)], None),
}


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1441])
@pytest.mark.parametrize("name", TABLE)
def test_every_step_is_fastai_s_formula(name: str, steps: int) -> None:
    phase, curves, momenta = TABLE[name]
    lr = phase.lr.of(3e-3) if isinstance(phase.lr, Find) else phase.lr
    schedule = phase.schedule(lr, groups=len(curves), steps=steps)
    told = [schedule.at(step) for step in range(steps)]
    p = [step / steps for step in range(steps)]
    np.testing.assert_allclose([lrs for lrs, _ in told], [[curve(x) for curve in curves] for x in p], rtol=1e-7)
    if momenta is None:
        assert {value for _, value in told} == {None}
    else:
        np.testing.assert_allclose([float(value or 0) for _, value in told], [momenta(x) for x in p], rtol=1e-7)


def test_the_ends_and_the_peak_of_a_cycle() -> None:
    cycle = OneCycle((3e-3,), 100)
    for step, lr, momentum in ((0, 3e-3 / 25, 0.95), (25, 3e-3, 0.85)):
        assert cycle.at(step)[0] == pytest.approx((lr,))
        assert cycle.at(step)[1] == pytest.approx(momentum)
    (last,), end = cycle.at(99)
    assert 3e-3 / 1e5 < last < 3e-3 / 1e3, "the last step comes just before the end, as in fastai"
    assert 0.949 < end < 0.95
    assert max(range(100), key=lambda step: cycle.at(step)[0]) == 25


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
    for make in (lambda: spread(lr, 3), lambda: Phase("x", 1, lr=lr), lambda: Find(lr)):
        with pytest.raises(RecipeError, match=r"lr=.*; (give|.*, or one number)|lr=.*: give"):
            make()


# Recipes and their phases ----------------------------------------------------------------------------------


def test_fine_tune_is_the_head_and_then_everything() -> None:
    frozen, unfrozen = fine_tune_phases(5, 3e-3)
    assert (frozen.name, frozen.epochs, frozen.freeze_to) == ("frozen", 1, -1)
    assert (unfrozen.name, unfrozen.epochs, unfrozen.freeze_to) == ("unfrozen", 5, 0)
    assert fine_tune_phases(5, 3e-3, frozen_epochs=0) == (unfrozen,)
    frozen, unfrozen = fine_tune_phases(2.5, 3e-3, frozen_epochs=0.5)
    assert (frozen.epochs, unfrozen.epochs) == (0.5, 2.5)


def test_fine_tune_searches_once_and_in_its_first_phase() -> None:
    frozen, unfrozen = fine_tune_phases(5, Find())
    assert (frozen.lr, unfrozen.lr) == (Find(slice(1.0)), Find(slice(0.005, 0.5), search=False))
    (alone,) = fine_tune_phases(5, Find(), frozen_epochs=0)
    assert alone.lr == Find(slice(0.005, 0.5), search=True)
    (alone,) = fine_tune_phases(5, Find(2.0, search=False), frozen_epochs=0, lr_mult=10)
    assert alone.lr == Find(slice(0.1, 1.0), search=False)


@pytest.mark.parametrize(
    ("rate", "lr"),
    [
        (1.0, 2e-3),
        (0.5, 1e-3),
        (slice(1.0), slice(2e-3)),
        (slice(0.005, 0.5), slice(1e-5, 1e-3)),
        ((0.1, 1), [2e-4, 2e-3]),
    ],
)
def test_a_find_is_in_units_of_the_suggestion(rate: Any, lr: Any) -> None:
    assert spread(Find(rate).of(2e-3), 3) == pytest.approx(spread(lr, 3))


def test_the_other_recipes_are_one_phase_over_all_layer_groups() -> None:
    lr = slice(1e-6, 1e-4)
    cycle = Phase("one_cycle", 12, lr=lr, shape="one_cycle", div=10.0, div_final=1e5, pct_start=0.25)
    assert one_cycle_phases(12, lr, div=10.0) == (cycle,)
    assert flat_cos_phases(0.5, lr) == (Phase("flat_cos", 0.5, lr=lr, shape="flat_cos", pct_start=0.75),)
    assert constant_phases(3, lr) == (Phase("constant", 3, lr=lr, shape="constant"),)


@pytest.mark.parametrize(("shape", "pct_start"), [("one_cycle", 0.25), ("flat_cos", 0.75)])
def test_a_phase_without_pct_start_has_that_of_its_shape(shape: Any, pct_start: float) -> None:
    phase = Phase("x", 1, shape=shape)
    given = replace(phase, pct_start=pct_start).schedule(1e-3, groups=2, steps=9)
    assert phase.schedule(1e-3, groups=2, steps=9) == given


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"steps": 7}, 7),
        *(({"samples": samples}, steps) for samples, steps in ((1, 1), (16, 1), (17, 2), (160, 10), (161, 11))),
        *(({"epochs": epochs}, 100 * epochs) for epochs in (0.5, 1, 2.25)),
    ],
)
def test_the_length_of_a_phase_in_steps(given: dict[str, Any], steps: int) -> None:
    assert length(Phase("x", **given), epoch_steps=lambda epochs: round(100 * epochs), global_batch=16) == steps


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: one_cycle_phases(0, 1e-3), r"phase 'one_cycle' has no epochs.*: .*exactly one of the three"),
        (lambda: one_cycle_phases(-0.5, 1e-3), r"epochs=-0\.5"),
        (lambda: one_cycle_phases(math.nan, 1e-3), "epochs=nan"),
        (lambda: flat_cos_phases(math.inf), "epochs=inf"),
        (lambda: constant_phases(True), "epochs=True"),
        (lambda: Phase("x"), r"phase 'x' has no epochs"),
        (lambda: Phase("x", 1, steps=5), r"phase 'x' has epochs=1 and steps=5: .*exactly one"),
        (lambda: Phase("x", 1, 2, 3), r"epochs=1 and steps=2 and samples=3"),
        (lambda: Phase("x", steps=1.5), r"steps=1\.5"),  # type: ignore[arg-type]
        (lambda: Phase("x", samples=-1), "samples=-1"),
        (lambda: Phase("x", 1, freeze_to="head"), "freeze_to='head'"),  # type: ignore[arg-type]
        (lambda: Phase("x", 1, shape="cosine"), r"'cosine'.*one_cycle, flat_cos, step"),  # type: ignore[arg-type]
        (lambda: Phase("x", 1, warmup=0.1), r"warmup=0\.1 with one_cycle"),
        (lambda: one_cycle_phases(1, -1e-3), r"lr=-0\.001"),
        (lambda: one_cycle_phases(1, 1e-3, div=0), "div=0"),
        (lambda: one_cycle_phases(1, 1e-3, div_final=-1), "div_final=-1"),
        (lambda: one_cycle_phases(1, 1e-3, pct_start=1.5), r"pct_start=1\.5"),
        (lambda: one_cycle_phases(1, 1e-3, momenta=(0.95, 1.0, 0.95)), "momenta="),
        (lambda: flat_cos_phases(1, pct_start=0.5, warmup=0.6), r"warmup=0\.6 is more than pct_start=0\.5"),
        (lambda: flat_cos_phases(1, warmup=-0.1), r"warmup=-0\.1"),
        (lambda: flat_cos_phases(1, div_final=0), "div_final=0"),
        (lambda: constant_phases(1, warmup=1.1), r"warmup=1\.1"),
        (lambda: constant_phases(1, warmup=0.1, div=-4), "div=-4"),
        (lambda: fine_tune_phases(0), r"phase 'unfrozen' has no epochs"),
        (lambda: fine_tune_phases(1, frozen_epochs=-1), r"frozen_epochs=-1 .*or 0 to leave"),
        (lambda: fine_tune_phases(1, lr_mult=0), "lr_mult=0"),
        (lambda: fine_tune_phases(1, [1e-5, 1e-3]), "with fine_tune"),  # type: ignore[arg-type]
        (lambda: fine_tune_phases(1, Find(slice(1e-2, 1.0))), "with fine_tune"),
        (lambda: OneCycle((), 10), "no layer group"),
        (lambda: OneCycle((1e-3, 0.0), 10), r"lr=0\.0"),
        (lambda: FlatCos((1e-3,), 0), "steps=0"),
        (lambda: Constant((), 10), "no layer group"),
        *(
            (lambda kind=kind: kind((1e-3,), 10).at(10), "step=10 lies outside")
            for kind in (OneCycle, FlatCos, Constant)
        ),
        (lambda: OneCycle((1e-3,), 10).at(-1), "step=-1"),
    ],
)
def test_a_recipe_that_makes_no_sense_gets_a_sentence(make: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make()


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        (one_cycle_phases(5), "5 epoch(s) come to 10 steps of 64 images"),
        (fine_tune_phases(5, frozen_epochs=0.5), "5.5 epoch(s) come to 11 steps of 64 images"),
        (one_cycle_phases(10), ""),
        ((Phase("short", steps=3),), ""),  # who counts steps knows how many they are
    ],
)
def test_epochs_that_are_few_steps_are_told_with_their_number(phases: tuple[Phase, ...], said: str) -> None:
    told = doubts(phases, epoch_steps=lambda epochs: round(2 * epochs), global_batch=64, pretrained=True)
    assert [sentence.partition(", and")[0] for sentence in told] == ([said] if said else [])


@pytest.mark.parametrize(
    ("phases", "pretrained", "said"),
    [
        (fine_tune_phases(9), False, True),
        ((Phase("mine", 9, freeze_to=1),), False, True),
        (fine_tune_phases(9), True, False),
        (fine_tune_phases(9, frozen_epochs=0), False, False),
    ],
)
def test_a_frozen_body_that_was_never_trained_is_told(phases: tuple[Phase, ...], pretrained: bool, said: bool) -> None:
    told = doubts(phases, epoch_steps=lambda epochs: round(9 * epochs), global_batch=64, pretrained=pretrained)
    assert [sentence.partition(":")[0] for sentence in told] == [
        f"phase {phases[0].name!r} freezes a body of random weights"
    ] * said


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_body_that_neither_was_nor_will_be_trained_is_told(pretrained: bool) -> None:
    told = doubts(
        one_cycle_phases(9),
        epoch_steps=lambda epochs: round(9 * epochs),
        global_batch=64,
        pretrained=pretrained,
        fixed=True,
    )
    assert [sentence.partition(":")[0] for sentence in told] == ["LoRA leaves a body of random weights as it is"] * (
        not pretrained
    )
