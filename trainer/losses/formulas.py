"""What do losses compute? Each (outputs, targets) -> (N,) float32, one a sample, whatever precision the outputs have.

Which of them a task has, and under which names, tasks says. What torch and torchvision have is theirs.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from thawline.trainer.metrics.names import IGNORED

# Labels: outputs (N, C) logits ----------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """targets: (N,) int64, or (N, C) of shares that sum to 1, as MixUp makes them.

    Source: Szegedy et al., Rethinking the Inception Architecture, 2016, for the smoothing.
    """
    return F.cross_entropy(logits.float(), targets, class_weights, reduction="none", label_smoothing=label_smoothing)


def one_against_rest(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of each class against all others, their mean. Targets as `cross_entropy`'s.

    Source: Wightman et al., ResNet strikes back, 2021.
    """
    return binary_cross_entropy(logits, _shares(logits, targets, label_smoothing))


def focal_of_one(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, gamma: float = 2.0) -> Tensor:
    """Cross-entropy in which a class that is nearly right counts little, by (1 - p)^gamma.

    Targets as `cross_entropy`'s. torchvision has it for sigmoids alone. Source: Lin et al., Focal Loss, 2017.
    """
    shares, logs = _shares(logits, targets, label_smoothing), logits.float().log_softmax(1)
    return -(shares * (1 - logs.exp()) ** gamma * logs).sum(1)


def _shares(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Class indices (N,) or shares as (N, C) float32 shares, smoothed."""
    classes = logits.shape[1]
    shares = F.one_hot(targets, classes).float() if targets.ndim == 1 else targets.float()
    return shares * (1 - label_smoothing) + label_smoothing / classes


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """The mean over C classes; targets: (N, C) from 0 to 1. class_weights: of the ones."""
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), reduction="none", pos_weight=class_weights
    )
    return losses.mean(dim=1)


def focal_of_several(logits: Tensor, targets: Tensor) -> Tensor:
    """torchvision's, with its alpha of .25 and gamma of 2; the mean over C classes; targets (N, C) from 0 to 1."""
    losses: Tensor = sigmoid_focal_loss(logits.float(), targets.float(), reduction="none")
    return losses.mean(dim=1)


def asymmetric(
    logits: Tensor, targets: Tensor, *, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05
) -> Tensor:
    """The mean over C classes; targets (N, C) from 0 to 1. What is absent and nearly right counts little, or nothing.

    timm has it for whole batches alone. Source: Ben-Baruch et al., Asymmetric Loss, 2021.
    """
    p, y = logits.float().sigmoid(), targets.float()
    absent = (1 - p + clip).clamp(max=1)
    logs = y * p.clamp(min=1e-8).log() + (1 - y) * absent.clamp(min=1e-8).log()
    weight = (1 - p * y - absent * (1 - y)) ** (gamma_pos * y + gamma_neg * (1 - y))
    return -(logs * weight).mean(dim=1)


# Numbers and points ---------------------------------------------------------------------------------------

Formula = Callable[[Tensor], Tensor]
"""What each difference costs, of any shape."""


def squared(difference: Tensor) -> Tensor:
    """x^2."""
    return difference.square()


def huber(difference: Tensor) -> Tensor:
    """x^2 / 2 below 1, |x| - 1/2 beyond. Source: Huber, 1964."""
    return F.huber_loss(difference, torch.zeros_like(difference), reduction="none")


def of_numbers(of: Formula, outputs: Tensor, targets: Tensor, *, scale: Sequence[float] | None = None) -> Tensor:
    """The mean over C numbers of a formula of what they are off by, in standard deviations `scale`; both (N, C)."""
    columns = (outputs.float() - targets.float()).unbind(1)
    units = scale or (1.0,) * len(columns)
    return torch.stack([of(column / unit) for column, unit in zip(columns, units, strict=True)]).mean(0)


def of_points(of: Formula, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the coordinates of the points that are seen (see `seen`); both (N, K, 2); 0 where none is."""
    wanted = seen(targets)
    there = ~wanted.isnan()
    losses = of(torch.where(there, outputs.float() - wanted, 0.0)).where(there, 0.0)
    return losses.sum((1, 2)) / there.sum((1, 2)).clamp(min=1)


def seen(points: Tensor) -> Tensor:
    """(N, K, 2) with NaN for what the image does not show: a point that is not there, or that the crop left outside."""
    return points.float().where((points.abs() <= 1).all(-1, keepdim=True), torch.nan)


# Masks: outputs (N, C, H, W) logits, targets (N, H, W) int64 ----------------------------------------------


def pixel_cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean over an image's pixels that have a class; 0 where none has."""
    losses = F.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    return losses.sum((1, 2)) / (targets != IGNORED).sum((1, 2)).clamp(min=1)


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - 2 |A and B| / (|A| + |B|) of probabilities and mask, the mean over the classes that the mask shows.

    Source: Milletari et al., V-Net, 2016; absent classes are left out as in segmentation_models_pytorch.
    """
    counts = (targets != IGNORED)[:, None]
    said = logits.float().softmax(1) * counts
    wanted = torch.zeros_like(said).scatter_(1, targets.where(counts[:, 0], 0)[:, None], 1.0) * counts
    both, size = (said * wanted).sum((2, 3)), (said + wanted).sum((2, 3))
    shown = wanted.amax((2, 3))
    losses = (1 - 2 * both / size.clamp(min=1e-6)) * shown
    return losses.sum(1) / shown.sum(1).clamp(min=1)


def cross_entropy_dice(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The sum of both."""
    return pixel_cross_entropy(logits, targets, label_smoothing=label_smoothing) + dice(logits, targets)
