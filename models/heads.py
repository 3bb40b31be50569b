"""What turns a body's features into the task's outputs? fastai's heads, and which of them a task has."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thawline.models.bodies.body import Body
from thawline.models.decoders import mask_head
from thawline.models.errors import ModelError

HIDDEN = 512
"""Width between the two linear layers."""


class AdaptiveConcatPool2d(nn.Module):
    """Global max pool beside global average pool: (N, F, H, W) -> (N, 2F, 1, 1), the max first."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features.amax((2, 3), keepdim=True), features.mean((2, 3), keepdim=True)], 1)


class SpatialSoftmax(nn.Module):
    """Where each channel is large: (N, F, H, W) -> (N, 2F, 1, 1), all x, then all y, -1 and 1 at the map's edges.

    Pooled as classes are, features tell where something lies only near the edges, by the padding that they saw there.
    Source: Levine et al., End-to-End Training of Deep Visuomotor Policies, 2016.
    """

    def forward(self, features: Tensor) -> Tensor:
        shares = features.float().flatten(2).softmax(2).reshape(features.shape)
        x, y = (_middles(side, features.device) for side in (features.shape[3], features.shape[2]))
        across, down = (shares.sum(2) * x).sum(2), (shares.sum(3) * y).sum(2)
        return torch.cat([across, down], 1)[:, :, None, None].to(features.dtype)


def _middles(side: int, device: torch.device) -> Tensor:
    """The middles of `side` cells between -1 and 1."""
    return (2 * torch.arange(side, device=device, dtype=torch.float32) + 1) / side - 1


def classification_head(
    features: int, outputs: int, *, dropout: float = 0.5, pooled: bool = False, pool: nn.Module | None = None
) -> nn.Sequential:
    """The head from a feature map (N, features, H, W) to logits (N, outputs).

    Half of `dropout` comes before the first linear layer, all of it before the second. The linear layers
    start Kaiming normal, the norms as torch makes them.
    pooled: the body is a transformer that gives a vector, (N, features): a norm, `dropout`, and one linear layer, which
    starts as transformers' do, truncated normal with deviation .02.
    pool: of a feature map, (N, F, H, W) -> (N, 2F, 1, 1); the concat pool when not given.
    Raises: ModelError, when there is nothing to predict or `dropout` is no probability below one.
    Source: fastai, `create_head` with its defaults; the initialisation is He et al. (2015).
    """
    if outputs < 1:
        raise ModelError(f"a head with {outputs} outputs predicts nothing: give at least one class")
    if not 0 <= dropout < 1:  # catches NaN too
        raise ModelError(f"dropout={dropout} lies outside [0, 1): nothing could be learned; give a value within")
    if pooled:
        linear = nn.Linear(features, outputs)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.LayerNorm(features), nn.Dropout(dropout), linear)
    head = nn.Sequential(
        pool or AdaptiveConcatPool2d(),
        nn.Flatten(),
        nn.BatchNorm1d(2 * features),
        nn.Dropout(dropout / 2),
        nn.Linear(2 * features, HIDDEN, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(HIDDEN),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, outputs, bias=False),
    )
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return head


class InUnits(nn.Module):
    """Standardised outputs (N, C) -> numbers in their own units, (N, C) float32, within `y_range` where one is given.

    Its constants are no buffers: those follow the model into half precision, where 2026 becomes 2032.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], y_range: Sequence[float] | None = None) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.y_range = None if y_range is None else (float(y_range[0]), float(y_range[1]))

    def forward(self, standardised: Tensor) -> Tensor:
        if self.y_range is not None:
            return sigmoid_range(standardised.float(), *self.y_range)
        columns = zip(standardised.float().unbind(1), self.mean, self.std, strict=True)
        return torch.stack([column * std + mean for column, mean, std in columns], 1)


def other_units(head: nn.Module, options: Mapping[str, Any] | None) -> str:
    """Why a head of numbers cannot say what another one said, made with these options of `create`; "" where it can."""
    units = _units(head)
    if units is None:
        return ""
    if options is None or not {"label_mean", "label_std"} <= options.keys():
        return "the file does not say in which units its numbers were learnt"
    theirs = None if (given := options.get("y_range")) is None else (float(given[0]), float(given[1]))
    return "" if theirs == units.y_range else f"its numbers lie within y_range={theirs}, and these in {units.y_range}"


def convert_units(head: nn.Module, options: Mapping[str, Any]) -> None:
    """Have a head of numbers, loaded from one that was made with these options, say the same in its own units.

    Exactly so in evaluation. A last layer without a bias has the shift in the norm before it, spread as thin as it can
    be; dropout then makes it noisy in training.
    """
    units = _units(head)
    if units is None or units.y_range is not None:  # within a range nothing is standardised
        return
    mean, std, old_mean, old_std = (
        torch.tensor(list(each), dtype=torch.float64)
        for each in (units.mean, units.std, options["label_mean"], options["label_std"])
    )
    layer = [each for each in head.modules() if isinstance(each, nn.Linear)][-1]
    with torch.no_grad():
        weight, shift = layer.weight.double() * (old_std / std)[:, None], (old_mean - mean) / std
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() * (old_std / std) + shift)
        else:
            norm = [each for each in head.modules() if isinstance(each, nn.BatchNorm1d)][-1]
            norm.bias += (torch.linalg.pinv(weight) @ shift).to(norm.bias)


def _units(head: nn.Module) -> InUnits | None:
    return next((layer for layer in head.modules() if isinstance(layer, InUnits)), None)


class AsPoints(nn.Module):
    """Outputs (N, 2K) -> points (N, K, 2) float32, x and y in (-1, 1), the edges of the square that the model sees."""

    def forward(self, outputs: Tensor) -> Tensor:
        return sigmoid_range(outputs.float(), -1.0, 1.0).reshape(outputs.shape[0], -1, 2)


def sigmoid_range(outputs: Tensor, low: float, high: float) -> Tensor:
    """Source: fastai."""
    return outputs.sigmoid() * (high - low) + low


def number_head(
    features: int,
    outputs: int,
    *,
    dropout: float = 0.5,
    label_mean: Sequence[float] | None = None,
    label_std: Sequence[float] | None = None,
    y_range: Sequence[float] | None = None,
    pooled: bool = False,
) -> nn.Sequential:
    """The head from a feature map to numbers (N, outputs) in their own units.

    label_mean, label_std: what the numbers of the training images have, one each, so that what is learned is around 0
    and 1 whatever the units. y_range: the model says nothing outside of it.
    Raises: ModelError, as `classification_head`, for moments that are not one an output and a range without an inside.
    """
    mean, std = tuple(label_mean or (0.0,) * outputs), tuple(label_std or (1.0,) * outputs)
    if not len(mean) == len(std) == outputs or not all(spread > 0 for spread in std):
        raise ModelError(
            f"label_mean={mean} and label_std={std} for {outputs} numbers: outputs could not be put into their units; "
            "give one of each a number, deviations above 0"
        )
    if y_range is not None and not y_range[0] < y_range[1]:
        raise ModelError(f"y_range={tuple(y_range)} has no inside: no number could be said; give (low, high)")
    layers = classification_head(features, outputs, dropout=dropout, pooled=pooled)
    return nn.Sequential(*layers, InUnits(mean, std, y_range))


def points_head(features: int, outputs: int, *, dropout: float = 0.5, pooled: bool = False) -> nn.Sequential:
    """The head from a feature map to `outputs` points, (N, outputs, 2). Raises ModelError as `classification_head`.

    Source: fastai, whose points are within a y_range of -1 to 1, too; but features are pooled by where they are.
    """
    pool = SpatialSoftmax()
    return nn.Sequential(
        *classification_head(features, 2 * outputs, dropout=dropout, pooled=pooled, pool=pool), AsPoints()
    )


TASKS: dict[str, Callable[..., nn.Module] | None] = {
    "single_label": classification_head,
    "multi_label": classification_head,
    "number": number_head,
    "points": points_head,
    "mask": mask_head,
}
"""(features, outputs, dropout=, ...) -> the head of each task; None where there is none, and a model is the user's own.

What further arguments a head takes, `create` takes for it. `pooled=True` is given where the body is a transformer, and
so gives vectors; a head without it takes feature maps alone. One with `stages` is given those of the body, and is
called with the images and the map of each stage.
"""


def head_of(task: str) -> Callable[..., nn.Module]:
    """How the head of a task is made, see `TASKS`. Raises ModelError where there is none."""
    head = TASKS.get(task)
    if head is None:
        known = " or ".join(name for name, head in TASKS.items() if head)
        raise ModelError(f"task={task!r} has no head here: no model can be built; give {known}, or a model of your own")
    return head


def check_options(task: str, options: dict[str, Any]) -> None:
    """Raises ModelError for an argument that the head of a task does not take."""
    takes = _arguments(head_of(task))
    for name, value in options.items():
        if name not in takes:
            others = " or ".join(each for each, head in TASKS.items() if head and name in _arguments(head))
            raise ModelError(
                f"{name}={value} with task={task!r}, whose head has no such thing: nothing would read it; leave it "
                f"out{f' (it is for {others})' if others else ''}"
            )


def _arguments(head: Callable[..., nn.Module]) -> Sequence[str]:
    return list(inspect.signature(head).parameters)


def on_stages(make_head: Callable[..., nn.Module]) -> bool:
    """Whether a head works on the maps of all stages, and not on the last alone."""
    return "stages" in _arguments(make_head)


def kind_of(make_head: Callable[..., nn.Module], body: Body, *, task: str, in_channels: int) -> dict[str, Any]:
    """What to tell a head of the body that it stands on. Raises ModelError where it cannot stand there."""
    if on_stages(make_head):
        if len(body.stages) < 2:
            raise ModelError(
                f"{body.name} has feature maps of one size alone, and the head of task={task!r} goes from small ones "
                "to large ones: no model can be built; give a convolutional body, such as resnet34"
            )
        return {"stages": body.stages, "in_channels": in_channels}
    if not body.pooled:
        return {}
    if "pooled" not in _arguments(make_head):
        raise ModelError(
            f"the head of task={task!r} takes feature maps, and {body.name} gives a vector for each image: no model "
            "can be built; give a convolutional body, such as resnet34"
        )
    return {"pooled": True}
