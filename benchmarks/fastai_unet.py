"""Is the U-Net fastai's? Parameters and shapes beside its DynamicUnet, and two losses on the same tensors.

By hand, where fastai is installed (nobody's dependency): `pip install fastai`, then `-m benchmarks.fastai_unet`. What
it prints stands in tests/models/test_unet.py.
"""

import json

import torch
import torchvision
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.vision.models.unet import DynamicUnet
from torch import nn

from thawline.models.unet import UNetHead
from thawline.trainer.losses.named import named_loss

CHANNELS, CLASSES, SIZES = (64, 64, 128, 256, 512), 5, ((64, 96), (130, 97))


def main() -> None:
    """Print one line of JSON."""
    encoder = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2])
    theirs = DynamicUnet(encoder, CLASSES, SIZES[0])
    ours = UNetHead(CHANNELS, CLASSES)
    body = sum(p.numel() for p in encoder.parameters())
    result = {
        "theirs": sum(p.numel() for p in theirs.parameters()) - body,
        "ours": sum(p.numel() for p in ours.parameters()),
        "shapes": sorted(tuple(p.shape) for name, p in theirs.named_parameters() if not name.startswith("layers.0."))
        == sorted(tuple(p.shape) for p in ours.parameters()),
        "blocks": {
            "theirs": _shapes(theirs, list(theirs.layers)[4:8]),
            "ours": _ours(ours, encoder),
        },
        "losses": _losses(),
    }
    print(json.dumps(result))


def _shapes(network: nn.Module, blocks: list[nn.Module]) -> list[list[int]]:
    found = list[list[int]]()
    hooks = [b.register_forward_hook(lambda _, __, out: found.append(list(out.shape[1:]))) for b in blocks]
    with torch.no_grad():
        network.eval()(torch.randn(1, 3, *SIZES[0]))
    for hook in hooks:
        hook.remove()
    return found


def _ours(head: UNetHead, encoder: nn.Sequential) -> list[list[int]]:
    maps, value, images = list[torch.Tensor](), torch.randn(1, 3, *SIZES[0]), torch.randn(1, 3, *SIZES[0])
    with torch.no_grad():
        for number, layer in enumerate(encoder.eval()):
            value = layer(value)
            if number in (2, 4, 5, 6, 7):
                maps.append(value)
        found = list[list[int]]()
        for block in head.blocks:
            block.register_forward_hook(lambda _, __, out: found.append(list(out.shape[1:])))
        head.eval()(images, maps)
    return found


def _losses() -> dict[str, list[float]]:
    draw = torch.Generator().manual_seed(0)
    logits, flags = torch.randn(6, 4, generator=draw), torch.randint(2, (6, 4), generator=draw).float()
    points, wanted = torch.rand(6, 4, 2, generator=draw) * 2 - 1, torch.rand(6, 4, 2, generator=draw) * 2 - 1
    return {
        "multi_label": [
            BCEWithLogitsLossFlat()(logits, flags).item(),
            named_loss("auto", task="multi_label")(logits, flags).mean().item(),
        ],
        "points": [
            MSELossFlat()(points, wanted).item(),
            named_loss("auto", task="points")(points, wanted).mean().item(),
        ],
    }


if __name__ == "__main__":
    main()
