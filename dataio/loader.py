"""How do a manifest and a spec become batches? The loaders, and which engine was chosen and why."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dataio import geometry
from dataio.batch import Batch
from dataio.cores import usable_cores
from dataio.errors import EngineError, ManifestError, SplitError
from dataio.manifest import Manifest, Part
from dataio.plan import Plan, part_bounds
from dataio.reference import ReferenceEngine
from dataio.spec import ImageSpec
from dataio.work import Work, read_ahead, read_file

EngineName = Literal["auto", "dali", "reference"]

_AHEAD = 3  # batches read ahead of the engine; the files of three batches hide a slow disk's latency
_READERS = 2


class _Engine(Protocol):
    name: str
    reusable: bool

    def run(self, works: Iterator[Work]) -> Iterator[Batch]: ...
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
        import dataio.dali  # noqa: F401
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

    Nothing is opened before the first batch is asked for.
    """

    part: Part
    spec: ImageSpec
    task: str
    classes: tuple[str, ...]
    train: bool
    global_batch: int
    seed: int = 42
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    choice: Choice = field(default_factory=choose_engine)
    threads: int = 0

    def __post_init__(self) -> None:
        if self.global_batch < self.world_size:
            raise SplitError(
                f"global_batch={self.global_batch} is smaller than world_size={self.world_size}: some ranks would "
                "have nothing to do; give a larger global_batch or fewer workers"
            )
        unknown = int((self.part.widths < 1).sum())
        if unknown:
            raise ManifestError(
                f"{unknown} of {self.samples} images have no size in the manifest (it was made with verify=False): "
                "their geometry cannot be drawn; split again with verify=True, or index again"
            )
        self._engine: _Engine | None = None

    @property
    def samples(self) -> int:
        """Samples in the split, over all ranks."""
        return len(self.part.ids)

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

    def work(self, positions: NDArray[np.int64]) -> Work:
        """What the engine must render at these stream positions (training) or rows (validation)."""
        epochs, rows = self.plan.at(positions) if self.train else (np.zeros_like(positions), positions)
        ids, widths, heights = self.part.ids[rows], self.part.widths[rows], self.part.heights[rows]
        if self.train:
            drawn = geometry.draw(self.spec, seed=self.seed, epochs=epochs, ids=ids, widths=widths, heights=heights)
        else:
            drawn = geometry.centred(self.spec, widths=widths, heights=heights)
        paths = [self.part.paths[row] for row in rows]
        return Work(
            encoded=[read_file(path) for path in paths],
            paths=paths,
            geometry=drawn,
            ids=ids,
            targets=self.part.targets[rows],
        )

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        """Training: endless, from that step on. Validation: this rank's part, once, in order, the last one short."""
        if self._engine is None or not self._engine.reusable:  # an abandoned stream leaves batches in its queues
            self._engine = self._make_engine()
        works = read_ahead(self.work, self._positions(first_step), ahead=_AHEAD, threads=_READERS)
        return self._engine.run(works)

    def _positions(self, first_step: int) -> Iterator[NDArray[np.int64]]:
        if self.train:
            for step in count(first_step):
                yield self.plan.positions(step, self.rank, self.world_size)
        else:
            lo, hi = part_bounds(self.samples, self.rank, self.world_size)
            for start in range(lo, hi, self.batch):
                yield np.arange(start, min(start + self.batch, hi), dtype=np.int64)

    def _make_engine(self) -> _Engine:
        threads = self.threads or default_threads(self.world_size)
        common: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "threads": threads}
        if self.engine == "reference":
            return ReferenceEngine(self.spec, **common)
        from dataio.dali import DaliEngine

        targets = self.part.targets
        return DaliEngine(self.spec, max_batch=self.batch, target=(targets.dtype, targets.ndim - 1), **common)

    def close(self) -> None:
        """Give back threads and memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def default_threads(world_size: int) -> int:
    """Decoding threads for a rank: its share of the usable cores, at most 8, at least 1."""
    return max(1, min(8, usable_cores() // world_size))


def loaders(
    manifest: Manifest,
    spec: ImageSpec,
    *,
    global_batch: int | None = None,
    batch: int | None = None,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    engine: EngineName = "auto",
    threads: int = 0,
) -> tuple[ImageLoader, ImageLoader]:
    """The training and the validation loader of a manifest, for one rank.

    Give `batch` (samples a step and rank) or `global_batch` (over all ranks); 64 a rank if neither.
    Raises ManifestError (files gone), SplitError (batch sizes), EngineError (no such engine here).
    """
    if global_batch is None:
        global_batch = (batch or 64) * world_size
    manifest.check_paths()
    common: dict[str, Any] = {
        "spec": spec,
        "task": manifest.task,
        "classes": manifest.classes,
        "global_batch": global_batch,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "device": torch.device(device),
        "dtype": dtype,
        "choice": choose_engine(engine),
        "threads": threads,
    }
    train = ImageLoader(part=manifest.part("train"), train=True, **common)
    valid = ImageLoader(part=manifest.part("valid"), train=False, **common)
    return train, valid
