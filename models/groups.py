"""Which layers train together, and which are frozen? Layer groups from stem to head.

Works on any module with a method `groups()` that answers lists of its submodules, stem first, and beside them of such
parameters as lie in none of these (a transformer's class token). `fixed_groups`, where it has that, counts those first
ones that never train. A model wrapped by DDP or torch.compile is to be unwrapped first; and DDP must be wrapped anew
after each change made here.
"""

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from thawline.models.errors import ModelError

Part = nn.Module | nn.Parameter
"""What a layer group is made of."""


def layer_groups(model: nn.Module) -> list[list[Part]]:
    """The model's submodules in groups, stem first and head last.

    Raises: ModelError, when the model has no method `groups()`.
    """
    groups = getattr(model, "groups", None)
    if not callable(groups):
        raise ModelError(
            f"{type(model).__name__} has no method groups(): what to freeze is not known; "
            "give it one that returns lists of submodules, stem first"
        )
    return [list(group) for group in groups()]


def parameter_groups(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters by layer group, in order, each with its name in `model.state_dict()`; frozen ones too.

    Raises: ModelError, when a parameter lies in no group or in two, or the model has no method `groups()`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        [(names[id(parameter)], parameter) for part in group for parameter in parameters_of(part)]
        for group in layer_groups(model)
    ]
    placed = Counter(name for group in found for name, _ in group)
    wrong = [name for name in names.values() if placed[name] != 1]
    if wrong:
        raise ModelError(
            f"{type(model).__name__}.groups() holds {wrong[0]} {placed[wrong[0]]} times ({len(wrong)} "
            "parameters so): it would not train as meant; put every layer in exactly one group"
        )
    return found


def gathered(module: nn.Module, names: Sequence[Sequence[str]]) -> list[list[Part]]:
    """Groups of parameters, given by their names in `module`, as the largest submodules that lie in one group whole.

    A submodule without parameters goes with what comes before it.
    """
    of = {name: i for i, group in enumerate(names) for name in group}
    found: list[list[Part]] = [[] for _ in names]
    last = 0

    def place(part: nn.Module, prefix: str) -> None:
        nonlocal last
        inside = {of[prefix + name] for name, _ in part.named_parameters()} or {last}
        if len(inside) == 1:
            (last,) = inside
            found[last].append(part)
            return
        for name, parameter in part.named_parameters(recurse=False):
            found[of[prefix + name]].append(parameter)
        for name, child in part.named_children():
            place(child, f"{prefix}{name}.")

    for name, child in module.named_children():
        place(child, f"{name}.")
    for name, parameter in module.named_parameters(recurse=False):
        found[of[name]].insert(0, parameter)
    return found


def parameters_of(part: Part) -> list[nn.Parameter]:
    """What of a layer group learns, of one of its parts."""
    return [part] if isinstance(part, nn.Parameter) else [*part.parameters()]


def modules_of(group: Sequence[Part]) -> list[nn.Module]:
    """Every module of a layer group, and those within."""
    return [layer for part in group if isinstance(part, nn.Module) for layer in part.modules()]


def freeze_to(model: nn.Module, n: int, *, norms: bool = True) -> None:
    """Train the groups from n on and freeze those before; -1 is the head only, as in indexing.

    norms: BatchNorm layers keep training in frozen groups too: their parameters ask for gradients, and since the
    mode is left alone, `model.train()` keeps their statistics moving. Backward then runs through the whole body.
    Without, no frozen parameter asks for a gradient: nothing is kept of the forward pass before the first trainable
    layer, and backward ends there.
    Of a model with `fixed_groups` nothing in these trains, BatchNorm neither, whatever n is.
    Raises: ModelError, when there is no group n.
    Source: fastai, `Learner.freeze_to` with `train_bn=True`.
    """
    groups, first, fixed = layer_groups(model), first_trained(model, n), _fixed(model)
    for i, group in enumerate(groups):
        for part in group:
            for parameter in parameters_of(part):
                parameter.requires_grad_(i >= first)
        for layer in modules_of(group):
            for parameter in layer.parameters(recurse=False) if norms and isinstance(layer, _BatchNorm) else ():
                parameter.requires_grad_(i >= fixed)


def first_trained(model: nn.Module, n: int) -> int:
    """The number of the first layer group that `freeze_to(model, n)` trains. Raises ModelError, when there is none."""
    groups = layer_groups(model)
    first = n + len(groups) if n < 0 else n
    if not 0 <= first < len(groups):
        raise ModelError(
            f"freeze_to {n}: the model has {len(groups)} layer groups, so nothing would be left to train; "
            f"give a value from {-len(groups)} to {len(groups) - 1}"
        )
    return max(first, _fixed(model))


def _fixed(model: nn.Module) -> int:
    return int(getattr(model, "fixed_groups", 0))


def freeze(model: nn.Module) -> None:
    """Train the last group only, and BatchNorm everywhere."""
    freeze_to(model, -1)


def unfreeze(model: nn.Module) -> None:
    """Train everything that may train."""
    freeze_to(model, 0)
