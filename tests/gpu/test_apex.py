"""Does NVIDIA's own apex step as the papers say? The checks of tests/trainer/optimisers/test_apex on its kernels."""

import copy

import numpy as np
import pytest
import torch

from tests.kit.optimisers import assert_close, feed, make_grads, make_groups, numpy_steps, ours, rising
from tests.trainer.optimisers.test_apex import APEX_RECIPES
from thawline.trainer.optimisers import optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nvidias_apex() -> None:
    """Skips, with the reason, where it is not installed or not whole."""
    state, sentence = optim.find_apex()
    if state != "nvidia":
        pytest.skip(sentence)


@pytest.mark.parametrize("named", APEX_RECIPES)
def test_apex_under_a_schedule_equals_plain_numpy(named: str) -> None:
    recipe, grads, hyper = APEX_RECIPES[named], make_grads(12), rising(12)
    assert_close(ours(recipe, grads, hyper, device=CUDA, lie=CUDA), numpy_steps(recipe, grads, hyper))


@pytest.mark.parametrize("named", APEX_RECIPES)
def test_apex_makes_the_class_and_does_not_skip(named: str) -> None:
    optimizer = optim.build(make_groups(CUDA), APEX_RECIPES[named], device=CUDA)
    assert type(optimizer).__name__ == named.split()[0]
    assert not optim.skips(optimizer)


@pytest.mark.parametrize("named", APEX_RECIPES)
def test_apex_goes_on_from_a_loaded_state(named: str) -> None:
    recipe, grads, hyper = APEX_RECIPES[named], make_grads(4), rising(4)
    groups = make_groups(CUDA)
    optimizer = optim.build(groups, recipe, device=CUDA)
    for step in range(4):
        state = copy.deepcopy(optimizer.state_dict())
        groups = copy.deepcopy(groups)
        optimizer = optim.build(groups, recipe, device=CUDA)
        optim.load_state(optimizer, state)
        optim.set_hyper(optimizer, *hyper[step])
        feed(groups, grads[step])
        optimizer.step()
    found = [p.detach().cpu().numpy() for group in groups for _, p in group]
    for one, other in zip(found, ours(recipe, grads, hyper, device=CUDA, lie=CUDA), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
