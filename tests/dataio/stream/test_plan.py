"""Is the order a permutation, a random-looking one, and the same for whoever asks? With the hash that it rests on."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from thawline.dataio.errors import SplitError
from thawline.dataio.hashing import hash64, uniforms
from thawline.dataio.stream.plan import Training, permute, rank_bounds

LENGTHS = (1, 2, 3, 5, 10, 97, 1438, 10_007)
U64 = (1 << 64) - 1


def order(n: int, *, seed: int = 42, epoch: int = 0) -> NDArray[np.int64]:
    return permute(np.arange(n), n=n, seed=seed, epoch=np.full(n, epoch))


def orders(n: int, epochs: int, *, seed: int = 42) -> NDArray[np.int64]:
    """(epochs, n): a permutation a row."""
    plan = Training(n=n, global_batch=n, seed=seed)
    return plan.at(np.arange(epochs * n, dtype=np.int64))[1].reshape(epochs, n)


def python_hash(*keys: int) -> int:
    """The documented hash in Python's unbounded integers: SplitMix64's finaliser, chained over the keys."""
    state = 0
    for key in keys:
        x = ((state ^ (key & U64)) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & U64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & U64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64
        state = x ^ (x >> 31)
    return state


# The hash --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(0,), (42, 0, 17, 3), (-1,), (-(2**63), 2**63 - 1), (2**31, 2**32, 2**53 + 1)])
def test_hash_equals_unbounded_integer_arithmetic(keys: tuple[int, ...]) -> None:
    assert int(hash64(*keys)) == python_hash(*keys)
    assert float(uniforms(*keys)) == (python_hash(*keys) >> 11) / 2**53


def test_keys_broadcast_and_each_entry_is_the_scalar_hash() -> None:
    ids, which = np.arange(-3, 4)[:, None], np.arange(5)
    table = hash64(42, ids, which)
    assert table.shape == (7, 5)
    assert table.dtype == np.uint64
    assert hash64(1, 2).shape == ()
    expected = [[python_hash(42, int(i), int(w)) for w in which] for i in ids[:, 0]]
    assert table.tolist() == expected


def test_order_and_number_of_keys_matter() -> None:
    assert len({int(hash64(*keys)) for keys in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1,), (2,), (1, 1)]}) == 7


def test_uniforms_are_uniform() -> None:
    u = uniforms(42, np.arange(5)[:, None, None], np.arange(500)[:, None], np.arange(40)).ravel()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / u.size)
    assert stats.kstest(u, "uniform").pvalue > 0.01


def test_neighbouring_seeds_epochs_ids_and_draws_are_unrelated() -> None:
    u = uniforms(*np.ix_(np.arange(40, 44), np.arange(6), np.arange(300), np.arange(19))) - 0.5
    for axis in range(4):
        left, right = np.delete(u, -1, axis).ravel(), np.delete(u, 0, axis).ravel()
        assert abs(12 * (left * right).mean()) < 4 / np.sqrt(left.size), f"axis {axis}"
        pairs, _, _ = np.histogram2d(left, right, bins=16)
        assert stats.chisquare(pairs.ravel()).pvalue > 0.001, f"axis {axis}"


# The permutation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_every_epoch_is_a_permutation(n: int) -> None:
    for seed, epoch in itertools.product((0, 42, 2**40), (0, 1, 7, 10**6)):
        np.testing.assert_array_equal(np.sort(order(n, seed=seed, epoch=epoch)), np.arange(n))


@pytest.mark.parametrize("n", [97, 1438, 10_007])
def test_epochs_and_seeds_differ_and_repeat_exactly(n: int) -> None:
    seen = [order(n, seed=seed, epoch=epoch) for seed, epoch in itertools.product((41, 42), range(3))]
    for one, other in itertools.combinations(seen, 2):
        assert (one == other).mean() < 0.1  # two random permutations agree in 1 of n places
    np.testing.assert_array_equal(order(n, seed=42, epoch=2), seen[-1])


def test_order_is_pinned() -> None:
    """Recorded runs can be continued only as long as this does not change."""
    assert order(10).tolist() == [1, 7, 9, 5, 6, 2, 3, 0, 4, 8]
    assert order(1438, seed=7, epoch=3)[:8].tolist() == [607, 542, 1193, 679, 615, 92, 487, 498]


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_each_value_stands_equally_often_in_each_place(n: int) -> None:
    epochs = 4000
    table = orders(n, epochs)
    counts = np.stack([np.bincount(table[:, place], minlength=n) for place in range(n)])
    # Rows and columns sum to `epochs`, which leaves (n - 1)^2 degrees of freedom.
    chi_square = ((counts - epochs / n) ** 2 / (epochs / n)).sum() * (n - 1) / n
    assert stats.chi2.sf(chi_square, (n - 1) ** 2) > 0.001


@pytest.mark.parametrize("n", [3, 4])
def test_all_orders_of_a_few_are_equally_likely(n: int) -> None:
    epochs = 6000
    index = {p: i for i, p in enumerate(itertools.permutations(range(n)))}
    counts = np.bincount([index[tuple(row)] for row in orders(n, epochs).tolist()], minlength=len(index))
    assert stats.chisquare(counts).pvalue > 0.001


def test_each_pair_of_values_is_adjacent_equally_often() -> None:
    n, epochs = 10, 4000
    table = orders(n, epochs)
    pairs = np.bincount((table[:, :-1] * n + table[:, 1:]).ravel(), minlength=n * n).reshape(n, n)
    assert np.diag(pairs).sum() == 0
    off = pairs[~np.eye(n, dtype=bool)]
    expected = epochs * (n - 1) / (n * (n - 1))
    spread = np.sqrt(expected * (1 - expected / epochs))
    assert np.abs(off - expected).max() < 4 * spread
    assert 0.7 < off.std() / spread < 1.3


@pytest.mark.parametrize("n", [97, 1438])
def test_long_orders_are_spread_like_numpys_permutations(n: int) -> None:
    """Mean displacement, serial correlation and the number of rises, each against numpy's distribution of them."""

    def measures(p: NDArray[np.int64]) -> tuple[float, float, float]:
        centred = p - (n - 1) / 2
        serial = (centred[:-1] * centred[1:]).sum() / (centred**2).sum()
        return float(np.abs(p - np.arange(n)).mean()), float(serial), float((np.diff(p) > 0).mean())

    draw = np.random.default_rng(0)
    ours = np.array([measures(row) for row in orders(n, 300)])
    theirs = np.array([measures(draw.permutation(n)) for _ in range(300)])
    for i, name in enumerate(("displacement", "serial correlation", "rises")):
        assert stats.ks_2samp(ours[:, i], theirs[:, i]).pvalue > 0.005, name


def test_consecutive_epochs_put_a_sample_in_unrelated_places() -> None:
    n = 97
    places = np.argsort(orders(n, 200), axis=1) - (n - 1) / 2
    correlation = (places[:-1] * places[1:]).mean() / (places**2).mean()
    assert abs(correlation) < 4 / np.sqrt(199 * n)


# The stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "global_batch"), [(10, 4), (3, 8), (1, 5), (97, 64), (64, 64)])
def test_stream_is_epoch_permutations_end_to_end(n: int, global_batch: int) -> None:
    plan = Training(n=n, global_batch=global_batch, seed=3)
    steps = 3 * n  # as many samples as fill global_batch * 3 epochs exactly
    parts = [plan.at(plan.positions(step)) for step in range(steps)]
    assert all(len(rows) == global_batch for _, rows in parts)
    epochs, rows = (np.concatenate(both).reshape(-1, n) for both in zip(*parts, strict=True))
    np.testing.assert_array_equal(epochs, np.repeat(np.arange(3 * global_batch), n).reshape(-1, n))
    for epoch, row in enumerate(rows):
        np.testing.assert_array_equal(row, order(n, seed=3, epoch=epoch))


def test_a_step_straddles_two_epochs() -> None:
    plan = Training(n=10, global_batch=4, seed=3)
    epochs, rows = plan.at(plan.positions(2))
    assert epochs.tolist() == [0, 0, 1, 1]
    assert rows.tolist() == [*order(10, seed=3, epoch=0)[8:], *order(10, seed=3, epoch=1)[:2]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("global_batch", [8, 64, 13])
def test_parts_of_the_ranks_in_order_are_the_whole_step(world_size: int, global_batch: int) -> None:
    shape = {"n": 97, "global_batch": global_batch, "world_size": world_size}
    for step in (0, 1, 12, 10**9):
        parts = [Training(**shape, seed=1, rank=rank).positions(step) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), step * global_batch + np.arange(global_batch))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == -(-global_batch // world_size)


def test_asking_for_one_position_equals_reading_up_to_it() -> None:
    plan = Training(n=97, global_batch=64, seed=5)
    epochs, rows = plan.at(np.arange(1000, dtype=np.int64))
    for i in np.random.default_rng(0).permutation(1000)[:100]:
        epoch, row = plan.at(np.array([i]))
        assert (epoch[0], row[0]) == (epochs[i], rows[i])


def test_far_positions_of_a_large_set_are_exact() -> None:
    plan = Training(n=14_197_122, global_batch=1, seed=5)
    epochs, rows = plan.at(np.array([0, 10**15], np.int64))
    assert epochs.tolist() == [0, 10**15 // 14_197_122]
    assert ((rows >= 0) & (rows < 14_197_122)).all()


@pytest.mark.parametrize(
    ("n", "global_batch", "epochs", "steps"), [(1438, 64, 1, 22), (1438, 64, 5, 112), (10, 64, 1, 1), (96, 64, 1, 2)]
)
def test_steps_are_the_nearest_whole_number_and_at_least_one(
    n: int, global_batch: int, epochs: float, steps: int
) -> None:
    assert Training(n=n, global_batch=global_batch, seed=0).steps(epochs) == steps


@pytest.mark.parametrize(("count", "world_size"), [(0, 3), (2, 3), (7, 3), (360, 8)])
def test_part_bounds_cover_everything_once(count: int, world_size: int) -> None:
    bounds = [rank_bounds(count, rank, world_size) for rank in range(world_size)]
    assert [i for lo, hi in bounds for i in range(lo, hi)] == list(range(count))


@pytest.mark.parametrize(("n", "global_batch"), [(0, 8), (8, 0), (-1, 8)])
def test_a_plan_over_nothing_is_refused(n: int, global_batch: int) -> None:
    with pytest.raises(SplitError, match=f"n={n} samples in batches of {global_batch}.*check the split"):
        Training(n=n, global_batch=global_batch, seed=0)
