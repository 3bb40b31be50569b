"""Which errors can happen while a model is made?

ModelError
├── UnknownModelError    a backbone name that torchvision does not have
└── WeightsError         no network, a wrong checksum, a file that does not fit
"""


class ModelError(Exception):
    """Base of all that models raises for a user's input."""


class UnknownModelError(ModelError):
    """No such backbone."""


class WeightsError(ModelError):
    """Weights cannot be fetched, read or fitted."""
