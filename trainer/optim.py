"""How are weights updated? An optimiser over layer groups, and the two numbers a schedule writes into it.

Does not schedule, clip or scale, and does not keep what happened: `schedule.py`, `step.py`, `recorder.py` do.
"""

import difflib
import importlib
import importlib.machinery
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from thawline.trainer.errors import RecipeError

LayerGroups = Sequence[Sequence[tuple[str, nn.Parameter]]]
Name = Literal["adamw", "sgd", "lamb"]
Engine = Literal["torch", "apex"]


@dataclass(frozen=True)
class Recipe:
    """Which optimiser, and its constants; fastai's numbers. Raises RecipeError where they make no optimiser.

    Source: Loshchilov and Hutter, AdamW, 2019; Nesterov, 1983, as Sutskever et al., 2013; You et al., LAMB, 2020.
    """

    name: Name = "adamw"
    """adamw and lamb decay the weights directly, sgd adds the decay to the gradient."""
    engine: Engine = "torch"
    """Whose fused kernels; lamb is NVIDIA's apex's whatever stands here."""
    weight_decay: float = 0.01
    """Of matrices and filters; norms and biases have none."""
    momentum: float = 0.9
    """sgd's, or the first beta of adamw and lamb, where a schedule leaves it alone."""
    nesterov: bool = False
    """sgd looks ahead along its momentum."""
    beta2: float = 0.99
    eps: float = 1e-5
    """Beside the root, so that an entry with hardly any gradient takes hardly any step."""

    def __post_init__(self) -> None:
        _known("name", self.name, get_args(Name))
        _known("engine", self.engine, get_args(Engine))
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight_decay={self.weight_decay} would blow the weights up: give 0 (none) or more")
        for name, value in (("momentum", self.momentum), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise RecipeError(f"{name}={value} is outside [0, 1): its mean would never settle; give 0.9, say")
        if not 0 < self.eps < math.inf:
            raise RecipeError(f"eps={self.eps}: an entry without a gradient would divide 0 by 0; give 1e-5, say")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise RecipeError(
                f"nesterov=True with name={self.name!r}, momentum={self.momentum}: there is no velocity of sgd to look "
                "ahead along; give name='sgd' and a momentum above 0, or nesterov=False"
            )


def build(groups: LayerGroups, recipe: Recipe, *, device: torch.device) -> torch.optim.Optimizer:
    """An optimiser over layer groups of (name, parameter), stem first; the rates are 0 until `set_hyper`.

    Each layer group becomes up to two param groups, matrices and filters with weight decay, norms and biases
    (one axis or none) without; each param group knows its `layer_group`. Frozen parameters are included: they
    have no gradient and are passed over. device: where the parameters lie.

    Raises RecipeError: no parameters; apex's kernels wanted without a GPU or NVIDIA's apex, or in bfloat16 that
    they do not know.
    """
    params = _param_groups(groups, recipe.weight_decay)
    if recipe.engine == "apex" or recipe.name == "lamb":
        return _from_apex(params, recipe, device)
    # The CUDA kernels read the rate from the device, as float32; on the CPU float64 is a Python float to the last bit.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    for group in params:
        group["lr"] = torch.zeros((), dtype=dtype, device=device)
    if recipe.name == "adamw":
        betas = (recipe.momentum, recipe.beta2)
        return torch.optim.AdamW(params, lr=0.0, betas=betas, eps=recipe.eps, fused=True)
    sgd = torch.optim.SGD(params, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    # torch makes these in the first step without filling them; were that step skipped, the next would read garbage.
    for group in sgd.param_groups:
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"] if p.requires_grad})
    return sgd


def set_hyper(optimizer: torch.optim.Optimizer, lrs: Sequence[float], momentum: float | None) -> None:
    """Write a schedule's numbers before a step: lr by layer group, and momentum (Adam's first beta).

    A rate that is a tensor is filled in place, without waiting for the device. momentum=None leaves the recipe's.
    """
    for group in optimizer.param_groups:
        rate = lrs[group["layer_group"]]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over another optimiser's `state_dict`, from whatever device; tensors of rates stay the same objects.

    What of `state` has the right dtype and device already is not copied: later steps write into it.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        saved = float(group["lr"])
        group["lr"] = rate.fill_(saved) if isinstance(rate, Tensor) else saved


def skips(optimizer: torch.optim.Optimizer) -> bool:
    """Does a step leave everything as it was where `optimizer.found_inf` is 1?

    That attribute is a float32 tensor without axes on the parameters' device, exactly 0 or 1: torch's fused
    kernels compare it with 1, and adamw takes it off its count of steps. apex's know nothing of it.
    """
    return all(group.get("fused") for group in optimizer.param_groups)


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


def _from_apex(params: list[dict[str, Any]], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """FusedLAMB also clips the norm of all gradients to 1, as NVIDIA's recipes do."""
    lamb = recipe.name == "lamb"
    asked, instead = ("name='lamb'", "adamw or sgd") if lamb else ("engine='apex'", "engine='torch'")
    if device.type != "cuda":
        raise RecipeError(f"optimiser {asked} on device {device.type!r}: it runs on a GPU only; give {instead}")
    state, sentence = find_apex()
    if state != "nvidia":
        raise RecipeError(f"optimiser {asked} needs NVIDIA's apex, but {sentence}; or give {instead}")
    dtypes = {p.dtype for group in params for _, p in group["params"]}
    if recipe.name != "adamw" and torch.bfloat16 in dtypes:
        raise RecipeError(
            f"optimiser {asked} with bfloat16 weights: apex's {recipe.name} knows float32 and float16 only, and would "
            f"fail or leave them as they are; give precision='bf16', which keeps float32 weights, or {instead}"
        )
    apex = importlib.import_module("apex.optimizers")
    if recipe.name == "sgd":
        sgd: torch.optim.Optimizer = apex.FusedSGD(params, lr=0.0, momentum=recipe.momentum, nesterov=recipe.nesterov)
        return sgd
    cls = apex.FusedLAMB if lamb else apex.FusedAdam
    adam: torch.optim.Optimizer = cls(
        params, lr=0.0, betas=(recipe.momentum, recipe.beta2), eps=recipe.eps, adam_w_mode=True
    )
    return adam


def _known(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}?" if near else "nothing like it is known;"
    raise RecipeError(f"optimiser {field}={value!r} is not known: {meant} give one of {', '.join(choices)}")


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
