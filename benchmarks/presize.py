"""What does one image cost from JPEG bytes to normalised tensor, and how good are its pixels?

The training stream's own work (presize, every default augmentation and a random resized crop) on photo-like JPEGs that
lie in memory, through each engine. Quality is each engine's distance from an ideal that no engine could afford. What
reading files costs is not here (train.py measures whole loaders).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.harness import DeviceName, check_positive, measure, open_device, report, say, spread, torch_threads
from benchmarks.photos import write_photos
from dataio import geometry, reference
from dataio.batch import Batch
from dataio.geometry import Floats, Geometry
from dataio.loader import default_threads
from dataio.reference import ReferenceEngine
from dataio.spec import Border, ImageSpec
from dataio.work import Work
from trainer.step import choose_precision

QUESTION = "what does one image cost from JPEG bytes to normalised tensor, and how good are its pixels?"
WIDTH, HEIGHT = 500, 375  # the usual size of the photos in Pets and ImageNet
SPEC = ImageSpec(size_px=224, presize_px=460, min_scale=0.75)
SEED = 42
SUB = 8

Run = Callable[[Iterator[Work]], Iterator[Batch]]


def main(
    *,
    device: DeviceName = "cpu",
    images: int = 64,
    batch: int = 16,
    quality_images: int = 16,
    threads: int = 0,
    repeats: int = 5,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure each engine on the same JPEGs and the same geometry.

    Args:
        device: Where DALI runs; the reference engine renders on the CPU and copies there.
        images: JPEGs in a repeat.
        batch: JPEGs an engine gets at once.
        quality_images: How many of them are compared with the ideal.
        threads: Threads an engine may use; 0 is 1 for the CPU, all cores beside a GPU.
        repeats: Measured passes over the images.
        out: Also write the JSON here.
    """
    check_positive(images=images, batch=batch, quality_images=quality_images)
    where = open_device(device)
    threads = threads or (1 if device == "cpu" else default_threads(1))
    say(f"making {images} JPEGs of {WIDTH} x {HEIGHT}")
    works = make_works(write_photos(images, width=WIDTH, height=HEIGHT, seed=SEED), batch)
    ideals = _ideals(works, min(quality_images, images))
    common: dict[str, Any] = {"device": where, "threads": threads, "dtype": choose_precision("auto", where).input_dtype}
    results = {}
    with torch_threads(threads):
        for name in ("dali", "reference"):
            say(f"measuring {name}")
            engine = _engine(name, batch, common)
            results[name] = _measured(engine.run, works, ideals, device=where, repeats=repeats)
            engine.close()
    size = float(np.mean([len(encoded) for work in works for encoded in work.encoded]))
    settings = {
        "device": device,
        "images": images,
        "batch": batch,
        "threads": threads,
        "quality_images": len(ideals),
        "jpeg_px": [WIDTH, HEIGHT],
        "jpeg_bytes": round(size),
        "spec": asdict(SPEC),
        "dtype": str(common["dtype"]),
    }
    return report("presize", QUESTION, settings, results, out=out)


def make_works(jpegs: Sequence[NDArray[np.uint8]], batch: int) -> list[Work]:
    """The JPEGs, all WIDTH x HEIGHT, in batches with SPEC's training geometry; ids count from 0, targets are 0."""
    return [_work(jpegs[start : start + batch], start) for start in range(0, len(jpegs), batch)]


def _work(jpegs: Sequence[NDArray[np.uint8]], first_id: int) -> Work:
    n = len(jpegs)
    ids, zeros = np.arange(first_id, first_id + n), np.zeros(n, np.int64)
    widths, heights = np.full(n, WIDTH, np.int32), np.full(n, HEIGHT, np.int32)
    drawn = geometry.draw(SPEC, seed=SEED, epochs=zeros, ids=ids, widths=widths, heights=heights)
    paths = [f"photo {i}" for i in ids]
    return Work(encoded=list(jpegs), paths=paths, geometry=drawn, ids=ids, targets=zeros)


def _engine(name: str, batch: int, common: dict[str, Any]) -> Any:
    if name == "reference":
        return ReferenceEngine(SPEC, **common)
    from dataio.dali import DaliEngine

    return DaliEngine(SPEC, max_batch=batch, target=(np.dtype(np.int64), 0), **common)


def _measured(
    run: Run, works: Sequence[Work], ideals: Sequence[Floats], *, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Quality on the first images, then speed on all of them, over and over."""
    found = [image for work, done in zip(works, run(iter(works)), strict=True) for image in pixels(done, work)]
    quality = spread([psnr(image, best) for image, best in zip(found, ideals, strict=False)])
    stream = run(cycle(works))
    timing = measure(
        lambda: [next(stream) for _ in works],
        images_per_call=sum(len(work.ids) for work in works),
        device=device,
        repeats=repeats,
    )
    return {**timing.summary(), "psnr_db": quality}


def pixels(batch: Batch, work: Work) -> Floats:
    """Undo colour map and normalisation: (N, H, W, 3) float64 as the warp left them, 0 to 255."""
    mean, std = work.geometry.folded(SPEC)
    images: Floats = batch.images.permute(0, 2, 3, 1).double().cpu().numpy()
    return images * std[:, None, None].astype(np.float64) + mean[:, None, None]


def _ideals(works: Sequence[Work], count: int) -> list[Floats]:
    found: list[Floats] = []
    for work in works:
        for encoded, homography in zip(work.encoded, from_source(work.geometry, WIDTH, HEIGHT), strict=True):
            if len(found) == count:
                return found
            source = reference.decode(encoded)
            found.append(ideal(source, homography, size_px=SPEC.size_px, border=SPEC.border))
    return found


def from_source(drawn: Geometry, width: int, height: int) -> Floats:
    """The homographies with any prefilter taken out: output pixel -> pixel of the decoded source, (n, 3, 3)."""
    source = np.array([height, width], np.float64)
    ratio = np.where(drawn.prefilter_px > 0, source / np.maximum(drawn.prefilter_px, 1), 1.0)
    back: Floats = np.stack([ratio[:, 1], ratio[:, 0], np.ones(len(ratio))], axis=1)[:, :, None]
    return back * drawn.homographies


def ideal(source: NDArray[np.uint8], homography: Floats, *, size_px: int, border: Border, sub: int = SUB) -> Floats:
    """What an output pixel would be if it gathered all the light that falls on it: (size_px, size_px, 3) float64.

    sub x sub bilinear samples of the decoded source (H, W, 3), evenly over each output pixel, averaged.
    """
    finer = homography @ np.diag([1 / sub, 1 / sub, 1.0])
    samples = reference.warp(torch.from_numpy(source).double(), finer, size_px=sub * size_px, border=border)
    averaged: Floats = F.avg_pool2d(samples.permute(2, 0, 1), sub).permute(1, 2, 0).numpy()
    return averaged


def psnr(image: Floats, best: Floats) -> float:
    """Peak signal-to-noise ratio in dB, the peak being 255."""
    return float(10 * np.log10(255**2 / np.mean((image - best) ** 2)))
