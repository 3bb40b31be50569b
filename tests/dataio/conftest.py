"""What do tests of dataio share? A server on loopback that misbehaves as they ask."""

from tests.kit.download_site import site

__all__ = ["site"]
