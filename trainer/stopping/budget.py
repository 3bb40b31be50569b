"""How many epochs does a time allow? `plan`: steps and a piece of the validation are timed before anything is trained.

What it finds is recorded and becomes part of the run: whoever resumes keeps it, however fast the machine is by then.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from thawline.models import groups
from thawline.trainer.errors import RecipeError
from thawline.trainer.lr_finder import STEPS
from thawline.trainer.schedule.phases import Find, Phase, length
from thawline.trainer.session import Session
from thawline.trainer.step import world
from thawline.trainer.stopping.durations import written

_WARM, _TIMED = 4, 12
"""Steps, and batches of the validation, that are passed over first, and those that are timed then."""


@dataclass(frozen=True)
class Pace:
    """What one step of each phase takes, and one validation; in seconds."""

    step_s: tuple[float, ...]
    valid_s: float


def plan(session: Session, phases: Sequence[Phase], budget_s: float) -> tuple[Phase, ...]:
    """The phases, the last of them as many whole epochs long as the budget allows. Collective.

    budget_s: wall time of the run, what it has taken so far included. Trains nothing.
    Raises RecipeError where not even one epoch is allowed.
    """
    if session.progress.planned_epochs is None:
        session.note(f"timing steps, to plan for {written(budget_s)}")
        pace = measured(session, phases)
        left_s = budget_s - world.gather(session.elapsed_s())[0]
        epochs, takes_s = epochs_within(session, phases, pace, left_s)
        if epochs < 1:
            raise RecipeError(
                f"a budget of {written(budget_s)} is too short for one epoch of the last phase: {written(takes_s)} "
                f"with what comes before it, after {written(budget_s - left_s)} to get ready; give "
                f"{written(budget_s - left_s + 1.1 * takes_s)} or more, or epochs instead"
            )
        session.progress.planned_epochs, session.progress.planned_phase = epochs, len(phases) - 1
        session.note(
            f"{written(budget_s)} allow {epochs} epoch(s) of {phases[-1].name}, in about {written(takes_s)}: a step "
            f"takes {written(pace.step_s[-1])}, a validation {written(pace.valid_s)}"
        )
    index, epochs = session.progress.planned_phase, session.progress.planned_epochs
    return (*phases[:index], replace(phases[index], epochs=epochs, steps=0, samples=0), *phases[index + 1 :])


def epochs_within(session: Session, phases: Sequence[Phase], pace: Pace, left_s: float) -> tuple[int, float]:
    """How many whole epochs of the last phase fit beside the others, and how long all take then.

    Where not one does: 0, and how long all take with one.
    """
    train, fixed_s = session.train, 0.0
    for phase, step_s in zip(phases, pace.step_s, strict=True):
        if isinstance(phase.lr, Find) and phase.lr.search:
            fixed_s += STEPS * step_s
    for phase, step_s in zip(phases[:-1], pace.step_s[:-1], strict=True):
        steps = length(phase, epoch_steps=train.steps, global_batch=train.global_batch)
        fixed_s += steps * step_s + max(1, math.ceil(phase.epochs)) * pace.valid_s
    epoch_s = train.steps(1) * pace.step_s[-1] + pace.valid_s
    epochs = max(0, int((left_s - fixed_s) / epoch_s))
    return epochs, fixed_s + max(1, epochs) * epoch_s


def measured(session: Session, phases: Sequence[Phase]) -> Pace:
    """The slowest rank's times. Collective."""
    by_depth = {freeze_to: _step_s(session, freeze_to) for freeze_to in dict.fromkeys(p.freeze_to for p in phases)}
    return Pace(tuple(by_depth[phase.freeze_to] for phase in phases), _valid_s(session))


def _step_s(session: Session, freeze_to: int) -> float:
    """Of steps that are put back afterwards."""
    marks: list[float] = []

    def mark(loss: float) -> bool:
        marks.append(perf_counter())
        return False

    rates = (0.0,) * len(groups.parameter_groups(session.model))
    session.rehearse(lambda step: rates, stop=mark, steps=_WARM + _TIMED, freeze_to=freeze_to)
    return max(world.gather((marks[-1] - marks[_WARM - 1]) / _TIMED))


def _valid_s(session: Session) -> float:
    """Of all batches, from some."""
    device, marks = session.settings.device, list[float]()

    def mark() -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(perf_counter())
        return len(marks) > _WARM + _TIMED

    began = perf_counter()
    session.measure(session.valid, interrupted=mark)
    mark()
    batches = -(-session.valid.samples // session.valid.global_batch)
    warm = min(_WARM, len(marks) - 2)  # a small split has fewer batches than are passed over
    each_s = (marks[-1] - marks[warm]) / (len(marks) - 1 - warm) if warm >= 0 else perf_counter() - began
    return batches * max(world.gather(each_s))
