"""Does every kind of architecture become a body? A dozen small ones here; `make architectures` tries eighty."""

import pytest

from tests.kit.architectures import try_out

TORCHVISION = ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5")
TIMM = ("test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet", "test_mambaout")


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_a_network_of_torchvision_is_grouped_frozen_and_trained(name: str) -> None:
    try_out(name, side_px=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_grouped_frozen_and_trained(name: str) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    try_out(f"timm/{name}", side_px=64)
