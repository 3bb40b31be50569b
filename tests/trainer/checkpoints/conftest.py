"""What do these tests share? A run's folder with checkpoints in it."""

from tests.kit.checkpoints import folder

__all__ = ["folder"]
