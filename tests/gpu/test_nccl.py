"""Do ranks train as one over NCCL? And is what they tell one another on the host not in its way?"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.gpu.steps import CUDA, SINGLE, make_stepper, no_waiting, plain, random_batch, taking, weights_of
from thawline.dataio.batch import ImageBatch
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.step import world
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.guard import Guard
from thawline.trainer.step.precision import choose_precision, place
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.reduction import Reduction
from thawline.trainer.step.step import StepSettings, train_step
from thawline.trainer.step.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
    # torch says so once when the mode is switched on; what it does detect is what these tests rest on.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
BACKENDS = "cpu:gloo,cuda:nccl"  # as cluster.launch.launch sets it up


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(CUDA)
    dist.init_process_group(BACKENDS, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain_steps(wrap: Callable[[nn.Module], Reduction]) -> tuple[Reduction, Callable[[], Tensor], nn.Module]:
    """A function that takes a step of `Plain`, all parts put together by hand."""
    precision = choose_precision("fp32", CUDA)
    model = place(plain(), precision, CUDA).train()
    optimizer = optim.build([list(model.named_parameters())], OptimSettings(), device=CUDA)
    optim.set_hyper(optimizer, [1e-3], 0.9)
    reduction, scaler = wrap(model), torch.amp.GradScaler("cuda", enabled=False)
    guard, batch = Guard(model, CUDA), random_batch("fp32")
    settings = StepSettings(CUDA, precision, SINGLE, OptimSettings(), global_batch=16)

    def step() -> Tensor:
        return train_step(
            lambda: batch,
            settings=settings,
            reduction=reduction,
            optimizer=optimizer,
            scaler=scaler,
            guard=guard,
            micro_batches=2,
        )

    return reduction, step, model


@pytest.mark.usefixtures("one_process_group")
def test_ddp_over_nccl_trains_as_the_bare_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank is not wrapped by itself, so `Reduction` is told of two; NCCL then sums over the one there is."""
    ends = []
    for wrapped in (False, True):

        def wrap(model: nn.Module, ranks: int = 1 + wrapped) -> Reduction:
            with monkeypatch.context() as patch:
                patch.setattr(world, "world_size", lambda: ranks)
                return Reduction(model, CUDA, busy=Busy(CUDA))

        reduction, step, model = plain_steps(wrap)
        assert isinstance(reduction.local(), contextlib.nullcontext) != wrapped
        for _ in range(2):  # DDP lays its buckets out anew after the first step
            step()
        with no_waiting():
            step()
        ends.append(weights_of(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_process_group")
def test_bytes_are_gathered_on_the_host_beside_nccl() -> None:
    """The window's gather goes through gloo: were it NCCL, reading its sizes back would wait for the GPU."""
    mine = torch.arange(4, dtype=torch.uint8)
    values = [torch.zeros_like(mine)]
    with no_waiting():
        dist.all_gather(values, mine)
    assert values[0].tolist() == [0, 1, 2, 3]
    window = Window()
    window.add(ids=torch.arange(4), losses=torch.full((4,), 2.0, device=CUDA), data_wait_s=0.5)
    reading = window.close(guard=Guard(plain().to(CUDA), CUDA), busy=Busy(CUDA), stop=True)
    assert (reading.loss, reading.data_wait_s, reading.stop) == (2.0, 0.5, True)


def two_ranks(rank: int, port: int, folder: str) -> None:
    """Three steps on this rank's half of the batch, a window's close, and the weights written down."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(BACKENDS, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    precision = choose_precision("fp32", device)
    model, window, whole = place(plain(), precision, device).train(), Window(), random_batch("fp32")
    options = StepSettings(
        device=device, precision=precision, loss=SINGLE, optim_settings=OptimSettings(), global_batch=16
    )
    stepper = Stepper(model, options, splits=1, on_split=lambda splits: None)
    optim.set_hyper(stepper.optimizer, [1e-3, 1e-3], 0.9)
    half = slice(8 * rank, 8 * rank + 8)
    batch = ImageBatch(whole.inputs[half].to(device), whole.targets[half].to(device), whole.ids[half])
    for _ in range(3):
        window.add(ids=batch.ids, losses=taking(stepper, batch), data_wait_s=float(rank))
    reading = window.close(guard=stepper.guard, busy=stepper.busy, stop=rank == 1)
    facts = (reading.images, reading.loss, reading.data_wait_s, reading.stop, len(reading.busy_s))
    ids = [step.tolist() for step in reading.ids]
    torch.save({"weights": weights_of(model), "facts": facts, "ids": ids}, f"{folder}/{rank}.pt")
    stepper.close()
    dist.destroy_process_group()


def test_two_gpus_train_as_one_and_read_one_window(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and torch sees {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two_ranks, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, batch, window = plain(), random_batch("fp32"), Window()
    stepper = make_stepper("fp32", model=model)
    for _ in range(3):
        window.add(ids=batch.ids, losses=taking(stepper, batch), data_wait_s=0.5)
    loss = window.close(guard=stepper.guard, busy=stepper.busy, stop=False).loss
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], weights_of(model), rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert rank["ids"] == [list(range(16))] * 3
        images, mean, wait, stop, busy_ranks = rank["facts"]
        assert (images, wait, stop, busy_ranks) == (48, 1.5, True, 2)
        assert mean == pytest.approx(loss, rel=1e-5)
