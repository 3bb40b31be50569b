"""The optimisers against plain numpy, steps that are skipped, and what a machine without the right apex is told."""

import copy
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from thawline.trainer import optim
from thawline.trainer.errors import RecipeError
from thawline.trainer.optim_settings import OptimSettings as Settings

CPU = torch.device("cpu")
Groups = list[list[tuple[str, nn.Parameter]]]
Arrays = list[np.ndarray]
Hyper = Sequence[tuple[Sequence[float], float]]
ADAMW = Settings(weight_decay=0.05)
SGD = Settings("sgd", weight_decay=0.05)


def make_groups(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Groups:
    """Two layer groups: a filter with a norm's weight and bias, and a matrix with a bias and a scale."""
    draw = torch.Generator().manual_seed(3)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype))

    stem = [("conv", parameter(4, 3, 3, 3)), ("norm.weight", parameter(4)), ("norm.bias", parameter(4))]
    return [stem, [("head.weight", parameter(5, 4)), ("head.bias", parameter(5)), ("scale", parameter())]]


def make_grads(steps: int) -> list[Arrays]:
    """A gradient a step and parameter; those down to 1e-6 tell whether eps stands inside the root or outside."""
    draw = np.random.default_rng(5)
    shapes = [tuple(p.shape) for group in make_groups() for _, p in group]
    return [[draw.normal(size=shape) * 10.0 ** -(i % 7) for i, shape in enumerate(shapes)] for _ in range(steps)]


def rising(steps: int) -> Hyper:
    """Rates of the two layer groups that rise, and a momentum that falls."""
    return [((1e-2 * (i + 1) / steps, 1e-1 * (i + 1) / steps), 0.95 - 0.1 * i / steps) for i in range(steps)]


def constant(steps: int, momentum: float = 0.9) -> Hyper:
    return [((1e-2, 1e-1), momentum)] * steps


def numpy_steps(settings: Settings, grads: list[Arrays], hyper: Hyper) -> Arrays:
    """The weights of `make_groups` after those steps, in float64 from the papers' formulas.

    adamw: decoupled decay, bias correction by the current betas, eps outside the root. sgd: decay added to the
    gradient, as torch has it. lamb: adamw's direction with the decay in it, as long as the weight, where it decays;
    all gradients first clipped to a norm of 1 together.
    """
    weights = [p.detach().double().numpy().copy() for group in make_groups() for _, p in group]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for step, (lrs, momentum) in enumerate(hyper):
        norm = np.sqrt(sum(float((g * g).sum()) for g in grads[step]))
        for i, g in enumerate(grads[step]):
            lr, decay = lrs[i // 3], settings.weight_decay if weights[i].ndim > 1 else 0.0
            if settings.name == "sgd":
                total = g + decay * weights[i]
                first[i] = total if step == 0 else momentum * first[i] + total
                weights[i] = weights[i] - lr * (total + momentum * first[i] if settings.nesterov else first[i])
                continue
            g = g / max(1.0, norm) if settings.name == "lamb" else g
            first[i] = momentum * first[i] + (1 - momentum) * g
            second[i] = settings.beta2 * second[i] + (1 - settings.beta2) * g * g
            root = np.sqrt(second[i] / (1 - settings.beta2 ** (step + 1))) + settings.eps
            update = first[i] / (1 - momentum ** (step + 1)) / root + decay * weights[i]
            trust = np.linalg.norm(weights[i]) / np.linalg.norm(update) if settings.name == "lamb" and decay else 1.0
            weights[i] = weights[i] - lr * trust * update
    return weights


def feed(groups: Groups, grads: Arrays) -> None:
    """Set the gradients of the parameters that train."""
    for p, g in zip((p for group in groups for _, p in group), grads, strict=True):
        p.grad = torch.from_numpy(np.asarray(g, dtype=np.float32)).to(p) if p.requires_grad else None


def ours(
    settings: Settings, grads: list[Arrays], hyper: Hyper, *, device: torch.device, lie: torch.device = CPU
) -> Arrays:
    """The weights of `make_groups` after those steps of the optimiser that is built for `device`; they lie on `lie`."""
    groups = make_groups(lie)
    optimizer = optim.build(groups, settings, device=device)
    for step, (lrs, momentum) in enumerate(hyper):
        optim.set_hyper(optimizer, lrs, momentum)
        feed(groups, grads[step])
        optimizer.step()
    return [p.detach().cpu().numpy() for group in groups for _, p in group]


def assert_close(found: Arrays, expected: Arrays) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


RECIPES = {
    "adamw": ADAMW,
    "adamw with other betas and eps": Settings(beta2=0.9, eps=1e-3),
    "adamw without decay": Settings(weight_decay=0.0),
    "sgd": SGD,
    "nesterov": Settings("sgd", weight_decay=0.05, nesterov=True),
}


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_steps_under_a_schedule_equal_plain_numpy(settings: Settings) -> None:
    grads, hyper = make_grads(12), rising(12)
    assert_close(ours(settings, grads, hyper, device=CPU), numpy_steps(settings, grads, hyper))


@pytest.mark.parametrize(
    "settings", [Settings(momentum=0.7), Settings("sgd", momentum=0.7), Settings("sgd", momentum=0.0)]
)
def test_a_schedule_without_momentum_leaves_the_settings_own(settings: Settings) -> None:
    grads, groups = make_grads(6), make_groups()
    optimizer = optim.build(groups, settings, device=CPU)
    for step in range(6):
        optim.set_hyper(optimizer, (1e-2, 1e-1), None)
        feed(groups, grads[step])
        optimizer.step()
    found = [p.detach().numpy() for group in groups for _, p in group]
    assert_close(found, numpy_steps(settings, grads, constant(6, settings.momentum)))


@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_rates_in_tensors_step_as_python_floats_do_to_the_last_bit(settings: Settings) -> None:
    grads, hyper = make_grads(12), rising(12)
    groups = make_groups()
    optimizer = optim.build(groups, settings, device=CPU)
    for step, (lrs, momentum) in enumerate(hyper):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optim.set_hyper(optimizer, lrs, momentum)
        assert all(type(group["lr"]) is float for group in optimizer.param_groups)
        feed(groups, grads[step])
        optimizer.step()
    floats = [p.detach().numpy() for group in groups for _, p in group]
    for one, other in zip(ours(settings, grads, hyper, device=CPU), floats, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_a_schedule_fills_the_rates_in_place(settings: Settings) -> None:
    optimizer = optim.build(make_groups(), settings, device=CPU)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [float(rate) for rate in rates] == [0.0] * 4
    for lrs in ((1e-3, 1e-2), (2e-3, 3e-2)):
        optim.set_hyper(optimizer, lrs, 0.9)
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        assert [float(rate) for rate in rates] == [lrs[0], lrs[0], lrs[1], lrs[1]]


# Steps that are skipped ------------------------------------------------------------------------------------


def everything(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of all weights and all state, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    return [value.detach().clone() for value in (*params, *state)]


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_a_skipped_step_changes_nothing_and_later_ones_go_on_as_without_it(settings: Settings, before: int) -> None:
    grads, hyper = make_grads(6), rising(6)
    groups = make_groups()
    optimizer = optim.build(groups, settings, device=CPU)
    assert optim.skips(optimizer)
    for step, (lrs, momentum) in enumerate(hyper):
        optim.set_hyper(optimizer, lrs, momentum)
        if step == before:
            feed(groups, [np.full(g.shape, np.nan) for g in grads[step]])
            old = everything(optimizer)
            optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
            optimizer.step()
            new = everything(optimizer)[: len(old)]  # the first step adds moments: zeros, with adamw
            assert all(torch.equal(one, other) for one, other in zip(new, old, strict=True))
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        feed(groups, grads[step])
        optimizer.step()
    found = [p.detach().numpy() for group in groups for _, p in group]
    for one, other in zip(found, ours(settings, grads, hyper, device=CPU), strict=True):
        np.testing.assert_array_equal(one, other)


# State -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [torch.float64, torch.float32, None])
@pytest.mark.parametrize("settings", [ADAMW, RECIPES["nesterov"]])
def test_a_loaded_state_goes_on_bit_by_bit_with_the_same_rate_tensors(
    settings: Settings, rates: torch.dtype | None
) -> None:
    """rates: as a GPU's checkpoint has them, and as one with plain numbers has."""
    grads, hyper = make_grads(10), rising(10)
    ends = []
    groups = make_groups()
    optimizer = optim.build(groups, settings, device=CPU)
    for step in range(10):
        if step == 5:
            ends.append(ours(settings, grads, hyper, device=CPU))
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"]) if rates is None else group["lr"].to(rates)
            kept = copy.deepcopy(groups)
            groups, optimizer = kept, optim.build(kept, settings, device=CPU)
            before = [group["lr"] for group in optimizer.param_groups]
            optim.load_state(optimizer, state)
            for group, rate, saved in zip(optimizer.param_groups, before, state["param_groups"], strict=True):
                assert group["lr"] is rate
                assert rate.dtype == torch.float64
                assert float(rate) == float(saved["lr"])
        optim.set_hyper(optimizer, *hyper[step])
        feed(groups, grads[step])
        optimizer.step()
    ends.append([p.detach().numpy() for group in groups for _, p in group])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


# Groups and mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.01, 0.0])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_parameter_is_in_one_param_group_with_its_layer_group_and_decay(name: Any, weight_decay: float) -> None:
    optimizer = optim.build(make_groups(), Settings(name, weight_decay=weight_decay), device=CPU)
    found = [(group["layer_group"], group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
    assert found == [
        (0, weight_decay, ["conv"]),
        (0, 0.0, ["norm.weight", "norm.bias"]),
        (1, weight_decay, ["head.weight"]),
        (1, 0.0, ["head.bias", "scale"]),
    ]
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("settings", [ADAMW, SGD])
def test_a_frozen_layer_group_is_included_and_does_not_move(settings: Settings) -> None:
    groups = make_groups()
    for _, p in groups[0]:
        p.requires_grad_(False)
    before = [p.detach().clone() for group in groups for _, p in group]
    optimizer = optim.build(groups, settings, device=CPU)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    optim.set_hyper(optimizer, (1e-2, 1e-2), 0.9)
    feed(groups, make_grads(1)[0])
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip((p for g in groups for _, p in g), before, strict=True)]
    assert moved == [False] * 3 + [True] * 3


def test_empty_layer_groups_keep_the_count_of_the_others() -> None:
    stem, head = make_groups()
    optimizer = optim.build([stem, [], head], Settings(), device=CPU)
    optim.set_hyper(optimizer, (1.0, 2.0, 3.0), 0.8)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [1.0, 1.0, 3.0, 3.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.99)] * 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"name": "SGD"}, "did you mean 'sgd'"),
        ({"name": "ranger"}, "nothing like it"),
        ({"engine": "Apex"}, "engine='Apex' is not known: did you mean 'apex'"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"momentum": 1.0}, r"momentum=1\.0 is out of range"),
        ({"beta2": -0.5}, r"beta2=-0\.5 is out of range"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"nesterov": True}, "nesterov=True with name='adamw'"),
        ({"name": "sgd", "nesterov": True, "momentum": 0.0}, r"momentum=0\.0"),
    ],
)
def test_what_makes_no_optimiser_gets_a_sentence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Settings(**options).check()


def test_nothing_to_optimise_gets_a_sentence() -> None:
    with pytest.raises(RecipeError, match="no parameters"):
        optim.build([[], []], Settings(), device=CPU)


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
