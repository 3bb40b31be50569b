"""Which images do tests use? Synthetic images with known content, manifests over them, and how alike two are.

Everything is a function of its arguments: no test depends on a download or on another test's files.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from thawline.dataio.batch import ImageBatch
from thawline.dataio.labels.labels import from_lists
from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.stream.loader import ImageLoader
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.splits import by_folder, split

Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"flip": False, "rotate_deg": 0.0, "max_zoom": 1.0, "max_warp": 0.0, "max_lighting": 0.0}
EVERYTHING: dict[str, Any] = {
    "rotate_deg": 30.0,
    "max_warp": 0.3,
    "min_scale": 0.5,
    "max_zoom": 1.3,
    "max_lighting": 0.4,
}
SIZES = [(31, 57), (57, 31), (33, 33), (97, 640), (640, 97), (200, 90), (90, 333), (500, 375), (375, 500), (1000, 700)]


def photo(width: int, height: int, *, seed: int = 0) -> Pixels:
    """(height, width, 3) uint8: waves in many directions, the weaker the finer, and two discs with soft edges."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    image = np.zeros((height, width, 3))
    for _ in range(12):
        angle, cycles = draw.uniform(0, 2 * np.pi), draw.uniform(0.5, 8)
        wave = np.cos(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + draw.uniform(0, 2 * np.pi))
        image += wave[..., None] * draw.normal(size=3) / (1 + cycles)
    for _ in range(2):
        (cx, cy), radius = draw.uniform(0, 1, 2), draw.uniform(0.1, 0.3)
        image += np.tanh((radius - np.hypot(x - cx, y - cy)) * 40)[..., None] * draw.normal(size=3) / 4
    low, high = image.min(), image.max()
    return ((image - low) / (high - low) * 255).round().astype(np.uint8)


def encode(pixels: Pixels, kind: str = "JPEG", *, orientation: int = 1, mode: str = "RGB") -> Pixels:
    """The bytes of a file, (bytes,) uint8; a JPEG at quality 92, with an EXIF orientation if it is not 1."""
    image, options = Image.fromarray(pixels).convert(mode), dict[str, Any]()
    if kind == "JPEG":
        options["quality"] = 92
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def odd_files() -> dict[str, Pixels]:
    """Encoded photos by name: odd sizes and aspects, kinds of files, every EXIF orientation."""
    files = {f"{w}x{h}.jpg": encode(photo(w, h, seed=i)) for i, (w, h) in enumerate(SIZES)}
    files["grey.jpg"] = encode(photo(120, 77, seed=20), mode="L")
    files["grey.png"] = encode(photo(77, 120, seed=21), "PNG", mode="L")
    files["alpha.png"] = encode(
        np.dstack([photo(101, 64, seed=22), photo(101, 64, seed=23)[..., 0]]), "PNG", mode="RGBA"
    )
    files["palette.png"] = encode(photo(64, 101, seed=24), "PNG", mode="P")
    files |= {f"turned{o}.jpg": encode(photo(96, 61, seed=30 + o), orientation=o) for o in range(1, 9)}
    return files


def upright_sizes(encoded: Iterable[Pixels]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Widths and heights after EXIF orientation, (n,) int32 each."""
    shapes = [decode(file).shape for file in encoded]
    return np.array([s[1] for s in shapes], np.int32), np.array([s[0] for s in shapes], np.int32)


def make_work(encoded: Sequence[Pixels], geometry: Geometry, *, size_px: int, masks: Any = None) -> Work:
    """Work for the engines, with ids and targets 0, 1, 2, ..."""
    ids = np.arange(len(encoded), dtype=np.int64)
    return Work(
        encoded=list(encoded),
        paths=[f"image{i}" for i in ids],
        geometry=geometry,
        ids=ids,
        targets=ids.copy(),
        size_px=size_px,
        positions=ids.copy(),
        masks=masks,
    )


def take_work(work: Work, rows: Sequence[int]) -> Work:
    """The same samples in another batch."""
    index = np.array(rows)
    g = work.geometry
    return Work(
        encoded=[work.encoded[i] for i in rows],
        paths=[work.paths[i] for i in rows],
        geometry=Geometry(*(getattr(g, f.name)[index] for f in fields(g))),
        ids=work.ids[index],
        targets=work.targets[index],
        size_px=work.size_px,
        positions=work.positions[index],
        masks=None if work.masks is None else [work.masks[i] for i in rows],
    )


def run_engine(
    name: str,
    works: Sequence[Work],
    spec: ImageSpec,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    max_batch: int | None = None,
) -> list[ImageBatch]:
    """Every batch that an engine makes of the works; they are kept alive together."""
    engine: Any
    if name == "reference":
        engine = ReferenceEngine(spec, device=device, dtype=dtype, threads=1)
    else:
        from thawline.dataio.pixels.dali import DaliEngine

        largest = max_batch or max(len(work.ids) for work in works)
        masks = works[0].masks is not None
        engine = DaliEngine(spec, device=device, dtype=dtype, threads=1, max_batch=largest, masks=masks)
    with engine:
        return list(engine.run(iter(works)))


def pixels_of(batch: ImageBatch, work: Work, spec: ImageSpec) -> NDArray[np.float64]:
    """Undo colour map and normalisation: (n, size, size, 3) float64, 0..255, as the warp left it."""
    mean, std = (v.astype(np.float64)[:, None, None] for v in work.geometry.folded(spec))
    return batch.inputs.permute(0, 2, 3, 1).double().cpu().numpy() * std + mean


def psnr(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Peak signal to noise of each image of (n, h, w, 3), 0..255: (n,) dB."""
    return 10 * np.log10(255**2 / np.maximum(((a - b) ** 2).mean(axis=(1, 2, 3)), 1e-12))


def lent_memory(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the address of every tensor that DALI lends to torch from now on."""
    from thawline.dataio.pixels import dali

    lent, take = list[int](), dali.from_dlpack  # type: ignore[attr-defined]

    def watched(tensor: Any) -> torch.Tensor:
        lent.append(tensor.data_ptr())
        return take(tensor)

    patch.setattr(dali, "from_dlpack", watched)
    return lent


def flat_colour(number: int) -> tuple[int, int, int]:
    """One of 256 colours, 14 steps apart in red and green: far more than a JPEG changes a flat image."""
    return 20 + 14 * (number % 16), 20 + 14 * (number // 16), 128


def colour_numbers(loader: ImageLoader, batch: ImageBatch) -> list[int]:
    """Which `flat_colour` each image of a batch shows; the loader's spec must leave the lighting alone."""
    mean, std = np.array(loader.spec.mean), np.array(loader.spec.std)
    colours = batch.inputs.double().cpu().numpy().mean(axis=(2, 3)) * std + mean
    red, green = ((colours[:, :2] * 255 - 20) / 14).round().astype(int).T
    return (red + 16 * green).tolist()


def flat_manifest(folder: Path, *, train: int, valid: int, multi_label: bool = False) -> Manifest:
    """`train` + `valid` flat JPEGs of many sizes; image i (in the order of ids) shows `flat_colour(i)`.

    Every third image (i % 3) has the label of that remainder; multi_label adds "even" or none.
    """
    paths, labels = list[str](), list[Any]()
    is_valid = np.zeros(train + valid, np.bool_)
    is_valid[np.random.default_rng(7).permutation(train + valid)[:valid]] = True  # ids of both splits mixed
    for i in range(train + valid):
        path = folder / ("valid" if is_valid[i] else "train") / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16 + 5 * i % 23, 16 + 7 * i % 19), flat_colour(i)).save(path, quality=95)
        paths.append(str(path.relative_to(folder)))
        labels.append([f"third{i % 3}", *(["even"] if i % 2 == 0 else [])] if multi_label else f"third{i % 3}")
    return split(from_lists(paths, labels, root=folder), by_folder("valid"))


def first(loader: ImageLoader, count: int, *, step: int = 0) -> list[ImageBatch]:
    """The first batches of a stream, which is then abandoned."""
    return list(islice(loader.stream(step), count))


def grown(file: Path) -> None:
    """A file of a tebibyte, more than any memory holds; none of it on the disk."""
    with file.open("wb") as made:
        made.truncate(1 << 40)
