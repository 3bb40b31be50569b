"""What turns a body's feature map into the task's outputs? fastai's heads, and which of them a task has."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from thawline.models.errors import ModelError

HIDDEN = 512
"""Width between the two linear layers."""


class AdaptiveConcatPool2d(nn.Module):
    """Global max pool beside global average pool: (N, F, H, W) -> (N, 2F, 1, 1), the max first."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features.amax((2, 3), keepdim=True), features.mean((2, 3), keepdim=True)], 1)


def classification_head(features: int, outputs: int, *, dropout: float = 0.5) -> nn.Sequential:
    """The head from a feature map (N, features, H, W) to logits (N, outputs).

    Half of `dropout` comes before the first linear layer, all of it before the second. The linear layers
    start Kaiming normal, the norms as torch makes them.
    Raises: ModelError, when there is nothing to predict or `dropout` is no probability below one.
    Source: fastai, `create_head` with its defaults; the initialisation is He et al. (2015).
    """
    if outputs < 1:
        raise ModelError(f"a head with {outputs} outputs predicts nothing: give at least one class")
    if not 0 <= dropout < 1:  # catches NaN too
        raise ModelError(f"dropout={dropout} lies outside [0, 1): nothing could be learned; give a value within")
    head = nn.Sequential(
        AdaptiveConcatPool2d(),
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


TASKS: dict[str, Callable[..., nn.Module] | None] = {
    "single_label": classification_head,
    "multi_label": classification_head,
    "points": None,
    "mask": None,
}
"""(features, outputs, dropout=) -> the head of each task; None where there is none, and a model is the user's own."""


def head_of(task: str) -> Callable[..., nn.Module]:
    """How the head of a task is made, see `TASKS`. Raises ModelError where there is none."""
    head = TASKS.get(task)
    if head is None:
        known = " or ".join(name for name, head in TASKS.items() if head)
        raise ModelError(f"task={task!r} has no head here: no model can be built; give {known}, or a model of your own")
    return head
