"""Do apex's fused optimisers step as plain numpy does, and is another apex known? Its kernels are stood in for here."""

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kit.optimisers import (
    CPU,
    assert_close,
    feed,
    make_grads,
    make_groups,
    numpy_steps,
    ours,
    rising,
)
from thawline.trainer.errors import RecipeError
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings as Settings

# apex -------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda")

# The signatures, and what zero_grad takes, are NVIDIA's; the maths is plain torch, one tensor at a time.
APEX = """
import torch

class _Plain(torch.optim.Optimizer):
    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def trained(self):
        for group in self.param_groups:
            assert type(group["lr"]) is float
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    yield group, p, p.grad, self.state[p]

    def moments(self, group, p, g, state):
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        (b1, b2), m, v, step = group["betas"], state["exp_avg"], state["exp_avg_sq"], group["step"]
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        return m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + group["eps"]) + group["weight_decay"] * p

class FusedAdam(_Plain):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0., amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert bias_correction and adam_w_mode and not amsgrad and not capturable and not master_weights
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group, p, g, state in self.trained():
            p -= group["lr"] * self.moments(group, p, g, state)

class FusedSGD(_Plain):
    def __init__(self, params, lr=None, momentum=0, dampening=0, weight_decay=0, nesterov=False,
                 wd_after_momentum=False, materialize_master_grads=True, set_grad_none=False):
        assert lr is not None and dampening == 0 and not wd_after_momentum
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))

    @torch.no_grad()
    def step(self, closure=None):
        for group, p, g, state in self.trained():
            g, momentum = g + group["weight_decay"] * p, group["momentum"]
            first = "momentum_buffer" not in state
            v = state["momentum_buffer"] = g.clone() if first else momentum * state["momentum_buffer"] + g
            p -= group["lr"] * (g + momentum * v if group["nesterov"] else v)

class FusedLAMB(_Plain):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):
        assert bias_correction and adam_w_mode and grad_averaging and not amsgrad and not use_nvlamb
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        clip = max(1.0, float(torch.stack([g.norm() for g in grads]).norm()) / self.max_grad_norm)
        for group, p, g, state in self.trained():
            update = self.moments(group, p, g / clip, state)
            trust = p.norm() / update.norm() if group["weight_decay"] else 1.0
            p -= group["lr"] * trust * update
"""

WHOLE = {"apex/__init__.py": "", "apex/optimizers/__init__.py": APEX, "amp_C.py": ""}

APEX_RECIPES = {
    "FusedAdam": Settings(engine="apex", weight_decay=0.05),
    "FusedSGD": Settings("sgd", "apex", weight_decay=0.05),
    "FusedSGD with nesterov": Settings("sgd", "apex", weight_decay=0.05, nesterov=True),
    "FusedLAMB": Settings("lamb", weight_decay=0.05),
}

Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write packages that hide whatever this machine has; forget them afterwards."""
    ours = ("apex", "apex.optimizers", "amp_C")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield write
    for name in ours:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("named", APEX_RECIPES)
def test_apex_under_a_schedule_equals_plain_numpy(install: Install, named: str) -> None:
    install(WHOLE)
    assert optim.find_apex()[0] == "nvidia"
    settings, grads, hyper = APEX_RECIPES[named], make_grads(12), rising(12)
    assert_close(ours(settings, grads, hyper, device=GPU), numpy_steps(settings, grads, hyper))


@pytest.mark.parametrize("named", APEX_RECIPES)
def test_apex_makes_the_class_with_the_same_groups_and_does_not_skip(install: Install, named: str) -> None:
    install(WHOLE)
    optimizer = optim.build(make_groups(), APEX_RECIPES[named], device=GPU)
    assert type(optimizer).__name__ == named.split()[0]
    assert [group["layer_group"] for group in optimizer.param_groups] == [0, 0, 1, 1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0, 0.05, 0.0]
    assert not optim.skips(optimizer)


@pytest.mark.parametrize("named", APEX_RECIPES)
def test_apex_goes_on_from_a_loaded_state_of_its_own_or_with_rates_in_tensors(install: Install, named: str) -> None:
    install(WHOLE)
    settings, grads, hyper = APEX_RECIPES[named], make_grads(4), rising(4)
    groups = make_groups()
    optimizer = optim.build(groups, settings, device=GPU)
    for step in range(4):
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            group["lr"] = torch.tensor(group["lr"])
        groups = copy.deepcopy(groups)
        optimizer = optim.build(groups, settings, device=GPU)
        optim.load_state(optimizer, state)
        optim.set_hyper(optimizer, *hyper[step])
        feed(groups, grads[step])
        optimizer.step()
    found = [p.detach().numpy() for group in groups for _, p in group]
    for one, other in zip(found, ours(settings, grads, hyper, device=GPU), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("settings", [Settings("lamb"), Settings("sgd", "apex")])
def test_apex_without_bfloat16_kernels_gets_a_sentence(install: Install, settings: Settings) -> None:
    install(WHOLE)
    with pytest.raises(RecipeError, match=r"bfloat16 weights.*give precision='bf16'"):
        optim.build(make_groups(dtype=torch.bfloat16), settings, device=GPU)
    optim.build(make_groups(dtype=torch.bfloat16), Settings(engine="apex"), device=GPU)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [(Settings("lamb"), "give adamw or sgd"), (Settings(engine="apex"), "give engine='torch'")],
)
def test_a_missing_apex_is_not_to_be_installed_from_pypi(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert optim.find_apex()[0] == "missing"
    with pytest.raises(RecipeError, match=r"nvcr\.io/nvidia/pytorch.*`pip install apex` gets an unrelated") as told:
        optim.build(make_groups(), settings, device=GPU)
    assert remedy in str(told.value)


def test_the_unrelated_apex_is_named_and_never_imported(install: Install, tmp_path: Path) -> None:
    install({"apex/__init__.py": "raise SystemExit('imported')"})
    state, sentence = optim.find_apex()
    assert state == "unrelated"
    assert str(tmp_path) in sentence
    with pytest.raises(RecipeError, match=r"only has the name of NVIDIA's"):
        optim.build(make_groups(), Settings(engine="apex"), device=GPU)


@pytest.mark.parametrize(
    ("optimizers", "amp_c", "reason"),
    [
        ("raise OSError('libcudart.so: not found')", "", "OSError: libcudart"),
        ("", "", "AttributeError"),
        (APEX, "raise ImportError('kernels')", "ImportError: kernels"),
    ],
)
def test_a_half_built_apex_is_broken_with_the_reason(
    install: Install, optimizers: str, amp_c: str, reason: str
) -> None:
    install({"apex/__init__.py": "", "apex/optimizers/__init__.py": optimizers, "amp_C.py": amp_c})
    state, sentence = optim.find_apex()
    assert state == "broken"
    assert reason in sentence


@pytest.mark.parametrize("settings", APEX_RECIPES.values(), ids=APEX_RECIPES)
def test_apex_on_a_cpu_gets_a_sentence(settings: Settings) -> None:
    with pytest.raises(RecipeError, match="runs on a GPU only"):
        optim.build(make_groups(), settings, device=CPU)
