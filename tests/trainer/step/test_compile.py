"""torch.compile as a switch: the same numbers but for rounding, on two ranks under DDP."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.kit.ranks import Here, Outcome, worlds_of
from tests.kit.toy import ToyModel, same, snapshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and g++ is not here"),
]


class Counted(ToyModel):
    """Counts how often Python goes through its forward pass, which compiled code does not."""

    passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.passes += 1
        return super().forward(images)


def scenario(here: Here) -> Outcome:
    outcomes: Outcome = {}
    for mode in ("off", "default"):
        model = Counted(dropout=0.0)
        # Not Adam: it makes a step of any gradient, however small, and a bias ahead of BatchNorm has but rounding.
        learn = here.learner(mode, model=model, compile=mode, optimizer="sgd")
        learn.fit_one_cycle(2, 1e-2)
        outcomes[mode] = (snapshot(model), model.passes, learn.progress.step, learn.validate())
    return outcomes


def test_compiled_steps_train_to_the_eager_weights_on_two_ranks(tmp_path: Path) -> None:
    ranks = worlds_of(scenario, tmp_path, sizes=(2,))[2]
    for outcome in ranks:
        eager, eager_passes, steps, plain = outcome["off"]
        compiled, passes, compiled_steps, values = outcome["default"]
        assert compiled_steps == steps
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        assert values == pytest.approx(plain, rel=1e-4)
        assert same(compiled, ranks[0]["default"][0])
        assert passes <= eager_passes - steps  # validation stays eager
