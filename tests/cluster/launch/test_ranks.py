"""Several ranks against one: the same weights, the same stream, exact counts, and decisions taken together.

The scenario below runs once in 1, 2 and 3 processes (gloo, on the CPU); the tests compare what came out.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.kit.ranks import GLOBAL_BATCH, VALID, Here, Outcome, exact_loss, worlds_of
from tests.kit.toy import ToyModel, ids_of, loaders, same, snapshot, stream_hash
from thawline.dataio.errors import ManifestError
from thawline.trainer import lr_find
from thawline.trainer.checkpoints.saver import Written
from thawline.trainer.errors import CheckpointError
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.step import world
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.guard import Guard
from thawline.trainer.step.precision import choose_precision
from thawline.trainer.step.reduction import Reduction
from thawline.trainer.step.step import StepSettings, train_step
from thawline.trainer.step.window import Window

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def collectives(here: Here) -> Outcome:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3)).requires_grad_(False)
    model[0].running_mean.fill_(here.rank + 1.0)  # type: ignore[operator]
    model[1].running_var.copy_(torch.arange(3.0) * here.rank)  # type: ignore[operator]
    world.average_buffers(model)
    readings = []
    for stop in (False, here.last):
        window = Window()
        for step in range(2):
            ids = torch.tensor([100 * step + 10 * here.rank + i for i in range(here.rank + 1)])
            window.add(ids=ids, losses=torch.full(ids.shape, here.rank + 1.0), data_wait_s=float(here.rank))
        written = [Written(here.rank, 1.0, None)]
        readings.append(window.close(guard=Guard(model, CPU), busy=Busy(CPU), stop=stop, written=written))
    return {
        "gather": world.gather({"rank": here.rank}),
        "gather_tensors": world.gather_tensors([torch.full((here.rank, 2), 0.5), torch.tensor(here.last)], [math.inf]),
        "gather_to_first": world.gather_to_first([torch.arange(here.rank, dtype=torch.int16)]),
        "told": told(here),
        "buffers": snapshot(model),
        "readings": [
            ([i.tolist() for i in r.ids], r.steps, r.images, r.loss, r.data_wait_s, r.stop, [w.step for w in r.written])
            for r in readings
        ],
    }


def told(here: Here) -> list[tuple[str, str]]:
    """What this rank raises where the last fails: by a sentence, and by a fault of its own."""
    failures = (ManifestError("rows 3 ≠ 4 \udcff"), KeyError("x"))
    raised = [world.common_error(failure if here.last else None) for failure in failures]
    return [(type(error).__name__, str(error)) for error in raised]


def one_step(here: Here, *, frozen_statistics: bool) -> dict[str, Tensor]:
    """The weights after one step on this rank's part of 7 samples."""
    model = ToyModel(norm=frozen_statistics, dropout=0.0).train(not frozen_statistics)
    reduction, stream = Reduction(model, CPU, busy=Busy(CPU)), here.data()[0].stream()
    train_step(
        lambda: next(stream),
        settings=StepSettings(CPU, choose_precision("fp32", CPU), exact_loss, OptimSettings("sgd"), GLOBAL_BATCH),
        reduction=reduction,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        guard=Guard(model, CPU),
    )
    reduction.close()
    return snapshot(model)


def freezing(here: Here, *, frozen_statistics: bool = False) -> Outcome:
    """freeze, fit, unfreeze, fit in float64, BatchNorm absent or with frozen statistics: one process is the oracle."""
    model = ToyModel(norm=frozen_statistics, dropout=0.0, dtype=torch.float64)
    data, norms = here.data(dtype=torch.float64), "frozen" if frozen_statistics else "train"
    learn = here.learner("freezing", model=model, data=data, loss=exact_loss, batch_norm=norms)
    learn.freeze()
    learn.fit_one_cycle(1, 1e-2)
    frozen = snapshot(model)
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-2)
    rows = [(row["step"], row["loss"]) for row in learn.recorder.of_kind("train")]
    return {"frozen": frozen, "weights": snapshot(model), "hash": learn.progress.stream_hash, "losses": rows}


def searching(here: Here) -> Outcome:
    """The lr finder in the middle of a run, and what the run is afterwards."""
    weights, states = [], []
    for search in (False, True):
        learn = here.learner("search", model=ToyModel(norm=False, dropout=0.0))
        learn.fit_one_cycle(1, 1e-2)
        if search:
            before, random = snapshot(learn.model), torch.get_rng_state()
            flags = [p.requires_grad for p in learn.model.parameters()]
            found = lr_find(learn, start=1e-4, steps=60, freeze_to=1)
            states = [
                same(before, snapshot(learn.model)),
                torch.equal(random, torch.get_rng_state()),
                flags == [p.requires_grad for p in learn.model.parameters()],
                all(p.grad is None for p in learn.model.parameters()),
            ]
        learn.fit_one_cycle(1, 1e-2)
        weights.append((snapshot(learn.model), learn.progress.stream_hash))
    suggestions = [found.valley, found.steep, found.minimum, found.slide]
    return {"losses": found.raw, "suggestions": suggestions, "states": states, "runs": weights}


def fitting(here: Here) -> Outcome:
    """BatchNorm and dropout: an unbroken run, and the same one stopped by its last rank and resumed."""
    unbroken = here.learner("unbroken", checkpoint_every_s=0.0)
    unbroken.fine_tune(1, 1e-2)
    # Asked at the windows that end at 2 and 3, at both batches of a rank's validation, and at the window ending at 5.
    stopped = here.learner("stopped", checkpoint_every_s=0.0, stop_at_ask=5 if here.last else 0)
    stopped.fine_tune(1, 1e-2)
    resumed = here.learner("stopped", checkpoint_every_s=0.0)
    found = resumed.resume()
    resumed.fine_tune(1, 1e-2)
    values, predictions = unbroken.validate(), unbroken.predictions()
    return {
        "weights": snapshot(unbroken.model),
        "hash": unbroken.progress.stream_hash,
        "stopped": (stopped.stopped, stopped.progress.step),
        "found": found,
        "resumed": (snapshot(resumed.model), resumed.progress.stream_hash, resumed.progress.step),
        "values": values,
        "predictions": predictions
        and (predictions.ids, predictions.targets, predictions.probabilities, predictions.losses),
    }


def elsewhere(here: Here) -> str:
    """What a rank that sees another storage than the others is told."""
    storage = here.folder / "elsewhere" if here.last and here.size > 1 else here.folder / "unbroken"
    try:
        here.learner("storage", run_dir=storage).resume()
    except CheckpointError as error:
        return str(error)
    return ""


def unreadable(here: Here) -> str:
    """What all ranks are told where one cannot read its storage."""
    storage = here.folder / ("in the way" if here.last else "unbroken")
    if here.last:
        storage.mkdir()
        (storage / "checkpoints").write_text("a file")
    try:
        here.learner("storage", run_dir=storage).resume()
    except CheckpointError as error:
        return str(error)
    return ""


def scenario(here: Here) -> Outcome:
    return {
        **collectives(here),
        "plain step": one_step(here, frozen_statistics=False),
        "step with frozen statistics": one_step(here, frozen_statistics=True),
        "freezing": freezing(here),
        "frozen statistics": freezing(here, frozen_statistics=True),
        "searching": searching(here),
        "fitting": fitting(here),
        "elsewhere": elsewhere(here),
        "unreadable": unreadable(here),
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Outcome]]:
    """What every rank of 1, 2 and 3 saw."""
    return worlds_of(scenario, tmp_path_factory.mktemp("ranks"))


Worlds = dict[int, list[Outcome]]
several = pytest.mark.parametrize("size", [2, 3])
every = pytest.mark.parametrize("size", [1, 2, 3])


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@every
def test_gather_gives_every_rank_everything_and_gather_to_first_only_rank_0(worlds: Worlds, size: int) -> None:
    assert [o["gather"] for o in worlds[size]] == [[{"rank": r} for r in range(size)]] * size
    for outcome in worlds[size]:
        for rank, (value, tensors) in enumerate(outcome["gather_tensors"]):
            assert value == [math.inf]
            assert [tensor.dtype for tensor in tensors] == [torch.float32, torch.bool]
            assert torch.equal(tensors[0], torch.full((rank, 2), 0.5))
            assert torch.equal(tensors[1], torch.tensor(rank == size - 1))
    first, *others = (outcome["gather_to_first"] for outcome in worlds[size])
    assert others == [[]] * (size - 1)
    assert [(numbers.dtype, numbers.tolist()) for (numbers,) in first] == [
        (torch.int16, list(range(rank))) for rank in range(size)
    ]


@every
def test_an_error_crosses_as_its_type_and_sentence_and_as_no_other_type(worlds: Worlds, size: int) -> None:
    readable, strange = ("ManifestError", "rows 3 ≠ 4 \udcff"), f"rank {size - 1} failed (KeyError: 'x')"
    for rank, outcome in enumerate(worlds[size]):
        assert outcome["told"][0] == readable
        own, other = outcome["told"][1]
        assert (own, other) == ("KeyError", "'x'") if rank == size - 1 else other.startswith(strange)


@every
def test_averaged_buffers_are_the_mean_over_ranks_and_counters_stay_whole(worlds: Worlds, size: int) -> None:
    mean = (size - 1) / 2
    for outcome in worlds[size]:
        buffers = outcome["buffers"]
        assert torch.equal(buffers["0.running_mean"], torch.full((2,), mean + 1))
        assert torch.equal(buffers["0.running_var"], torch.ones(2))
        assert torch.equal(buffers["1.running_var"], torch.arange(3.0) * mean)
        assert buffers["0.num_batches_tracked"].dtype == torch.int64


@every
def test_a_window_closes_with_the_same_reading_on_every_rank(worlds: Worlds, size: int) -> None:
    """Rank r adds r + 1 samples of loss r + 1 a step."""
    ids = [[100 * step + 10 * r + i for r in range(size) for i in range(r + 1)] for step in range(2)]
    images = 2 * sum(r + 1 for r in range(size))
    loss = 2 * sum((r + 1) ** 2 for r in range(size)) / images
    wait = 2 * (size - 1) / 2
    for outcome in worlds[size]:
        first, second = outcome["readings"]
        assert first == (ids, 2, images, pytest.approx(loss), wait, False, [0])  # rank 0's writes are told
        assert second == (ids, 2, images, pytest.approx(loss), wait, True, [0])  # the last rank asked


@several
@pytest.mark.parametrize("kind", ["plain step", "step with frozen statistics"])
def test_a_step_over_uneven_parts_gives_one_process_s_weights(worlds: Worlds, size: int, kind: str) -> None:
    for outcome in worlds[size]:
        assert_close(outcome[kind], worlds[1][0][kind], 1e-6)


@several
@pytest.mark.parametrize("kind", ["freezing", "frozen statistics"])
def test_ranks_stay_identical_through_freeze_fit_unfreeze_fit_and_follow_one_process(
    worlds: Worlds, size: int, kind: str
) -> None:
    first, alone = worlds[size][0][kind], worlds[1][0][kind]
    for outcome in worlds[size]:
        for name in ("frozen", "weights"):
            assert same(outcome[kind][name], first[name])
            assert_close(outcome[kind][name], alone[name], 1e-9)
        assert outcome[kind]["losses"] == first["losses"]
    assert [step for step, _ in first["losses"]] == [step for step, _ in alone["losses"]]
    np.testing.assert_allclose([loss for _, loss in first["losses"]], [loss for _, loss in alone["losses"]], rtol=1e-9)
    model = ToyModel(norm=kind == "frozen statistics")
    assert torch.equal(first["frozen"]["stem.0.weight"], snapshot(model)["stem.0.weight"].double())
    assert not torch.equal(first["frozen"]["stem.0.weight"], first["weights"]["stem.0.weight"])


@several
def test_the_lr_finder_sees_one_process_s_losses_and_suggests_the_same_on_every_rank(worlds: Worlds, size: int) -> None:
    alone = worlds[1][0]["searching"]
    for outcome in worlds[size]:
        search = outcome["searching"]
        assert (search["losses"], search["suggestions"]) == (
            worlds[size][0]["searching"]["losses"],
            worlds[size][0]["searching"]["suggestions"],
        )
        sane = [i for i, loss in enumerate(alone["losses"]) if loss < 100]  # beyond, rounding is amplified
        assert len(sane) > 30
        np.testing.assert_allclose(np.array(search["losses"])[sane], np.array(alone["losses"])[sane], rtol=1e-4)
        assert search["suggestions"] == pytest.approx(alone["suggestions"], rel=1e-6)


@every
def test_after_the_lr_finder_everything_is_as_before_bit_by_bit(worlds: Worlds, size: int) -> None:
    for outcome in worlds[size]:
        search = outcome["searching"]
        assert search["states"] == [True] * 4
        (plain, plain_hash), (searched, searched_hash) = search["runs"]
        assert same(plain, searched)
        assert plain_hash == searched_hash


@every
def test_the_stream_hash_is_the_plan_s_at_any_world_size(worlds: Worlds, size: int) -> None:
    plan = loaders(global_batch=GLOBAL_BATCH)[0]
    assert {o["freezing"]["hash"] for o in worlds[size]} == {stream_hash(plan, steps=3 + 3)}
    assert {o["fitting"]["hash"] for o in worlds[size]} == {stream_hash(plan, steps=3 + 3)}


@several
def test_ranks_end_with_the_same_weights_and_batchnorm_statistics(worlds: Worlds, size: int) -> None:
    assert all(same(o["fitting"]["weights"], worlds[size][0]["fitting"]["weights"]) for o in worlds[size])


@every
def test_a_stop_asked_of_one_rank_stops_all_at_the_same_step(worlds: Worlds, size: int) -> None:
    assert [o["fitting"]["stopped"] for o in worlds[size]] == [(True, 5)] * size  # windows end at 2, 3 and 5


@every
def test_a_resumed_run_equals_the_unbroken_one_of_as_many_ranks(worlds: Worlds, size: int) -> None:
    """Bit by bit, also where three add up: see reduction._sum."""
    for outcome in worlds[size]:
        fit = outcome["fitting"]
        weights, digest, step = fit["resumed"]
        assert fit["found"]
        assert (digest, step) == (fit["hash"], 6)
        assert same(weights, fit["weights"])


@every
def test_validation_counts_every_sample_once_and_its_error_is_a_plain_count(worlds: Worlds, size: int) -> None:
    fits = [outcome["fitting"] for outcome in worlds[size]]
    assert [fit["predictions"] is None for fit in fits] == [False] + [True] * (size - 1)
    ids, targets, probabilities, losses = fits[0]["predictions"]
    assert ids.tolist() == ids_of(VALID).tolist()
    assert targets.tolist() == loaders(valid=VALID)[1].targets.tolist()
    wrong = int((probabilities.argmax(1) != targets).sum())
    for fit in fits:
        assert fit["values"]["error_rate"] == wrong / VALID
        assert fit["values"]["valid_loss"] == pytest.approx(float(losses.astype(np.float64).mean()), rel=1e-7)
        assert fit["values"] == fits[0]["values"]
    assert 0 < wrong < VALID


@several
def test_ranks_that_see_different_storage_refuse_to_go_on(worlds: Worlds, size: int) -> None:
    steps = [6] * (size - 1) + [None]
    for outcome in worlds[size]:
        assert f"ranks see different checkpoints (steps {steps})" in outcome["elsewhere"]


@every
def test_a_rank_that_cannot_read_its_storage_ends_all_with_its_sentence(worlds: Worlds, size: int) -> None:
    said = {outcome["unreadable"] for outcome in worlds[size]}
    assert len(said) == 1
    assert "in the way/checkpoints cannot be listed or read" in said.pop()
