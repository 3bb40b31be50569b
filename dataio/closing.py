"""Who gives back what a loader, an engine or a reader holds? Whoever opened it."""

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """What gives threads, memory or files back by `close`: whoever opens it closes it, best by `with`."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; more than once is no error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
