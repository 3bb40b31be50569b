"""Which files turned out to be unusable? Recorded once, in a row, on every rank, and again when a run resumes.

Loaders find them and fill the gaps (dataio); here every rank learns what one rank found.
"""

import time
from collections.abc import Mapping, Sequence

from thawline.dataio.batch import Loader
from thawline.trainer.records.rows import QuarantineRow


def merge_by_id(found: Sequence[Mapping[int, str]]) -> dict[int, str]:
    """What any rank found, in the order of the ids: the same on every rank."""
    everything = {number: why for rank in found for number, why in rank.items()}
    return dict(sorted(everything.items()))


class Quarantine:
    """The unusable files of a training and a validation loader: those with a row, and those without one yet."""

    def __init__(self, train: Loader, valid: Loader) -> None:
        self._loaders = {"train": train, "valid": valid}
        self._recorded: set[tuple[str, int]] = set()

    def unrecorded(self, split: str) -> dict[int, str]:
        """What this rank's loader found and no row holds yet: id -> file and reason."""
        return {
            number: why
            for number, why in self._loaders[split].quarantined.items()
            if (split, number) not in self._recorded
        }

    def rows(self, split: str, found: Mapping[int, str], *, step: int) -> list[QuarantineRow]:
        """A row for each file that some rank found and no row holds yet: to be recorded, then given to `apply`."""
        fresh = [(number, why) for number, why in found.items() if (split, number) not in self._recorded]
        return [
            {
                "kind": "quarantine",
                "step": step,
                "unix_s": time.time(),
                "split": split,
                "id": number,
                "reason": why,
                "quarantined": count,
            }
            for count, (number, why) in enumerate(fresh, start=len(self._recorded) + 1)
        ]

    def apply(self, rows: Sequence[QuarantineRow]) -> None:
        """Have the loaders do without these. Raises when they are more than the user allows, on every rank alike."""
        for split, loader in self._loaders.items():
            files = {row["id"]: row["reason"] for row in rows if row["split"] == split}
            self._recorded |= {(split, number) for number in files}
            if files:
                loader.quarantine(files)
