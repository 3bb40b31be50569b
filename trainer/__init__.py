"""The training loop: schedules, optimisers, the step, checkpoints and records. Knows no decoder and no Ray."""

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
