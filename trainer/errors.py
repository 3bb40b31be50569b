"""Which errors can happen while a model is trained?

TrainError
├── RecipeError          a schedule, optimiser or precision that makes no sense
├── CheckpointError      no valid checkpoint where one is needed
└── DivergedError        the loss is not finite
"""


class TrainError(Exception):
    """Base of all that trainer raises for a user's input or a run gone wrong."""


class RecipeError(TrainError):
    """A schedule, optimiser, metric or precision cannot be built as asked."""


class CheckpointError(TrainError):
    """A checkpoint cannot be read or written."""


class DivergedError(TrainError):
    """The loss or the gradients are no longer finite."""
