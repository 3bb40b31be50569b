"""Does the stream follow the plan: at any world size, from any step, with either engine, to the last sample?"""

import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.images import EVERYTHING, first, flat_manifest
from thawline.dataio.ahead import read_ahead
from thawline.dataio.errors import EngineError, ManifestError, ResourceError, SplitError
from thawline.dataio.labels.labels import by_parent, label
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.dataio.stream.plan import Training
from thawline.dataio.stream.renderer import EngineName, choose_engine, default_threads
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import by_folder, split

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
SPEC = ImageSpec(size_px=16, presize_px=20, **EVERYTHING)
both_engines = pytest.mark.parametrize("engine", ["dali", "reference"])


def pair(manifest: Manifest, engine: EngineName = "dali", **options: Any) -> tuple[ImageLoader, ImageLoader]:
    options = {"global_batch": 8, "seed": 5, "threads": 1, **options}
    return loaders(manifest, SPEC, engine=engine, **options)


def ids_of(loader: ImageLoader, count: int, *, step: int = 0) -> list[list[int]]:
    return [batch.ids.tolist() for batch in first(loader, count, step=step)]


# The training stream ---------------------------------------------------------------------------------------


@both_engines
def test_training_stream_equals_the_plan(flat: Manifest, engine: EngineName) -> None:
    train, _ = pair(flat, engine)
    ids = flat.subset("train").ids
    assert (train.samples, len(ids)) == (37, 37)
    plan = Training(n=37, global_batch=8, seed=5)
    expected = [ids[plan.at(plan.positions(step))[1]].tolist() for step in range(14)]
    assert ids_of(train, 14) == expected
    stream = [i for step in expected for i in step]
    assert sorted(stream[:37]) == sorted(stream[37:74]) == sorted(ids.tolist())  # a whole epoch, then the next
    assert stream[:37] != stream[37:74]


@both_engines
def test_images_are_drawn_anew_each_epoch_by_seed_epoch_and_id(flat: Manifest, engine: EngineName) -> None:
    train, _ = pair(flat, engine, global_batch=37)
    work = train.source.work(np.arange(30, 45, dtype=np.int64))
    part = flat.subset("train")
    rows = part.take(np.searchsorted(part.ids, work.ids))
    drawn = geometry.draw(
        SPEC,
        seed=5,
        epochs=np.repeat([0, 1], [7, 8]),
        ids=work.ids,
        widths=rows.widths,
        heights=rows.heights,
    )
    np.testing.assert_array_equal(work.geometry.homographies, drawn.homographies)
    one, two = first(train, 2)
    order = [two.ids.tolist().index(i) for i in one.ids.tolist()]
    different = (one.inputs != two.inputs[order]).flatten(1).any(1)
    assert different.float().mean() > 0.9  # flat images: the lighting, drawn for nine in ten, tells epochs apart


@both_engines
@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_a_stream_opened_at_a_step_equals_the_tail_of_the_whole(flat: Manifest, engine: EngineName, step: int) -> None:
    whole = first(pair(flat, engine)[0], 11)
    for tail, expected in zip(first(pair(flat, engine)[0], 11 - step, step=step), whole[step:], strict=True):
        assert torch.equal(tail.ids, expected.ids)
        assert torch.equal(tail.targets, expected.targets)
        assert torch.equal(tail.inputs, expected.inputs)


@both_engines
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_parts_of_the_ranks_are_the_batch_of_one(flat: Manifest, engine: EngineName, world_size: int) -> None:
    whole = first(pair(flat, engine)[0], 6)
    ranks = [first(pair(flat, engine, rank=r, world_size=world_size)[0], 6) for r in range(world_size)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert torch.equal(torch.cat([part.ids for part in parts]), whole[step].ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole[step].targets)
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole[step].inputs)


def test_64_over_3_ranks_is_22_21_21_in_some_order_every_step(flat: Manifest) -> None:
    options: dict[str, Any] = {"global_batch": 64, "world_size": 3}
    trains = [pair(flat, rank=rank, **options)[0] for rank in range(3)]
    assert {train.order.local_batch for train in trains} == {22}
    sizes = [[len(batch.ids) for batch in first(train, 4)] for train in trains]
    assert all(len(set(of_rank)) == 1 for of_rank in sizes)
    assert sorted(of_rank[0] for of_rank in sizes) == [21, 21, 22]


@both_engines
def test_an_abandoned_stream_can_be_opened_anew(flat: Manifest, engine: EngineName) -> None:
    train, _ = pair(flat, engine)
    expected = ids_of(train, 5)
    for count in (1, 3):
        assert ids_of(train, count) == expected[:count]
    half_read = train.stream()
    next(half_read)
    assert ids_of(train, 3, step=2) == expected[2:]


# Validation ------------------------------------------------------------------------------------------------


@both_engines
@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
@pytest.mark.parametrize("global_batch", [13, 64])
def test_validation_shows_every_sample_once_in_order(
    flat: Manifest, engine: EngineName, world_size: int, global_batch: int
) -> None:
    """Eleven samples: fewer than a batch, and fewer than 13 ranks, two of which then have nothing."""
    seen = list[int]()
    for rank in range(world_size):
        _, valid = pair(flat, engine, rank=rank, world_size=world_size, global_batch=global_batch)
        batches = list(valid.stream())
        assert all(0 < len(batch.ids) <= valid.order.local_batch for batch in batches)
        seen += [i for batch in batches for i in batch.ids.tolist()]
        valid.close()
    assert seen == flat.subset("valid").ids.tolist()


@both_engines
def test_validation_repeats_itself_and_has_a_short_last_batch(flat: Manifest, engine: EngineName) -> None:
    _, valid = pair(flat, engine, global_batch=4)
    once, again = list(valid.stream()), list(valid.stream())
    assert [len(batch.ids) for batch in once] == [4, 4, 3]
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.inputs, other.inputs)
    assert len(list(islice(valid.stream(), 1))) == 1  # abandoned
    assert [len(batch.ids) for batch in valid.stream()] == [4, 4, 3]


# Targets ---------------------------------------------------------------------------------------------------


@both_engines
def test_multi_label_targets_are_one_hot_float32(tmp_path: Path, engine: EngineName) -> None:
    manifest = flat_manifest(tmp_path, train=9, valid=4, multi_label=True)
    assert manifest.classes == ("even", "third0", "third1", "third2")
    for loader in pair(manifest, engine, global_batch=4):
        assert loader.task == "multi_label"
        for batch in first(loader, 3):
            assert batch.targets.dtype == torch.float32
            expected = [[i % 2 == 0, i % 3 == 0, i % 3 == 1, i % 3 == 2] for i in batch.ids.tolist()]
            assert batch.targets.tolist() == np.array(expected, float).tolist()


def test_half_precision_is_handed_out_when_asked_for(flat: Manifest) -> None:
    for engine in ("dali", "reference"):
        for loader in pair(flat, engine, dtype=torch.float16):
            (batch,) = first(loader, 1)
            assert batch.inputs.dtype == torch.float16
            assert batch.inputs.is_contiguous(memory_format=torch.channels_last)


# What goes wrong -------------------------------------------------------------------------------------------


def test_files_that_moved_are_found_before_anything_is_opened(own_flat: Manifest) -> None:
    one, other = own_flat.subset("valid").take(np.arange(2)).paths
    (Path(own_flat.root) / one).unlink()
    pair(own_flat)  # one is within the 1 % (rounded up) that may be lost, and will be filled
    (Path(own_flat.root) / other).unlink()
    with pytest.raises(ManifestError, match="2 of 16 files checked"):
        pair(own_flat)


def test_a_batch_smaller_than_the_world_is_refused(flat: Manifest) -> None:
    with pytest.raises(SplitError, match=r"global_batch=2 is smaller than world_size=3: some ranks.*fewer workers"):
        pair(flat, global_batch=2, world_size=3)


def test_a_manifest_without_sizes_is_refused(own_flat: Manifest) -> None:
    unverified = split(label(from_folder(own_flat.root), by_parent()), by_folder("valid"), verify=False)
    with pytest.raises(ManifestError, match=r"the 12 images have no size.*verify=False.*verify=True"):
        pair(unverified)


# The choice of an engine -----------------------------------------------------------------------------------


def test_the_engine_is_chosen_with_a_reason(flat: Manifest) -> None:
    assert (choose_engine().engine, choose_engine().reason) == ("dali", "DALI is installed")
    assert (choose_engine("dali").engine, choose_engine("dali").reason) == ("dali", "asked for")
    assert (choose_engine("reference").engine, choose_engine("reference").reason) == ("reference", "asked for")
    assert [loader.engine for loader in pair(flat, "auto")] == ["dali", "dali"]


def test_without_dali_the_reference_engine_steps_in(flat: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from thawline.dataio import pixels

    monkeypatch.delattr(pixels, "dali")
    monkeypatch.setitem(sys.modules, "thawline.dataio.pixels.dali", None)
    found = choose_engine("auto")
    assert found.engine == "reference"
    assert found.reason.startswith("DALI cannot be imported (")
    (batch,) = first(pair(flat, "auto")[0], 1)
    assert len(batch.ids) == 8
    with pytest.raises(
        EngineError, match=r"engine='dali' was asked for, but DALI cannot be imported.*engine='reference'"
    ):
        pair(flat, "dali")


def test_batch_is_per_rank_and_global_batch_for_the_world(flat: Manifest) -> None:
    assert [loader.global_batch for loader in loaders(flat, SPEC, batch=6, world_size=3)] == [18, 18]
    assert [loader.global_batch for loader in loaders(flat, SPEC, world_size=2)] == [128, 128]
    train, valid = pair(flat)
    assert (train.steps(1), train.steps(3)) == (5, 14)
    assert (train.classes, train.task, valid.samples) == (("third0", "third1", "third2"), "single_label", 11)


def test_threads_are_a_share_of_the_cores_from_1_to_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(20)))
    assert [default_threads(world_size) for world_size in (1, 4, 20, 64)] == [8, 5, 1, 1]


# Reading ahead ---------------------------------------------------------------------------------------------


def test_reading_ahead_keeps_the_order_and_stays_within_its_bound() -> None:
    begun = list[int]()

    def make(i: int) -> int:
        begun.append(i)
        return i * i

    made = read_ahead(make, range(10**9), ahead=3, threads=2)
    for expected in range(20):
        assert next(made) == expected**2
        assert max(begun) <= expected + 3
    made.close()  # type: ignore[attr-defined]
    assert list(read_ahead(make, range(7), ahead=3, threads=2)) == [i * i for i in range(7)]


def test_an_error_while_reading_ahead_comes_out_at_its_own_place() -> None:
    made = read_ahead(lambda i: 1 // (3 - i), range(10), ahead=3, threads=2)
    assert [next(made) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_an_abandoned_stream_ends_without_waiting_for_its_threads() -> None:
    """The garbage collector may end it while it holds the lock that a join needs: then waiting is for ever."""
    gate = threading.Event()
    made = read_ahead(lambda i: i == 0 or gate.wait(60), range(9), ahead=1, threads=1)
    next(made)  # the second item is under way now, and stuck
    closing = threading.Thread(target=made.close)  # type: ignore[attr-defined]
    closing.start()
    closing.join(timeout=10)
    waited = closing.is_alive()
    gate.set()
    closing.join()
    assert not waited


def test_a_storage_that_never_answers_ends_the_wait_with_a_sentence() -> None:
    gate = threading.Event()
    made = read_ahead(lambda i: i < 1 or gate.wait(60), range(9), ahead=1, threads=1, limit_s=0.2)
    assert next(made) is True
    with pytest.raises(ResourceError, match="nothing could be read"):
        next(made)
    gate.set()


def test_a_time_out_that_a_storage_tells_itself_is_its_own() -> None:
    def refuse(i: int) -> int:
        raise TimeoutError("the store said so")

    with pytest.raises(TimeoutError, match="the store said so"):
        next(read_ahead(refuse, range(9), ahead=1, threads=1))


# Views and sizes -------------------------------------------------------------------------------------------


@both_engines
def test_an_augmented_view_is_the_training_geometry_of_the_validation_samples(
    flat: Manifest, engine: EngineName
) -> None:
    _, valid = pair(flat, engine, global_batch=4)
    plain, one, two = (list(loader.stream()) for loader in (valid, valid.augmented(0), valid.augmented(1)))
    for batches in (one, two):
        assert [b.ids.tolist() for b in batches] == [b.ids.tolist() for b in plain]
        assert all(torch.equal(b.targets, p.targets) for b, p in zip(batches, plain, strict=True))
    assert not torch.equal(one[0].inputs, two[0].inputs)
    work = valid.augmented(1).source.work(np.arange(4))
    rows = valid.subset.take(np.arange(4))
    size: dict[str, Any] = {"widths": rows.widths, "heights": rows.heights}
    drawn = geometry.draw(SPEC, seed=5, epochs=np.ones(4, np.int64), ids=rows.ids, **size)
    np.testing.assert_array_equal(work.geometry.homographies, drawn.homographies)


@both_engines
def test_the_size_follows_the_stream_and_nothing_is_rebuilt(flat: Manifest, engine: EngineName) -> None:
    """37 samples in batches of 8: step 5 begins at position 40, in the second epoch."""
    spec = ImageSpec(size_px=24, presize_px=24, stages=((0, 16), (1, 20), (1.5, 24)))
    train, valid = loaders(flat, spec, engine=engine, global_batch=8, seed=5, threads=1)
    sides = [16] * 5 + [20] * 2 + [24] * 4  # step 7 begins at 56 >= 55.5
    batches = first(train, 11)
    assert [b.inputs.shape[-1] for b in batches] == sides
    assert [b.inputs.shape[-1] for b in first(train, 3, step=4)] == [16, 20, 20]
    assert [{b.inputs.shape[-1] for b in valid.stream(step)} for step in (0, 5, 100)] == [{16}, {20}, {24}]
    alone = loaders(flat, ImageSpec(size_px=20, presize_px=24), engine=engine, global_batch=8, seed=5, threads=1)[0]
    assert torch.equal(first(alone, 1, step=5)[0].inputs, batches[5].inputs)  # the same view at that size


def test_another_manifest_may_be_validated_on_if_its_classes_are_the_same(flat: Manifest, tmp_path: Path) -> None:
    other = flat_manifest(tmp_path / "same", train=4, valid=6)
    _, valid = pair(flat, valid=other)
    assert valid.subset.ids.tolist() == other.subset("valid").ids.tolist()
    with pytest.raises(
        ManifestError, match=r"the manifest to validate on is for multi_label, this one for single_label"
    ):
        pair(flat, valid=flat_manifest(tmp_path / "multi", train=4, valid=6, multi_label=True))
