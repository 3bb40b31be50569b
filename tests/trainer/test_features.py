"""Are kept features those of the images, and is a run that keeps them the run that does not?"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.kit.images import flat_manifest
from tests.kit.ranks import Here, Outcome, worlds_of
from tests.kit.toy import ToyModel, Watched, learner, loaders, same, snapshot
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream import loader as images
from thawline.models.errors import ModelError
from thawline.trainer.errors import RecipeError
from thawline.trainer.learner import Learner


class Halves(ToyModel):
    """The toy, which says where its head begins."""

    def in_two(self) -> tuple[nn.Module, nn.Module]:
        return nn.Sequential(self.stem, self.body), self.head


def run(views: int, *, asked: list[int] | None = None, resume: bool = False, **options: Any) -> Learner:
    """Three epochs frozen, one not; ema and micro-batches with them."""
    data = loaders(dtype=torch.float64, train=22)
    if asked is not None:
        data[0].before = asked.append
    more = {"batch_norm": "frozen", "cache_features": views, "ema": 0.8, "accumulate": 2}
    learn = learner(model=Halves(dtype=torch.float64), data=data, **more, **options)
    assert learn.resume() == resume
    learn.fine_tune(1, 1e-2, frozen_epochs=3)
    return learn


def test_a_run_that_keeps_features_is_the_run_that_does_not_and_reads_images_once() -> None:
    asked: list[int] = []
    plain, kept = run(0), run(1, asked=asked)
    assert [row["loss"] for row in kept.recorder.of_kind("train")] == pytest.approx(
        [row["loss"] for row in plain.recorder.of_kind("train")], rel=1e-5
    )
    for name, value in snapshot(plain.model).items():
        torch.testing.assert_close(snapshot(kept.model)[name], value, rtol=1e-5, atol=1e-7)
    assert kept.progress.stream_hash == plain.progress.stream_hash
    frozen = round(3 * 22 / 4)
    assert [step for step in asked if step < frozen] == [0, 1, 2, 3, 4, 5]  # 22 images in fours
    assert set(asked) >= set(range(frozen, plain.progress.step))


def test_a_search_for_a_rate_after_it_sees_images() -> None:
    learn = run(1)
    assert learn.session.features is None
    assert len(learn.rehearse(lambda step: [1e-4] * 3, stop=lambda loss: False, steps=3, freeze_to=-1)) == 3


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopped_and_resumed_it_is_the_unbroken_run_bit_by_bit(tmp_path: Path, stop: int) -> None:
    unbroken = run(1, context=Watched(run_dir=tmp_path / "unbroken"))
    first = run(1, context=Watched(run_dir=tmp_path / "broken", stop_at_ask=stop), checkpoint_every_s=0.0)
    assert first.stopped
    assert first.progress.phase == 0
    second = run(1, context=Watched(run_dir=tmp_path / "broken"), resume=True)
    assert same(second.model.state_dict(), unbroken.model.state_dict())
    assert same(second.session.weights()["ema"], unbroken.session.weights()["ema"])
    assert second.progress.stream_hash == unbroken.progress.stream_hash


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_norm": "train"}, r"cache_features=2 while BatchNorm trains.*give batch_norm = 'frozen'"),
        ({"batch_transform": lambda batch, step: batch}, r"with mixed batches.*give mixup = 0"),
        ({"cache_features": -1}, r"cache_features=-1 is out of range"),
    ],
)
def test_features_that_cannot_be_kept_get_a_sentence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        learner(model=Halves(), **{"batch_norm": "frozen", "cache_features": 2, **options})


def test_a_model_that_does_not_say_where_its_head_begins_gets_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"ToyModel has no method in_two\(\)"):
        learner(batch_norm="frozen", cache_features=1)


def test_images_come_in_so_many_views_and_are_known_before_they_come(tmp_path: Path) -> None:
    manifest = flat_manifest(tmp_path, train=6, valid=2)
    train, _ = images.loaders(manifest, ImageSpec(size_px=16, presize_px=20), global_batch=6, engine="reference")
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    repeated = train.repeated(2)
    for step, batch in zip(range(4), repeated.stream(), strict=False):
        keys = repeated.planned(step)
        assert [key[-1] for key in keys] == batch.ids.tolist()
        assert {key[:2] for key in keys} == {(16, step % 2)}
        for key, image in zip(keys, batch.inputs, strict=True):
            assert torch.equal(seen.setdefault(key, image), image)
    assert len(seen) == 12
    plain = next(train.stream())
    np.testing.assert_array_equal(plain.inputs[0], seen[repeated.planned(0)[0]])


def fitted(here: Here) -> Outcome:
    asked: list[int] = []
    data = here.data(dtype=torch.float64)
    data[0].before = asked.append
    model = Halves(dropout=0.0, dtype=torch.float64)
    learn = here.learner("kept", model=model, data=data, batch_norm="frozen", cache_features=1, log_every=1)
    learn.fine_tune(1, 1e-2, frozen_epochs=3)
    return {"weights": snapshot(learn.model), "asked": asked, "hash": learn.progress.stream_hash}


@pytest.mark.slow
def test_two_and_three_ranks_equal_one_and_share_what_they_computed(tmp_path: Path) -> None:
    worlds = worlds_of(fitted, tmp_path)
    (one,) = worlds[1]
    for outcome in (*worlds[2], *worlds[3]):
        assert outcome["hash"] == one["hash"]
        assert outcome["asked"] == one["asked"]
        for name, value in one["weights"].items():
            torch.testing.assert_close(outcome["weights"][name], value, rtol=1e-5, atol=1e-7)
