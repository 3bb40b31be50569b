"""How do a manifest and a spec become batches? The loaders, and which engine was chosen and why."""

import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from thawline.dataio.batch import ImageBatch
from thawline.dataio.cores import usable_cores
from thawline.dataio.errors import EngineError, ManifestError, QuarantineError, SplitError
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Mend, Work, read_ahead, timed
from thawline.dataio.reading.readers import Encoded, Reader
from thawline.dataio.reading.shards import Progress, open_reader
from thawline.dataio.stream.plan import Plan, part_bounds
from thawline.dataio.table.keypoints import UNPAIRED, Pairs
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.part import Part, Rows
from thawline.dataio.table.targets import decode_mask, make_targets, value_table

EngineName = Literal["auto", "dali", "reference"]

log = logging.getLogger(__name__)

_AHEAD = 3  # batches read ahead of the engine; the files of three batches hide a slow disk's latency
_READERS = 2
_ATTEMPTS = 100  # to fill a hole: with even nine files of ten gone, one hole in 37,000 would stay


class _Engine(Protocol):
    name: str
    reusable: bool

    def run(self, works: Iterator[Work], mend: Mend | None = None) -> Iterator[ImageBatch]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Choice:
    """Which engine renders, and why."""

    engine: str
    reason: str


def choose_engine(wanted: EngineName = "auto") -> Choice:
    """Decide who renders. Raises EngineError if DALI is asked for and cannot be had."""
    if wanted == "reference":
        return Choice("reference", "asked for")
    try:
        from thawline.dataio.pixels import dali  # noqa: F401
    except ImportError as error:
        if wanted == "dali":
            raise EngineError(
                f"engine='dali' was asked for, but DALI does not import ({error}): nothing could decode; "
                "install nvidia-dali-cuda130, or give engine='reference'"
            ) from error
        return Choice("reference", f"DALI does not import ({error})")
    return Choice("dali", "asked for" if wanted == "dali" else "DALI is installed")


@dataclass(kw_only=True)
class ImageLoader:
    """Batches of one split for one rank: satisfies `dataio.batch.Loader`.

    Nothing is opened before the first batch is asked for. A file that turns out unusable never ends a stream. In
    training another sample takes its place (see plan.Plan.at); in validation there is one sample less.
    """

    part: Part
    spec: ImageSpec
    task: str
    classes: tuple[str, ...]
    reader: Reader
    train: bool
    global_batch: int
    epoch_samples: int
    """Training samples an epoch: what `spec.stages` count by."""
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    choice: Choice = field(default_factory=choose_engine)
    threads: int = 0
    values: tuple[int, ...] = ()
    """Of a mask: see manifest.Manifest."""
    max_quarantined: float = 0.01
    """Share of the samples that may turn out unusable before training stops."""
    swap: Pairs | None = None
    """Of points: see manifest.Manifest. None: images with points are not mirrored."""
    view: int | None = None
    """For test-time augmentation: which of the augmented views of the validation samples; None is the plain one."""

    def __post_init__(self) -> None:
        if self.global_batch < self.world_size:
            raise SplitError(
                f"global_batch={self.global_batch} is smaller than world_size={self.world_size}: some ranks would "
                "have nothing to do; give a larger global_batch or fewer workers"
            )
        if self.part.take(np.zeros(1, np.int64)).widths[0] < 1:  # all rows were verified, or none
            raise ManifestError(
                f"the {self.samples} images have no size in the manifest (it was made with verify=False): "
                "their geometry cannot be drawn; split again with verify=True, or index again"
            )
        if self.task == "points" and self.swap is None:
            self.spec = self._unmirrored()
        self._engine: _Engine | None = None
        self._lost: dict[int, str] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._spent = dict.fromkeys(("read", "decode", "finish"), 0.0)

    @property
    def samples(self) -> int:
        """Samples in the split, over all ranks."""
        return len(self.part)

    @property
    def engine(self) -> str:
        """Who decodes: dali or reference."""
        return self.choice.engine

    @cached_property
    def plan(self) -> Plan:
        """The pure order of this split."""
        return Plan(n=self.samples, global_batch=self.global_batch, seed=self.seed)

    @property
    def batch(self) -> int:
        """The largest batch this rank sees."""
        return -(-self.global_batch // self.world_size)

    def steps(self, epochs: float) -> int:
        """Training steps that this many passes take."""
        return self.plan.steps(epochs)

    def size_px(self, step: int) -> int:
        """The side of the images that training takes at a step."""
        return self.spec.size_at(step * self.global_batch / self.epoch_samples)

    def augmented(self, view: int) -> "ImageLoader":
        """The same samples in the same order, each with training's augmentation: another one for each view."""
        other = replace(self, view=view)
        other._lost = self._lost
        return other

    # What turned out unusable -----------------------------------------------------------------------------

    @property
    def quarantined(self) -> Mapping[int, str]:
        """What turned out unusable since the manifest was made: id -> file and reason."""
        return dict(self._lost)  # reading threads add to it

    def quarantine(self, files: Mapping[int, str]) -> None:
        """Use these no more, whoever found them. Raises QuarantineError when they are more than `max_quarantined`."""
        self._lost |= files
        allowed = math.ceil(self.max_quarantined * self.samples)
        if len(self._lost) > allowed:
            named = "; ".join(list(self._lost.values())[:3])
            raise QuarantineError(
                f"{len(self._lost)} of {self.samples} {'training' if self.train else 'validation'} images turned out "
                f"unusable since they were indexed ({named}), more than the {allowed} that "
                f"max_quarantined={self.max_quarantined:g} allows: mend the files, or index again, or give a higher "
                "data.max_quarantined"
            )

    # From positions to work -------------------------------------------------------------------------------

    def _unmirrored(self) -> ImageSpec:
        """The spec for points without pairs; training says so, once. Raises SpecError."""
        if not self.train:
            return replace(self.spec, flip=False, dihedral=False)
        spec = self.spec.unmirrored()
        if self.spec.flips:
            log.warning("%s", UNPAIRED)
        return spec

    def work(self, positions: NDArray[np.int64], *, size_px: int | None = None) -> Work:
        """What the engine must render at these stream positions (training) or rows (validation).

        In validation, what cannot be used is left out, so there may be fewer samples than positions.
        Raises: QuarantineError when no usable file can be found for a position.
        """
        while True:
            positions, epochs, rows = self._choose(positions)
            loaded = self._load(rows)
            reasons = {i: found for i, found in enumerate(loaded) if isinstance(found, str)}
            if not reasons:
                break
            for i, why in reasons.items():
                self._lost.setdefault(int(rows.ids[i]), f"{self.reader.where(rows, i)}: {why}")
        if len(rows) == 0:
            return _nothing(self.spec.size_px)
        return self._work(
            positions, epochs, rows, [sample for sample in loaded if isinstance(sample, Encoded)], size_px
        )

    def _choose(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], Rows]:
        """Who stands at these positions, of those that are not known to be lost: (positions, epochs, rows)."""
        if not self.train:
            positions = positions[~self._are_lost(self.part.take(positions))]
            return positions, np.zeros_like(positions), self.part.take(positions)
        attempts = np.zeros(len(positions), np.int64)
        for _ in range(_ATTEMPTS + 1):
            epochs, index = self.plan.at(positions, attempts)
            rows = self.part.take(index)
            lost = self._are_lost(rows)
            if not lost.any():
                return positions, epochs, rows
            attempts += lost
        raise QuarantineError(
            f"no usable file was found in {_ATTEMPTS} attempts to fill a batch (last: "
            f"{self._lost[int(rows.ids[lost.argmax()])]}): nearly all files are gone; bring them back, then start the "
            "run again to go on"
        )

    def _are_lost(self, rows: Rows) -> NDArray[np.bool_]:
        return np.isin(rows.ids, list(self._lost))

    def _work(self, positions: Any, epochs: Any, rows: Any, loaded: list[Encoded], size_px: int | None) -> Work:
        size_px = size_px or self.spec.size_px
        sizes: dict[str, Any] = {"widths": rows.widths, "heights": rows.heights, "size_px": size_px}
        if self.train or self.view is not None:
            epochs = epochs if self.train else epochs + self.view
            drawn = geometry.draw(self.spec, seed=self.seed, epochs=epochs, ids=rows.ids, **sizes)
        else:
            drawn = geometry.centred(self.spec, **sizes)
        return Work(
            encoded=[sample.image for sample in loaded],
            paths=[self.reader.where(rows, i) for i in range(len(rows))],
            geometry=drawn,
            ids=rows.ids,
            targets=make_targets(
                rows, task=self.task, classes=self.classes, geometry=drawn, size_px=size_px, swap=self.swap
            ),
            size_px=size_px,
            positions=positions,
            masks=self._masks(loaded),
        )

    def _masks(self, loaded: list[Encoded]) -> list[NDArray[np.uint8]] | None:
        if self.task != "mask":
            return None
        table = value_table(self.values)
        return [table[decode_mask(sample.mask)] for sample in loaded if sample.mask is not None]

    def _load(self, rows: Rows) -> list[Encoded | str]:
        if self.reader.threads == 1:
            return [self.reader.read(rows, i) for i in range(len(rows))]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.reader.threads, thread_name_prefix="thawline-fetch")
        return list(self._pool.map(lambda i: self.reader.read(rows, i), range(len(rows))))

    def _mend(self, work: Work, reasons: dict[int, str]) -> Work:
        self._lost |= {int(work.ids[i]): reason for i, reason in reasons.items()}
        return self.work(work.positions, size_px=work.size_px)

    # From work to batches ---------------------------------------------------------------------------------

    def stream(self, first_step: int = 0) -> Iterator[ImageBatch]:
        """Training: endless, from that step on. Validation: this rank's part, once, in order, the last one short."""
        if self._engine is None or not self._engine.reusable:  # an abandoned stream leaves batches in its queues
            self._engine = self._make_engine()
        works = read_ahead(self._make, self._asked(first_step), ahead=_AHEAD, threads=_READERS)
        read = timed((work for work in works if len(work.ids)), self._spent, "read")
        return timed(self._engine.run(read, self._mend), self._spent, "decode")

    @property
    def seconds(self) -> Mapping[str, float]:
        """What batches were waited for so far, in whichever thread asked for them, all streams of this loader together.

        read: encoded files; decode: decoding and warping, as far as the engine had not worked ahead; finish: colours
        and normalisation. Together, the time that batches took to come.
        """
        return self._spent.copy()

    def _make(self, asked: tuple[NDArray[np.int64], int]) -> Work:
        positions, size_px = asked
        return self.work(positions, size_px=size_px)

    def _asked(self, first_step: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        if self.train:
            for step in count(first_step):
                yield self.plan.positions(step, self.rank, self.world_size), self.size_px(step)
        else:
            lo, hi = part_bounds(self.samples, self.rank, self.world_size)
            size_px = self.size_px(first_step)
            for start in range(lo, hi, self.batch):
                yield np.arange(start, min(start + self.batch, hi), dtype=np.int64), size_px

    def _make_engine(self) -> _Engine:
        threads = self.threads or default_threads(self.world_size)
        common: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "threads": threads, "spent": self._spent}
        if self.engine == "reference":
            return ReferenceEngine(self.spec, **common)
        from thawline.dataio.pixels.dali import DaliEngine

        target = None if self.task == "mask" else _TARGETS[self.task]
        return DaliEngine(self.spec, max_batch=self.batch, target=target, **common)

    def close(self) -> None:
        """Give back threads and memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self.reader.close()


_TARGETS: dict[str, tuple[np.dtype[Any], int]] = {
    "single_label": (np.dtype(np.int64), 0),
    "multi_label": (np.dtype(np.float32), 1),
    "points": (np.dtype(np.float32), 2),
}
"""Type and dimensions of a sample's target."""


def _nothing(size_px: int) -> Work:
    none = np.zeros(0, np.int64)
    drawn = geometry.centred(ImageSpec(), widths=none.astype(np.int32), heights=none.astype(np.int32))
    return Work(encoded=[], paths=[], geometry=drawn, ids=none, targets=none, size_px=size_px, positions=none)


def default_threads(world_size: int) -> int:
    """Decoding threads for a rank: its share of the usable cores, at most 8, at least 1."""
    return max(1, min(8, usable_cores() // world_size))


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
    train = split_loader(manifest, spec, "train", global_batch=global_batch, **options)
    options |= {"global_batch": global_batch, "epoch_samples": train.samples, "look": valid is not None}
    return train, split_loader(valid or manifest, spec, "valid", **options)


def split_loader(
    manifest: Manifest,
    spec: ImageSpec,
    split: str,
    *,
    global_batch: int = 64,
    epoch_samples: int | None = None,
    seed: int = 42,
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
    look: bool = True,
) -> ImageLoader:
    """The loader of one split: 'train' endless and augmented, any other once, in order, plain.

    `look`: whether the files are still there; once is enough for two splits of one manifest.
    `cache`, `cache_gib`, `progress`: where the shards of a packed manifest in an object store are kept, and who is told
    while they come; see shards.open_reader. Raises: as `loaders`, and ShardError.
    """
    if look:
        manifest.check_paths(allowed=max_quarantined)
    part = manifest.part(split)
    return ImageLoader(
        part=part,
        spec=spec,
        task=manifest.task,
        classes=manifest.classes,
        values=manifest.values,
        swap=manifest.swap,
        reader=open_reader(manifest, cache=cache, cache_gib=cache_gib, progress=progress),
        train=split == "train",
        global_batch=global_batch,
        epoch_samples=epoch_samples or len(part),
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        dtype=dtype,
        choice=choose_engine(engine),
        threads=threads,
        max_quarantined=max_quarantined,
    )
