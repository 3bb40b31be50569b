"""Are arrays served as images are: in the same order, to any world, exactly; and do they train?"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thawline.dataio.errors import SplitError
from thawline.dataio.stream.arrays import ArrayLoader, array_loaders
from thawline.dataio.stream.plan import Training
from thawline.trainer.learner import Learner

N = 53
IDS = 1000 - 7 * np.arange(N)
"""Neither in order nor equal to the rows, so that mixing them up shows."""


def pair(**options: Any) -> tuple[ArrayLoader, ArrayLoader]:
    """Two inputs and targets, each a function of the id."""
    inputs = (torch.from_numpy(IDS), np.stack([IDS, -IDS], 1).astype(np.float32))
    given = {"ids": IDS, "valid": 0.25, "global_batch": 8, "seed": 5, **options}
    return array_loaders(inputs, IDS.astype(np.float32) / 2, **given)


def ids_of(loader: ArrayLoader, batches: int, *, step: int = 0) -> list[list[int]]:
    """Of the first batches from a step on; every other column must belong to them."""
    found = []
    for batch, _ in zip(loader.stream(step), range(batches), strict=False):
        numbers, both = batch.arguments
        assert torch.equal(numbers, batch.ids)
        assert torch.equal(both, torch.stack([batch.ids, -batch.ids], 1).float())
        assert torch.equal(batch.targets, batch.ids.float() / 2)
        found.append(batch.ids.tolist())
    return found


def test_training_follows_the_plan_from_any_step() -> None:
    train, _ = pair()
    order = Training(n=train.samples, global_batch=8, seed=5)
    rows = [order.at(order.positions(step))[1] for step in range(12)]
    expected = [train.ids.numpy()[index].tolist() for index in rows]
    assert ids_of(train, 12) == expected
    assert ids_of(train, 3, step=9) == expected[9:]
    assert train.steps(2) == round(2 * train.samples / 8)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_parts_of_the_ranks_are_the_batch_of_one(world_size: int) -> None:
    whole = [pair()[side] for side in (0, 1)]
    ranks = [pair(rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = zip(*(ids_of(train, 9) for train, _ in ranks), strict=True)
    assert [[i for part in step for i in part] for step in parts] == ids_of(whole[0], 9)
    seen = [i for _, valid in ranks for ids in ids_of(valid, N) for i in ids]
    assert seen == whole[1].ids.tolist()


def test_validation_is_every_row_that_was_held_out_once_and_training_the_others() -> None:
    train, valid = pair()
    assert valid.samples == round(0.25 * N)
    assert [len(ids) for ids in ids_of(valid, N)] == [8, 5]
    assert sorted(valid.ids.tolist() + train.ids.tolist()) == sorted(IDS.tolist())
    assert [i for ids in ids_of(valid, N) for i in ids] == valid.ids.tolist()
    held_out = IDS % 3 == 0
    train, valid = pair(valid=held_out)
    assert valid.ids.tolist() == IDS[held_out].tolist()
    assert train.ids.tolist() == IDS[~held_out].tolist()


def test_rows_that_are_added_move_few_of_those_before() -> None:
    def held_out(ids: NDArray[np.int64]) -> set[int]:
        return set(array_loaders(ids, ids, ids=ids, valid=0.25, global_batch=8)[1].ids.tolist())

    before, after = held_out(np.arange(1000)), held_out(np.arange(1010))
    assert len(before & after) >= 240
    assert held_out(np.random.default_rng(0).permutation(1000)) == before, "whatever their order"


def test_images_keep_their_memory_format_and_numbers_their_types() -> None:
    images = torch.randn(9, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    train, _ = array_loaders(images, np.arange(9, dtype=np.int8), global_batch=3)
    batch = next(train.stream())
    (taken,) = batch.arguments
    assert isinstance(batch.inputs, Tensor)
    assert torch.equal(taken, images[batch.ids])
    assert taken.is_contiguous(memory_format=torch.channels_last)
    assert batch.targets.dtype == torch.int8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": np.arange(5)}, f"have {N}, {N}, {N}, {N}, 5 rows|have 5, {N}, {N}, {N}, 5 rows"),
        ({"valid": np.zeros(7, np.bool_)}, f"have 7, {N}, {N}, {N}, {N} rows"),
        ({"valid": 0.0}, "valid=0.0 is not a share"),
        ({"valid": 1}, "valid=1 is not a share"),
        ({"valid": 0.001}, f"0 of {N} rows are for validation"),
        ({"valid": np.ones(N, np.bool_)}, f"{N} of {N} rows are for validation"),
        ({"global_batch": 2, "world_size": 3}, "global_batch=2 is smaller than world_size=3"),
    ],
)
def test_what_leaves_nothing_to_train_on_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SplitError, match=words):
        pair(**changes)


# A ratings table, from nothing -------------------------------------------------------------------------------


class Ratings(nn.Module):
    """A rating is the product of what a user likes and what an item has."""

    def __init__(self, users: int, items: int, factors: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, factors), nn.Embedding(items, factors)

    def groups(self) -> list[list[nn.Module]]:
        return [[self.users], [self.items]]

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets) ** 2


def test_a_ratings_table_trains_to_its_noise() -> None:
    """With k factors of 60 users and 40 items, least squares is left with the noise times 1 + parameters / rows."""
    draw, noise = np.random.default_rng(0), 0.2
    user, item = (each.ravel() for each in np.indices((60, 40)))
    likes, has = draw.normal(size=(60, 2)), draw.normal(size=(40, 2))
    ratings = (likes[user] * has[item]).sum(1) + noise * draw.normal(size=2400)
    torch.manual_seed(0)
    learn = Learner(
        Ratings(60, 40, 2),
        *array_loaders((user, item), ratings.astype(np.float32), global_batch=64),
        loss=squared_error,
    )
    untrained = learn.validate()["valid_loss"]
    learn.fit_one_cycle(15, 0.1)
    error = learn.validate()["valid_loss"] / noise**2
    assert untrained > 20 * noise**2
    assert 0.85 < error < 1.25, "about 1 + 2 * (60 + 40) / 1920"
