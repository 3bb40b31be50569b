"""Which networks do tests of models share?"""

from functools import partial

import pytest

from thawline import models

untrained = partial(models.create, weights="none")


@pytest.fixture(scope="module")
def shared() -> models.Classifier:
    """One model for the tests that change nothing but what is frozen."""
    return untrained("resnet18", 3, seed=0)
