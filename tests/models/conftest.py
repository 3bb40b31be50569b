"""What do these tests share? A network that none of them changes."""

from tests.kit.networks import shared

__all__ = ["shared"]
