"""What is an export compared with its model on? Validation images of the run, or where they are gone, drawn ones."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from thawline.cluster.errors import ClusterError, ExportError
from thawline.cluster.job import job as jobs
from thawline.dataio.errors import DataError, EngineError
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.store.files import as_array
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import split_loader
from thawline.dataio.stream.render import Item, Sound, rendered
from thawline.dataio.stream.renderer import EngineName, Renderer, choose_engine
from thawline.dataio.table.manifest import Manifest

MOST = 32
_DRAWN_PX = ((96, 128), (375, 500), (500, 375), (64, 64), (33, 700), (900, 1200))


@dataclass(frozen=True)
class Examples:
    """Encoded images that every engine decodes."""

    words: str
    """What they are."""
    encoded: Sequence[NDArray[np.uint8]]
    """n files, each (bytes,) uint8."""
    sizes: Sequence[tuple[int, int]]
    """n heights and widths, upright."""

    def pixels(self) -> list[Tensor]:
        """What Pillow decodes, each (H, W, 3) uint8."""
        return [torch.from_numpy(decode(file)) for file in self.encoded]

    def seen(self, spec: ImageSpec, engine: str) -> Tensor:
        """What the model sees of them in validation, (n, 3, size_px, size_px): by that engine, if it is installed."""
        items = [
            Item(f"example {i}", Sound(file, width, height, key=0))
            for i, (file, (height, width)) in enumerate(zip(self.encoded, self.sizes, strict=True))
        ]
        with Renderer(spec=spec, local_batch=len(items), choice=choose_engine(_there(engine))) as renderer:
            (batch,) = rendered(items, renderer, tell=_refuse)
        return batch.inputs


def examples(source: str | Path) -> Examples:
    """Up to `MOST` validation images of a run, evenly spaced; drawn ones where none can be read, or for a bundle."""
    try:
        return _of(manifest_of(source))
    except (ClusterError, DataError, OSError) as error:
        return _drawn(str(error).partition(": ")[0])


def manifest_of(source: str | Path) -> Manifest:
    """The manifest that a run was validated on. Raises ClusterError, DataError where it cannot be read."""
    folder = Path(source).expanduser()
    if not (folder / "job.toml").is_file():
        raise ExportError(f"{folder} is no run's folder: its data are not known")
    # the job is asked for its data, and never run: nothing that it names is imported
    job = jobs.from_toml(folder / "job.toml", trust_code=True)
    given = job.data.valid or job.manifest
    own = folder / PurePosixPath(given).name  # beside it, wherever both are by now
    return Manifest.load(own if own.is_file() else given, root=None if job.data.valid else job.data.root or None)


def _of(manifest: Manifest) -> Examples:
    if manifest.shards and Root.of(manifest.home).remote:
        return _drawn(f"all shards of {manifest.home} would have to be fetched")
    with split_loader(manifest, ImageSpec(size_px=8, presize_px=8), "valid", engine="reference") as loader:
        places = np.linspace(0, loader.samples - 1, min(loader.samples, MOST)).round().astype(np.int64)
        rows = loader.subset.take(places)
        read = [loader.source.reader.read(rows, i) for i in range(len(rows))]
    kept = [(each.image, i) for i, each in enumerate(read) if not isinstance(each, str)]
    if not kept:
        return _drawn(str(read[0]))
    files, at = zip(*kept, strict=True)
    sizes = [(int(rows.heights[i]), int(rows.widths[i])) for i in at]
    return Examples(f"{len(files)} validation images", files, sizes)


def _drawn(why: str) -> Examples:
    """Coloured noise on slopes, as lossless files."""
    draw, files = np.random.default_rng(0), list[NDArray[np.uint8]]()
    for height, width in _DRAWN_PX:
        y, x = np.mgrid[:height, :width]
        slopes = np.stack([x / width, y / height, (x + y) / (width + height)], -1) * 160
        file = io.BytesIO()
        Image.fromarray((slopes + draw.integers(0, 96, (height, width, 3))).astype(np.uint8)).save(file, "PNG")
        files.append(as_array(file.getvalue()))
    return Examples(f"{len(files)} drawn images, since no validation image can be read ({why})", files, _DRAWN_PX)


def _there(engine: str) -> EngineName:
    """An engine by its name, where it is installed; else the one that is."""
    return "reference" if choose_engine().engine == "reference" or engine != "dali" else "dali"


def _refuse(number: int, reason: str) -> None:
    raise EngineError(f"example {number} cannot be used ({reason}): nothing can be compared; mend that file")
