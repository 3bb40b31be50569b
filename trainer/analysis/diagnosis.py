"""Do the curves of a run show one of the known troubles? In words, with the numbers that the rule saw.

At most one finding about the learning (the first of these that holds), and one about the data path. `start` is the
training loss at the beginning of the run (mean of the first 50th of its windows), `end` that of its last tenth;
curves are smoothed as `smooth` does. Where rows are too few for a rule, it says nothing.

- *Not finite*: a training or validation loss is NaN or infinite.
- *Learning rate too high*, by any of four signs. The smoothed training loss rises above 1.5 x start. A validation loss
  is above 2 x start in an epoch whose mean training loss is above start: fastai's course shows a first epoch of
  fine_tune at 0.1 with 8.9 in training and 48 in validation, where ln 37 = 3.6 is chance (validation alone may jump in
  a healthy first epoch, while BatchNorm's statistics still lag). The training loss ends 1.5 times, and 10 % of start,
  above its smoothed lowest: what was learnt was lost again. Or it fell by a quarter while a share of wrong answers of
  more than one half never gained two standard errors, of .1 at most, on the first epoch: it began blown up and fell to
  chance.
  In place of 1.5: 1 + four standard errors of the smoothed loss, where windows are so noisy that this is more.
- *Learning rate too low*: start is at least 0.5 (below, a model has little left to learn), end is less than 10 % lower
  or higher, and either it did not even fall by 1 %, or the windows of the first half of the learning (by the sum of
  learning rates) still lay half the fall above the end: it was on its way, and had not settled at what the data allow.
- *Too few epochs*: training loss above validation loss in every epoch, and the last epoch still lowered the validation
  loss by a tenth, and by 5 % of start; metric and validation loss stand at their best. Course: that is underfitting.
  Training loss above validation loss by itself is what dropout and augmentation do to a healthy run.
- *Too many epochs*: the validation loss ends at least 1.5 times the training loss, and one of two. Since the best mean
  of three neighbouring epochs the metric got worse by more than two standard errors (of a share over the validation
  samples; 5 % where it is no share), while training loss fell by a tenth. Or the validation loss stands 20 %, and 2 %
  of start, above its lowest, which was at least a fifth of the epochs ago, training loss halved since, and the metric
  did not gain a standard error. Course: a rising validation loss alone is no overfitting while the metric gets better.
- *Data-bound*: after the first window, steps waited for their batch more than 25 % of the time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thawline.trainer.metrics.direction import higher
from thawline.trainer.records.rows import metric_columns

Floats = NDArray[np.float64]
_LEAST_WINDOWS, _LEAST_EPOCHS = 5, 6
_COARSEST = 0.1  # two standard errors of a share that can show whether a model has learnt: of some 100 samples


def smooth(values: Floats) -> Floats:
    """A centred Gaussian mean, as wide as a 50th of the curve, (N > 0,); lags nowhere, passes over NaN."""
    sigma = max(len(values) / 50, 1.0)
    reach = min(int(3 * sigma), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    weight = np.convolve(finite.astype(float), kernel, "same")
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


@dataclass(frozen=True)
class Finding:
    """One trouble: what it is, the rule that saw it with its numbers, and what to do. Clauses without a full stop."""

    what: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.rule}; {self.remedy}"


@dataclass(frozen=True)
class _Curves:
    """What the rules look at. T windows, V validations."""

    loss: Floats
    """(T,)"""
    lr: Floats
    """(T,) of the last layer group; ones where it was not recorded"""
    epoch: Floats
    """(V,)"""
    train: Floats
    """(V,) mean training loss of the epoch"""
    valid: Floats
    """(V,)"""
    metric: Floats
    """(V,) turned so that less is better; empty where no metric's direction is known"""
    name: str
    samples: float
    """Validation samples; infinite where not recorded."""

    @property
    def start(self) -> float:
        return float(self.loss[: max(1, len(self.loss) // 50)].mean())

    @property
    def end(self) -> float:
        return float(self.loss[-max(1, len(self.loss) // 10) :].mean())

    @property
    def noise(self) -> float:
        """Four standard errors of a smoothed training loss, relative to it; whatever the outliers."""
        curve = smooth(self.loss)
        window = 1.4826 * float(np.median(np.abs(self.loss - curve) / np.maximum(curve, np.finfo(float).tiny)))
        return 4 * window / math.sqrt(2.5 * max(len(self.loss) / 50, 1))  # a smoothed value is the mean of so many

    def error(self, value: float) -> float:
        """The standard error of the metric at this value."""
        if 0 <= abs(value) <= 1 and math.isfinite(self.samples):
            return math.sqrt(abs(value) * (1 - abs(value)) / self.samples)
        return 0.025 * abs(value)


def diagnose(rows: pa.Table) -> list[Finding]:
    """What the recorder's rows show, as told above; an empty list for a run without a known trouble."""
    curves = _read(rows)
    rules: tuple[Callable[[_Curves], Finding | None], ...] = (_not_finite, _high, _low, _few, _many)
    seen = (rule(curves) for rule in rules)
    found = next((finding for finding in seen if finding is not None), None)
    return [finding for finding in (found, _data_bound(rows)) if finding is not None]


def _not_finite(c: _Curves) -> Finding | None:
    if np.isfinite(c.loss).all() and np.isfinite(c.valid).all():
        return None
    return Finding(
        "the loss is not finite",
        f"{np.sum(~np.isfinite(c.loss))} of {len(c.loss)} windows of training and {np.sum(~np.isfinite(c.valid))} of "
        f"{len(c.valid)} validations have a loss of NaN or infinity",
        "go back to the last checkpoint with a lower lr, or train in fp32, and look at the images of that batch",
    )


def _high(c: _Curves) -> Finding | None:
    if len(c.loss) < _LEAST_WINDOWS:
        return None
    rule = _rose(c) or _jumped(c) or _lost(c) or _blown_up(c)
    if not rule:
        return None
    return Finding("the learning rate was too high", rule, "take a tenth of it, or what lr_find suggests")


def _rose(c: _Curves) -> str:
    peak, limit = float(smooth(c.loss).max()), c.start * (1 + max(0.5, c.noise))
    return f"training loss began at {c.start:.3g} and rose to {peak:.3g} (limit {limit:.3g})" if peak > limit else ""


def _jumped(c: _Curves) -> str:
    jumped = (c.valid > 2 * c.start) & (c.train > c.start)
    if not jumped.any():
        return ""
    at = int(np.argmax(np.where(jumped, c.valid, -np.inf)))
    return (
        f"training loss began at {c.start:.3g}; in epoch {c.epoch[at]:.0f} it was {c.train[at]:.3g}, and validation "
        f"loss {c.valid[at]:.3g} (limit {2 * c.start:.3g})"
    )


def _lost(c: _Curves) -> str:
    lowest = float(smooth(c.loss).min())
    limit = max(lowest * (1 + max(0.5, c.noise)), lowest + 0.1 * c.start)
    return f"training loss had come down to {lowest:.3g} and ended at {c.end:.3g} (limit {limit:.3g})" * (c.end > limit)


def _blown_up(c: _Curves) -> str:
    if len(c.metric) < 2 or c.end > 0.75 * c.start or not 0 <= abs(c.metric[-1]) <= 1:
        return ""
    wrong = c.metric[-1] if c.metric[-1] > 0 else 1 + c.metric[-1]
    chance = 2 * c.error(c.metric[-1])
    if wrong <= 0.5 or chance > _COARSEST or c.metric[0] - c.metric.min() > chance:
        return ""
    return (
        f"training loss came from {c.start:.3g} to {c.end:.3g} without any gain in {c.name} ({abs(c.metric[0]):.3g} "
        f"after the first epoch, {abs(c.metric[-1]):.3g} after the last): the first steps had blown it up"
    )


def _low(c: _Curves) -> Finding | None:
    if len(c.loss) < _LEAST_WINDOWS or c.start < 0.5 or not 0.9 * c.start < c.end < 1.1 * c.start:
        return None
    fall = c.start - c.end
    half = int(np.searchsorted(np.cumsum(c.lr), c.lr.sum() / 2))
    early = float(c.loss[: half + 1].mean()) - c.end
    if fall >= 0.01 * c.start and early < 0.5 * fall:
        return None
    return Finding(
        "the learning rate was too low",
        f"training loss began at {c.start:.3g} and ended at {c.end:.3g}, {max(fall / c.start, 0):.1%} lower (limit "
        "10 %), and had not settled",
        "take ten times as much, or what lr_find suggests",
    )


def _few(c: _Curves) -> Finding | None:
    if len(c.valid) < 2 or not len(c.loss) or not (c.train > c.valid).all():
        return None
    fall = c.valid[-2] - c.valid[-1]
    at_best = c.valid.argmin() == len(c.valid) - 1 and (not len(c.metric) or c.metric[-1] == c.metric.min())
    if not at_best or fall < 0.1 * c.valid[-2] or fall < 0.05 * c.start:
        return None
    return Finding(
        "the run ended too early (underfitting)",
        f"training loss was above validation loss in all {len(c.valid)} epochs ({c.train[-1]:.3g} against "
        f"{c.valid[-1]:.3g} in the last), and the last epoch still took validation loss from {c.valid[-2]:.3g} to "
        f"{c.valid[-1]:.3g} (limits 10 % of it and 5 % of the first loss, {c.start:.3g})",
        "train for more epochs, or at a higher lr",
    )


def _many(c: _Curves) -> Finding | None:
    if len(c.valid) < _LEAST_EPOCHS or not len(c.loss):
        return None
    if c.valid[-1] < 1.5 * c.train[-1]:
        return None
    return _metric_worse(c) or _loss_worse(c)


def _metric_worse(c: _Curves) -> Finding | None:
    if len(c.metric) < _LEAST_EPOCHS:
        return None
    means = np.convolve(c.metric, np.ones(3) / 3, "valid")
    at = int(means.argmin())
    limit = 2 * c.error(means[at])
    if at + 3 >= len(means) or means[-1] - means[at] <= limit or c.train[-1] > 0.9 * c.train[at + 1]:
        return None
    return Finding(
        "the run had too many epochs (overfitting)",
        f"{c.name} was {abs(means[at]):.3g} around epoch {c.epoch[at + 1]:.0f} and {abs(means[-1]):.3g} at the end, "
        f"worse by more than {limit:.2g} (two standard errors), while training loss fell from {c.train[at + 1]:.3g} "
        f"to {c.train[-1]:.3g}",
        "train for fewer epochs, with more augmentation or weight decay, or keep the best checkpoint",
    )


def _loss_worse(c: _Curves) -> Finding | None:
    at = int(c.valid.argmin())
    now = float(c.valid[-2:].mean())
    since = len(c.valid) - 1 - at
    rose = now >= 1.2 * c.valid[at] and now - c.valid[at] >= 0.02 * c.start
    if since < max(2, len(c.valid) / 5) or not rose or c.train[-1] > 0.5 * c.train[at]:
        return None
    gain = 0.0
    if len(c.metric):
        then = float(c.metric[max(0, at - 1) : at + 2].mean())
        gain = then - float(c.metric[-3:].mean())
        if gain > c.error(then):
            return None
    return Finding(
        "the run had too many epochs (overfitting)",
        f"validation loss was lowest in epoch {c.epoch[at]:.0f}, {c.valid[at]:.3g}, and ended at {now:.3g} (limit 20 % "
        f"more), while training loss fell from {c.train[at]:.3g} to {c.train[-1]:.3g}"
        f"{f' and {c.name} gained nothing' if len(c.metric) else ''}",
        "train for fewer epochs, with more augmentation or weight decay, or keep the best checkpoint",
    )


def _data_bound(rows: pa.Table) -> Finding | None:
    windows = [row for row in _of_kind(rows, "train") if row.get("window_s") and row.get("data_wait_s") is not None][1:]
    if len(windows) < _LEAST_WINDOWS - 1:
        return None
    waited, whole = (sum(float(row[name]) for row in windows) for name in ("data_wait_s", "window_s"))
    if waited <= 0.25 * whole:
        return None
    return Finding(
        "training waited for data",
        f"{waited / whole:.0%} of {whole:.1f} s in steps went by before their batch was there (limit 25 %)",
        "decode on the GPU, pack the images (`thawline pack`), or give the loader more threads",
    )


def _read(rows: pa.Table) -> _Curves:
    train, valid = _of_kind(rows, "train"), _of_kind(rows, "valid")
    valid = [row for row in valid if row.get("valid_loss") is not None]
    losses = [row for row in train if row.get("loss") is not None]
    names = [name for name in metric_columns([*train, *valid]) if higher(name) is not None]
    name = names[0] if names else ""
    sign = -1.0 if name and higher(name) else 1.0
    whole = bool(name) and all(row.get(name) is not None for row in valid)
    samples = [float(row["valid_samples"]) for row in valid if row.get("valid_samples")]

    def column(kind: list[dict[str, float]], key: str, *, default: float = math.nan) -> Floats:
        return np.array([default if row.get(key) is None else row[key] for row in kind], dtype=np.float64)

    return _Curves(
        loss=column(losses, "loss"),
        lr=column(losses, "lr", default=1.0),
        epoch=column(valid, "epoch"),
        train=column(valid, "train_loss"),
        valid=column(valid, "valid_loss"),
        metric=sign * column(valid, name) if whole else np.empty(0),
        name=name.replace("_", " "),
        samples=samples[-1] if samples else math.inf,
    )


def _of_kind(rows: pa.Table, kind: str) -> list[dict[str, float]]:
    return [row for row in rows.to_pylist() if row["kind"] == kind]
