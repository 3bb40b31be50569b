"""Does it hold on a GPU? Parity of mixed decoding, tensors handed over in place, a whole training."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.kit.images import (
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
from tests.kit.scenes import scenes
from thawline.dataio.labels.labels import by_parent, label
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import loaders
from thawline.dataio.table.draws import random_split
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import split
from thawline.models import create
from thawline.trainer import Learner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
CUDA = torch.device("cuda", 0)
SPEC = ImageSpec(size_px=64, presize_px=80, **EVERYTHING)


# DALI on the GPU -------------------------------------------------------------------------------------------


def test_mixed_decoding_is_close_to_the_reference_on_odd_images() -> None:
    """Chroma upsampling and the IDCT differ from libjpeg's, so the bound is lower than the CPU's 45 dB."""
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
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
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    n = 16
    size = np.full(n, 80, np.int32)
    ids = np.arange(n, dtype=np.int64)
    drawn = geometry.draw(SPEC, seed=1, epochs=ids, ids=ids, widths=size, heights=size)
    work = make_work([encode(photo(80, 80, seed=i), "PNG") for i in range(n)], drawn, size_px=SPEC.size_px)
    (gpu,), (cpu,) = (run_engine("dali", [work], SPEC, device=device) for device in (CUDA, torch.device("cpu")))
    assert psnr(pixels_of(gpu, work, SPEC), pixels_of(cpu, work, SPEC)).min() >= 45


def test_saturation_on_the_gpu_is_the_cpus() -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    spec = replace(SPEC, max_saturation=0.6)
    n = 16
    size, ids = np.full(n, 80, np.int32), np.arange(n, dtype=np.int64)
    drawn = geometry.draw(spec, seed=1, epochs=ids, ids=ids, widths=size, heights=size)
    work = make_work([encode(photo(80, 80, seed=i), "PNG") for i in range(n)], drawn, size_px=spec.size_px)
    (gpu,), (cpu,) = (run_engine("dali", [work], spec, device=device) for device in (CUDA, torch.device("cpu")))
    assert psnr(pixels_of(gpu, work, spec), pixels_of(cpu, work, spec)).min() >= 45


@pytest.mark.parametrize("task", ["mask", "points"])
def test_masks_and_points_on_the_gpu_are_the_references(tmp_path: Path, task: str) -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    manifest = scenes(tmp_path, task)
    ours = loaders(manifest, SPEC, batch=3, engine="dali", device=CUDA)[0].stream()
    oracle = loaders(manifest, SPEC, batch=3, engine="reference")[0].stream()
    for mine, theirs in islice(zip(ours, oracle, strict=True), 8):
        assert mine.targets.device == mine.inputs.device
        assert torch.equal(mine.ids, theirs.ids)
        if task == "points":
            assert torch.equal(mine.targets.cpu(), theirs.targets)
        else:
            assert (mine.targets.cpu() == theirs.targets).float().mean() > 0.998  # ties of rounding, at edges


def test_a_file_that_the_gpus_decoder_refuses_is_quarantined(
    own_flat: Manifest, capfd: pytest.CaptureFixture[str]
) -> None:
    """Cut short behind the manifest's back: the pipeline breaks, and a new one goes on at the same place."""
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    train, _ = loaders(own_flat, SPEC, batch=4, device=CUDA, engine="dali", max_quarantined=0.5)
    number = int(train.subset.ids[3])
    file = Path(own_flat.root) / own_flat.rows["path"][number].as_py()
    file.write_bytes(file.read_bytes()[:150])
    subset = replace(train.subset, table=own_flat.rows.drop_columns(["hash"]).append_column("hash", [[0] * 16]))
    trusting = replace(train, source=replace(train.source, subset=subset))
    stream = [i for batch in first(trusting, 9) for i in batch.ids.tolist()]
    assert number not in stream
    assert len(stream) == 36
    capfd.readouterr()  # nvImageCodec writes to stderr by itself


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_batches_lie_on_the_gpu_as_channels_last_in_torchs_own_memory(
    flat: Manifest, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    lent = lent_memory(monkeypatch)
    for loader in loaders(flat, SPEC, batch=8, device=device, dtype=torch.float16, engine="dali"):
        (batch,) = first(loader, 1)
        assert batch.inputs.device == batch.targets.device == CUDA
        assert batch.ids.device.type == "cpu"
        assert batch.inputs.dtype == torch.float16
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        assert batch.inputs.data_ptr() not in lent  # DALI would take it back before torch's stream is done with it
        assert batch.targets.data_ptr() not in lent
        lent.clear()
        loader.close()


def test_ids_arrive_beside_their_pixels_and_kept_batches_stay_as_they_were(flat: Manifest) -> None:
    pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
    spec = ImageSpec(size_px=16, presize_px=16, **{**EVERYTHING, "max_lighting": 0.0})
    for loader in loaders(flat, spec, batch=8, device=CUDA, engine="dali"):
        kept = first(loader, 12)
        torch.cuda.synchronize()
        assert len(kept) == (12 if loader.order.endless else 2)
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
    learn = Learner(create("resnet18", 3, weights="none", seed=0).to(CUDA), train, valid, precision="bf16", log_every=2)
    start = learn.validate()["valid_loss"]
    learn.fit_one_cycle(5, 3e-3)
    losses = [float(row["loss"] or 0) for row in learn.recorder.rows if row["kind"] == "train"]
    found = learn.validate()
    learn.close()
    assert next(learn.model.parameters()).device == CUDA
    assert losses[-1] < 0.5 * losses[0]
    assert found["valid_loss"] < 0.5 * start
    assert found["error_rate"] < 0.1
