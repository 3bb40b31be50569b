"""What does a model say, whoever it is handed to? Its outputs, and their probabilities where the task has such."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from thawline.trainer.tasks import record_of


class Answers(nn.Module):
    """Images (N, 3, H, W) float32, normalised -> what the model puts out, and the probabilities where it has such."""

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self._probabilities = model, record_of(task).probabilities

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        probabilities = self._probabilities(outputs)
        return (outputs,) if probabilities is outputs else (outputs, probabilities)


def names_of(answers: Sequence[Any]) -> tuple[str, ...]:
    """What the outputs are called, which `Answers` gives."""
    return ("logits", "probabilities") if len(answers) == 2 else ("predictions",)
