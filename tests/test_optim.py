"""The optimisers against plain numpy, and what a machine without the right apex is told."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trainer import optim
from trainer.errors import RecipeError
from trainer.schedule import OneCycle

CPU = torch.device("cpu")
Groups = list[list[tuple[str, nn.Parameter]]]


def make_groups() -> Groups:
    """Two layer groups: a filter with a norm's weight and bias, and a matrix with a bias and a scale."""
    draw = torch.Generator().manual_seed(3)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=draw))

    stem = [("conv", parameter(4, 3, 3, 3)), ("norm.weight", parameter(4)), ("norm.bias", parameter(4))]
    return [stem, [("head.weight", parameter(5, 4)), ("head.bias", parameter(5)), ("scale", parameter())]]


def numpy_adamw(weights: list[np.ndarray], grads: list[list[np.ndarray]], cycle: OneCycle) -> list[np.ndarray]:
    """Decoupled decay, bias correction by the current betas, eps outside the root; three weights a group."""
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    for step in range(cycle.steps):
        lrs, beta = cycle.at(step)
        for i, g in enumerate(grads[step]):
            lr = lrs[i // 3]
            first[i] = beta * first[i] + (1 - beta) * g
            second[i] = 0.99 * second[i] + 0.01 * g * g
            decay = 0.05 if weights[i].ndim > 1 else 0.0
            unbiased = first[i] / (1 - beta ** (step + 1))
            root = np.sqrt(second[i] / (1 - 0.99 ** (step + 1)))
            weights[i] = weights[i] * (1 - lr * decay) - lr * unbiased / (root + 1e-5)
    return weights


def test_adamw_under_a_schedule_equals_plain_numpy() -> None:
    groups = make_groups()
    params = [p for group in groups for _, p in group]
    cycle = OneCycle((1e-2, 1e-1), 12)
    draw = np.random.default_rng(5)
    # Gradients down to 1e-6 tell whether eps stands inside the root or outside.
    grads = [[draw.normal(size=tuple(p.shape)) * 10.0 ** -(i % 7) for i, p in enumerate(params)] for _ in range(12)]
    expected = numpy_adamw([p.detach().double().numpy().copy() for p in params], grads, cycle)
    optimizer = optim.build(groups, weight_decay=0.05, device=CPU)
    for step in range(12):
        optim.set_hyper(optimizer, *cycle.at(step))
        for p, g in zip(params, grads[step], strict=True):
            p.grad = torch.from_numpy(np.asarray(g, dtype=np.float32))
        optimizer.step()
    for p, weight in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=2e-5, atol=2e-6)


def test_sgd_under_a_schedule_equals_plain_numpy() -> None:
    groups = make_groups()
    params = [p for group in groups for _, p in group]
    weights = [p.detach().double().numpy().copy() for p in params]
    velocity: list[np.ndarray] = [np.zeros_like(w) for w in weights]
    cycle = OneCycle((1e-2, 1e-1), 8)
    draw = np.random.default_rng(6)
    optimizer = optim.build(groups, name="sgd", weight_decay=0.05, device=CPU)
    for step in range(8):
        lrs, momentum = cycle.at(step)
        optim.set_hyper(optimizer, lrs, momentum)
        for i, p in enumerate(params):
            g = draw.normal(size=tuple(p.shape))
            p.grad = torch.from_numpy(np.asarray(g, dtype=np.float32))
            total = g + (0.05 * weights[i] if weights[i].ndim > 1 else 0.0)
            velocity[i] = total if step == 0 else momentum * velocity[i] + total
            weights[i] = weights[i] - lrs[i // 3] * velocity[i]
        optimizer.step()
    for p, weight in zip(params, weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), weight, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("weight_decay", [0.01, 0.0])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_parameter_is_in_one_param_group_with_its_layer_group_and_decay(name: str, weight_decay: float) -> None:
    groups = make_groups()
    optimizer = optim.build(groups, name=name, weight_decay=weight_decay, device=CPU)
    found = [(group["layer_group"], group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
    assert found == [
        (0, weight_decay, ["conv"]),
        (0, 0.0, ["norm.weight", "norm.bias"]),
        (1, weight_decay, ["head.weight"]),
        (1, 0.0, ["head.bias", "scale"]),
    ]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_frozen_layer_group_is_included_and_does_not_move() -> None:
    groups = make_groups()
    for _, p in groups[0]:
        p.requires_grad_(False)
    before = [p.detach().clone() for _, p in groups[0]]
    optimizer = optim.build(groups, device=CPU)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    optim.set_hyper(optimizer, (1e-2, 1e-2), 0.9)
    moved = groups[1][0][1]
    old = moved.detach().clone()
    for _, p in groups[1]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(groups[0], before, strict=True))
    assert not torch.equal(moved, old)


def test_empty_layer_groups_keep_the_count_of_the_others() -> None:
    stem, head = make_groups()
    optimizer = optim.build([stem, [], head], device=CPU)
    optim.set_hyper(optimizer, (1.0, 2.0, 3.0), 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 3.0, 3.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.99)] * 4


@pytest.mark.parametrize(
    ("name", "told"),
    [("adam", "did you mean 'adamw'"), ("SGD", "did you mean 'sgd'"), ("ranger", "nothing like it")],
)
def test_an_unknown_name_is_told_the_nearest(name: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        optim.build(make_groups(), name=name, device=CPU)


def test_nothing_to_optimise_and_negative_decay_get_a_sentence() -> None:
    with pytest.raises(RecipeError, match="no parameters"):
        optim.build([[], []], device=CPU)
    with pytest.raises(RecipeError, match=r"weight_decay=-0\.1"):
        optim.build(make_groups(), weight_decay=-0.1, device=CPU)


# apex, as four machines have it ----------------------------------------------------------------------------

FUSED_LAMB = "import torch\nclass FusedLAMB(torch.optim.AdamW):\n    pass\n"
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


def test_nvidia_s_apex_is_found_and_makes_the_lamb(install: Install) -> None:
    install({"apex/__init__.py": "", "apex/optimizers/__init__.py": FUSED_LAMB, "amp_C.py": ""})
    assert optim.find_apex()[0] == "nvidia"
    optimizer = optim.build(make_groups(), name="lamb", device=torch.device("cuda"))
    assert type(optimizer).__name__ == "FusedLAMB"
    assert [group["layer_group"] for group in optimizer.param_groups] == [0, 0, 1, 1]


def test_a_missing_apex_is_not_to_be_installed_from_pypi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert optim.find_apex()[0] == "missing"
    with pytest.raises(RecipeError, match=r"`pip install apex` gets an unrelated package.*give adamw or sgd"):
        optim.build(make_groups(), name="lamb", device=torch.device("cuda"))


def test_the_unrelated_apex_is_named_and_never_imported(install: Install, tmp_path: Path) -> None:
    install({"apex/__init__.py": "raise SystemExit('imported')"})
    state, sentence = optim.find_apex()
    assert state == "unrelated"
    assert str(tmp_path) in sentence


@pytest.mark.parametrize(
    ("optimizers", "amp_c"),
    [
        ("raise OSError('libcudart.so: not found')", ""),
        ("", ""),
        (FUSED_LAMB, "raise ImportError('kernels')"),
    ],
)
def test_a_half_built_apex_is_broken_with_the_reason(install: Install, optimizers: str, amp_c: str) -> None:
    install({"apex/__init__.py": "", "apex/optimizers/__init__.py": optimizers, "amp_C.py": amp_c})
    state, sentence = optim.find_apex()
    assert state == "broken"
    assert "OSError: libcudart" in sentence or "AttributeError" in sentence or "ImportError: kernels" in sentence


def test_lamb_on_a_cpu_gets_a_sentence() -> None:
    with pytest.raises(RecipeError, match="runs on a GPU only"):
        optim.build(make_groups(), name="lamb", device=CPU)
