"""One step against plain numpy and plain autograd."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kit.toy import ToyModel, same, samples, snapshot
from thawline.dataio.batch import Batch, ImageBatch
from thawline.trainer.errors import RecipeError
from thawline.trainer.losses.named import default_loss
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.step.busy import Busy
from thawline.trainer.step.guard import Guard
from thawline.trainer.step.precision import Precision, autocast, choose_precision, place
from thawline.trainer.step.recovery import Stepper
from thawline.trainer.step.reduction import Reduction
from thawline.trainer.step.step import LossFunction, StepSettings, eval_step, train_step

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)
BF16 = choose_precision("bf16", CPU)


def exact_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in the logits' own precision."""
    return F.cross_entropy(logits, targets, reduction="none")


def make_batch(number: int = 6, *, dtype: torch.dtype = torch.float64) -> ImageBatch:
    images, targets = samples(number, seed=3, dtype=dtype)
    return ImageBatch(inputs=images, targets=targets, ids=torch.arange(number))


def step(
    model: nn.Module,
    batch: Batch,
    *,
    global_batch: int,
    lr: float = 0.5,
    precision: Precision = FP32,
    loss: LossFunction = exact_loss,
    micro_batches: int = 1,
    clip: float | None = None,
) -> Tensor:
    return train_step(
        lambda: batch,
        settings=StepSettings(CPU, precision, loss, OptimSettings("sgd"), global_batch, clip=clip),
        reduction=Reduction(model, CPU, busy=Busy(CPU)),
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        guard=Guard(model, CPU),
        micro_batches=micro_batches,
    )


@pytest.mark.parametrize("share", [6, 13], ids=["alone", "a part"])
def test_a_step_of_a_linear_model_equals_plain_numpy(share: int) -> None:
    batch = make_batch()
    linear = nn.Linear(48, 3, dtype=torch.float64)
    x, y = batch.inputs.flatten(1).numpy(), np.eye(3)[batch.targets.numpy()]
    w, b = linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()
    z = x @ w.T + b
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)

    losses = step(nn.Sequential(nn.Flatten(), linear), batch, global_batch=share)

    np.testing.assert_allclose(losses, -np.log((p * y).sum(1)), rtol=1e-12)
    np.testing.assert_allclose(linear.weight.detach(), w - 0.5 * (p - y).T @ x / share, rtol=1e-12)
    np.testing.assert_allclose(linear.bias.detach(), b - 0.5 * (p - y).sum(0) / share, rtol=1e-12)


def test_with_equal_parts_the_step_follows_the_gradient_of_the_mean_loss() -> None:
    batch, model = make_batch(), ToyModel(dropout=0.0, dtype=torch.float64)
    plain = ToyModel(dropout=0.0, dtype=torch.float64)
    loss = F.cross_entropy(plain(batch.inputs), batch.targets)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    step(model, batch, global_batch=6)
    for stepped, before, gradient in zip(model.parameters(), plain.parameters(), gradients, strict=True):
        torch.testing.assert_close(stepped, before - 0.5 * gradient, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


def test_uneven_parts_divided_by_the_global_batch_add_up_to_the_mean_over_the_whole() -> None:
    """What the ranks' reduction does: the sum of their gradients, here of 4 and 3 samples of 7."""
    whole = make_batch(7)
    moved = []
    for part in (slice(0, 4), slice(4, 7), slice(0, 7)):
        model = ToyModel(norm=False, dropout=0.0, dtype=torch.float64)
        before = list(model.parameters())[-2].detach().clone()
        step(model, ImageBatch(whole.inputs[part], whole.targets[part], whole.ids[part]), global_batch=7)
        moved.append(list(model.parameters())[-2].detach() - before)
    torch.testing.assert_close(moved[0] + moved[1], moved[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_micro_batches_give_the_gradients_and_losses_of_the_whole(pieces: int) -> None:
    whole = make_batch(7)
    models = [ToyModel(norm=False, dropout=0.0, dtype=torch.float64) for _ in range(2)]
    losses = [step(m, whole, global_batch=7, micro_batches=k) for m, k in zip(models, (1, pieces), strict=True)]
    torch.testing.assert_close(snapshot(models[0]), snapshot(models[1]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-14)


class Rating(nn.Module):
    """Two inputs, one of them indices: a dot product of a row of a table and of numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.users = nn.Embedding(5, 4)

    def groups(self) -> list[list[nn.Module]]:
        return [[self.users]]

    def forward(self, user: Tensor, numbers: Tensor) -> Tensor:
        return (self.users(user) * numbers).sum(1)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", ["fp32", "bf16", "pure_bf16"])
def test_a_model_of_two_inputs_takes_a_step_and_only_numbers_are_cast(name: Any, pieces: int) -> None:
    """Against plain autograd; a table looked up by anything but integers raises."""
    precision, draw = choose_precision(name, CPU), np.random.default_rng(0)
    user, numbers = torch.from_numpy(draw.integers(0, 5, 7)), torch.from_numpy(draw.normal(size=(7, 4))).float()
    targets = torch.from_numpy(draw.normal(size=7)).float()
    model, plain = place(Rating(), precision, CPU), Rating()

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.float() - targets) ** 2

    batch = Batch((user, numbers), targets, torch.arange(7))
    losses = step(model, batch, global_batch=7, precision=precision, loss=squares, micro_batches=pieces)
    expected = squares(plain(user, numbers), targets)
    expected.mean().backward()  # type: ignore[no-untyped-call]
    moved = plain.users.weight - 0.5 * plain.users.weight.grad  # type: ignore[operator]
    tolerance = 1e-6 if name == "fp32" else 0.05
    torch.testing.assert_close(losses, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        model.state_dict()["users.weight"].float(), moved.detach(), rtol=tolerance, atol=tolerance
    )
    outputs, _ = eval_step(Rating(), batch, loss=squares, precision=FP32)
    torch.testing.assert_close(outputs, Rating()(user, numbers).detach())


def test_batchnorm_sees_a_micro_batch_at_a_time() -> None:
    """What is said aloud wherever a step is split."""
    whole, model = make_batch(6, dtype=torch.float32), ToyModel(dropout=0.0)
    step(model, whole, global_batch=6, micro_batches=3)
    assert int(model.stem[1].num_batches_tracked) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_clipping_scales_all_gradients_to_one_norm_and_only_down(clip: float) -> None:
    batch = make_batch()
    plain, clipped = (ToyModel(dropout=0.0, dtype=torch.float64) for _ in range(2))
    before = list(snapshot(plain).items())
    step(plain, batch, global_batch=6)
    step(clipped, batch, global_batch=6, clip=clip)
    names = [name for name, _ in plain.named_parameters()]
    moves = [{n: dict(before)[n] - m.state_dict()[n] for n in names} for m in (plain, clipped)]
    norm = float(torch.sqrt(sum(((move / 0.5) ** 2).sum() for move in moves[0].values())))
    for name in names:
        torch.testing.assert_close(moves[1][name], moves[0][name] * min(1.0, clip / norm), rtol=1e-5, atol=1e-12)


def test_pure_bf16_has_bfloat16_weights_gradients_and_moments_but_float32_norms() -> None:
    batch, exact = make_batch(dtype=torch.float32), ToyModel(dropout=0.0)
    pure = choose_precision("pure_bf16", CPU)
    model = place(ToyModel(dropout=0.0), pure, CPU)
    half = ImageBatch(batch.inputs.to(pure.input_dtype), batch.targets, batch.ids)
    losses = step(model, half, global_batch=6, precision=pure, loss=default_loss("single_label"))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        *("stem.1.weight", "stem.1.bias", "body.2.weight", "body.2.bias")
    }
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None and p.ndim > 1} == {torch.bfloat16}
    expected = default_loss("single_label")(exact(batch.inputs), batch.targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=0.05, atol=0.03)
    logits, _ = eval_step(model.eval(), half, loss=default_loss("single_label"), precision=pure)
    assert logits.dtype == torch.float32


def test_losses_of_a_step_are_those_before_the_update_and_hold_no_graph() -> None:
    batch, model = make_batch(), ToyModel(dropout=0.0, dtype=torch.float64)
    expected = exact_loss(ToyModel(dropout=0.0, dtype=torch.float64)(batch.inputs), batch.targets)
    losses = step(model, batch, global_batch=6)
    assert torch.equal(losses, expected)
    assert not losses.requires_grad


def test_bf16_runs_layers_in_bfloat16_and_keeps_weights_gradients_and_losses_in_float32() -> None:
    batch, model = make_batch(dtype=torch.float32), ToyModel(dropout=0.0)
    seen: list[torch.dtype] = []
    model.head[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    losses = step(model, batch, global_batch=6, lr=0.1, precision=BF16, loss=default_loss("single_label"))
    assert (seen, losses.dtype) == ([torch.bfloat16], torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    exact = default_loss("single_label")(ToyModel(dropout=0.0)(batch.inputs), batch.targets)
    torch.testing.assert_close(losses, exact.detach(), rtol=0.05, atol=0.02)
    assert not torch.equal(losses, exact)  # eight bits of mantissa were really used


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_evaluation_leaves_gradients_weights_and_batchnorm_alone(precision: Precision) -> None:
    batch, model = make_batch(dtype=torch.float32), ToyModel().eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    logits, losses = eval_step(model, batch, loss=default_loss("single_label"), precision=precision)
    assert same(before, snapshot(model))
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert not logits.requires_grad
    assert not losses.requires_grad
    assert (logits.dtype, losses.dtype, logits.shape) == (torch.float32, torch.float32, (6, 3))
    if precision is FP32:
        expected = model(batch.inputs)
        assert torch.equal(logits, expected)
        assert torch.equal(losses, F.cross_entropy(expected, batch.targets, reduction="none"))


def test_precision_is_chosen_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert choose_precision("auto", CPU).name == "fp32"
    for has_bf16, name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulation, has_bf16=has_bf16: has_bf16)
        assert choose_precision("auto", gpu).name == name
    assert choose_precision("fp16", gpu) == Precision("fp16", torch.float16, scaled=True)
    assert choose_precision("pure_bf16", gpu).weights == torch.bfloat16
    assert choose_precision("bf16", gpu) == Precision("bf16", torch.bfloat16, scaled=False)
    assert [choose_precision(name, gpu).input_dtype for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.float16,
        torch.float16,
    ]


def test_precisions_that_cannot_be_are_refused_with_what_can() -> None:
    with pytest.raises(RecipeError, match=r"precision='fp16' on a CPU: .* give fp32 or bf16"):
        choose_precision("fp16", CPU)
    with pytest.raises(RecipeError, match=r"precision='fp64' is not known: give auto, fp32, bf16, fp16"):
        choose_precision("fp64", CPU)  # type: ignore[arg-type]  # what a TOML file may hold


def test_fp32_has_no_autocast_region() -> None:
    x = torch.ones(2, 2)
    with autocast(FP32, CPU):
        assert (x @ x).dtype == torch.float32
    with autocast(BF16, CPU):
        assert (x @ x).dtype == torch.bfloat16


def test_one_rank_is_not_wrapped() -> None:
    model = ToyModel(dropout=0.0)
    reduction = Reduction(model, CPU, busy=Busy(CPU))
    images = make_batch(dtype=torch.float32).inputs
    assert torch.equal(reduction(images), ToyModel(dropout=0.0)(images))
    reduction.shadow()  # nobody asks
    assert all(p.grad is None for p in model.parameters())


def test_a_step_reads_every_one_of_its_settings() -> None:
    """A setting that nobody reads is a promise that nobody keeps."""
    read = set[str]()

    class Spied(StepSettings):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    settings_of_sgd = OptimSettings("sgd")
    settings = Spied(device=CPU, precision=FP32, loss=exact_loss, optim_settings=settings_of_sgd, global_batch=6)
    stepper = Stepper(ToyModel(), settings, splits=1, on_split=lambda splits: None)
    read.discard("__class__")
    stepper.step(lambda: make_batch(dtype=torch.float32), seed=1)
    assert {field.name for field in fields(StepSettings)} - read == set()
