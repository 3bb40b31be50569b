"""Where does a run stand? The few numbers that, beside weights and records, make it whole."""

from dataclasses import dataclass, replace
from typing import Self


@dataclass
class Progress:
    """Where a run stands. All of it goes into a checkpoint."""

    phase: int = 0
    """Phases of the current fit that are complete."""
    phase_step: int = 0
    """Steps taken in the phase under way."""
    step: int = 0
    """Steps taken since the run began; times global_batch, it is the stream's cursor."""
    epochs: float = 0.0
    """Epochs in phases that are complete."""
    validate_due: bool = False
    """An epoch has ended, and its validation has not."""
    splits: int = 1
    """Micro-batches a step: what was asked for, or more since some rank ran out of memory."""
    found_lr: float | None = None
    """What the lr finder last suggested to a phase that asked for it."""
    planned_epochs: int | None = None
    """How many epochs a phase of the current fit takes, where a budget was given: see `budget.plan`."""
    planned_phase: int = 0
    """Which phase that is: the last, unless more were appended since."""
    stream_hash: str = ""
    """Over the ids of every step so far, as they arrived (see `window.extend_hash`)."""
    elapsed_s: float = 0.0
    """Wall time, over every process that worked on the run."""

    def after_phase(self, epochs: float) -> Self:
        """Where it stands once the phase under way, of so many epochs, is complete."""
        return replace(self, phase=self.phase + 1, phase_step=0, epochs=self.epochs + epochs)
