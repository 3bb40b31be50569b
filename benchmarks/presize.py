"""What does one image cost from JPEG bytes to normalised tensor, and how good are its pixels?

The training stream's own work (presize, every default augmentation and a random resized crop) on JPEGs in memory, cut
from real photographs: through each engine and, on the CPU, through fastai's and torchvision's way (peers.py), which get
the same files and show the same views, and through fastai itself where it can be imported, at views of its own. Quality
is each way's distance from an ideal that none could afford, over the pixels that all of them see. What reading files
costs is not here (train.py measures whole loaders).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from thawline.benchmarks import peers
from thawline.benchmarks.harness import (
    BenchmarkError,
    DeviceName,
    Timing,
    check_positive,
    measure,
    open_device,
    report,
    say,
    spread,
    torch_threads,
)
from thawline.benchmarks.peers import Views
from thawline.benchmarks.photos import real_photos, write_photos
from thawline.dataio.batch import ImageBatch
from thawline.dataio.pixels import geometry, pictures, reference
from thawline.dataio.pixels.geometry import Floats, Geometry
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.pixels.spec import Border, ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.stream.renderer import default_threads
from thawline.trainer.step.precision import choose_precision

QUESTION = "what does one image cost from JPEG bytes to normalised tensor, and how good are its pixels?"
WIDTH, HEIGHT = 500, 375  # the usual size of the photos in Pets and ImageNet
SPEC = ImageSpec(size_px=224, presize_px=460, min_scale=0.75, ratio=(1.0, 1.0))
"""fastai's Resize(460) and aug_transforms(size=224, min_scale=.75), whose crop is square."""
SEED = 42
SUB = 8
FASTAI_BATCHES = (16, 64)
"""64 is fastai's default; on the CPU the smaller one may be cheaper, since its tensors are reused."""

Jpegs = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Piece:
    """A batch as each way wants it: the same files and the same views."""

    work: Work
    views: Views


@dataclass(frozen=True)
class Way:
    """One way to render: a stream of batches to time, one a piece, and what the warp left of a piece, 0 to 255."""

    stream: Callable[[Iterator[Piece]], Iterator[object]]
    pixels: Callable[[Piece], Floats] | None
    """None for a way that cannot be told which view to show."""
    batch: int
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Scene:
    """Images that quality is judged by, what they should look like, and where all ways look at the same."""

    piece: Piece
    ideals: list[Floats]
    seen: NDArray[np.bool_]
    """(n, size_px, size_px)"""

    def scores(self, way: Way) -> Floats:
        """PSNR of each image, (n,) dB; none for a way without pixels."""
        if way.pixels is None:
            return np.zeros(0)
        both = zip(way.pixels(self.piece), self.ideals, self.seen, strict=True)
        return np.array([psnr(image[seen], best[seen]) for image, best, seen in both])


def main(
    *,
    device: DeviceName = "cpu",
    images: int = 64,
    batch: int = 16,
    quality_images: int = 16,
    ways: tuple[str, ...] = (),
    threads: int = 0,
    repeats: int = 5,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure each engine on the same JPEGs and the same geometry; on the CPU, the peers too (peers.py).

    Args:
        device: Where DALI runs; the reference engine renders on the CPU and copies there.
        images: JPEGs in a repeat.
        batch: JPEGs an engine gets at once (fastai's way is measured at 16 and at 64).
        quality_images: How many of the files, and how many synthetic ones, are compared with the ideal.
        ways: Which are measured, such as "dali"; all that can run here unless given.
        threads: Threads an engine may use; 0 is 1 for the CPU, all cores beside a GPU.
        repeats: Measured passes over the images.
        out: Also write the JSON here.
    """
    check_positive(images=images, batch=batch, quality_images=quality_images)
    where = open_device(device)
    names = _chosen(ways, device)
    threads = threads or (1 if device == "cpu" else default_threads(1))
    say(f"making {images} JPEGs of {WIDTH} x {HEIGHT} and {2 * quality_images} ideals")
    size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "seed": SEED}
    jpegs = real_photos(images, **size)
    scenes = {"psnr_db": make_scene(real_photos(quality_images, **size))}
    scenes["psnr_synthetic_db"] = make_scene(write_photos(quality_images, **size))
    common: dict[str, Any] = {"device": where, "threads": threads, "dtype": choose_precision("auto", where).input_dtype}
    with torch_threads(threads):
        make = partial(_way, batch=batch, max_batch=max(batch, quality_images), common=common)
        results, scores = _measured(names, make, jpegs, scenes, device=where, repeats=repeats)
    if device == "cpu" and not ways:
        results["dali against fastai"] = _compared(results, scores)
    settings: dict[str, Any] = {"device": device, "images": images, "batch": batch, "threads": threads}
    settings |= {"quality_images": quality_images, "jpeg_px": [WIDTH, HEIGHT]}
    settings["jpeg_bytes"] = round(float(np.mean([len(jpeg) for jpeg in jpegs])))
    settings |= {"compared_share": float(scenes["psnr_db"].seen.mean()), "spec": asdict(SPEC)}
    settings["dtype"] = str(common["dtype"])
    return report("presize", QUESTION, settings, results, out=out)


def _measured(
    names: list[str],
    make: Callable[[str], Way],
    jpegs: Jpegs,
    scenes: dict[str, Scene],
    *,
    device: torch.device,
    repeats: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Floats]]]:
    """Speed and quality of each way, and its scores image by image; one way is there at a time."""
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Floats]] = {}
    for name in names:
        say(f"measuring {name}")
        way = make(name)
        scores[name] = {key: scene.scores(way) for key, scene in scenes.items()}
        timing = _timed(way, jpegs, device=device, repeats=repeats)
        way.close()
        quality = {key: spread(found) for key, found in scores[name].items() if len(found)}
        results[name] = {**timing.summary(), **quality}
    return results, scores


def make_piece(jpegs: Jpegs, first_id: int = 0) -> Piece:
    """The JPEGs, all WIDTH x HEIGHT, with SPEC's training geometry; ids count from first_id, targets are 0."""
    n = len(jpegs)
    ids, zeros = np.arange(first_id, first_id + n), np.zeros(n, np.int64)
    who: dict[str, Any] = {"seed": SEED, "epochs": zeros, "ids": ids}
    sizes: dict[str, Any] = {"widths": np.full(n, WIDTH, np.int32), "heights": np.full(n, HEIGHT, np.int32)}
    work = make_work(jpegs, geometry.draw(SPEC, **who, **sizes), ids, size_px=SPEC.size_px)
    return Piece(work, peers.draw(SPEC, width=WIDTH, height=HEIGHT, **who))


def make_work(jpegs: Jpegs, drawn: Geometry, ids: NDArray[np.int64], *, size_px: int) -> Work:
    """What an engine gets to render, targets 0."""
    return Work(
        encoded=list(jpegs),
        paths=[f"photo {i}" for i in ids],
        geometry=drawn,
        ids=ids,
        targets=np.zeros_like(ids),
        size_px=size_px,
        positions=ids,
    )


def make_scene(jpegs: Jpegs) -> Scene:
    """The JPEGs, their geometry and their ideals."""
    piece = make_piece(jpegs)
    ideals = [
        ideal(pictures.decode(jpeg), homography, size_px=SPEC.size_px, border=SPEC.border)
        for jpeg, homography in zip(jpegs, piece.views.totals, strict=True)
    ]
    return Scene(piece, ideals, peers.interior(piece.views, SPEC))


def _chosen(ways: tuple[str, ...], device: DeviceName) -> list[str]:
    """The ways to measure. Raises BenchmarkError for one that cannot run here."""
    every = _names(device)
    if unknown := [way for way in ways if way not in every]:
        raise BenchmarkError(f"ways: {unknown[0]!r} cannot be measured on {device} here; give {', '.join(every)}")
    return [name for name in every if name in (ways or every)]


def _names(device: DeviceName) -> list[str]:
    """The peers run on the CPU alone: beside a GPU there is nothing to compare them with."""
    names = ["dali", "reference"]
    if device != "cpu":
        return names
    names += [*(f"fastai, {n}" for n in FASTAI_BATCHES), "torchvision"]
    try:
        peers.fastai_itself(SPEC)
    except ImportError as error:
        say(f"fastai's own code is not measured, only its way written anew ({error})")
        return names
    return [*names, *(f"fastai itself, {n}" for n in FASTAI_BATCHES)]


def _way(name: str, batch: int, max_batch: int, common: dict[str, Any]) -> Way:
    kind, _, of = name.partition(", ")
    if kind == "fastai itself":
        run = peers.fastai_itself(SPEC)
        return Way(lambda pieces: run(p.work.encoded for p in pieces), pixels=None, batch=int(of))
    if kind == "fastai":
        return Way(
            lambda pieces: peers.fastai(((p.work.encoded, p.views) for p in pieces), SPEC),
            lambda piece: _hwc(255 * peers.fastai_pixels(piece.work.encoded, piece.views, SPEC)),
            batch=int(of),
        )
    if kind == "torchvision":
        return Way(
            lambda pieces: peers.torchvision(((p.work.encoded, p.views) for p in pieces), SPEC),
            lambda piece: _hwc(torch.stack(peers.torchvision_pixels(piece.work.encoded, piece.views, SPEC))),
            batch=batch,
        )
    engine = make_engine(name, SPEC, max_batch=max_batch, **common)
    return Way(
        lambda pieces: engine.run(piece.work for piece in pieces),
        lambda piece: rendered(engine, piece.work, SPEC),
        batch=batch,
        close=engine.close,
    )


def make_engine(name: str, spec: ImageSpec, *, max_batch: int, **common: Any) -> Any:
    """The reference engine or DALI's; `common` are its device, threads and dtype."""
    if name == "reference":
        return ReferenceEngine(spec, **common)
    from thawline.dataio.pixels.dali import DaliEngine

    return DaliEngine(spec, max_batch=max_batch, **common)


def rendered(engine: Any, work: Work, spec: ImageSpec) -> Floats:
    """What an engine's warp left of one batch: (N, H, W, 3) float64, 0 to 255."""
    (batch,) = engine.run(iter([work]))
    return pixels(batch, work, spec)


def pixels(batch: ImageBatch, work: Work, spec: ImageSpec) -> Floats:
    """Undo colour map and normalisation: (N, H, W, 3) float64 as the warp left them, 0 to 255."""
    mean, std = work.geometry.folded(spec)
    return _hwc(batch.inputs) * std[:, None, None].astype(np.float64) + mean[:, None, None]


def _hwc(images: torch.Tensor) -> Floats:
    found: Floats = images.permute(0, 2, 3, 1).double().cpu().numpy()
    return found


def _timed(way: Way, jpegs: Jpegs, *, device: torch.device, repeats: int) -> Timing:
    """Speed on all the files, over and over."""
    pieces = [make_piece(jpegs[start : start + way.batch], start) for start in range(0, len(jpegs), way.batch)]
    stream = way.stream(cycle(pieces))
    return measure(lambda: [next(stream) for _ in pieces], images_per_call=len(jpegs), device=device, repeats=repeats)


def _compared(results: dict[str, dict[str, Any]], scores: dict[str, dict[str, Floats]]) -> dict[str, Any]:
    """How many times DALI's CPU time each fastai takes, and how much worse its pixels are.

    gain: DALI's PSNR less fastai's, image by image; mean_gain: the same of their means over all images.
    """
    cost = {name: values["cpu_ms_per_image"]["median"] for name, values in results.items()}
    times = {f"cpu_times, {name}": cost[name] / cost["dali"] for name in cost if name.startswith("fastai")}
    fastai = scores[f"fastai, {FASTAI_BATCHES[0]}"]  # its batch changes no pixel
    gains = {key.replace("psnr", "gain"): spread(found - fastai[key]) for key, found in scores["dali"].items()}
    means = {
        key.replace("psnr", "mean_gain"): float(np.mean(found) - np.mean(fastai[key]))
        for key, found in scores["dali"].items()
    }
    return {**times, **gains, **means}


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
