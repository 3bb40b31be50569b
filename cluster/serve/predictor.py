"""What does a finished run say of images? `load(RUN).predict(...)`: the pixels and the probabilities of validation.

It needs neither Ray nor DALI nor a GPU. Where images lie, and what is written of them, see cli.predict.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from thawline.cluster.errors import PredictError
from thawline.cluster.words import quoted
from thawline.dataio.closing import Closing
from thawline.dataio.errors import EngineError, SourceError
from thawline.dataio.pixels.geometry import Geometry
from thawline.dataio.pixels.pictures import MOST_BYTES, to_rgb, why_undecodable
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.reading.readers import Reason
from thawline.dataio.store.root import Root
from thawline.dataio.stream.render import Content, Item, Rendered, rendered
from thawline.dataio.stream.renderer import Choice, EngineName, Renderer, choose_engine, default_threads
from thawline.dataio.table import tasks as kinds
from thawline.models import bundle
from thawline.models.bundle import Bundle, Description
from thawline.models.errors import BundleError
from thawline.trainer.metrics.predictions import check_averaged, mean_of_views
from thawline.trainer.settings import PrecisionName
from thawline.trainer.step.precision import Precision, choose_precision, place
from thawline.trainer.step.step import forward
from thawline.trainer.tasks import record_of

log = logging.getLogger(__name__)

Picture = str | Path | bytes | NDArray[np.uint8] | Image.Image | Item
"""A path or URI, an encoded file, pixels (H, W, 3) or (H, W), or a picture that Pillow has opened."""

BETA = 0.25
"""What the plain image counts beside its augmented views, as in Learner.tta."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image."""

    name: str
    """Its path, or its place among the images."""
    prediction: Any = None
    """The class; a list of classes where there may be several, and of a mask those that occur; a number, or a list of
    them; by a point's name [x, y] in px of the image, upright."""
    probability: float | None = None
    """Of the most probable class; None for what has none."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """By class, the most probable first."""
    points: NDArray[np.float64] | None = None
    """(K, 2) x, y in px of the image, upright: 0, 0 is its upper left corner."""
    mask: NDArray[np.uint8] | None = None
    """(height, width) of the image, upright: indices into the classes, 255 where the model saw nothing of it."""
    error: str | None = None
    """Why the image cannot be used; then nothing else is said."""


def load(
    where: str | Path,
    *,
    device: str | torch.device | None = None,
    engine: EngineName = "auto",
    precision: PrecisionName | None = None,
    trust_code: bool = False,
) -> "Predictor":
    """A finished run, ready to say what is in images. where: its folder, or its bundle's.

    device: the GPU where there is one, when not given. engine, precision: those that the run was validated with; where
    DALI is not installed, Pillow decodes, whose JPEGs differ a little, and a line is logged.
    trust_code: import a model of one's own that the bundle names, see models.load.
    Raises: BundleError, EngineError, RecipeError, PredictError.
    """
    return Predictor(
        bundle.load(where, trust_code=trust_code), name=str(where), device=device, engine=engine, precision=precision
    )


class Predictor(Closing):
    """Says what a bundle's model sees. Its engine starts with the first image, and ends with `close`."""

    def __init__(
        self,
        loaded: Bundle,
        *,
        name: str = "the bundle",
        device: str | torch.device | None = None,
        engine: EngineName = "auto",
        precision: PrecisionName | None = None,
    ) -> None:
        """name: of the bundle, in messages. The rest: see `load`."""
        self.about = loaded.about
        self.device = _device(device)
        self.precision = _precision(precision, self.about, self.device, name)
        self.engine = _engine(engine, self.about, name)
        self.spec = _spec(self.about, name)
        self.model = place(loaded.model.eval(), self.precision, self.device)
        self._record, self._kind = record_of(self.about.task), kinds.TASKS.get(self.about.task)
        self._renderer: Renderer | None = None

    def predict(
        self,
        items: Picture | Iterable[Picture],
        *,
        tta: int = 0,
        top_k: int = 0,
        threshold: float | None = None,
        batch: int = 64,
    ) -> Any:
        """What the model says of an image, a `Prediction`; of many, a list of them, in their order.

        items: paths or URIs, encoded files, (H, W, 3) uint8 arrays, pictures of Pillow, mixed as you like.
        tta: how many augmented views to average with each image. top_k: how many classes `probabilities` names, all
        when 0. threshold: above which probability a class is predicted, where there may be several. batch: images that
        go through the model at once.
        Raises: EngineError for a single image that cannot be used; among many, its `error` says why. RecipeError,
        PredictError for options that do not fit the task.
        """
        options: dict[str, Any] = {"tta": tta, "top_k": top_k, "threshold": threshold, "batch": batch}
        one = _as_one(items)
        if one is None:
            return list(self.stream(cast(Iterable[Picture], items), **options))
        (said,) = self.stream([one], **options)
        if said.error is not None:
            raise EngineError(f"{said.name} cannot be used ({said.error}): nothing is said of it; give another image")
        return said

    def stream(
        self,
        items: Iterable[Picture],
        *,
        tta: int = 0,
        top_k: int = 0,
        threshold: float | None = None,
        batch: int = 64,
        reading: int = 2,
    ) -> Iterator[Prediction]:
        """`predict` of as many images as there are: one after another, read a few batches ahead.

        reading: images to read at the same time; more where each read waits for a network.
        """
        self._check(tta=tta, top_k=top_k, threshold=threshold, batch=batch)
        names, refused = dict[int, str](), dict[int, Reason]()

        def named() -> Iterator[Item]:
            for number, item in enumerate(map(as_item, items, count())):
                names[number] = item.name
                yield item

        def of_refused(before: float) -> Iterator[Prediction]:
            for number in sorted(number for number in refused if number < before):
                yield Prediction(name=names.pop(number), error=refused.pop(number))

        views = list[NDArray[Any]]()
        for seen in rendered(named(), self._rendering(batch), views=tta, tell=refused.__setitem__, reading=reading):
            views = [*views, self._said(seen.inputs)] if seen.view else [self._said(seen.inputs)]
            if seen.view < tta:
                continue
            said = views[0] if not tta else mean_of_views(views[0], views[1:], beta=BETA).astype(np.float32)
            for number, columns in zip(seen.numbers, self._columns(said, seen, top_k, threshold), strict=True):
                yield from of_refused(number)
                yield Prediction(name=names.pop(number), **columns)
        yield from of_refused(np.inf)

    @property
    def says_masks(self) -> bool:
        """Whether a prediction has a mask."""
        return self._kind is not None and self._kind.masks

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the model puts out for images on its device, normalised (N, 3, H, W): float32, there too."""
        return forward(self.model, (inputs,), precision=self.precision, device=self.device).float()

    def close(self) -> None:
        """Release the engine's threads and memory; the next image starts another."""
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = None

    # Within -----------------------------------------------------------------------------------------------

    def _rendering(self, batch: int) -> Renderer:
        """The renderer of this batch."""
        if self._renderer is None or self._renderer.local_batch != batch:
            self.close()
            self._renderer = Renderer(
                spec=self.spec,
                local_batch=batch,
                device=self.device,
                dtype=self.precision.input_dtype,
                threads=default_threads(1),
                choice=self.engine,
            )
        return self._renderer

    def _said(self, inputs: Tensor) -> NDArray[Any]:
        """What the record's `answers` take: probabilities, numbers, points, or a mask's classes."""
        outputs = self.outputs(inputs)
        if self._record.answered is not None:
            return self._record.answered(outputs).cpu().numpy()
        return self._record.probabilities(outputs.cpu()).numpy()

    def _columns(
        self, said: NDArray[Any], seen: Rendered, top_k: int, threshold: float | None
    ) -> Iterator[dict[str, Any]]:
        """The fields of each image's Prediction but its name."""
        classes = self.about.classes
        answers = {name: _listed(values) for name, values in self._record.answers(said, classes, threshold).items()}
        located = self._on_images(said, seen.geometry)
        for i in range(len(said)):
            columns = {name: values[i] for name, values in answers.items()}
            if self._record.by_class:
                columns["probabilities"] = _ranked(said[i], classes, top_k)
            if located is not None and self.says_masks:
                columns["mask"] = located[i]
            elif located is not None:
                columns |= {"points": located[i], "prediction": dict(zip(classes, located[i].tolist(), strict=True))}
            yield columns

    def _on_images(self, said: NDArray[Any], geometry: Geometry) -> Sequence[NDArray[Any]] | None:
        if self._kind is None or self._kind.on_images is None:
            return None
        return self._kind.on_images(said, geometry, self.spec.size_px)

    def _check(self, *, tta: int, top_k: int, threshold: float | None, batch: int) -> None:
        task = self.about.task
        if tta:
            check_averaged(task)
        if tta < 0 or top_k < 0 or batch < 1:
            raise PredictError(
                f"tta={tta}, top_k={top_k}, batch={batch}: nothing can be said so; give tta and top_k of at least 0, "
                "batch of at least 1"
            )
        if top_k and not self._record.by_class:
            raise PredictError(f"top_k={top_k} with task {task}: it has no probabilities of classes; leave it out")
        if threshold is not None and self._record.threshold is None:
            raise PredictError(
                f"threshold={threshold:g} with task {task}: it is for images with several labels, and nothing would be "
                "cut by it; leave it out"
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise PredictError(f"threshold={threshold:g} is no probability: give one in 0 to 1")


# What it is made with -------------------------------------------------------------------------------------


def _spec(about: Description, name: str) -> ImageSpec:
    """Raises BundleError, SpecError."""
    try:
        return ImageSpec(**about.image)
    except TypeError as error:  # a field of a later version
        raise BundleError(
            f"{name} describes its images in a way that is not known here ({error}): they might be seen otherwise; "
            f"install thawline {about.thawline}, which wrote it"
        ) from error


def _engine(wanted: EngineName, about: Description, name: str) -> Choice:
    """The engine of the last validation where nobody chose, or what there is. Raises EngineError."""
    if wanted != "auto":
        return choose_engine(wanted)
    if about.engine == "reference":
        return Choice("reference", "the run was validated with it")
    choice = choose_engine()
    if choice.engine != about.engine:
        log.warning(
            "%s was validated with DALI, and %s: Pillow decodes, whose JPEGs differ by a few levels%s; install "
            "nvidia-dali-cuda130 for the same",
            name,
            choice.reason,
            _moved(about),
        )
    return choice


def _moved(about: Description) -> str:
    """What Pillow's pixels changed when it was measured, in words."""
    if not about.pillow:
        return ", and so what is said a little"
    agreement = about.pillow.get("agreement")
    same = "" if agreement is None else f", with the same prediction for {agreement:.4g} of them"
    largest, mean = about.pillow["largest"], about.pillow["mean"]
    return (
        f". On {about.pillow['images']:.0f} validation images that moved what it says by {largest:.2g} at most, "
        f"{mean:.2g} in the mean{same}"
    )


def _device(wanted: str | torch.device | None) -> torch.device:
    """The GPU where there is one and nobody chose. Raises PredictError for one that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(wanted or ("cuda" if gpus else "cpu"))
    except RuntimeError:  # torch lists its 20 kinds of devices
        raise PredictError(f"device={quoted(str(wanted))} is not known: give cpu, cuda, or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise PredictError(
            f"device='{device}', but torch sees {gpus} GPUs here: nothing could be computed; see `thawline doctor`, or "
            "give device='cpu'"
        )
    return device


def _precision(wanted: PrecisionName | None, about: Description, device: torch.device, name: str) -> Precision:
    """The precision of the last validation where nobody chose. Raises RecipeError."""
    if wanted is None and about.precision == "fp16" and device.type == "cpu":
        log.warning("%s was validated in fp16, which a CPU has not: fp32 is used, which is more exact", name)
        wanted = "fp32"
    return choose_precision(wanted or about.precision, device)  # type: ignore[arg-type]  # checked there


# What it is asked -----------------------------------------------------------------------------------------


def _as_one(items: Any) -> Picture | None:
    """The image that this is; None for many, and what else can be gone through."""
    single = isinstance(items, str | Path | bytes | Image.Image | Item) or not isinstance(items, Iterable)
    return items if single or (isinstance(items, np.ndarray) and items.ndim < 4) else None


def as_item(picture: Picture, number: int = 0) -> Item:
    """The image as one to render. number: its name, where it has none. Raises PredictError for what is no image."""
    if isinstance(picture, Item):
        return picture
    if isinstance(picture, str | Path):
        return Item(str(picture), partial(_read, picture))
    name = f"image {number}"
    if isinstance(picture, bytes):
        return Item(name, picture)
    if isinstance(picture, Image.Image):
        return Item(name, partial(_pixels, picture))
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim in (2, 3) and picture.size:
        return Item(name, partial(_pixels, picture))
    kind = f"{picture.dtype} array {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise PredictError(
        f"{name} is a {quoted(kind)}: a model sees nothing in it; give a path, bytes, a uint8 array (H, W, 3), or a "
        "picture of Pillow"
    )


def _read(path: str | Path) -> Content | Reason:
    """Raises OSError; ResourceError, where no file is at fault."""
    try:
        root, name = Root.holding(path)
        return root.read(name, most=MOST_BYTES)
    except SourceError as error:  # a name that cannot be one, a store that is not known
        return str(error)


def _pixels(picture: Image.Image | NDArray[np.uint8]) -> Content | Reason:
    """Pixels as files have them: upright, RGB, without transparency."""
    try:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture.copy()
        return to_rgb(image)
    except Exception as error:  # see pictures.decode
        return f"cannot be decoded: {why_undecodable(error)}"


# What it says ---------------------------------------------------------------------------------------------


def _listed(values: Any) -> list[Any]:
    """A column of a table as Python's own numbers, texts and lists."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    return values if isinstance(values, list) else values.to_pylist()


def _ranked(probabilities: NDArray[Any], classes: Sequence[str], top_k: int) -> dict[str, float]:
    order = np.argsort(-probabilities, kind="stable")[: top_k or None]
    return {classes[i]: float(probabilities[i]) for i in order}
