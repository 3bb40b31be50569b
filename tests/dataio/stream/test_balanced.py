"""Do rare classes come as often as was asked, each of their samples as often as any other, wherever one begins?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kit.manifests import pictures, unlooked
from thawline.dataio.errors import SplitError
from thawline.dataio.hashing import hash64
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream import balanced as module
from thawline.dataio.stream.balanced import WINDOW, Balanced, balanced
from thawline.dataio.stream.loader import loaders
from thawline.dataio.stream.plan import FAR, Training, permute
from thawline.dataio.table.splits import by_function, split

SIZES = {
    "one in a hundred": [500, 5],
    "a class of nobody": [40, 0, 3, 1],
    "ten": [178, 182, 177, 183, 181, 182, 181, 179, 174, 180],
    "tiny shares": [60_000, 25_000, 9, 7, 1],
    "many": [1 + 37 * i % 211 for i in range(400)],
}
VECTORS = [(name, power) for name in SIZES for power in (0.0, 0.3, 0.5, 1.0)]


def order(sizes: list[int], power: float, *, seed: int = 3, **shape: Any) -> tuple[Balanced, NDArray[np.int64]]:
    """The order, and each sample's class: samples of all classes lie mixed."""
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    shape = {"n": len(classes), "global_batch": 50, **shape}
    return balanced(classes, power=power, count=len(sizes), seed=seed, **shape), classes


def wanted(sizes: list[int], power: float) -> NDArray[np.float64]:
    """Shares in proportion to m (1 / m)^power."""
    weights = np.array([m * (1 / m) ** power if m else 0.0 for m in sizes])
    return weights / weights.sum()


@pytest.mark.parametrize(("name", "power"), VECTORS)
def test_every_window_of_a_thousand_is_within_one_of_the_shares(name: str, power: float) -> None:
    plan, classes = order(SIZES[name], power)
    shares, windows = wanted(SIZES[name], power), 40
    np.testing.assert_allclose(plan.shares(), shares, atol=1e-9)
    for first in (0, 10**6):  # windows from the beginning of the stream
        kinds = classes[plan.at(first * WINDOW + np.arange(windows * WINDOW))[1]].reshape(windows, WINDOW)
        counts = np.stack([np.bincount(row, minlength=len(shares)) for row in kinds])
        assert np.abs(counts - WINDOW * shares).max() < 1 + 1e-6
        assert np.abs(counts.mean(0) - WINDOW * shares).max() < 0.2
        flat = kinds.ravel()
        for kind in range(min(len(shares), 10)):  # windows that begin anywhere lie across two turns of the circle
            before = np.concatenate([[0], np.cumsum(flat == kind)])
            seen = before[WINDOW:] - before[:-WINDOW]
            assert np.abs(seen - WINDOW * shares[kind]).max() < 1.383


def test_the_smallest_share_has_its_turn() -> None:
    plan, classes = order(SIZES["tiny shares"], 0.0)
    windows = 100 * len(classes) // WINDOW  # a hundred epochs: every sample some hundred times
    times = np.diff(module._before(plan.bounds, np.full(6, windows)))
    assert np.abs(times - WINDOW * windows * wanted(SIZES["tiny shares"], 0.0)).max() < 20
    assert times[-1] in (98, 99, 100, 101, 102)


@pytest.mark.parametrize(("name", "power"), [("one in a hundred", 1.0), ("a class of nobody", 0.5), ("many", 0.7)])
def test_it_is_what_plain_arithmetic_says(name: str, power: float) -> None:
    """Position by position, with a counter for each class, in Python's integers."""
    plan, classes = order(SIZES[name], power, seed=11)
    members = [np.flatnonzero(classes == kind) for kind in range(len(SIZES[name]))]
    ends = [*np.cumsum(wanted(SIZES[name], power))[:-1], 1.0]
    places = permute(np.arange(1000), n=1000, seed=11, epoch=np.full(1000, -1)).tolist()
    counters, expected = [0] * len(members), []
    for position in range(1600):
        window, place = divmod(position, 1000)
        point = (window * 6_408_327 + places[place] * 2**24) % (1000 * 2**24)
        kind = next(k for k, end in enumerate(ends) if point < round(end * 1000 * 2**24))
        turn, index = divmod(counters[kind], len(members[kind]))
        counters[kind] += 1
        key = int(hash64(11, kind).view(np.int64))
        chosen = permute(np.array([index]), n=len(members[kind]), seed=key, epoch=np.array([turn]))[0]
        expected.append((turn, members[kind][chosen]))
    epochs, rows = plan.at(np.arange(1600))
    assert list(zip(epochs, rows, strict=True)) == expected
    asked = np.random.default_rng(1).permutation(1600)[:200]
    epochs, rows = plan.at(asked)
    assert list(zip(epochs, rows, strict=True)) == [expected[i] for i in asked]


def test_every_sample_of_a_class_comes_before_any_comes_again() -> None:
    plan, classes = order(SIZES["ten"][:4], 1.0)
    epochs, rows = plan.at(np.arange(5000))
    for kind, size in enumerate(SIZES["ten"][:4]):
        own, turns = rows[classes[rows] == kind], epochs[classes[rows] == kind]
        for turn in range(len(own) // size):
            np.testing.assert_array_equal(np.sort(own[turns == turn]), np.flatnonzero(classes == kind))


@pytest.mark.parametrize("window", [0, 1, 999, 2**24 - 1, 2**24, 2**25 + 12_345])
def test_what_came_before_is_counted_exactly(window: int) -> None:
    bounds = np.array([0, 1, 5 * 2**24, 7 * 2**24 + 9_000_001, 1000 * 2**24])
    near = max(0, window - 2000)
    counts = [module._before(bounds, np.full(5, at)) for at in (near, window)]
    points = (np.arange(near, window)[:, None] * 6_408_327 + np.arange(1000) * 2**24) % (1000 * 2**24)
    np.testing.assert_array_equal(counts[1] - counts[0], [(points < bound).sum() for bound in bounds.tolist()])


def test_a_hole_is_filled_from_its_own_class_and_at_last_from_any() -> None:
    plan, classes = order([30, 1], 1.0)
    positions = np.arange(200)
    kinds = classes[plan.at(positions)[1]]
    for attempt in (1, 10):
        epochs, rows = plan.at(positions, attempt)
        np.testing.assert_array_equal(classes[rows], kinds)
        assert (epochs >= attempt * FAR).all()
    others = Training(n=31, global_batch=50, seed=3).at(positions, 11)
    np.testing.assert_array_equal(plan.at(positions, 11), others)


# Loaders ---------------------------------------------------------------------------------------------------


def test_loaders_balance_training_alone_and_alike_in_any_world(tmp_path: Path) -> None:
    table = pictures(tmp_path, 24)  # 12 of each, of which training gets 2 dogs
    manifest = split(table, by_function(lambda row: row["label"] == "dog" and row["path"] > "dog/04"))
    options: dict[str, Any] = {"global_batch": 10, "engine": "reference", "seed": 7}
    spec = ImageSpec(size_px=8, presize_px=8)

    def ids(balance: float, world_size: int, first: int = 0) -> list[list[int]]:
        ranks = [loaders(manifest, spec, balance=balance, world_size=world_size, rank=r, **options)[0].stream(first)
                 for r in range(world_size)]  # fmt: skip
        return [[int(i) for rank in ranks for i in next(rank).ids] for _ in range(4)]

    whole = ids(1.0, 1)
    assert ids(1.0, 2) == ids(1.0, 3) == whole
    assert ids(1.0, 2, first=2)[:2] == whole[2:]  # a run that goes on
    train, valid = loaders(manifest, spec, balance=1.0, **options)
    kinds = dict(zip(manifest.rows["id"].to_pylist(), manifest.rows["label"].to_pylist(), strict=True))
    assert [kinds[i] for step in whole for i in step].count("dog") in range(15, 26)  # 2 of 14 there
    assert train.samples == 14
    assert train.steps(1) == 1
    assert [int(i) for batch in valid.stream() for i in batch.ids] == valid.subset.ids.tolist()
    assert type(loaders(manifest, spec, balance=0.0, **options)[0].order) is Training


def test_what_cannot_be_balanced_gets_a_sentence() -> None:
    several = unlooked([["b", "a"], [], ["c"], ["a", "a"]])
    with pytest.raises(SplitError, match=r"balance=0\.5 with task='multi_label'.*balance is for single_label"):
        loaders(several, ImageSpec(), balance=0.5)
    with pytest.raises(SplitError, match=r"balance=1\.5 is out of range.*give 0 <= balance <= 1"):
        order([3, 4], 1.5)
