"""Optimisers by name: torch's and timm's own, step for step; resumed bit by bit; and what none of them can do."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.kit.optimisers import CPU, feed, make_grads, make_groups, ours, rising
from tests.kit.toy import ToyModel, same
from tests.trainer.checkpoints.test_resume import asked, on_disk, outcome
from thawline.models import groups
from thawline.trainer.errors import RecipeError
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings as Settings

Kind = Callable[..., torch.optim.Optimizer]
THEIRS: dict[str, tuple[Kind, dict[str, Any]]] = {
    # What each is in torch's own words, the betas and the momentum aside.
    "adam": (torch.optim.Adam, {"eps": 1e-5}),
    "nadam": (torch.optim.NAdam, {"eps": 1e-5, "decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"eps": 1e-5, "decoupled_weight_decay": True}),
    "rmsprop": (torch.optim.RMSprop, {"eps": 1e-5, "alpha": 0.99}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-5}),
}


def by_hand(kind: Kind, steps: int, **options: Any) -> list[np.ndarray[Any, Any]]:
    """The weights after `steps` of torch's optimiser, its rates and momenta set as a user would."""
    made = make_groups()
    parts = [
        {"params": [p for _, p in group if (p.ndim > 1) == decayed], "weight_decay": 0.05 if decayed else 0.0}
        for group in made
        for decayed in (True, False)
    ]
    optimizer = kind(parts, **options)
    for grads, (lrs, momentum) in zip(make_grads(steps), rising(steps), strict=True):
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = lrs[number // 2]
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            elif "momentum" in group:
                group["momentum"] = momentum
        feed(made, grads)
        optimizer.step()
    return [p.detach().numpy() for group in made for _, p in group]


@pytest.mark.parametrize("name", THEIRS)
def test_a_name_is_torch_s_optimiser_under_the_schedule(name: str) -> None:
    kind, options = THEIRS[name]
    betas = {"betas": (0.9, 0.99)} if name in ("adam", "nadam", "radam") else {}
    momentum = {"momentum": 0.9} if name == "rmsprop" else {}
    found = ours(Settings(name, weight_decay=0.05), make_grads(12), rising(12), device=CPU)
    for one, other in zip(found, by_hand(kind, 12, **options, **betas, **momentum), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_timm_s_are_timm_s() -> None:
    timm = pytest.importorskip("timm.optim", reason="the extra timm is not installed")
    for name in ("lion", "adopt", "lamb"):
        found = ours(Settings(f"timm:{name}", weight_decay=0.05), make_grads(12), rising(12), device=CPU)
        kind = partial(timm.create_optimizer_v2, opt=name, lr=0.0)
        for one, other in zip(found, by_hand(kind, 12), strict=True):
            np.testing.assert_array_equal(one, other)
    given = optim.build(make_groups(), Settings("timm:adopt", momentum=0.8, eps=1e-3), device=CPU)
    assert [(group["betas"], group["eps"]) for group in given.param_groups] == [((0.8, 0.9999), 1e-3)] * 4
    for settings, told in (
        (Settings("timm:lyon"), "is none that timm has: .* did you mean timm:lion"),
        (Settings("timm:adahessian"), "needs second derivatives"),
        (Settings("timm:lion", eps=1e-3), r"eps=0\.001 with name='timm:lion', which has none"),
        (Settings("timm:fusedlamb"), "cannot be made here"),
    ):
        with pytest.raises(RecipeError, match=told):
            optim.check(settings)


class Hidden(ToyModel):
    """With a hidden matrix, for muon."""

    def __init__(self) -> None:
        super().__init__(norm=False)  # a bias before BatchNorm has no gradient but rounding
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def test_muon_has_the_hidden_matrices_and_adamw_the_rest() -> None:
    hidden, plain = Hidden(), Hidden()
    optimizer = optim.build(groups.parameter_groups(hidden), Settings("muon", weight_decay=0.05), device=CPU)
    weights = dict(plain.named_parameters())
    weight = weights.pop("head.2.weight")
    decayed = [p for p in weights.values() if p.ndim > 1]
    exempt = [p for p in weights.values() if p.ndim <= 1]
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.05}
    muon = torch.optim.Muon([weight], momentum=0.9, adjust_lr_fn="match_rms_adamw", **options)
    parts: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(parts, betas=(0.9, 0.99), eps=1e-5, **options)
    for step in range(5):
        optim.set_hyper(optimizer, (0.01,) * 3, 0.9)
        images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        for model in (hidden, plain):
            model.zero_grad()
            model(images).square().mean().backward()
        optimizer.step()
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    for (name, one), other in zip(hidden.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    moments = {tuple(sorted(optimizer.state[p])) for group in optimizer.param_groups for p in group["params"]}
    assert moments == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    with pytest.raises(RecipeError, match="name='muon' has no hidden matrix in this model"):
        optim.build(make_groups(), Settings("muon"), device=CPU)


@pytest.mark.parametrize("name", ["nadam", "adagrad", "muon", "timm:lion"])
def test_stopped_and_resumed_each_goes_on_bit_by_bit(tmp_path: Path, name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra timm is not installed")

    def fit(folder: str, stop_at_ask: int = 0) -> Any:
        learn = on_disk(tmp_path / folder, model=Hidden(), optimizer=Settings(name), stop_at_ask=stop_at_ask)
        learn.resume()
        learn.fine_tune(1, 1e-2)
        return learn

    unbroken = fit("unbroken")
    for stop in (1, 2, asked(unbroken) - 5):
        assert fit(str(stop), stop).stopped
        resumed = fit(str(stop))
        assert outcome(resumed) == outcome(unbroken)
        assert same(resumed.model.state_dict(), unbroken.model.state_dict())


def test_a_pair_s_state_survives_a_file() -> None:
    named = groups.parameter_groups(Hidden())
    one, other = (optim.build(named, Settings("muon"), device=CPU) for _ in range(2))
    optim.set_hyper(one, (0.01,) * 3, 0.8)
    for group in one.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    one.step()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    optim.load_state(other, torch.load(file, weights_only=True))
    assert other.state_dict()["param_groups"] == one.state_dict()["param_groups"]
    other.step()
    assert all(other.state[p] for group in other.param_groups for p in group["params"])
