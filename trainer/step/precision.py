"""How are numbers represented while a model trains? Autocast, loss scaling, and the types of weights and inputs."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thawline.trainer.errors import RecipeError
from thawline.trainer.settings import PrecisionName


@dataclass(frozen=True)
class Precision:
    """How numbers are represented while the model runs. Optimiser state has the weights' type."""

    name: str
    autocast: torch.dtype | None
    scaled: bool
    """fp16's exponent is too short for gradients, so its loss is scaled; bf16's is float32's."""
    weights: torch.dtype = torch.float32

    @property
    def input_dtype(self) -> torch.dtype:
        """What loaders should write: half the bytes where the first layer would round anyway."""
        return torch.float32 if self.name == "fp32" else torch.float16


def choose_precision(name: PrecisionName, device: torch.device) -> Precision:
    """auto: float32 on a CPU; on a GPU bfloat16 where it has it, else float16. Raises RecipeError."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise RecipeError("precision='fp16' on a CPU: its gradients cannot be scaled there; give fp32 or bf16")
    precisions = {
        "fp32": Precision("fp32", None, False),
        "bf16": Precision("bf16", torch.bfloat16, False),
        "fp16": Precision("fp16", torch.float16, True),
        "pure_bf16": Precision("pure_bf16", None, False, torch.bfloat16),
    }
    if name not in precisions:
        raise RecipeError(f"precision={name!r} is not known: give auto, {', '.join(precisions)}")
    return precisions[name]


def place(model: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    """Move the model to the device, channels_last, its weights in the precision's type, and return it.

    BatchNorm stays float32: a running mean that moves by a tenth of a small difference would stand still in bfloat16.
    """
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision.weights != torch.float32:
        model.to(precision.weights)
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.float()
    return model


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The mixed-precision region of a forward pass."""
    return torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None)


def cast_inputs(arguments: tuple[Tensor, ...], precision: Precision) -> tuple[Tensor, ...]:
    """The model's inputs in the type of its weights, which autocast does by itself; integers are indices, and stay."""
    if precision.weights == torch.float32:
        return arguments
    return tuple(tensor.to(precision.weights) if tensor.is_floating_point() else tensor for tensor in arguments)
