"""Which errors can happen while a model is made?

ModelError
├── UnknownModelError    a body that `create` does not know
├── WeightsError         no network, a wrong checksum, a file that does not fit
├── CodeError            a user's own code that is not there, fails, or is no model
└── BundleError          what a run left is not there, incomplete, changed or of another version
"""


class ModelError(Exception):
    """Base of all that models raises for a user's input."""


class UnknownModelError(ModelError):
    """No such backbone."""


class WeightsError(ModelError):
    """Weights cannot be fetched, read or fitted."""


class CodeError(ModelError):
    """A user's own code cannot be imported, or does not give what it should."""


class BundleError(ModelError):
    """A bundle cannot be read."""
