"""How are weights updated? An optimiser over layer groups, and the two numbers a schedule writes into it.

Does not schedule, clip or scale, and does not keep what happened: `schedule.py`, `step.py`, `recorder.py` do.
"""

import difflib
import importlib
import importlib.machinery
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from trainer.errors import RecipeError

LayerGroups = Sequence[Sequence[tuple[str, nn.Parameter]]]
_KNOWN = ("adamw", "sgd", "lamb")
_BETAS = (0.9, 0.99)
_EPS = 1e-5  # fastai's: an entry with hardly any gradient then takes hardly any step


def build(
    groups: LayerGroups,
    *,
    name: str = "adamw",
    weight_decay: float = 0.01,
    device: torch.device,
) -> torch.optim.Optimizer:
    """An optimiser over layer groups of (name, parameter), stem first; the rates are 0 until `set_hyper`.

    Each layer group becomes up to two param groups, matrices and filters with weight decay, norms and biases
    (one axis or none) without; each param group knows its `layer_group`. Frozen parameters are included: they
    have no gradient and are passed over. adamw and lamb decay the weights directly, sgd adds to the gradient.

    Raises RecipeError: unknown name, weight_decay below 0, lamb without a GPU or without NVIDIA's apex.
    Source: Loshchilov and Hutter, AdamW, 2019; You et al., LAMB, 2020; constants and exemptions are fastai's.
    """
    if name not in _KNOWN:
        near = difflib.get_close_matches(str(name).lower(), _KNOWN, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}?" if near else "nothing like it is known;"
        raise RecipeError(f"optimiser name={name!r} is not known: {meant} give one of {', '.join(_KNOWN)}")
    if not 0 <= weight_decay < float("inf"):
        raise RecipeError(f"weight_decay={weight_decay} would blow the weights up: give 0 (none) or more")
    params = _param_groups(groups, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, betas=_BETAS, eps=_EPS, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.0, momentum=0.9, fused=True)
    if device.type != "cuda":
        raise RecipeError(f"optimiser name='lamb' on device {device.type!r}: it runs on a GPU only; give adamw or sgd")
    state, sentence = find_apex()
    if state != "nvidia":
        raise RecipeError(f"optimiser name='lamb' is apex's FusedLAMB, but {sentence}; or give adamw or sgd")
    from apex.optimizers import FusedLAMB

    lamb: torch.optim.Optimizer = FusedLAMB(params, lr=0.0, betas=_BETAS, eps=_EPS)
    return lamb


def set_hyper(optimizer: torch.optim.Optimizer, lrs: Sequence[float], momentum: float) -> None:
    """Write a schedule's numbers before a step: lr by layer group, and momentum (Adam's first beta)."""
    for group in optimizer.param_groups:
        group["lr"] = lrs[group["layer_group"]]
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def find_apex() -> tuple[Literal["nvidia", "unrelated", "missing", "broken"], str]:
    """Which apex is installed, and a sentence about it. Imports apex only where it looks like NVIDIA's."""
    remedy = (
        "NVIDIA's apex comes with the nvcr.io/nvidia/pytorch image or from github.com/NVIDIA/apex "
        "(`pip install apex` gets an unrelated package)"
    )
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "missing", f"apex is not installed: {remedy}"
    folders = list(spec.submodule_search_locations or [])
    where = spec.origin or ", ".join(folders)
    if importlib.machinery.PathFinder.find_spec("optimizers", folders) is None:
        return "unrelated", f"the apex at {where} only has the name of NVIDIA's: uninstall it; {remedy}"
    try:
        importlib.import_module("apex.optimizers").FusedLAMB  # noqa: B018  # is it there?
        importlib.import_module("amp_C")  # FusedLAMB needs these kernels only once it is made
    except Exception as error:  # whatever a half-installed package raises, the answer is the same
        fault = f"{type(error).__name__}: {error}"
        return "broken", f"the apex at {where} does not work ({fault}): build its CUDA extensions; {remedy}"
    return "nvidia", f"NVIDIA's apex with FusedLAMB at {where}"


def _param_groups(groups: LayerGroups, weight_decay: float) -> list[dict[str, Any]]:
    param_groups: list[dict[str, Any]] = []
    for layer_group, named in enumerate(groups):
        decayed = [(name, p) for name, p in named if p.ndim > 1]
        exempt = [(name, p) for name, p in named if p.ndim <= 1]
        for params, decay in ((decayed, weight_decay), (exempt, 0.0)):
            if params:
                param_groups.append({"params": params, "weight_decay": decay, "layer_group": layer_group})
    if not param_groups:
        raise RecipeError("the model has no parameters: there is nothing to optimise; give one with weights")
    return param_groups
