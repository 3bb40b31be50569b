"""How does a network of timm become a body? By the names, the groups and the features that timm itself gives.

The only file that imports timm, an extra. Names are `timm/ARCHITECTURE[.TAG]`, and `hf-hub:ORG/MODEL` of a network that
timm can read from the Hugging Face Hub; its description there is data, and its weights are read as tensors alone.
"""

import fnmatch
import warnings
from collections.abc import Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from thawline.models.bodies.body import (
    Body,
    Names,
    Origin,
    Stage,
    by_children,
    feature_maps,
    give_channels,
    is_map,
    named,
    on_meta,
    shape_of,
    stages_of,
)
from thawline.models.errors import ModelError, UnknownModelError, WeightsError

PREFIX, HUB = "timm/", "hf-hub:"


def is_ours(name: str) -> bool:
    """Whether a model's name is one of timm's."""
    return name.startswith((PREFIX, HUB))


@cache
def _timm(name: str = PREFIX) -> ModuleType:
    """The package. Raises UnknownModelError where it is not installed; name: what somebody asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
    except ModuleNotFoundError as error:
        raise UnknownModelError(
            f"{name[:80]!r} is a model of timm, which is not installed: nothing can be built; "
            'pip install "thawline[timm]"'
        ) from error
    module: ModuleType = timm
    return module


def names(pattern: str = "*") -> list[str]:
    """timm's networks with the names of their weights, as `timm/...`, of which a pattern fits. Raises as `_timm`."""
    timm = _timm()
    tagged, bare = timm.list_pretrained(), timm.list_models()
    every = sorted(PREFIX + name for name in {*tagged, *bare})
    return fnmatch.filter(every, pattern)


def check_name(name: str) -> None:
    """Raises UnknownModelError, with the nearest right names, if timm has no such network."""
    timm = _timm(name)
    if name.startswith(HUB):
        _config(name)
        return
    architecture, _, tag = name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(architecture):
        from difflib import get_close_matches

        near = get_close_matches(architecture, timm.list_models(), n=3)
        raise UnknownModelError(
            f"{name[:80]!r} is no model of timm {timm.__version__}: nothing can be built; "
            + (f"give one of {', '.join(PREFIX + each for each in near)}" if near else "see `thawline models 'timm/*'`")
        )
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        there = ", ".join(f"{PREFIX}{architecture}.{each}" for each in tags[:5]) or f"{PREFIX}{architecture}"
        raise UnknownModelError(f"{name[:80]!r}: timm has no weights of this tag; give {there}")


def _config(name: str) -> Mapping[str, Any]:
    """What is known of a network's weights: timm's pretrained_cfg. Raises UnknownModelError."""
    timm = _timm(name)
    if not name.startswith(HUB):
        found: dict[str, Any] = timm.get_pretrained_cfg(name.removeprefix(PREFIX)).to_dict()
        return found
    try:
        config, _, _ = timm.models.load_model_config_from_hf(name.removeprefix(HUB))
    except Exception as error:  # the network, the Hub, JSON
        raise UnknownModelError(
            f"{name[:120]} cannot be asked from the Hugging Face Hub ({_said(error)}): nothing can be built; check the "
            "name and the network, or give weights of this machine"
        ) from error
    known: dict[str, Any] = config
    return known


def origin(name: str) -> Origin:
    """What timm says of a network's weights. Raises UnknownModelError."""
    config = _config(name)
    (m0, m1, m2), (s0, s1, s2) = (tuple(map(float, config[key])) for key in ("mean", "std"))
    return Origin(int(config["input_size"][1]), (m0, m1, m2), (s0, s1, s2), licence=config.get("license") or "")


def body_of(name: str, *, in_channels: int = 3, size_px: int | None = None, maps: bool = False) -> Body:
    """A body with random weights, as timm starts them.

    name: one that `check_name` lets pass. size_px: for networks that are built for one size. maps: leave out what comes
    behind the last feature map. Raises ModelError: it cannot be built for this size or these channels.
    """
    config, about = _config(name), origin(name)
    bound = bool(config.get("fixed_input_size"))
    size_px = (size_px if bound else None) or about.size_px
    options: dict[str, Any] = {"img_size": size_px} if bound and size_px != about.size_px else {}
    unpooled = {**options, "global_pool": ""}
    ghost = _ghost(name, **unpooled)
    pooled = ghost is None or not _gives_maps(ghost, name=name, size_px=size_px)
    module = _made(name, **(options if pooled else unpooled))
    if module is None:
        raise ModelError(
            f"{name} cannot be built for images of {size_px} px: give data.size_px={about.size_px}, or a model that "
            "takes any size"
        )
    if in_channels != 3:
        give_channels(module, in_channels)
    ghost, before = on_meta(module), [*module.state_dict()]
    stages = _stages(ghost, channels=in_channels, size_px=size_px)
    if maps and stages:
        for each in (module, ghost):
            network: Any = each
            network.prune_intermediate_layers(list(range(len(stages))), prune_norm=True, prune_head=True)
    kept = module.state_dict().keys()
    shape = shape_of(ghost, channels=in_channels, size_px=size_px, name=name)
    return Body(
        name=name,
        module=module,
        features=shape[1],
        pooled=pooled,
        stages=stages,
        by_stage=_groups(ghost, coarse=True),
        by_block=_groups(ghost, coarse=False),
        size_px=size_px,
        bound=bound,
        origin=about,
        foreign=(*_classifier(config), *(key for key in before if key not in kept)),
    )


def _made(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module | None:
    """A network without its classifier, None where it has not these options."""
    asked = name if name.startswith(HUB) else name.removeprefix(PREFIX)
    try:
        network: nn.Module = _timm(name).create_model(asked, pretrained=pretrained, num_classes=0, **options)
    except (AssertionError, TypeError, ValueError, RuntimeError, KeyError):
        if pretrained:
            raise
        return None
    return network


def _ghost(name: str, **options: Any) -> nn.Module | None:
    """`_made`, with shapes alone, in a moment; a few networks ask for numbers while they are built."""
    with torch.device("meta"):
        ghost = _made(name, **options)
    if ghost is not None:
        return ghost.eval()
    module = _made(name, **options)
    return None if module is None else on_meta(module)


def _gives_maps(ghost: nn.Module, *, name: str, size_px: int) -> bool:
    try:
        return is_map(shape_of(ghost, channels=3, size_px=size_px, name=name))
    except ModelError:  # a list of several maps
        return False


def _stages(module: nn.Module, *, channels: int, size_px: int) -> tuple[Stage, ...]:
    """None where timm cannot tell its feature maps, or they are of one size."""
    try:
        with torch.no_grad():
            maps = feature_maps(module, torch.empty(1, channels, size_px, size_px, device="meta"))
    except Exception:  # a network without them says so in many ways
        return ()
    return stages_of(maps, size_px=size_px)


def _groups(module: nn.Module, *, coarse: bool) -> Names:
    """Every parameter by timm's own groups, or where it has none by children."""
    network: Any = module
    try:
        by_id = _timm().models.group_parameters(module, network.group_matcher(coarse=coarse))
    except (AttributeError, AssertionError):  # has none; has none so coarse
        return by_children(module)
    found = named([by_id[number] for number in sorted(by_id)])
    whole = sum(map(len, found)) == sum(1 for _ in module.named_parameters())
    return found if whole else by_children(module)


def _classifier(config: Mapping[str, Any]) -> tuple[str, ...]:
    heads = config.get("classifier") or ()
    return tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))


def published(body: Body) -> dict[str, Tensor]:
    """The weights that are published under a body's name, those of its first layer for RGB.

    The Hub's own client keeps them in its cache, behind its lock, with their checksums.
    Raises WeightsError: there are none, or they cannot be fetched.
    """
    name, timm = body.name, _timm(body.name)
    if not name.startswith(HUB) and not timm.is_model_pretrained(name.removeprefix(PREFIX)):
        raise WeightsError(f'nobody published weights of {name}: there is nothing to start from; give weights = "none"')
    options: dict[str, Any] = {"img_size": body.size_px} if body.bound else {}
    if not body.pooled:
        options["global_pool"] = ""
    try:
        network = _made(name, pretrained=True, **options)
    except Exception as error:  # the network, the disk, the Hub
        raise WeightsError(
            f"the weights of {name} could not be fetched ({_said(error)}): nothing to start from; try again with a "
            'network, give model.weights = "FILE", or weights = "none"'
        ) from error
    assert network is not None
    own = body.module.state_dict()
    return {key: value for key, value in network.state_dict().items() if key in own}


def foreign(body: Body) -> tuple[str, ...]:
    """What the names of a classifier's tensors begin with: `Body.foreign`, and further layers that it has."""
    own = body.module.state_dict()
    return (*body.foreign, *(key for key in shapes(body.name) if key not in own))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a network of timm with its own classifier, in order. Raises UnknownModelError."""
    check_name(name)
    make = partial(_timm(name).create_model, name if name.startswith(HUB) else name.removeprefix(PREFIX))
    try:
        with torch.device("meta"):
            network: nn.Module = make()
    except RuntimeError:  # it asks for numbers while it is built
        network = make()
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['nothing more'])[0][:120]}"
