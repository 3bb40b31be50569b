"""The training loop: schedules, optimisers, the step, checkpoints and records. Knows no decoder and no Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint import Best
    from trainer.context import LocalContext, RunContext
    from trainer.diagnosis import diagnose
    from trainer.errors import TrainError
    from trainer.learner import Learner
    from trainer.lr_find import Found, lr_find
    from trainer.optim import Recipe
    from trainer.predictions import Predictions
    from trainer.schedule import Find, Phase
    from trainer.shapes import OneCycle, spread
    from trainer.thresholds import sweep

# Imported when they are first asked for: some bring torch, for which a console and `thawline status` need not wait.
_LATE = {
    "Best": "trainer.checkpoint",
    "Find": "trainer.schedule",
    "Found": "trainer.lr_find",
    "Learner": "trainer.learner",
    "LocalContext": "trainer.context",
    "OneCycle": "trainer.shapes",
    "Phase": "trainer.schedule",
    "Predictions": "trainer.predictions",
    "Recipe": "trainer.optim",
    "RunContext": "trainer.context",
    "TrainError": "trainer.errors",
    "diagnose": "trainer.diagnosis",
    "lr_find": "trainer.lr_find",
    "spread": "trainer.shapes",
    "sweep": "trainer.thresholds",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATE[name]), name)
    return value


__all__ = [
    "Best",
    "Find",
    "Found",
    "Learner",
    "LocalContext",
    "OneCycle",
    "Phase",
    "Predictions",
    "Recipe",
    "RunContext",
    "TrainError",
    "diagnose",
    "lr_find",
    "spread",
    "sweep",
]
