"""Which of timm's optimisers is meant? `timm:lion`, say: made with timm's own defaults. Needs the extra timm."""

import importlib
from difflib import get_close_matches
from typing import Any

import torch

from thawline.trainer.errors import RecipeError
from thawline.trainer.optimisers.settings import TIMM, OptimSettings


def build(params: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    """timm's optimiser of that name over param groups, the settings that were given on top of its own defaults.

    Raises RecipeError: no timm, no such optimiser, one that needs more than gradients, a setting that it has not.
    """
    try:
        theirs = importlib.import_module("timm.optim")
    except ImportError as error:
        raise RecipeError(
            f"optimiser name={settings.name!r} needs timm, which cannot be imported ({error}): nothing could train; "
            "install thawline[timm], or give a name without timm:"
        ) from error
    name = settings.name.removeprefix(TIMM)
    known = theirs.list_optimizers()
    if name not in known:
        near = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(TIMM + each for each in near)}?" if near else "give timm:lion, for instance"
        raise RecipeError(f"optimiser name={settings.name!r} is none that timm has: nothing could train; {meant}")
    if theirs.get_optimizer_info(name).second_order:
        raise RecipeError(
            f"optimiser name={settings.name!r} needs second derivatives, which a training step here does not make; "
            "give one of the first order, such as timm:lion"
        )
    try:
        optimizer: torch.optim.Optimizer = theirs.create_optimizer_v2(params, opt=name, lr=0.0)
    except Exception as error:  # apex or bitsandbytes that are not there, kernels for GPUs only
        raise RecipeError(
            f"optimiser name={settings.name!r} cannot be made here ({type(error).__name__}: {error}): nothing could "
            "train; give another one"
        ) from error
    _set(optimizer, settings)
    return optimizer


def _set(optimizer: torch.optim.Optimizer, settings: OptimSettings) -> None:
    """Write what was given, which is what is not our default, into all param groups."""
    default, has = OptimSettings(), set(optimizer.param_groups[0])
    homes = {"momentum": {"momentum", "betas"}, "beta2": {"betas"}, "eps": {"eps"}, "nesterov": {"nesterov"}}
    given = {name: value for name in homes if (value := getattr(settings, name)) != getattr(default, name)}
    for name, value in given.items():
        if not homes[name] & has:
            raise RecipeError(
                f"optimiser {name}={value!r} with name={settings.name!r}, which has none: nothing would read it; "
                "leave it out"
            )
    for group in optimizer.param_groups:
        if "betas" in group:
            first, second, *more = group["betas"]
            group["betas"] = (given.get("momentum", first), given.get("beta2", second), *more)
            given_here = {name: value for name, value in given.items() if name not in ("momentum", "beta2")}
            group.update(given_here)
        else:
            group.update(given)
