"""What is an optimiser's step in plain numpy? The oracle of every optimiser's test."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings as Settings

CPU = torch.device("cpu")

Groups = list[list[tuple[str, nn.Parameter]]]

Arrays = list[np.ndarray]

Hyper = Sequence[tuple[Sequence[float], float]]


def make_groups(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Groups:
    """Two layer groups: a filter with a norm's weight and bias, and a matrix with a bias and a scale."""
    draw = torch.Generator().manual_seed(3)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype))

    stem = [("conv", parameter(4, 3, 3, 3)), ("norm.weight", parameter(4)), ("norm.bias", parameter(4))]
    return [stem, [("head.weight", parameter(5, 4)), ("head.bias", parameter(5)), ("scale", parameter())]]


def make_grads(steps: int) -> list[Arrays]:
    """A gradient a step and parameter; those down to 1e-6 show whether eps is inside or outside the root."""
    draw = np.random.default_rng(5)
    shapes = [tuple(p.shape) for group in make_groups() for _, p in group]
    return [[draw.normal(size=shape) * 10.0 ** -(i % 7) for i, shape in enumerate(shapes)] for _ in range(steps)]


def rising(steps: int) -> Hyper:
    """Rates of the two layer groups that rise, and a momentum that falls."""
    return [((1e-2 * (i + 1) / steps, 1e-1 * (i + 1) / steps), 0.95 - 0.1 * i / steps) for i in range(steps)]


def numpy_steps(settings: Settings, grads: list[Arrays], hyper: Hyper) -> Arrays:
    """The weights of `make_groups` after those steps, in float64 from the papers' formulas.

    adamw: decoupled decay, bias correction by the current betas, eps outside the root. sgd: decay added to the
    gradient, as in torch. lamb: adamw's direction with the decay in it, scaled to the length of the weight where it
    decays; all gradients first clipped to a norm of 1 together.
    """
    weights = [p.detach().double().numpy().copy() for group in make_groups() for _, p in group]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for step, (lrs, momentum) in enumerate(hyper):
        norm = np.sqrt(sum(float((g * g).sum()) for g in grads[step]))
        for i, g in enumerate(grads[step]):
            lr, decay = lrs[i // 3], settings.weight_decay if weights[i].ndim > 1 else 0.0
            if settings.name == "sgd":
                total = g + decay * weights[i]
                first[i] = total if step == 0 else momentum * first[i] + total
                weights[i] = weights[i] - lr * (total + momentum * first[i] if settings.nesterov else first[i])
                continue
            g = g / max(1.0, norm) if settings.name == "lamb" else g
            first[i] = momentum * first[i] + (1 - momentum) * g
            second[i] = settings.beta2 * second[i] + (1 - settings.beta2) * g * g
            root = np.sqrt(second[i] / (1 - settings.beta2 ** (step + 1))) + settings.eps
            update = first[i] / (1 - momentum ** (step + 1)) / root + decay * weights[i]
            trust = np.linalg.norm(weights[i]) / np.linalg.norm(update) if settings.name == "lamb" and decay else 1.0
            weights[i] = weights[i] - lr * trust * update
    return weights


def feed(groups: Groups, grads: Arrays) -> None:
    """Set the gradients of the parameters that train."""
    for p, g in zip((p for group in groups for _, p in group), grads, strict=True):
        p.grad = torch.from_numpy(np.asarray(g, dtype=np.float32)).to(p) if p.requires_grad else None


def ours(
    settings: Settings, grads: list[Arrays], hyper: Hyper, *, device: torch.device, lie: torch.device = CPU
) -> Arrays:
    """The weights of `make_groups` after those steps of the optimiser that is built for `device`; they lie on `lie`."""
    groups = make_groups(lie)
    optimizer = optim.build(groups, settings, device=device)
    for step, (lrs, momentum) in enumerate(hyper):
        optim.set_hyper(optimizer, lrs, momentum)
        feed(groups, grads[step])
        optimizer.step()
    return [p.detach().cpu().numpy() for group in groups for _, p in group]


def assert_close(found: Arrays, expected: Arrays) -> None:
    for values, expected_values in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, expected_values, rtol=2e-5, atol=2e-6)
