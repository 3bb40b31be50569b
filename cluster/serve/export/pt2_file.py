"""How does a model become a .pt2 file? By torch.export, which records it; whoever reads it needs torch alone."""

import io
import json
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from thawline.cluster.serve.export.made import Made, Wish, description
from thawline.cluster.serve.export.network import graph
from thawline.cluster.words import finite

FILE = "model.pt2"
DESCRIPTION = "thawline.json"
"""The name of its description within the archive: torch.export.load(FILE, extra_files={"thawline.json": ""})."""


def make(wish: Wish) -> Made:
    """The file. Raises ExportError."""
    found = graph(wish)
    about = description(wish, inputs={found.input: found.images}, outputs=found.outputs)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, on its own code
        torch.export.save(found.program, file, extra_files={DESCRIPTION: json.dumps(finite(about), ensure_ascii=False)})
        read = torch.export.load(io.BytesIO(file.getvalue())).module()  # its own bytes: nobody else's can be in them

    def answers(images: Tensor) -> Sequence[Tensor]:
        said: Sequence[Tensor] = read(images)
        return said

    return Made({FILE: file.getvalue()}, answers, f"torch.export, torch {torch.__version__}: {found.words}")
