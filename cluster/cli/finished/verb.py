"""What do the verbs that ask a finished run's model have in common? Which run, on what, and how it is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from thawline.cluster.cli.verbs import Flag, Verb

if TYPE_CHECKING:
    from thawline.cluster.serve.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class FinishedVerb(Verb):
    """A verb on a finished run's model."""

    source: Annotated[Positional[str], arg(metavar="RUN")]
    """A finished run's folder, or its bundle's (RUN/model)."""
    engine: Literal["auto", "dali", "reference"] = "auto"
    """Who decodes: the run's own engine, DALI, or Pillow and torch (reference)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs: on a GPU, where there is one."""
    trust_code: Flag = False
    """Import the code that RUN's model is made by, python:MODULE:NAME."""

    def predictor(self) -> "Predictor":
        """The model, to be closed. Raises as serve.predictor.load does."""
        from thawline.cluster.serve.predictor import load
        from thawline.models.code import look_here

        if self.trust_code:
            look_here()
        device = None if self.device == "auto" else self.device
        return load(self.source, device=device, engine=self.engine, trust_code=self.trust_code)
