"""What does an answer look like? A JSON object for each image."""

import base64
import io
from typing import Any

from thawline.cluster.serve.endpoint.batching import Said
from thawline.cluster.serve.mask_pictures import by_index, painted
from thawline.cluster.serve.predictor import Prediction
from thawline.cluster.words import as_json
from thawline.models.bundle import Description


def as_answer(said: list[Said]) -> bytes:
    """The JSON of what was said of a request's images: a list of objects, in their order."""
    return as_json([_of_one(*each) for each in said]).encode()


def _of_one(said: Prediction, about: Description) -> dict[str, Any]:
    if said.error is not None:
        return {"name": said.name, "error": said.error}
    told: dict[str, Any] = {"name": said.name, "prediction": said.prediction}
    if said.probability is not None:
        told |= {"probability": said.probability, "probabilities": dict(said.probabilities)}
    elif said.probabilities:
        told["probabilities"] = dict(said.probabilities)
    if said.points is not None:
        told["points"] = said.points.tolist()
    if said.mask is not None:
        file = io.BytesIO()
        painted(said.mask, by_index(about.values, len(about.classes))).save(file, "PNG")
        told["mask"] = base64.b64encode(file.getvalue()).decode("ascii")
    return told
