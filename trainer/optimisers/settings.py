"""Which optimiser, and with which constants? A description that needs no torch; `optim` builds it."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal, Self, get_args

from thawline.dataio import ranges
from thawline.dataio.ranges import above_zero, at_least, below_one
from thawline.trainer.errors import RecipeError

_ADAM = ("momentum", "beta2", "eps")
_HAS = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "nadam": _ADAM,
    "radam": _ADAM,
    "sgd": ("momentum", "nesterov"),
    "rmsprop": _ADAM,
    "adagrad": ("eps",),
    "muon": _ADAM,
    "lamb": _ADAM,
}
"""Optimiser -> the settings that it has, besides weight_decay."""
TIMM = "timm:"
"""What stands before the name of an optimiser of timm's."""
OptimEngine = Literal["torch", "apex"]
MOMENTUM = below_one("the moments would never settle")


@dataclass(frozen=True)
class OptimSettings:
    """What turns gradients into steps; fastai's numbers. `check` says whether they make an optimiser.

    adamw, nadam, radam, muon and lamb decay the weights directly; adam, sgd, rmsprop and adagrad add the decay to the
    gradient. muon is for hidden matrices: all parameters with another number of axes, and the last layer, have adamw.
    adamw, adam and sgd have torch's fused kernels. With the others, and with apex, the host waits for a GPU once a
    step, to ask whether the gradients are finite.
    Source: Loshchilov and Hutter, AdamW, 2019; Nesterov, 1983, as Sutskever et al., 2013; Jordan et al., Muon, 2024;
    You et al., LAMB, 2020; torch.optim for the others.
    """

    name: str = "adamw"
    """adamw, adam, nadam, radam, sgd, rmsprop, adagrad, muon, lamb (NVIDIA's apex), or one of timm's as timm:lion."""
    engine: OptimEngine = "torch"
    """Whose fused kernels; lamb is NVIDIA's apex's whatever stands here."""
    weight_decay: Annotated[float, at_least(0, "weights would grow by themselves")] = 0.01
    """Of matrices and filters; norms and biases have none."""
    momentum: Annotated[float, MOMENTUM] = 0.9
    """That of sgd, rmsprop and muon, or the first beta of the others, where the schedule leaves it alone."""
    nesterov: bool = False
    """Look ahead along the momentum; sgd only."""
    beta2: Annotated[float, MOMENTUM] = 0.99
    """Decay of the mean square of gradients; not sgd or adagrad."""
    eps: Annotated[float, above_zero("an entry without a gradient would divide 0 by 0")] = 1e-5
    """Added to its root, so that an entry with hardly any gradient takes hardly any step; not sgd."""

    def check(self, *, where: str = "") -> Self:
        """Itself. where: what stands before the names of fields, such as "optim.". Raises RecipeError."""
        ranges.check(self, RecipeError, where=where)
        _check_known(f"{where}engine", self.engine, get_args(OptimEngine))
        if not self.name.startswith(TIMM):
            _check_known(f"{where}name", self.name, tuple(_HAS))
            self._check_has(where)
        if self.engine == "apex" and self.name not in ("adamw", "sgd", "lamb"):
            raise RecipeError(
                f"{where}engine='apex' with {where}name={self.name!r}, which NVIDIA's apex has not: nothing could "
                f"train; give {where}engine='torch', or adamw, sgd or lamb"
            )
        return self

    def _check_has(self, where: str) -> None:
        """Raises RecipeError for a setting that was given, which is one that is not its default, and is not read."""
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise RecipeError(
                f"{where}nesterov=True with {where}name={self.name!r} and {where}momentum={self.momentum}: only sgd "
                f"with a momentum has such steps; give {where}name='sgd' and {where}momentum=0.9, or no nesterov"
            )
        for name in ("momentum", "beta2", "eps"):
            value = getattr(self, name)
            if name not in _HAS[self.name] and value != getattr(type(self), name):
                raise RecipeError(
                    f"{where}{name}={value!r} with {where}name={self.name!r}, which has none: nothing would read it; "
                    "leave it out, or give another optimiser"
                )


def _check_known(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}?" if near else "nothing like it is known;"
    raise RecipeError(f"optimiser {field}={value!r} is not known: {meant} give one of {', '.join(choices)}")
