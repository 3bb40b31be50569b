"""Which errors can happen while a model is trained?

TrainError
├── RecipeError          a schedule, optimiser or precision that makes no sense
├── CheckpointError      no valid checkpoint where one is needed
├── DivergedError        the loss or the gradients are not finite
└── MemoryLimitError     a step does not fit, however it is split

PeerError stands apart: another rank failed, in a way that may be its machine's, and starting again may help.
"""


class TrainError(Exception):
    """Base of all that trainer raises for a user's input or a run gone wrong."""


class RecipeError(TrainError):
    """A schedule, optimiser, metric or precision cannot be built as asked."""


class CheckpointError(TrainError):
    """A checkpoint cannot be read or written."""


class DivergedError(TrainError):
    """The loss or the gradients are no longer finite."""


class MemoryLimitError(TrainError):
    """A training step does not fit into the device's memory, however it is split."""


class PeerError(RuntimeError):
    """Another rank failed in a way that only its own traceback explains."""
