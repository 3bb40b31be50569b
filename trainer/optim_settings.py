"""Which optimiser, and with which constants? A description that needs no torch; `optim` builds it."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal, Self, get_args

from thawline.dataio import ranges
from thawline.dataio.ranges import above_zero, at_least, below_one
from thawline.trainer.errors import RecipeError

OptimName = Literal["adamw", "sgd", "lamb"]
OptimEngine = Literal["torch", "apex"]
MOMENTUM = below_one("the moments would never settle")


@dataclass(frozen=True)
class OptimSettings:
    """What turns gradients into steps; fastai's numbers. `check` says whether they make an optimiser.

    Source: Loshchilov and Hutter, AdamW, 2019; Nesterov, 1983, as Sutskever et al., 2013; You et al., LAMB, 2020.
    """

    name: OptimName = "adamw"
    """adamw and lamb decay the weights directly, sgd adds the decay to the gradient; lamb needs NVIDIA's apex."""
    engine: OptimEngine = "torch"
    """Whose fused kernels; lamb is NVIDIA's apex's whatever stands here."""
    weight_decay: Annotated[float, at_least(0, "weights would grow by themselves")] = 0.01
    """Of matrices and filters; norms and biases have none."""
    momentum: Annotated[float, MOMENTUM] = 0.9
    """sgd's, or the first beta of adamw and lamb, where the schedule leaves it alone."""
    nesterov: bool = False
    """Look ahead along the momentum; sgd only."""
    beta2: Annotated[float, MOMENTUM] = 0.99
    """Decay of the mean square of gradients; not sgd."""
    eps: Annotated[float, above_zero("an entry without a gradient would divide 0 by 0")] = 1e-5
    """Added to its root, so that an entry with hardly any gradient takes hardly any step; not sgd."""

    def check(self, *, where: str = "") -> Self:
        """Itself. where: what stands before the names of fields, such as "optim.". Raises RecipeError."""
        ranges.check(self, RecipeError, where=where)
        _check_known(f"{where}name", self.name, get_args(OptimName))
        _check_known(f"{where}engine", self.engine, get_args(OptimEngine))
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise RecipeError(
                f"{where}nesterov=True with {where}name={self.name!r} and {where}momentum={self.momentum}: only sgd "
                f"with a momentum has such steps; give {where}name='sgd' and {where}momentum=0.9, or no nesterov"
            )
        return self


def _check_known(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}?" if near else "nothing like it is known;"
    raise RecipeError(f"optimiser {field}={value!r} is not known: {meant} give one of {', '.join(choices)}")
