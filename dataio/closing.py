"""Who closes a loader, an engine or a reader? Whoever opened it."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Something that holds threads, memory or files until `close`: whoever opens it closes it, best by `with`."""

    @abstractmethod
    def close(self) -> None:
        """Release what is held; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
