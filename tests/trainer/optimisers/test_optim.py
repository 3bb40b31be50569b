"""The optimisers against plain numpy, steps that are skipped, and what a machine without the right apex is told."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.optimisers import (
    CPU,
    Hyper,
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

ADAMW = Settings(weight_decay=0.05)
SGD = Settings("sgd", weight_decay=0.05)


def constant(steps: int, momentum: float = 0.9) -> Hyper:
    return [((1e-2, 1e-1), momentum)] * steps


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


@pytest.mark.parametrize(("release", "fused"), [("2.13.0", False), ("2.15.0+cu132", True)])
def test_sgd_in_bfloat16_on_a_cpu_is_right_with_every_torch(
    release: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused and optim._release() < optim._FUSED_SGD_IN_BF16:
        pytest.skip("this torch's fused SGD is wrong in bfloat16")
    monkeypatch.setattr(torch, "__version__", release)
    grads, groups = make_grads(6), make_groups(dtype=torch.bfloat16)
    optimizer = optim.build(groups, SGD, device=CPU)
    assert {group["fused"] for group in optimizer.param_groups} == {fused}
    for step in range(6):
        optim.set_hyper(optimizer, (1e-2, 1e-1), 0.9)
        feed(groups, grads[step])
        optimizer.step()
    exact = numpy_steps(SGD, grads, constant(6))
    for (_, p), expected in zip((named for group in groups for named in group), exact, strict=True):
        np.testing.assert_allclose(p.detach().float().numpy(), expected, atol=0.05)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert optim.skips(optim.build(make_groups(), SGD, device=CPU)), "in float32 the fused one is right"


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
        ({"name": "adamx"}, "did you mean 'adam"),
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
        ({"name": "sgd", "beta2": 0.9}, r"beta2=0\.9 with name='sgd', which has none"),
        ({"name": "sgd", "eps": 1e-8}, "eps=1e-08 with name='sgd', which has none"),
        ({"name": "adagrad", "momentum": 0.5}, r"momentum=0\.5 with name='adagrad', which has none"),
        ({"name": "radam", "engine": "apex"}, "engine='apex' with name='radam', which NVIDIA's apex has not"),
    ],
)
def test_what_makes_no_optimiser_gets_a_sentence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Settings(**options).check()


def test_nothing_to_optimise_gets_a_sentence() -> None:
    with pytest.raises(RecipeError, match="no parameters"):
        optim.build([[], []], Settings(), device=CPU)
