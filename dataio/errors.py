"""Which errors can happen between a folder and a batch?

    DataError
    ├── SourceError      no folder, no images, a CSV without the column
    ├── LabelError       a pattern that matches nothing, a missing label, one class only
    ├── SplitError       a fraction out of range, an empty side
    ├── ManifestError    not a manifest, files that moved, an unknown version
    ├── SpecError        an ImageSpec that contradicts itself
    ├── ShardError       packed files that are missing, changed, or do not fit the cache
    ├── QuarantineError  too many files turned out unusable
    ├── PlaceError       no folder for a process's own files that others keep out of
    └── EngineError      an engine that cannot run here, a file that cannot be decoded

Every message says condition, value, consequence and remedy; every one is safe to show without a traceback.
"""


class DataError(Exception):
    """Base of all that dataio raises for a user's input."""


class SourceError(DataError):
    """The images cannot be listed."""


class LabelError(DataError):
    """The images cannot be labelled."""


class SplitError(DataError):
    """The rows cannot be divided into train and valid."""


class ManifestError(DataError):
    """A manifest cannot be read, written or trusted."""


class SpecError(DataError):
    """An ImageSpec asks for what cannot be drawn."""


class ShardError(DataError):
    """Packed files are missing, are not what was packed, or cannot be kept here."""


class QuarantineError(DataError):
    """More files turned out unusable than the user allows."""


class PlaceError(DataError):
    """There is no folder that is this user's alone."""


class EngineError(DataError):
    """No engine can run this spec here, or one failed while decoding."""
