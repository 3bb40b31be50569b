"""The training loop: schedules, optimisers, the step, checkpoints and records. Knows no decoder and no Ray."""

from typing import TYPE_CHECKING

from thawline.late import late

if TYPE_CHECKING:
    from thawline.trainer.analysis.diagnosis import diagnose
    from thawline.trainer.analysis.thresholds import sweep
    from thawline.trainer.checkpoints.checkpoint import Best
    from thawline.trainer.context import LocalContext, RunContext
    from thawline.trainer.errors import TrainError
    from thawline.trainer.learner import Learner
    from thawline.trainer.lr_finder import LrCurve, lr_find
    from thawline.trainer.metrics.predictions import Predictions
    from thawline.trainer.optimisers.settings import OptimSettings
    from thawline.trainer.schedule.phases import Find, Phase
    from thawline.trainer.schedule.shapes import OneCycle, spread
    from thawline.trainer.stopping.early import Stopping

__getattr__ = late(
    __name__,
    {
        "thawline.trainer.analysis.diagnosis": "diagnose",
        "thawline.trainer.analysis.thresholds": "sweep",
        "thawline.trainer.checkpoints.checkpoint": "Best",
        "thawline.trainer.context": "LocalContext RunContext",
        "thawline.trainer.errors": "TrainError",
        "thawline.trainer.learner": "Learner",
        "thawline.trainer.lr_finder": "LrCurve lr_find",
        "thawline.trainer.metrics.predictions": "Predictions",
        "thawline.trainer.optimisers.settings": "OptimSettings",
        "thawline.trainer.schedule.phases": "Find Phase",
        "thawline.trainer.schedule.shapes": "OneCycle spread",
        "thawline.trainer.stopping.early": "Stopping",
    },
)

__all__ = [
    "Best",
    "Find",
    "Learner",
    "LocalContext",
    "LrCurve",
    "OneCycle",
    "OptimSettings",
    "Phase",
    "Predictions",
    "RunContext",
    "Stopping",
    "TrainError",
    "diagnose",
    "lr_find",
    "spread",
    "sweep",
]
