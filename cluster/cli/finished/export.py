"""What does `thawline export` do? Make a file of a finished run's model for others, and compare it with the model."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from thawline.cluster.cli.verbs import Flag, Verb
from thawline.cluster.words import say


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Make a file of a finished run's model, for use without thawline. It is compared with the model before it is
    written: one that says something else is an error."""

    source: Annotated[Positional[str], arg(metavar="RUN")]
    """A finished run's folder, or its bundle's (RUN/model)."""
    dest: Annotated[Positional[str], arg(metavar="DIR")]
    """A folder to write into, or a URI."""
    to: Literal["onnx", "pt2", "safetensors", "hub"]
    """onnx: model.onnx, for ONNX Runtime and others. pt2: model.pt2, for torch.export.load. safetensors: the weights
    alone, and those of the body as its own library takes them. hub: a folder for the Hugging Face Hub, with a model
    card, which `thawline.load` reads, too."""
    with_preprocessing: Flag = False
    """onnx, pt2: put all that validation does to an image inside: it takes one decoded image, (H, W, 3) uint8, of any
    size. Without, it takes normalised images, and the file says how they are made."""
    license: Annotated[str, arg(metavar="NAME")] = ""
    """hub: the licence of the weights for the model card, such as apache-2.0; unknown, if not given."""
    overwrite: Flag = False
    """Replace files of the same names in DIR."""
    trust_code: Flag = False
    """Import the code that RUN's model is made by, python:MODULE:NAME."""

    def run(self) -> int:
        """Print the path of the file that is written last."""
        from thawline.cluster.serve.export.export import export
        from thawline.models.code import look_here

        if self.trust_code:
            look_here()
        done = export(
            self.source,
            self.to,
            self.dest,
            with_preprocessing=self.with_preprocessing,
            license=self.license,
            overwrite=self.overwrite,
            trust_code=self.trust_code,
            tell=say,
        )
        print(done)
        return 0
