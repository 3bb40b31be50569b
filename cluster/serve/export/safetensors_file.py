"""How do the weights alone leave? As tensors by name: the whole model's, and the body's for its own library."""

import copy
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from thawline.cluster.serve.export.answers import Answers, names_of
from thawline.cluster.serve.export.made import Made, Wish, description
from thawline.cluster.words import finite
from thawline.models.bodies.libraries import library_of
from thawline.models.weights import tensors

FILE, BODY = "model.safetensors", "body.safetensors"


def make(wish: Wish) -> Made:
    """The model's file, and the body's where its library's own network takes it."""
    model, side_px = wish.bundle.model, wish.spec.size_px
    with torch.no_grad():
        outputs = names_of(wish.answers(torch.zeros(1, 3, side_px, side_px)))
    images = {"shape": ["batch", 3, side_px, side_px], "dtype": "float32"}
    about = description(wish, inputs={"images": images}, outputs=outputs)
    told = {"format": "pt", "thawline": json.dumps(finite(about), ensure_ascii=False)}
    whole = tensors.to_bytes(model.state_dict(), about=told)
    words = f"{FILE}: the state dict of thawline.create({model.name!r}, ...), body.* and head.*"
    files = {FILE: whole}
    if theirs := _theirs(wish):
        files = {BODY: tensors.to_bytes(model.body.state_dict(), about={"format": "pt"}), **files}
        words += f"; {BODY}: {theirs}"

    def answers(pixels: Tensor) -> Sequence[Tensor]:
        read = copy.deepcopy(wish.bundle.model)
        read.load_state_dict(tensors.from_bytes(whole, where=FILE))
        said: Sequence[Tensor] = Answers(read.float(), wish.bundle.about.task).eval()(pixels)
        return said

    return Made(files, torch.no_grad()(answers), words)


def _theirs(wish: Wish) -> str:
    """How the body's library loads it; empty where it does not."""
    model = wish.bundle.model
    library = library_of(model.name)
    if library.shapes is None:
        return ""
    shapes, own = library.shapes(model.name), model.body.state_dict()
    if any(
        shapes.get(key) != tuple(value.shape) for key, value in own.items()
    ):  # of another size, or of other channels
        return ""
    name = model.name.removeprefix("timm/")
    return f"{library.making.format(name=name)}.load_state_dict(..., strict=False) takes it"
