"""How are weights updated? An optimiser over layer groups, and the two numbers a schedule writes into it.

Schedules are made in `schedule`, gradients clipped and scaled in `step`, results kept by `recorder`.
"""

import importlib
import importlib.machinery
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thawline.trainer.errors import RecipeError
from thawline.trainer.optimisers import from_timm
from thawline.trainer.optimisers.pair import Pair
from thawline.trainer.optimisers.settings import TIMM, OptimSettings

LayerGroups = Sequence[Sequence[tuple[str, nn.Parameter]]]


def build(groups: LayerGroups, settings: OptimSettings, *, device: torch.device) -> torch.optim.Optimizer:
    """An optimiser over layer groups of (name, parameter), stem first; the rates are 0 until `set_hyper`.

    Each layer group becomes up to two param groups, matrices and filters with weight decay, norms and biases
    (one axis or none) without; each param group knows its `layer_group`. Frozen parameters are included: they
    have no gradient and are passed over. device: where the parameters lie.

    Raises RecipeError: no parameters; nothing for muon to do; apex's kernels wanted without a GPU or NVIDIA's apex, or
    in bfloat16 that they do not know; whatever from_timm.build finds.
    """
    params = _param_groups(groups, settings.weight_decay)
    if settings.engine == "apex" or settings.name == "lamb":
        return _from_apex(params, settings, device)
    if settings.name.startswith(TIMM):
        return from_timm.build(params, settings)
    if settings.name == "muon":
        return _muon(groups, settings, device)
    if settings.name in _UNFUSED:
        return _UNFUSED[settings.name](params, settings)
    return _fused(params, settings, device)


def check(settings: OptimSettings) -> None:
    """What `build` would refuse of settings whatever the model. Raises RecipeError."""
    settings.check()
    if settings.name.startswith(TIMM):
        from_timm.build([{"params": [nn.Parameter(torch.zeros(2, 2))]}], settings)


_UNFUSED: dict[str, Callable[[list[dict[str, Any]], OptimSettings], torch.optim.Optimizer]] = {
    # torch has no fused kernels for these, or none on every device: their rates are plain numbers.
    "nadam": lambda params, s: torch.optim.NAdam(
        params, lr=0.0, betas=(s.momentum, s.beta2), eps=s.eps, decoupled_weight_decay=True
    ),
    "radam": lambda params, s: torch.optim.RAdam(
        params, lr=0.0, betas=(s.momentum, s.beta2), eps=s.eps, decoupled_weight_decay=True
    ),
    "rmsprop": lambda params, s: torch.optim.RMSprop(params, lr=0.0, alpha=s.beta2, momentum=s.momentum, eps=s.eps),
    "adagrad": lambda params, s: torch.optim.Adagrad(params, lr=0.0, eps=s.eps),
}


def _fused(params: list[dict[str, Any]], settings: OptimSettings, device: torch.device) -> torch.optim.Optimizer:
    # The CUDA kernels read the rate from the device, as float32; on the CPU float64 is a Python float to the last bit.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    for group in params:
        group["lr"] = torch.zeros((), dtype=dtype, device=device)
    if settings.name in ("adamw", "adam"):
        kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
        return kind(params, lr=0.0, betas=(settings.momentum, settings.beta2), eps=settings.eps, fused=True)
    dtypes = {p.dtype for group in params for _, p in group["params"]}
    wrong = device.type == "cpu" and torch.bfloat16 in dtypes and _release() < _FUSED_SGD_IN_BF16
    sgd = torch.optim.SGD(params, lr=0.0, momentum=settings.momentum, nesterov=settings.nesterov, fused=not wrong)
    # torch makes these in the first step without filling them; were that step skipped, the next would read garbage.
    for group in sgd.param_groups:
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"] if p.requires_grad})
    return sgd


_FUSED_SGD_IN_BF16 = (2, 15)
"""The first torch whose fused SGD is right in bfloat16 on a CPU: 2.11 and 2.13 are off by 2 after five steps of .1."""


def _release() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def set_hyper(optimizer: torch.optim.Optimizer, lrs: Sequence[float], momentum: float | None) -> None:
    """Write a schedule's numbers before a step: lr by layer group, and momentum (Adam's first beta).

    A rate that is a tensor is filled in place, without waiting for the device. momentum=None leaves the settings' own.
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
            group["betas"] = (momentum, *group["betas"][1:])
        elif "momentum" in group:  # adagrad has none
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


def _muon(groups: LayerGroups, settings: OptimSettings, device: torch.device) -> torch.optim.Optimizer:
    """Muon for hidden matrices, AdamW for the rest, at the same rates.

    Source: Jordan et al., Muon, 2024; steps as long as AdamW's by Liu et al., Muon is Scalable for LLM Training, 2025.
    """
    matrices = [name for group in groups for name, p in group if p.ndim == 2 and name.endswith("weight")]
    hidden = {*matrices[:-1]}  # the last makes the outputs
    if not hidden:
        raise RecipeError(
            "optimiser name='muon' has no hidden matrix in this model: filters have four axes, and all would be "
            "adamw's; give name='adamw'"
        )

    def part(of_muon: bool) -> list[dict[str, Any]]:
        kept = [[(name, p) for name, p in group if (name in hidden) == of_muon] for group in groups]
        return _param_groups(kept, settings.weight_decay)

    muon = torch.optim.Muon(
        part(True), lr=0.0, weight_decay=0.0, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw"
    )
    return Pair(muon, _fused(part(False), replace(settings, name="adamw"), device))


def _from_apex(params: list[dict[str, Any]], settings: OptimSettings, device: torch.device) -> torch.optim.Optimizer:
    """FusedLAMB also clips the norm of all gradients to 1, as NVIDIA's recipes do."""
    lamb = settings.name == "lamb"
    asked, instead = ("name='lamb'", "adamw or sgd") if lamb else ("engine='apex'", "engine='torch'")
    if device.type != "cuda":
        raise RecipeError(f"optimiser {asked} on device {device.type!r}: it runs on a GPU only; give {instead}")
    state, sentence = find_apex()
    if state != "nvidia":
        raise RecipeError(f"optimiser {asked} needs NVIDIA's apex, but {sentence}; or give {instead}")
    dtypes = {p.dtype for group in params for _, p in group["params"]}
    if settings.name != "adamw" and torch.bfloat16 in dtypes:
        raise RecipeError(
            f"optimiser {asked} with bfloat16 weights: apex's {settings.name} knows float32 and float16 only, and "
            f"would fail or leave them as they are; give precision='bf16', which keeps float32 weights, or {instead}"
        )
    apex = importlib.import_module("apex.optimizers")
    if settings.name == "sgd":
        sgd: torch.optim.Optimizer = apex.FusedSGD(
            params, lr=0.0, momentum=settings.momentum, nesterov=settings.nesterov
        )
        return sgd
    cls = apex.FusedLAMB if lamb else apex.FusedAdam
    adam: torch.optim.Optimizer = cls(
        params, lr=0.0, betas=(settings.momentum, settings.beta2), eps=settings.eps, adam_w_mode=True
    )
    return adam


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
