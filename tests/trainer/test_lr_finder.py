"""The lr finder: the sweep, and its four readings of ten recorded curves, against plain definitions."""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.kit.curves import bowl
from tests.kit.toy import learner, loaders, same, snapshot
from thawline.cluster.job.flags import override
from thawline.cluster.job.job import Job
from thawline.trainer.errors import RecipeError
from thawline.trainer.lr_finder import FEWEST, LrCurve, lr_find, read

# scikit-learn's digits by a ResNet-18, a small CNN and two linear layers, under several optimisers: what
# Learner.rehearse gave to lr_find, to six digits.
CURVES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("curves.json").read_text())
each_curve = pytest.mark.parametrize("curve", CURVES, ids=[curve["name"] for curve in CURVES])


class ThreeGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    def groups(self) -> list[list[nn.Module]]:
        return [[layer] for layer in self.layers]


class Replay:
    """A learner whose losses are known beforehand; keeps what it was asked for."""

    def __init__(self, losses: Sequence[float]) -> None:
        self.model = ThreeGroups()
        self.losses = losses
        self.lrs: list[Sequence[float]] = []
        self.freeze_to: int | None = 99

    def rehearse(
        self,
        lrs: Callable[[int], Sequence[float]],
        *,
        stop: Callable[[float], bool],
        steps: int,
        freeze_to: int | None = None,
    ) -> list[float]:
        self.freeze_to = freeze_to
        for step in range(steps):
            self.lrs.append(lrs(step))
            if stop(self.losses[step]):
                break
        return list(self.losses[: len(self.lrs)])


# The definitions, by brute force ---------------------------------------------------------------------------


def mean_so_far(losses: Sequence[float]) -> list[float]:
    """The weighted mean of everything so far, a step back weighing .98 of the one after it."""
    means = []
    for n in range(1, len(losses) + 1):
        weights = 0.98 ** np.arange(n)[::-1]
        means.append(float((weights * losses[:n]).sum() / weights.sum()))
    return means


def falling(losses: Sequence[float], after: int = -1) -> Iterator[tuple[int, ...]]:
    """The indices of every strictly falling subsequence that goes on behind `after`."""
    for i in range(after + 1, len(losses)):
        if after < 0 or losses[i] < losses[after]:
            yield (i,)
            yield from ((i, *rest) for rest in falling(losses, i))


def valley_of(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """By patience sorting: how long the longest fall that ends at each step is, and the first of the longest."""
    piles: list[float] = []
    lengths = []
    for loss in losses:
        place = bisect_left(piles, -loss)  # a strict fall: an equal loss goes on the same pile
        piles[place : place + 1] = [-loss]
        lengths.append(place + 1)
    length = max(lengths)
    return lrs[lengths.index(length) - length + length // 3 + length // 6]


def steep_of(lrs: Sequence[float], losses: Sequence[float]) -> float:
    slopes = [(losses[i + 1] - losses[i]) / (math.log(lrs[i + 1]) - math.log(lrs[i])) for i in range(len(losses) - 1)]
    return lrs[slopes.index(min(slopes))]


def minimum_of(lrs: Sequence[float], losses: Sequence[float]) -> float:
    return min(zip(losses, lrs, strict=True))[1] / 10


def slide_of(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """fastai's loop in words: both ends go left together while their slopes are more than .005 apart."""
    n = len(losses)
    inner = [(losses[i + 1] - losses[i - 1]) / 2 for i in range(1, n - 1)]
    slopes = [losses[1] - losses[0], *inner, losses[-1] - losses[-2]]
    right, left = n - 1, n - 16
    found = lrs[left]
    while left >= 0 and abs(slopes[right] - slopes[left]) > 0.005:
        found = lrs[left]
        right, left = right - 1, left - 1
    return found


DEFINITIONS = {"valley": valley_of, "steep": steep_of, "minimum": minimum_of, "slide": slide_of}


# Recorded curves -------------------------------------------------------------------------------------------


def test_the_recorded_curves_are_ten_and_differ() -> None:
    assert len({tuple(curve["losses"]) for curve in CURVES}) == len(CURVES) == 10
    lengths = [(len(curve["losses"]), curve["steps"]) for curve in CURVES]
    assert any(taken < steps for taken, steps in lengths), "one diverged"
    assert any(taken == steps for taken, steps in lengths), "one did not"


@each_curve
def test_the_sweep_of_a_recorded_curve_is_the_formulas(curve: dict[str, Any]) -> None:
    start, end, steps, losses = (curve[name] for name in ("start", "end", "steps", "losses"))
    learn = Replay([*losses, *[losses[-1]] * (steps - len(losses))])
    found = lr_find(learn, start=start, end=end, steps=steps)
    assert len(learn.lrs) == len(losses), "stops where it stopped when it was recorded"
    swept = [start * (end / start) ** (i / steps) for i in range(len(losses))]
    np.testing.assert_allclose(learn.lrs, np.array(swept)[:, None].repeat(3, axis=1), rtol=1e-12)
    smoothed = mean_so_far(losses)
    kept = range(steps // 10, len(losses) - 5)
    np.testing.assert_allclose(found.lrs, [swept[i] for i in kept], rtol=1e-12)
    np.testing.assert_allclose(found.losses, [smoothed[i] for i in kept], rtol=1e-12)
    assert found.raw == tuple(losses[i] for i in kept)


@each_curve
@pytest.mark.parametrize("name", DEFINITIONS)
def test_suggestions_on_a_recorded_curve_are_the_definitions(curve: dict[str, Any], name: str) -> None:
    found = read(curve["losses"], **{key: curve[key] for key in ("start", "end", "steps")})
    expected = DEFINITIONS[name](found.lrs, found.losses)
    assert getattr(found, name) == expected
    assert found.suggestions()[name] == expected


def test_the_four_readings_tell_the_curves_apart() -> None:
    """Otherwise a reading that always took the same point might pass."""
    keys = ("start", "end", "steps")
    found = [read(curve["losses"], **{key: curve[key] for key in keys}).suggestions() for curve in CURVES]
    for name in DEFINITIONS:
        assert len({suggestions[name] for suggestions in found}) >= 6
    assert all(len(set(suggestions.values())) >= 3 for suggestions in found)


# Made-up curves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_suggestions_on_curves_full_of_ties_are_the_definitions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    losses = (9.0, *draw.integers(0, 8, size=19).astype(float))
    found = LrCurve(tuple(1e-4 * 1.5**i for i in range(20)), losses, losses)
    every = list(falling(losses))
    length = max(map(len, every))
    end = min(indices[-1] for indices in every if len(indices) == length)
    assert found.valley == found.lrs[end - length + length // 3 + length // 6]
    for name, definition in DEFINITIONS.items():
        assert getattr(found, name) == definition(found.lrs, losses)


def test_slide_stops_at_the_first_calm_window_and_not_at_the_edge_of_the_curve() -> None:
    """A fall, a calm bottom, a rise; and a curve that is nowhere calm, where the window ends at the left edge."""
    lrs = tuple(1e-4 * 1.2**i for i in range(60))
    bowl = tuple(2 - 0.04 * min(i, 20) + 0.1 * max(0, i - 50) for i in range(60))
    assert LrCurve(lrs, bowl, bowl).slide == slide_of(lrs, bowl) == lrs[35]
    bent = tuple(0.02 * (i - 30.0) ** 2 for i in range(60))
    assert LrCurve(lrs, bent, bent).slide == slide_of(lrs, bent) == lrs[0]
    calm = tuple(2 - 0.001 * i for i in range(60))
    assert LrCurve(lrs, calm, calm).slide == slide_of(lrs, calm) == lrs[44]


@pytest.mark.parametrize(
    ("lr", "ratios"),
    [
        (1.0, (1, 1, 1)),
        (slice(1.0), (0.1, 0.1, 1)),
        (slice(0.005, 0.5), (0.005, 0.05, 0.5)),
        ([0.01, 1], (0.01, 0.1, 1)),
    ],
)
def test_groups_keep_their_ratios_and_what_is_found_is_in_units_of_them(lr: Any, ratios: tuple[float, ...]) -> None:
    learn = Replay(bowl())
    found = lr_find(learn, start=1e-6, end=1.0, lr=lr, freeze_to=-1)
    swept = [1e-6 * 1e6 ** (i / 100) for i in range(100)]
    np.testing.assert_allclose(learn.lrs, [[lr * ratio for ratio in ratios] for lr in swept], rtol=1e-12)
    np.testing.assert_allclose(found.lrs, swept[10:95], rtol=1e-12)
    assert learn.freeze_to == -1


def test_freezing_is_left_as_it_is_unless_given() -> None:
    learn = Replay(bowl())
    lr_find(learn)
    assert learn.freeze_to is None


@pytest.mark.parametrize("spike", [60.0, 1e6, math.nan, math.inf])
def test_the_sweep_ends_where_the_mean_is_four_times_the_best_or_no_number(spike: float) -> None:
    losses = [2.0 - 0.02 * i for i in range(60)] + [spike] * 40
    means = mean_so_far(losses[:60])
    best, count = min(means), 60
    while means[-1] <= 4 * best:  # false of nan, too
        count += 1
        means = mean_so_far(losses[:count])
        best = min(best, means[-1])
    learn = Replay(losses)
    found = lr_find(learn)
    assert len(learn.lrs) == count
    assert len(found.lrs) == count - 15
    assert all(math.isfinite(loss) for loss in found.raw[: 60 - 10 - 5])


def test_the_fewest_steps_give_a_curve_and_fewer_are_refused() -> None:
    learn = Replay(bowl(FEWEST))
    assert len(lr_find(learn, steps=FEWEST).lrs) == 16
    with pytest.raises(RecipeError, match=rf"steps={FEWEST - 1} .* give steps >= {FEWEST}"):
        lr_find(learn, steps=FEWEST - 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"start": 1.0, "end": 0.1}, r"start=1\.0 is not below end=0\.1"),
        ({"start": 0.0}, r"start=0\.0 is not a positive"),
        ({"end": math.nan}, r"end=nan is not a positive"),
        ({"lr": -1.0}, r"lr=-1\.0 is not a positive"),
    ],
)
def test_a_sweep_that_cannot_be_gets_a_sentence_before_any_step(options: dict[str, Any], told: str) -> None:
    learn = Replay(bowl())
    with pytest.raises(RecipeError, match=told):
        lr_find(learn, **options)
    assert not learn.lrs


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([math.nan] * 100, "only 0 steps are left"),
        ([2.0] * 29 + [1e9] * 71, r"only 15 steps are left"),
        ([2.0] * 100, r"never falls between lr 6\.3e-07 and .* \(it begins at 2\)"),
        ([2.0 + 0.01 * i for i in range(100)], "never falls"),
    ],
)
def test_a_curve_that_tells_nothing_gets_a_sentence(losses: list[float], told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        lr_find(Replay(losses))
    advised = re.findall(r"(--[a-z.-]+)(?: ([0-9e-]+))?", str(caught.value))
    assert advised, "what to do next"
    for flag, value in advised:
        assert override(Job(), [flag, value or "128"]) != Job(), "what the command takes"


def test_a_fall_of_two_steps_is_none() -> None:
    """fastai's valley would take the last rate of all there: its index comes out as -1."""
    losses = (1.0, 0.9, *[1.0] * 18)
    with pytest.raises(RecipeError, match="never falls"):
        LrCurve(tuple(1e-4 * 1.5**i for i in range(20)), losses, losses)


def test_a_search_leaves_a_learner_as_it_was_and_finds_the_same_again() -> None:
    options: dict[str, Any] = {"start": 1e-4, "end": 3.0, "steps": 60}
    searched, plain = (learner(data=loaders(train=60, global_batch=12)) for _ in range(2))
    for learn in (searched, plain):
        learn.fit_one_cycle(1, 1e-3)
    before = snapshot(searched.model)
    found = [lr_find(searched, lr=slice(0.1, 1.0), **options) for _ in range(2)]
    assert found[0] == found[1]
    assert same(snapshot(searched.model), before)
    for learn in (searched, plain):
        learn.fit_one_cycle(1, found[0].valley)
    assert same(snapshot(searched.model), snapshot(plain.model))
    assert not same(snapshot(searched.model), before)


# What is shown ---------------------------------------------------------------------------------------------


def test_the_plot_marks_the_four_suggestions_on_the_smoothed_curve() -> None:
    found = lr_find(Replay(bowl()))
    (axes,) = found.plot().axes
    assert axes.get_xscale() == "log"
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    table = found.table()
    assert table.column_names == ["lr", "loss", "raw"]
    np.testing.assert_array_equal(lines["loss, smoothed"].get_xdata(), table["lr"].to_numpy())
    np.testing.assert_array_equal(lines["loss, smoothed"].get_ydata(), table["loss"].to_numpy())
    np.testing.assert_array_equal(lines["loss, as recorded"].get_ydata(), found.raw)
    for name, value in found.suggestions().items():
        mark = lines[f"{name} {value:.2g}"]
        assert mark.get_xdata() == [value]
        ((height,),) = (np.asarray(mark.get_ydata()),)
        assert height == pytest.approx(np.interp(math.log(value), np.log(found.lrs), found.losses))
