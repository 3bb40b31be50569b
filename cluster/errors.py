"""Which errors can happen between a job file and its workers?

ClusterError
├── JobError        a TOML that cannot be read, an unknown field, a value out of range
├── LaunchError     too many workers, no GPU, a worker group that gave up
├── StorageError    a run folder that cannot be written, or that holds another run
├── PredictError    a threshold for a task that has none, a file of predictions that cannot be written
├── ExportError     a model that cannot be exported so, an export that says something else, a folder that is taken
├── ServeError      a port in use, an address that all can reach without a token, limits that allow nothing
├── TokenError      no token for the cluster, a wrong one, or one that others can read
└── SubmitError     a cluster that does not answer, a name that is taken, a job that is not known

HangError stands apart: a rank was waited for in vain, and starting again may help.
"""

from thawline.dataio.errors import DataError
from thawline.models.errors import ModelError
from thawline.trainer.errors import TrainError
from thawline.trainer.step.sentences import errors_in


class ClusterError(Exception):
    """Base of all that cluster raises for a user's input."""


class JobError(ClusterError):
    """The job cannot be understood."""


class LaunchError(ClusterError):
    """The workers cannot be started, or gave up."""


class StorageError(ClusterError):
    """The run's folder cannot be used."""


class PredictError(ClusterError):
    """A finished run cannot be asked so, or what it says cannot be written."""


class ExportError(ClusterError):
    """A finished run's model cannot be handed on so."""


class ServeError(ClusterError):
    """A finished run cannot answer over HTTP so."""


class TokenError(ClusterError):
    """The cluster's token is missing, wrong or open to others."""


class SubmitError(ClusterError):
    """The cluster cannot be asked, or cannot do what it was asked."""


class HangError(RuntimeError):
    """A collective ended in a time-out, or because another rank had gone."""


USER_ERRORS = (ClusterError, DataError, ModelError, TrainError)
"""What a user can mend: shown as a sentence, never as a traceback."""
KINDS = errors_in(*USER_ERRORS)
"""The same by name: what crosses from one process to another as a sentence."""


def last_line(said: object) -> str:
    """The last line of what somebody else's error says, in which the cause most often stands.

    Where Ray's memory monitor has ended a process, that line is a page of advice on Ray.
    """
    if out_of_memory(said):
        return "a machine ran out of memory, and Ray ended a worker there"
    lines = [line.strip() for line in str(said or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def out_of_memory(said: object) -> bool:
    """Whether Ray's memory monitor says in this that it has ended a process."""
    return "address the out of memory issue" in str(said or "")
