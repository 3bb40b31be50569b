"""Does a training step hold on a GPU? No waiting, splitting, skipping, compiling, copies for checkpoints."""

from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.gpu.steps import CUDA, how, make_stepper, no_waiting, random_batch, resnet, taking
from thawline.dataio.batch import ImageBatch
from thawline.trainer.checkpoints.saver import snapshot
from thawline.trainer.losses.named import default_loss
from thawline.trainer.optimisers import optim
from thawline.trainer.settings import Compile, PrecisionName
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.precision import choose_precision, place
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
    # torch says so once when the mode is switched on; what it does detect is what these tests rest on.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
PRECISIONS: list[PrecisionName] = ["fp32", "bf16", "fp16", "pure_bf16"]
A_SECOND = 2_000_000_000
"""In ticks of a GPU's clock, within a factor of two."""


def sleep(ticks: int) -> None:
    """Keep the GPU from what is queued next."""
    torch.cuda._sleep(ticks)  # type: ignore[no-untyped-call]


def recorded() -> Any:
    """An event that is true when the GPU comes to it."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


class Hungry(nn.Module):
    """Has no memory for the activations of more than `limit` images, and says so after BatchNorm has seen them."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.model(images)
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("injected")
        return outputs

    def groups(self) -> list[list[nn.Module]]:
        return self.model.groups()  # type: ignore[operator]


def spoiled(batch: ImageBatch) -> ImageBatch:
    images = batch.inputs.clone()
    images[3, 1, 5, 5] = torch.nan
    return ImageBatch(images, batch.targets, batch.ids)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def updated(stepper: Stepper) -> dict[str, Tensor]:
    """All that an optimiser's step writes: weights, moments, counts of steps."""
    named = [(name, p) for group in stepper.parameters for name, p in group]
    moments = {f"{name}: {kind}": value for name, p in named for kind, value in stepper.optimizer.state[p].items()}
    return copies({**dict(named), **moments})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Not waiting ------------------------------------------------------------------------------------------------


def test_the_debug_mode_would_have_caught_a_wait() -> None:
    value = torch.ones(3, device=CUDA)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        float(value.sum())


@pytest.mark.parametrize("everything", [False, True], ids=["plainly", "with clip, ema, micro-batches and smoothing"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_step_never_waits_for_the_gpu(precision: PrecisionName, everything: bool) -> None:
    """Beyond the guard's depth, too, so that buffers are copied into places that are there."""
    loss = default_loss("single_label", label_smoothing=0.1)
    options: dict[str, Any] = {"clip": 1.0, "ema": 0.99, "splits": 2, "loss": loss} if everything else {}
    stepper = make_stepper(precision, window=3, **options)
    assert optim.skips(stepper.optimizer)
    batch, window = random_batch(precision), Window()
    losses = taking(stepper, batch)  # cuDNN chooses, state is made
    window.add(ids=batch.ids, losses=losses, data_wait_s=0.0)
    with no_waiting():
        for step in range(4):
            optim.set_hyper(stepper.optimizer, [2e-3] * 3, 0.85)
            losses = taking(stepper, batch, seed=step)
            window.add(ids=batch.ids, losses=losses, data_wait_s=0.0)
    reading = window.close(guard=stepper.guard, busy=stepper.busy, stop=False)
    assert (reading.steps, reading.images, reading.guard.bad) == (5, 80, None)
    assert np.isfinite(reading.loss)
    assert reading.busy_s[0] > 0


def test_busy_is_the_gpus_own_clock_and_starting_and_stopping_it_waits_for_nothing() -> None:
    """Between start and stop the GPU sleeps, and the host is elsewhere at once; what comes after does not count."""
    busy = Busy(CUDA)
    sleep(1000)  # loads its kernel
    with no_waiting():
        began = perf_counter()
        for _ in range(2):
            busy.start()
            sleep(A_SECOND // 10)
            busy.stop()
        launched_s = perf_counter() - began
        ended = recorded()
    ended.synchronize()
    slept_s = perf_counter() - began
    sleep(A_SECOND // 5)
    found = busy.read()
    assert launched_s < 0.5 * slept_s
    assert 0.8 * slept_s < found < 1.01 * slept_s
    assert busy.read() == 0.0


def test_a_snapshot_neither_waits_nor_sees_what_is_changed_afterwards() -> None:
    weights = torch.randn(64, 3, 7, 7, device=CUDA).to(memory_format=torch.channels_last)
    half = torch.randn(1000, device=CUDA).bfloat16()
    parts: dict[str, dict[str, Any]] = {
        "model": {"weights": weights, "half": half},
        "state": {"moments": [weights * 2], "rows": [{"step": 3}]},
    }
    expected = weights.cpu(), half.cpu()
    snapshot(parts).parts  # noqa: B018  # pinned memory is had once, and used again
    with no_waiting():
        sleep(A_SECOND)
        asleep = recorded()
        copied = snapshot(parts)
        weights.zero_()
        half.zero_()
        assert not asleep.query()
    found = copied.parts
    assert asleep.query()
    assert torch.equal(found["model"]["weights"], expected[0])
    assert torch.equal(found["model"]["half"], expected[1])
    assert torch.equal(found["state"]["moments"][0], expected[0] * 2)
    assert found["model"]["weights"].is_pinned()
    assert found["model"]["weights"].is_contiguous(memory_format=torch.channels_last)
    assert found["state"]["rows"] == [{"step": 3}]


# Numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_losses_in_mixed_precision_are_near_those_in_single_precision(precision: PrecisionName) -> None:
    """Same weights and images, no dropout: only the rounding differs, of layer upon layer."""
    batch = random_batch(precision)
    seen = []
    for name in ("fp32", precision):
        model = resnet(dropout=0.0)
        dtype = choose_precision(name, CUDA).input_dtype
        seen.append(
            taking(make_stepper(name, model=model), ImageBatch(batch.inputs.to(dtype), batch.targets, batch.ids))
        )
        convolution = torch.bfloat16 if name == "pure_bf16" else torch.float32
        assert {p.dtype for p in model.parameters() if p.ndim == 4} == {convolution}
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    torch.testing.assert_close(seen[1], seen[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_on_nan_leaves_weights_and_moments_bit_by_bit(precision: PrecisionName) -> None:
    """And the next, too, until the guard is read; but in fp16, where a step may be lost."""
    model = resnet()
    stepper, good = make_stepper(precision, model=model, clip=1.0), random_batch(precision)
    for step in range(8):  # what fp16 loses at first, to a scale too high, it has lost
        taking(stepper, good, seed=step)
    stepper.guard.read()
    before, statistics = updated(stepper), copies(dict(model.named_buffers()))
    scale, bad = stepper.scaler.get_scale(), spoiled(good)
    with no_waiting():
        taking(stepper, bad)
    assert same(updated(stepper), before)
    assert not same(dict(model.named_buffers()), statistics)
    taking(stepper, good)
    seen = stepper.guard.read()
    if precision == "fp16":
        assert (seen.bad, seen.skipped) == (None, 1)
        assert stepper.scaler.get_scale() == scale / 2
        assert not same(updated(stepper), before)
        return
    assert seen.bad == 0
    assert same(updated(stepper), before)
    assert stepper.guard.undo(2)
    assert same(dict(model.named_buffers()), statistics)


@pytest.mark.filterwarnings("ignore")  # the compiler gives advice, on TF32 and on small GPUs, that nobody asked for
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_have_losses_near_those_of_eager_ones_and_do_not_wait_either(precision: PrecisionName) -> None:
    pytest.importorskip("triton", reason="triton, with which torch compiles for a GPU, is not installed")
    batch, seen = random_batch(precision), []
    modes: tuple[Compile, ...] = ("off", "default")
    for mode in modes:
        stepper = make_stepper(precision, model=resnet(dropout=0.0), compile=mode)
        losses = [taking(stepper, batch) for _ in range(2)]
        with no_waiting():
            losses += [taking(stepper, batch) for _ in range(6)]
        seen.append(torch.stack(losses).mean(1))
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=tolerance, atol=tolerance)
    assert seen[0][-1] < 0.8 * seen[0][0]
    torch.testing.assert_close(seen[1], seen[0], rtol=0.1, atol=0.1)


# Out of memory ----------------------------------------------------------------------------------------------


def test_a_gpu_that_reports_no_memory_takes_the_step_in_halves_as_if_it_always_had() -> None:
    ends = []
    for splits, limit in ((1, 8), (2, 16)):
        told: list[int] = []
        model = place(Hungry(resnet(dropout=0.0), limit), choose_precision("fp32", CUDA), CUDA).train()
        stepper = Stepper(model, how("fp32"), splits=splits, on_split=told.append)
        optim.set_hyper(stepper.optimizer, [1e-3] * 3, 0.9)
        losses = taking(stepper, random_batch("fp32"))
        assert (stepper.splits, told) == (2, [2] if splits == 1 else [])
        ends.append({"losses": losses, **copies(dict(model.named_buffers()))})
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)
    assert ends[0]["model.body.bn1.num_batches_tracked"] == 2  # the whole batch's statistics were put back


class Scaled(nn.Module):
    """images (N, 3, H, W) -> cos(weight images), by channel. Gradients through it stay within a float's sight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 3)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.weight).cos()


class Deep(nn.Module):
    """Holds two activations of its images' size for each of its layers; no kernel has a workspace of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(*(Scaled() for _ in range(layers)))
        self.head = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))

    def groups(self) -> list[list[nn.Module]]:
        return [[self.body], [self.head]]


def test_a_batch_that_does_not_fit_is_split_until_it_does_and_gives_the_whole_batchs_gradients() -> None:
    """The memory is really gone: a block of it is held, and what is left is too little for the whole."""
    batch = random_batch("fp32", side_px=1024)  # 192 MiB

    def step(splits: int) -> tuple[Stepper, Tensor, int]:
        """The stepper, its gradients, and the bytes that were taken from the device."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        stepper = make_stepper("fp32", model=Deep(8), splits=splits)
        taking(stepper, batch)
        gradients = [p.grad for group in stepper.parameters for _, p in group if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        return stepper, flat, torch.cuda.max_memory_reserved() - before

    _, expected, whole_bytes = step(1)
    _, _, part_bytes = step(8)
    assert part_bytes < 0.5 * whole_bytes
    torch.cuda.empty_cache()
    left_bytes = (whole_bytes + part_bytes) // 2
    held = torch.empty(torch.cuda.mem_get_info(CUDA)[0] - left_bytes, dtype=torch.uint8, device=CUDA)
    try:
        stepper, found, _ = step(1)
    finally:
        del held
        torch.cuda.empty_cache()
    assert stepper.splits in (2, 4, 8)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
