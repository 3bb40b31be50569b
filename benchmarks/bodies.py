"""Which bodies are measured that `models.create` does not build? ConvNeXt-T and ViT-S, with a linear head.

Bare, from torchvision: they show what the step costs with them, and are not what a job would train.
"""

import torchvision
from torch import Tensor, nn

from thawline.benchmarks.harness import BenchmarkError

_VIT_PATCH_PX = 16


class Bare(nn.Module):
    """A body that gives (N, features), and a linear head; two layer groups."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def groups(self) -> list[list[nn.Module]]:
        """Body and head."""
        return [[self.body], [self.head]]


def convnext_tiny(classes: int, size_px: int) -> Bare:
    """ConvNeXt-T, for images of any size. Source: Liu et al. (2022)."""
    body = torchvision.models.convnext_tiny()
    norm, flatten, linear = body.classifier
    body.classifier = nn.Sequential(norm, flatten)
    return Bare(body, linear.in_features, classes)


def vit_small(classes: int, size_px: int) -> Bare:
    """ViT-S/16, for images of size_px. Raises BenchmarkError. Source: Touvron et al. (2021), DeiT-S."""
    if size_px % _VIT_PATCH_PX:
        raise BenchmarkError(
            f"size_px={size_px} is no multiple of ViT's patches of {_VIT_PATCH_PX}: it cannot be cut; give one that is"
        )
    body = torchvision.models.VisionTransformer(
        image_size=size_px, patch_size=_VIT_PATCH_PX, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    body.heads = nn.Identity()
    return Bare(body, 384, classes)


BODIES = {"convnext_tiny": convnext_tiny, "vit_small": vit_small}
