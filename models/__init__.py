"""Vision models: bodies, heads, the layer groups that fine-tuning works on, and the bundles that runs leave."""

from typing import TYPE_CHECKING

from thawline.late import late

if TYPE_CHECKING:
    from thawline.models.bodies.from_code import as_body
    from thawline.models.bodies.libraries import normalisation
    from thawline.models.bundle import Bundle, load
    from thawline.models.classifier import Classifier, create
    from thawline.models.errors import BundleError, CodeError, ModelError, UnknownModelError, WeightsError
    from thawline.models.groups import freeze, freeze_to, layer_groups, parameter_groups, unfreeze
    from thawline.models.lora import add_lora

__getattr__ = late(
    __name__,
    {
        "thawline.models.bodies.from_code": "as_body",
        "thawline.models.bodies.libraries": "normalisation",
        "thawline.models.classifier": "Classifier create",
        "thawline.models.bundle": "Bundle load",
        "thawline.models.errors": "BundleError CodeError ModelError UnknownModelError WeightsError",
        "thawline.models.groups": "freeze freeze_to layer_groups parameter_groups unfreeze",
        "thawline.models.lora": "add_lora",
    },
)

__all__ = [
    "Bundle",
    "BundleError",
    "Classifier",
    "CodeError",
    "ModelError",
    "UnknownModelError",
    "WeightsError",
    "add_lora",
    "as_body",
    "create",
    "freeze",
    "freeze_to",
    "layer_groups",
    "load",
    "normalisation",
    "parameter_groups",
    "unfreeze",
]
