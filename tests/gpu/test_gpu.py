"""Does it hold on a GPU? Parity of mixed decoding, tensors handed over in place, training, no waiting, NCCL."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataio import geometry
from dataio.batch import Batch
from dataio.labels import by_parent, label
from dataio.loader import loaders
from dataio.manifest import Manifest
from dataio.sources import from_folder
from dataio.spec import ImageSpec
from dataio.splits import random_split, split
from models import create, groups
from tests.images import (
    EVERYTHING,
    PLAIN,
    colour_numbers,
    encode,
    first,
    lent_memory,
    make_work,
    odd_files,
    photo,
    pixels_of,
    psnr,
    run_engine,
    upright_sizes,
)
from tests.scenes import scenes
from trainer import Learner, optim, world
from trainer.losses import default_loss
from trainer.step import PrecisionName, choose_precision, distribute, train_step
from trainer.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
    # torch says so once when the mode is switched on; what it does detect is what these tests rest on.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
CUDA = torch.device("cuda", 0)
BACKENDS = "cpu:gloo,cuda:nccl"  # as cluster.launch sets it up
SPEC = ImageSpec(size_px=64, presize_px=80, **EVERYTHING)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_step(
    precision: PrecisionName, *, model: nn.Module | None = None, classes: int = 10
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model on the GPU, its optimiser, and what else `train_step` wants."""
    model = model or create("resnet18", classes, seed=0)
    model = model.to(CUDA, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = optim.build(groups.parameter_groups(model), device=CUDA)
    optim.set_hyper(optimizer, [1e-3] * 3, 0.9)
    kind = choose_precision(precision, CUDA)
    scaler = torch.amp.GradScaler("cuda", enabled=kind.scaled)
    return model, optimizer, {"loss": default_loss("single_label"), "scaler": scaler, "precision": kind}


def random_batch(precision: PrecisionName, count: int = 16) -> Batch:
    dtype = choose_precision(precision, CUDA).input_dtype
    draw = torch.Generator().manual_seed(1)
    images = torch.randn((count, 3, 64, 64), generator=draw).to(CUDA, dtype, memory_format=torch.channels_last)
    return Batch(images, torch.arange(count, device=CUDA) % 10, torch.arange(count))


# DALI on the GPU -------------------------------------------------------------------------------------------


def test_mixed_decoding_is_close_to_the_reference_on_odd_images() -> None:
    """Chroma upsampling and the IDCT differ from libjpeg's, so the bound is lower than the CPU's 45 dB."""
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    files = odd_files()
    widths, heights = upright_sizes(files.values())
    n, found = len(files), dict[str, float]()
    for epoch in range(4):
        ids, epochs = np.arange(n, dtype=np.int64), np.full(n, epoch, np.int64)
        drawn = geometry.draw(SPEC, seed=42, epochs=epochs, ids=ids, widths=widths, heights=heights)
        work = make_work(list(files.values()), drawn, size_px=SPEC.size_px)
        (ours,) = run_engine("dali", [work], SPEC, device=CUDA)
        (oracle,) = run_engine("reference", [work], SPEC)
        db = psnr(pixels_of(ours, work, SPEC), pixels_of(oracle, work, SPEC))
        found |= {f"{name} in epoch {epoch}": round(float(v), 1) for name, v in zip(files, db, strict=True)}
    assert not {name: db for name, db in found.items() if db < 35}
    assert np.median(list(found.values())) >= 40


def test_a_png_is_warped_on_the_gpu_as_on_the_cpu() -> None:
    """Without a JPEG the decoders agree, so what differs is the warp and the normalisation alone."""
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    n = 16
    size = np.full(n, 80, np.int32)
    ids = np.arange(n, dtype=np.int64)
    drawn = geometry.draw(SPEC, seed=1, epochs=ids, ids=ids, widths=size, heights=size)
    work = make_work([encode(photo(80, 80, seed=i), "PNG") for i in range(n)], drawn, size_px=SPEC.size_px)
    (gpu,), (cpu,) = (run_engine("dali", [work], SPEC, device=device) for device in (CUDA, torch.device("cpu")))
    assert psnr(pixels_of(gpu, work, SPEC), pixels_of(cpu, work, SPEC)).min() >= 45


def test_saturation_on_the_gpu_is_the_cpus() -> None:
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    spec = replace(SPEC, max_saturation=0.6)
    n = 16
    size, ids = np.full(n, 80, np.int32), np.arange(n, dtype=np.int64)
    drawn = geometry.draw(spec, seed=1, epochs=ids, ids=ids, widths=size, heights=size)
    work = make_work([encode(photo(80, 80, seed=i), "PNG") for i in range(n)], drawn, size_px=spec.size_px)
    (gpu,), (cpu,) = (run_engine("dali", [work], spec, device=device) for device in (CUDA, torch.device("cpu")))
    assert psnr(pixels_of(gpu, work, spec), pixels_of(cpu, work, spec)).min() >= 45


@pytest.mark.parametrize("task", ["mask", "points"])
def test_masks_and_points_on_the_gpu_are_the_references(tmp_path: Path, task: str) -> None:
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    manifest = scenes(tmp_path, task)
    ours = loaders(manifest, SPEC, batch=3, engine="dali", device=CUDA)[0].stream()
    oracle = loaders(manifest, SPEC, batch=3, engine="reference")[0].stream()
    for mine, theirs in islice(zip(ours, oracle, strict=True), 8):
        assert mine.targets.device == mine.images.device
        assert torch.equal(mine.ids, theirs.ids)
        if task == "points":
            assert torch.equal(mine.targets.cpu(), theirs.targets)
        else:
            assert (mine.targets.cpu() == theirs.targets).float().mean() > 0.998  # ties of rounding, at edges


def test_a_file_that_the_gpus_decoder_refuses_is_quarantined(
    own_flat: Manifest, capfd: pytest.CaptureFixture[str]
) -> None:
    """Cut short behind the manifest's back: the pipeline breaks, and a new one goes on at the same place."""
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    train, _ = loaders(own_flat, SPEC, batch=4, device=CUDA, engine="dali", max_quarantined=0.5)
    number = int(train.part.ids[3])
    file = Path(own_flat.root) / own_flat.rows["path"][number].as_py()
    file.write_bytes(file.read_bytes()[:150])
    part = replace(train.part, table=own_flat.rows.drop_columns(["hash"]).append_column("hash", [[0] * 16]))
    stream = [i for batch in first(replace(train, part=part), 9) for i in batch.ids.tolist()]
    assert number not in stream
    assert len(stream) == 36
    capfd.readouterr()  # nvImageCodec writes to stderr by itself


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_batches_lie_on_the_gpu_as_channels_last_in_torchs_own_memory(
    flat: Manifest, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    lent = lent_memory(monkeypatch)
    for loader in loaders(flat, SPEC, batch=8, device=device, dtype=torch.float16, engine="dali"):
        (batch,) = first(loader, 1)
        assert batch.images.device == batch.targets.device == CUDA
        assert batch.ids.device.type == "cpu"
        assert batch.images.dtype == torch.float16
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.ids.data_ptr() == lent[-1]
        assert batch.images.data_ptr() not in lent  # DALI would take it back before torch's stream is done with it
        assert batch.targets.data_ptr() not in lent
        lent.clear()
        loader.close()


def test_ids_arrive_beside_their_pixels_and_kept_batches_stay_as_they_were(flat: Manifest) -> None:
    pytest.importorskip("dataio.dali", reason="DALI is not installed")
    spec = ImageSpec(size_px=16, presize_px=16, **{**EVERYTHING, "max_lighting": 0.0})
    for loader in loaders(flat, spec, batch=8, device=CUDA, engine="dali"):
        kept = first(loader, 12)
        torch.cuda.synchronize()
        assert len(kept) == (12 if loader.train else 2)
        for batch in kept:  # read only now: later batches must not have been written over earlier ones
            assert colour_numbers(loader, batch) == batch.ids.tolist()
            assert batch.targets.tolist() == [i % 3 for i in batch.ids.tolist()]
        loader.close()


# Training --------------------------------------------------------------------------------------------------


def striped_manifest(folder: Path, *, count: int = 240) -> Manifest:
    """Stripes that lie, stand or slope, in random phase and colour: three classes that a small model tells apart."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    for i in range(count):
        along = (x, y, x + y)[i % 3]
        wave = 0.5 + 0.5 * np.sin(along * draw.uniform(0.5, 0.9) + draw.uniform(0, 6))
        path = folder / ("standing", "lying", "sloping")[i % 3] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((wave[..., None] * draw.uniform(80, 255, 3)).astype(np.uint8)).save(path, quality=92)
    return split(label(from_folder(folder), by_parent()), random_split(valid=0.2, seed=0))


def test_a_learner_in_bf16_learns_stripes(tmp_path: Path) -> None:
    spec = ImageSpec(size_px=48, presize_px=48, **PLAIN)
    train, valid = loaders(striped_manifest(tmp_path), spec, batch=32, device=CUDA, dtype=torch.float16)
    learn = Learner(create("resnet18", 3, seed=0).to(CUDA), train, valid, precision="bf16", log_every=2)
    start = learn.validate()["valid_loss"]
    learn.fit_one_cycle(5, 3e-3)
    losses = [float(row["loss"] or 0) for row in learn.recorder.rows if row["kind"] == "train"]
    found = learn.validate()
    learn.close()
    assert next(learn.model.parameters()).device == CUDA
    assert losses[-1] < 0.5 * losses[0]
    assert found["valid_loss"] < 0.5 * start
    assert found["error_rate"] < 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_train_step_never_waits_for_the_gpu(precision: PrecisionName) -> None:
    model, optimizer, rest = make_step(precision)
    assert all(group["fused"] for group in optimizer.param_groups)
    batch, window = random_batch(precision), Window()
    losses = train_step(model, batch, optimizer=optimizer, share=16, **rest)  # cuDNN chooses, state is made
    window.add(ids=batch.ids, losses=losses, data_wait_s=0.0)
    with no_waiting():
        for _ in range(3):
            optim.set_hyper(optimizer, [2e-3] * 3, 0.85)
            losses = train_step(model, batch, optimizer=optimizer, share=16, **rest)
            window.add(ids=batch.ids, losses=losses, data_wait_s=0.0)
    reading = window.close(stop=False, save_due=False, lost={})
    assert (reading.steps, reading.images) == (4, 64)
    assert np.isfinite(reading.loss)


def test_the_debug_mode_would_have_caught_a_wait() -> None:
    value = torch.ones(3, device=CUDA)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        float(value.sum())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_in_mixed_precision_are_near_those_in_single_precision(precision: PrecisionName) -> None:
    """Same weights and images, no dropout: only the rounding differs, of layer upon layer."""
    seen = []
    for name in ("fp32", precision):
        model, optimizer, rest = make_step(name)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        batch = random_batch(precision)
        batch = Batch(batch.images.to(rest["precision"].input_dtype), batch.targets, batch.ids)
        seen.append(train_step(model, batch, optimizer=optimizer, share=16, **rest))
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(seen[1], seen[0], rtol=0.1, atol=0.1)


# NCCL ------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A small model without BatchNorm or dropout, so that two halves of a batch make the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))

    def groups(self) -> list[list[nn.Module]]:
        return [[self.body], [self.head]]


def plain() -> Plain:
    torch.manual_seed(3)
    return Plain()


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(CUDA)
    dist.init_process_group(BACKENDS, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_ddp_over_nccl_trains_as_the_bare_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank is not wrapped by itself, so `distribute` is told of two; NCCL then averages over the one there is."""
    batch, ends = random_batch("fp32"), []
    for wrapped in (False, True):
        model, optimizer, rest = make_step("fp32", model=plain())
        with monkeypatch.context() as patch:
            if wrapped:
                patch.setattr(world, "world_size", lambda: 2)
            trained = distribute(model, CUDA)
        assert isinstance(trained, DistributedDataParallel) == wrapped
        for _ in range(2):  # with a static graph, DDP builds its buckets in the first steps
            train_step(trained, batch, optimizer=optimizer, share=16, **rest)
        with no_waiting():
            train_step(trained, batch, optimizer=optimizer, share=16, **rest)
        ends.append(weights_of(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_process_group")
def test_objects_are_gathered_on_the_host_beside_nccl() -> None:
    """The window's gather goes through gloo: were it NCCL, reading its sizes back would wait for the GPU."""
    mine = (np.arange(4), 1.5, False)
    values: list[Any] = [None]
    with no_waiting():
        dist.all_gather_object(values, mine)
    assert values[0][0].tolist() == [0, 1, 2, 3]
    assert values[0][1:] == mine[1:]
    window = Window()
    window.add(ids=torch.arange(4), losses=torch.full((4,), 2.0, device=CUDA), data_wait_s=0.5)
    reading = window.close(stop=True, save_due=False, lost={})
    assert (reading.loss, reading.data_wait_s, reading.stop) == (2.0, 0.5, True)


def two_ranks(rank: int, port: int, folder: str) -> None:
    """Three steps on this rank's half of the batch, a window's close, and the weights written down."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(BACKENDS, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = plain().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.build(groups.parameter_groups(model), device=device)
    optim.set_hyper(optimizer, [1e-3, 1e-3], 0.9)
    trained, window, whole = distribute(model, device), Window(), random_batch("fp32")
    half = slice(8 * rank, 8 * rank + 8)
    batch = Batch(whole.images[half].to(device), whole.targets[half].to(device), whole.ids[half])
    rest: dict[str, Any] = {"loss": default_loss("single_label"), "precision": choose_precision("fp32", device)}
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    for _ in range(3):
        losses = train_step(trained, batch, optimizer=optimizer, scaler=scaler, share=8, **rest)
        window.add(ids=batch.ids, losses=losses, data_wait_s=float(rank))
    reading = window.close(stop=rank == 1, save_due=rank == 0, lost={})
    facts = (reading.images, reading.loss, reading.data_wait_s, reading.stop, reading.save_due)
    weights = weights_of(model)
    ids = [step.tolist() for step in reading.ids]
    torch.save({"weights": weights, "facts": facts, "ids": ids}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gpus_train_as_one_and_read_one_window(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and torch sees {torch.cuda.device_count()}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two_ranks, args=(port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, optimizer, rest = make_step("fp32", model=plain())
    batch, window = random_batch("fp32"), Window()
    for _ in range(3):
        losses = train_step(model, batch, optimizer=optimizer, share=16, **rest)
        window.add(ids=batch.ids, losses=losses, data_wait_s=0.5)
    alone = weights_of(model)
    loss = window.close(stop=False, save_due=False, lost={}).loss
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    torch.testing.assert_close(ranks[0]["weights"], alone, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert rank["ids"] == [list(range(16))] * 3
        images, mean, wait, stop, save_due = rank["facts"]
        assert (images, wait, stop, save_due) == (48, 1.5, True, True)
        assert mean == pytest.approx(loss, rel=1e-5)
