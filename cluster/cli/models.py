"""What can be typed about bodies? models: which there are, and what each is."""

import fnmatch
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from thawline.cluster.cli.verbs import Verb
from thawline.cluster.words import printable, say

_MOST = 40
"""So many are described; of more, only the names are told: a description takes up to seconds."""


@dataclass(frozen=True, kw_only=True)
class Models(Verb):
    """Bodies that a job may name: parameters, layer groups, input size, licence of the weights."""

    pattern: Annotated[Positional[str], arg(metavar="PATTERN")] = "*"
    """Which, such as 'efficientnet*', 'timm/convnextv2*', 'smp:*' (decoders), or your own; without, torchvision's."""

    def run(self) -> int:
        """Print a line for each, by name."""
        from thawline.models import code, decoders
        from thawline.models.bodies import from_timm, libraries
        from thawline.models.errors import UnknownModelError

        if self.pattern.startswith(decoders.PREFIX):
            return _tell_decoders(self.pattern)
        found = fnmatch.filter(libraries.names(), self.pattern)
        if self.pattern.startswith(from_timm.PREFIX):
            found = from_timm.names(self.pattern)
        elif code.is_code(self.pattern) or from_timm.is_ours(self.pattern):
            code.look_here()
            found = [self.pattern]
        if not found:
            libraries.check_name(self.pattern)  # names the nearest
            raise UnknownModelError(f"no body is called as {self.pattern[:80]!r}: see `thawline models`")
        if len(found) > _MOST:
            print("\n".join(map(printable, found)))
            say(f"{len(found)} names; `thawline models PATTERN` describes up to {_MOST}, timm's as 'timm/...'")
            return 0
        width = max(map(len, found))
        say(f"{'':<{width}}  parameters  groups: three/stages/blocks  px  licence of the weights")
        for name in found:
            print(printable(f"{name:<{width}}  {_described(name)}".rstrip()), flush=True)
        return 0


def _tell_decoders(pattern: str) -> int:
    """Print the names of smp's decoders."""
    from thawline.models import decoders

    found = fnmatch.filter(decoders.names(), pattern)
    if not found:
        decoders.check_name(pattern)  # names the nearest
    say("decoders of masks, for model.decoder")
    print("\n".join(found))
    return 0


def _described(name: str) -> str:
    """Parameters of the body, in millions; the numbers of its layer groups, head included; side; licence."""
    from thawline.models.bodies import libraries
    from thawline.models.settings import GROUPINGS

    body = libraries.sketch(name)
    millions = sum(parameter.numel() for parameter in body.module.parameters()) / 1e6
    groups = "/".join(str(len(body.groups(how)) + 1) for how in GROUPINGS)
    size = f"{body.origin.size_px}{' fixed' if body.bound else ''}"
    return f"{millions:8.2f} M  {groups:<9}  {size:<9}  {body.origin.licence}"
