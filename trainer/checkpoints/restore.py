"""Does a checkpoint fit the model and the run that resume from it? Checked before anything is changed."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from thawline.dataio.errors import quoted
from thawline.trainer.checkpoints.format import Saved
from thawline.trainer.errors import CheckpointError
from thawline.trainer.progress import Progress


def weights_of(
    saved: Saved, model: nn.Module, *, classes: Sequence[str], averaged: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's weights, and those to measure: the average if `averaged` and it has one, else the same weights.

    Raises CheckpointError for the weights of another model, or of one that was trained on other classes.
    """
    saved_classes = saved.origin.classes
    other, own = next((pair for pair in zip_longest(saved_classes, classes) if pair[0] != pair[1]), ("", ""))
    if saved_classes and other != own:
        raise CheckpointError(
            f"{saved.root} was trained on other classes ({quoted(other)!r} in the place of {quoted(own)!r}): outputs "
            "would be mixed up, so nothing was loaded; models.create(..., weights=FOLDER) takes its body alone"
        )
    weights = saved.load("model")
    average = saved.load("ema") if averaged and "ema" in saved.parts else weights
    wrong = _differs(model.state_dict(), weights) or _differs(dict(model.named_parameters()), average, more=True)
    if wrong:
        raise CheckpointError(
            f"{saved.root} holds the weights of another model than this {type(model).__name__} (they differ in "
            f"{quoted(wrong)}): nothing was loaded; give the model that was saved, or another checkpoint"
        )
    return weights, average


def _differs(own: Mapping[str, Tensor], other: Mapping[str, Any], *, more: bool = False) -> str:
    """The first name under which two models' weights differ in shape; "" where there is none.

    more: `other` may have further names.
    """
    names = own if more else {**own, **other}
    shapes = ((name, [getattr(state.get(name), "shape", None) for state in (own, other)]) for name in names)
    return next((name for name, (one, two) in shapes if one is None or one != two), "")


def progress_of(saved: Saved, state: Mapping[str, Any]) -> Progress:
    """The run's progress. Raises CheckpointError for a state that another version of this package wrote."""
    try:
        if not {"rows", "optimizer", "scaler"} <= state.keys():
            raise KeyError("rows, optimizer or scaler")
        return Progress(**state["progress"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{saved.root} was written by another version of thawline ({error}): going on from it would be a guess; "
            "go on with that version, or begin anew under another name"
        ) from error
