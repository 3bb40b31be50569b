"""Vision models: pretrained bodies, fastai's heads, and the layer groups that fine-tuning works on."""

from typing import TYPE_CHECKING

from thawline.late import late

if TYPE_CHECKING:
    from thawline.models.bodies import Classifier, create, normalisation
    from thawline.models.errors import ModelError, UnknownModelError, WeightsError
    from thawline.models.groups import freeze, freeze_to, layer_groups, parameter_groups, unfreeze

__getattr__ = late(
    __name__,
    {
        "thawline.models.bodies": "Classifier create normalisation",
        "thawline.models.errors": "ModelError UnknownModelError WeightsError",
        "thawline.models.groups": "freeze freeze_to layer_groups parameter_groups unfreeze",
    },
)

__all__ = [
    "Classifier",
    "ModelError",
    "UnknownModelError",
    "WeightsError",
    "create",
    "freeze",
    "freeze_to",
    "layer_groups",
    "normalisation",
    "parameter_groups",
    "unfreeze",
]
