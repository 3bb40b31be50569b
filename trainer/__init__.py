"""The training loop: schedules, optimisers, the step, checkpoints and records. Knows no decoder and no Ray."""

from trainer.context import LocalContext, RunContext
from trainer.errors import TrainError
from trainer.learner import Learner
from trainer.predictions import Predictions
from trainer.schedule import OneCycle, Phase, spread

__all__ = [
    "Learner",
    "LocalContext",
    "OneCycle",
    "Phase",
    "Predictions",
    "RunContext",
    "TrainError",
    "spread",
]
