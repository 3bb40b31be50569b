"""How do a manifest and a spec become batches? An order, a source and a renderer, put together."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from thawline.dataio.ahead import read_ahead
from thawline.dataio.batch import ImageBatch
from thawline.dataio.checks.census import class_indices, count_subset
from thawline.dataio.closing import Closing
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.reading.shards import Progress, open_reader
from thawline.dataio.stream.balanced import balanced
from thawline.dataio.stream.balanced import check as check_balance
from thawline.dataio.stream.plan import Once, Order, Training
from thawline.dataio.stream.renderer import EngineName, Renderer, choose_engine, default_threads
from thawline.dataio.stream.source import Source
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.subset import Subset
from thawline.dataio.table.tasks import TASKS


@dataclass(kw_only=True)
class ImageLoader(Closing):
    """Batches of one split for one rank: satisfies `dataio.batch.Loader`. Its maker closes it.

    Nothing is opened before the first batch is needed. A stream that ends or is abandoned returns its engine.
    """

    order: Order
    source: Source
    renderer: Renderer
    epoch_samples: int
    """Training samples an epoch: what `spec.stages` count by."""
    borrowed: bool = False
    """True for a view, whose source and renderer another loader closes."""

    @property
    def task(self) -> str:
        """See dataio.batch.Loader."""
        return self.source.manifest.task

    @property
    def classes(self) -> tuple[str, ...]:
        """See dataio.batch.Loader."""
        return self.source.manifest.classes

    @property
    def spec(self) -> ImageSpec:
        """The spec, without mirroring where it would give points the wrong names."""
        return self.source.spec

    @property
    def subset(self) -> Subset:
        """The rows of the split."""
        return self.source.subset

    @property
    def samples(self) -> int:
        """Samples in the split, over all ranks."""
        return self.order.n

    def class_counts(self) -> NDArray[np.int64]:
        """See dataio.batch.Counted; zeros where labels are no names of classes."""
        return count_subset(self.subset, self.classes)

    @property
    def global_batch(self) -> int:
        """Samples a step, over all ranks."""
        return self.order.global_batch

    @property
    def engine(self) -> str:
        """The engine that decodes: dali or reference."""
        return self.renderer.choice.engine

    def steps(self, epochs: float) -> int:
        """Training steps that this many passes take."""
        return self.order.steps(epochs)

    def size_px(self, step: int) -> int:
        """The side of the training images at a step."""
        return self.spec.size_at(step * self.global_batch / self.epoch_samples)

    def augmented(self, view: int) -> Self:
        """The same samples under training's augmentation, drawn anew for each view; closed with this loader."""
        return replace(self, source=self.source.augmented(view), borrowed=True)

    def repeated(self, views: int) -> Self:
        """See dataio.batch.Repeatable; closed with this loader."""
        return replace(self, source=self.source.repeated(views), borrowed=True)

    def planned(self, step: int) -> list[tuple[int, ...]]:
        """See dataio.batch.PlannedLoader: size, view, id."""
        _, positions = next(self.order.batches(step))
        return [(self.size_px(step), view, number) for view, number in self.source.planned(positions)]

    @property
    def quarantined(self) -> Mapping[int, str]:
        """Files that turned out unusable since the manifest was made: id -> file and reason."""
        return dict(self.source.unusable)  # reading threads add to it

    def quarantine(self, files: Mapping[int, str]) -> None:
        """Stop using these files. Raises QuarantineError when more than `max_quarantined` are unusable."""
        self.source.quarantine(files)

    def stream(self, first_step: int = 0) -> Iterator[ImageBatch]:
        """Training: endless, from that step on. Validation: this rank's samples once, in order."""

        def make(taken: tuple[int, NDArray[np.int64]]) -> Work:
            step, positions = taken
            return self.source.work(positions, size_px=self.size_px(step))

        works = read_ahead(make, self.order.batches(first_step))
        return self.renderer.batches(works, self.source.mend)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent waiting for batches so far, over all streams together: see Renderer.seconds."""
        return self.renderer.seconds.copy()

    def close(self) -> None:
        """Release threads, memory and files; a second call does nothing, nor does closing a view."""
        if not self.borrowed:
            self.renderer.close()
            self.source.close()


def loaders(
    manifest: Manifest,
    spec: ImageSpec,
    *,
    global_batch: int | None = None,
    batch: int | None = None,
    valid: Manifest | None = None,
    **options: Any,
) -> tuple[ImageLoader, ImageLoader]:
    """The training and the validation loader of a manifest, for one rank.

    Give `batch` (samples a step and rank) or `global_batch` (over all ranks); 64 a rank if neither. `valid`: another
    manifest, whose valid split is validated on; it must have the same classes. Options: as `split_loader` takes them.
    Raises ManifestError (files gone, other classes), SplitError (batch sizes), EngineError (no such engine here).
    """
    if global_batch is None:
        global_batch = (batch or 64) * options.get("world_size", 1)
    if valid is not None:
        manifest.check_vocabulary(valid, name="the manifest to validate on")
    with ExitStack() as opened:
        train = opened.enter_context(split_loader(manifest, spec, "train", global_batch=global_batch, **options))
        options |= {"global_batch": global_batch, "epoch_samples": train.samples, "check_paths": valid is not None}
        other = split_loader(valid or manifest, spec, "valid", **options)
        opened.pop_all()
    return train, other


def split_loader(
    manifest: Manifest,
    spec: ImageSpec,
    split: str,
    *,
    global_batch: int = 64,
    epoch_samples: int | None = None,
    seed: int = 42,
    balance: float = 0.0,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    engine: EngineName = "auto",
    threads: int = 0,
    max_quarantined: float = 0.01,
    cache: str | Path | None = None,
    cache_gib: float = 100.0,
    progress: Progress | None = None,
    check_paths: bool = True,
) -> ImageLoader:
    """The loader of one split: 'train' endless and augmented, any other once, in order, plain.

    balance: how much more often training draws rare classes, from 0 (as they occur) to 1 (all equally often).
    check_paths: whether to check that the files are still there; once is enough for two splits of one manifest.
    cache, cache_gib, progress: for the shards of a packed manifest in an object store; see shards.open_reader.
    Raises: as `loaders`, and ShardError.
    """
    check_balance(balance, task=manifest.task)
    if check_paths:
        manifest.check_paths(allowed=max_quarantined)
    subset = manifest.subset(split)
    shape = {"n": len(subset), "global_batch": global_batch, "rank": rank, "world_size": world_size}
    order = _training(manifest, subset, balance, seed=seed, **shape) if split == "train" else Once(**shape)
    renderer = Renderer(
        spec=spec,
        local_batch=order.local_batch,
        masks=TASKS[manifest.task].masks,
        device=torch.device(device),
        dtype=dtype,
        threads=threads or default_threads(world_size),
        choice=choose_engine(engine),
    )
    with ExitStack() as opened:
        reader = open_reader(manifest, cache=cache, cache_gib=cache_gib, progress=progress)
        opened.callback(reader.close)
        of: dict[str, Any] = {"manifest": manifest, "subset": subset, "order": order, "spec": spec, "seed": seed}
        source = Source(**of, reader=reader, max_quarantined=max_quarantined)
        opened.pop_all()
    return ImageLoader(order=order, source=source, renderer=renderer, epoch_samples=epoch_samples or len(subset))


def _training(manifest: Manifest, subset: Subset, balance: float, **shape: int) -> Training:
    if not balance:
        return Training(**shape)
    kinds = class_indices(subset, manifest.classes)
    return balanced(kinds, power=balance, count=len(manifest.classes), **shape)
