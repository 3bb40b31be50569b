"""Which errors can happen between a job file and its workers?

ClusterError
├── JobError        a TOML that cannot be read, an unknown field, a value out of range
├── LaunchError     too many workers, no GPU, a worker group that gave up
└── StorageError    a run folder that cannot be written, or that holds another run
"""


class ClusterError(Exception):
    """Base of all that cluster raises for a user's input."""


class JobError(ClusterError):
    """The job cannot be understood."""


class LaunchError(ClusterError):
    """The workers cannot be started, or gave up."""


class StorageError(ClusterError):
    """The run's folder cannot be used."""
