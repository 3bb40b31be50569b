"""What is rendered at a stream position? The rows of a split, their encoded files, and what turned out unusable.

A file that turns out unusable never ends a stream: in training another sample replaces it (see plan.Training.at), in
validation it is left out.
"""

import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.closing import Closing
from thawline.dataio.errors import ManifestError, QuarantineError
from thawline.dataio.labels.keypoints import UNPAIRED
from thawline.dataio.labels.targets import Targets, View, decode_mask, value_table
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.reading.readers import Encoded, Reader
from thawline.dataio.stream.plan import Order
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.subset import Rows, Subset
from thawline.dataio.table.tasks import TASKS

log = logging.getLogger(__name__)

_ATTEMPTS = 100  # to find a substitute: even with nine files of ten gone, it fails once in 37,000 times


@dataclass(kw_only=True)
class Source(Closing):
    """The samples of one split, in an order, as work for an engine.

    Raises ManifestError where the sizes of the images are not known, SpecError for points that cannot be mirrored.
    """

    manifest: Manifest
    subset: Subset
    """The rows of the split."""
    order: Order
    spec: ImageSpec
    reader: Reader
    """Closed with the source."""
    seed: int = 42
    max_quarantined: float = 0.01
    """Share of the samples that may turn out unusable before training stops."""
    view: int | None = None
    """Which augmented view of the validation samples, for test-time augmentation; None is the plain one."""
    views: int | None = None
    """In training: after how many epochs the augmentations come again; None is never."""
    unusable: dict[int, str] = field(default_factory=dict)
    """Files that turned out unusable since the manifest was made, id -> file and reason; reading threads add to it."""
    fetching: ThreadPoolExecutor | None = None
    """Threads for a reader that waits for a network; shared with views."""

    def __post_init__(self) -> None:
        if self.subset.take(np.zeros(1, np.int64)).widths[0] < 1:  # either all rows were verified or none
            raise ManifestError(
                f"the {len(self.subset)} images have no size in the manifest (it was made with verify=False): "
                "their geometry cannot be drawn; split again with verify=True, or index again"
            )
        if TASKS[self.manifest.task].sided and self.manifest.swap is None:
            self.spec = self._unmirrored()
        if self.reader.threads > 1 and self.fetching is None:  # its threads start with the first read
            self.fetching = ThreadPoolExecutor(self.reader.threads, thread_name_prefix="thawline-fetch")

    def _unmirrored(self) -> ImageSpec:
        """The spec for points without pairs; the training source warns of it. Raises SpecError."""
        if not self.order.endless:
            return replace(self.spec, flip=False, dihedral=False)
        spec = self.spec.unmirrored()
        if self.spec.flips:
            log.warning("%s", UNPAIRED)
        return spec

    def augmented(self, view: int) -> Self:
        """The same samples under training's augmentation; both share what is found unusable."""
        return replace(self, view=view)

    def repeated(self, views: int) -> Self:
        """The same stream, its augmentations those of the first `views` epochs again and again."""
        return replace(self, views=views)

    def planned(self, positions: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(view, id) of what will be rendered at these positions, as far as it is known what cannot be used."""
        _, epochs, rows = self._choose(positions)
        return [*zip(self._views(epochs).tolist(), rows.ids.tolist(), strict=True)]

    # What turned out unusable -----------------------------------------------------------------------------

    def quarantine(self, files: Mapping[int, str]) -> None:
        """Stop using these files. Raises QuarantineError when more than `max_quarantined` are unusable."""
        self.unusable.update(files)
        allowed = math.ceil(self.max_quarantined * len(self.subset))
        if len(self.unusable) > allowed:
            named = "; ".join(list(self.unusable.values())[:3])
            split = "training" if self.order.endless else "validation"
            raise QuarantineError(
                f"{len(self.unusable)} of {len(self.subset)} {split} images turned out unusable since they were "
                f"indexed ({named}), more than the {allowed} that max_quarantined={self.max_quarantined:g} allows: "
                "mend the files, or index again, or give a higher data.max_quarantined"
            )

    def mend(self, work: Work, reasons: Mapping[int, str]) -> Work:
        """The work made again without the files at these indices, which turned out unusable: see work.Mend."""
        self.unusable.update({int(work.ids[i]): reason for i, reason in reasons.items()})
        return self.work(work.positions, size_px=work.size_px)

    # From positions to work -------------------------------------------------------------------------------

    def work(self, positions: NDArray[np.int64], *, size_px: int | None = None) -> Work:
        """The work for these stream positions (training) or rows (validation).

        In validation unusable files are left out, so there may be fewer samples than positions.
        Raises: QuarantineError when no usable file can be found for a position.
        """
        size_px = size_px or self.spec.size_px
        while True:
            positions, epochs, rows = self._choose(positions)
            loaded = self._read(rows)
            reasons = {i: found for i, found in enumerate(loaded) if isinstance(found, str)}
            if not reasons:
                break
            for i, why in reasons.items():
                self.unusable.setdefault(int(rows.ids[i]), f"{self.reader.where(rows, i)}: {why}")
        encoded = [sample for sample in loaded if isinstance(sample, Encoded)]
        drawn = self._geometry(epochs, rows, size_px)
        return Work(
            encoded=[sample.image for sample in encoded],
            paths=[self.reader.where(rows, i) for i in range(len(rows))],
            geometry=drawn,
            ids=rows.ids,
            targets=self._targets(rows, drawn, size_px),
            size_px=size_px,
            positions=positions,
            masks=self._masks(encoded),
        )

    def _choose(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], Rows]:
        """The samples at these positions that are not known to be unusable: (positions, epochs, rows)."""
        attempts = np.zeros(len(positions), np.int64)
        for _ in range(_ATTEMPTS + 1):
            epochs, index = self.order.at(positions, attempts)
            rows = self.subset.take(index)
            bad = np.isin(rows.ids, list(self.unusable))
            if not bad.any():
                return positions, epochs, rows
            if self.order.endless:
                attempts += bad
            else:
                positions, attempts = positions[~bad], attempts[~bad]
        raise QuarantineError(
            f"no usable file was found in {_ATTEMPTS} attempts to fill a batch (last: "
            f"{self.unusable[int(rows.ids[bad.argmax()])]}): nearly all files are gone; bring them back, and "
            "start the run again to go on"
        )

    def _read(self, rows: Rows) -> list[Encoded | str]:
        if self.fetching is None:
            return [self.reader.read(rows, i) for i in range(len(rows))]
        return list(self.fetching.map(lambda i: self.reader.read(rows, i), range(len(rows))))

    def _geometry(self, epochs: NDArray[np.int64], rows: Rows, size_px: int) -> geometry.Geometry:
        sizes: dict[str, Any] = {"widths": rows.widths, "heights": rows.heights, "size_px": size_px}
        if not self.order.endless and self.view is None:
            return geometry.centred(self.spec, **sizes)
        views = self._views(epochs) + (self.view or 0)
        return geometry.draw(self.spec, seed=self.seed, epochs=views, ids=rows.ids, **sizes)

    def _views(self, epochs: NDArray[np.int64]) -> NDArray[np.int64]:
        return epochs if self.views is None else epochs % self.views

    def _targets(self, rows: Rows, drawn: geometry.Geometry, size_px: int) -> Targets:
        of = self.manifest
        return TASKS[of.task].targets(rows.labels, View(of.classes, drawn, size_px, of.swap))

    def _masks(self, encoded: list[Encoded]) -> list[NDArray[np.uint8]] | None:
        if not TASKS[self.manifest.task].masks:
            return None
        table = value_table(self.manifest.values)
        return [table[decode_mask(sample.mask)] for sample in encoded if sample.mask is not None]

    def close(self) -> None:
        """Release the reading threads, and close the reader."""
        if self.fetching is not None:
            self.fetching.shutdown(wait=False, cancel_futures=True)
        self.reader.close()
