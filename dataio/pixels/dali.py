"""How does DALI run the spec? One pipeline: decode, filter where needed, warp; finish.py does the colours.

Nobody else imports DALI but decoding.py, which asks it about single files. `device` alone decides where it runs: "cpu"
wholly on the CPU, "cuda" with `mixed` decoding (the GPU's JPEG engines) and everything after it on the GPU. Randomness
comes from `geometry`, never from DALI, so both give the same stream.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.pipeline import do_not_convert
from torch.utils.dlpack import from_dlpack

from thawline.dataio.batch import ImageBatch
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.colours import finish
from thawline.dataio.pixels.decoding import cause, decodable, known
from thawline.dataio.pixels.geometry import SAMPLES
from thawline.dataio.pixels.reference import decode
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Mend, Work
from thawline.dataio.reading.readers import transcode
from thawline.dataio.table.targets import VOID

PREFETCH = 2
_REWRITTEN = "__autograph_generated_file"  # how DALI calls modules of Python that it has rewritten
# The JPEG engines take this share of a batch, CUDA cores and the host's threads the rest. DALI's default, to be
# swept on the GPU at hand: with few CPU cores beside a big GPU a higher share pays.
HW_DECODER_LOAD = 0.65

_KINDS: dict[str, tuple[Any, int]] = {  # DALI type and dimensions of a sample's share of each input
    "encoded": (types.UINT8, 1),
    "start": (types.INT32, 1),  # of the window that is decoded: y, x
    "shape": (types.INT32, 1),  # height, width
    "ids": (types.INT64, 0),
    "size": (types.FLOAT, 1),  # height, width of the output
    "filtered": (types.BOOL, 0),  # does it need a prefilter?
    "filter_px": (types.FLOAT, 1),  # height, width
    "spread": (types.BOOL, 0),  # does it need more than one sample a pixel?
    "homography0": (types.FLOAT, 2),  # at each of geometry.SAMPLES
    "homography1": (types.FLOAT, 2),
    "homography2": (types.FLOAT, 2),
    "mask": (types.UINT8, 3),  # class indices
    "to_mask": (types.FLOAT, 2),  # its homography
}


def _inputs(work: Work, *, windowed: bool) -> dict[str, Any]:
    """What the pipeline is fed, by name. windowed: decode no more of each image than the warp reads."""
    geometry = work.geometry
    to_window = np.tile(np.eye(3), (len(work.ids), 1, 1))
    inputs: dict[str, Any] = {
        "encoded": work.encoded,
        "ids": work.ids,
        "size": np.full((len(work.ids), 2), work.size_px, np.float32),
        "filtered": geometry.prefilter_px[:, 0] > 0,
        "filter_px": np.maximum(geometry.prefilter_px, 1).astype(np.float32),
        "spread": geometry.sampling > 0,
    }
    if windowed:
        starts, shapes = geometry.windows(work.size_px)
        inputs |= {"start": starts.astype(np.int32), "shape": shapes.astype(np.int32)}
        to_window[:, :2, 2] = -starts[:, ::-1]
    for k in range(len(SAMPLES)):
        inputs[f"homography{k}"] = np.ascontiguousarray(to_window @ geometry.sampled(k), np.float32)
    if work.masks is None:
        return {**inputs, "targets": work.targets}
    sizes = np.array([mask.shape for mask in work.masks])
    inputs["mask"] = [mask[..., None] for mask in work.masks]
    return {**inputs, "to_mask": np.ascontiguousarray(geometry.onto(sizes), np.float32)}


@do_not_convert  # DALI rewrites a pipeline's Python for conditionals, and knows no strict zip
def _feed(source: Callable[[], Any], kinds: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    values = fn.external_source(
        source=source,
        num_outputs=len(kinds),
        dtype=[kind for kind, _ in kinds.values()],
        ndim=[dims for _, dims in kinds.values()],
        batch=True,
        no_copy=True,
    )
    return dict(zip(kinds, values, strict=True))


@pipeline_def(enable_conditionals=True)
def _pipeline(source: Callable[[], Any], spec: ImageSpec, kinds: dict[str, tuple[Any, int]]) -> Any:
    """kinds: of each input, in the order of what `source` returns."""
    fed = _feed(source, kinds)
    if "start" in fed:
        window: dict[str, Any] = {"start": fed["start"], "shape": fed["shape"], "axis_names": "HW"}
        images = fn.decoders.image_slice(fed["encoded"], device="cpu", output_type=types.RGB, **window)
    else:
        mixed: dict[str, Any] = {"device": "mixed", "hw_decoder_load": HW_DECODER_LOAD}
        images = fn.decoders.image(fed["encoded"], output_type=types.RGB, **mixed)
        fed |= {name: fed[name].gpu() for name in ("mask", "targets") if name in fed}
    filtered = fed["filtered"]
    if filtered:
        source_images = fn.resize(images, size=fed["filter_px"], antialias=True, interp_type=types.INTERP_LINEAR)
    else:
        source_images = images
    warping: dict[str, Any] = {"size": fed["size"], "border_mode": spec.border, "pixel_origin": "corner"}
    first = fn.experimental.warp_perspective(
        source_images, matrix=fed["homography0"], interp_type=types.INTERP_LINEAR, **warping
    )
    spread = fed["spread"]
    if spread:
        second = fn.experimental.warp_perspective(
            source_images, matrix=fed["homography1"], interp_type=types.INTERP_LINEAR, **warping
        )
        third = fn.experimental.warp_perspective(
            source_images, matrix=fed["homography2"], interp_type=types.INTERP_LINEAR, **warping
        )
    else:
        second = first
        third = first
    if "mask" not in fed:
        return first, second, third, fed["targets"], fed["ids"]
    mask = fn.experimental.warp_perspective(
        fn.reinterpret(fed["mask"], layout="HWC"),
        matrix=fed["to_mask"],
        interp_type=types.INTERP_NN,
        fill_value=VOID,
        **warping,
    )
    return first, second, third, fn.cast(mask, dtype=types.INT64), fed["ids"]


class DaliEngine:
    """Renders work with DALI on the CPU or the GPU; tensors are handed over without a copy."""

    name = "dali"

    def __init__(
        self,
        spec: ImageSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        max_batch: int,
        target: tuple[np.dtype[Any], int] | None,
        spent: dict[str, float] | None = None,
    ) -> None:
        """spent: seconds by name; what `finish` takes is added to its "finish"."""
        self._spec, self._dtype = spec, dtype
        index = device.index if device.type == "cuda" else None  # to DALI, no index means no GPU
        if device.type == "cuda" and index is None:  # torch's current one
            index = torch.cuda.current_device()
        # The hardware JPEG engines decode whole images; libjpeg-turbo gains a quarter by leaving out what nobody sees.
        self._windowed = index is None
        kinds = _KINDS.copy()
        if not self._windowed:
            del kinds["start"], kinds["shape"]
        if target is not None:
            del kinds["mask"], kinds["to_mask"]
            kinds["targets"] = (
                {np.dtype(np.int64): types.INT64, np.dtype(np.float32): types.FLOAT}[target[0]],
                target[1],
            )
        self._options: dict[str, Any] = {
            "spec": spec,
            "kinds": kinds,
            "batch_size": max_batch,
            "num_threads": threads,
            "device_id": index,
            "prefetch_queue_depth": PREFETCH,
            "set_affinity": False,
            "exec_dynamic": True,  # outputs live as long as the tensors made from them
        }
        self._masks = target is None
        self._spent = {"finish": 0.0} if spent is None else spent
        self._works: Iterator[Work] = iter(())
        # no_copy: DALI reads our arrays where they lie, so they must outlive its queues.
        self._alive: deque[tuple[Work, Any]] = deque(maxlen=2 * PREFETCH + 2)
        self._lent: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
        self._fed: deque[Work] = deque()
        """Work that the pipeline has taken and not yet returned."""
        self._pipe = self._built()
        self.reusable = True

    def _built(self) -> Pipeline:
        pipe: Pipeline = _pipeline(self._next, **self._options)
        # DALI rewrites our Python into a file that goes with a regular end of the process; workers end otherwise.
        for name, module in list(sys.modules.items()):
            if name.startswith(_REWRITTEN) and module.__file__ is not None:
                Path(module.__file__).unlink(missing_ok=True)
        return pipe

    def _next(self) -> tuple[Any, ...]:
        work = next(self._works)
        inputs = _inputs(work, windowed=self._windowed)
        self._alive.append((work, inputs))
        self._fed.append(work)
        return tuple(inputs[name] for name in self._options["kinds"])

    def run(self, works: Iterator[Work], mend: Mend | None = None) -> Iterator[ImageBatch]:
        """One Batch a Work, in order. Once a run has ended, `reusable` says that another may begin.

        A file that cannot be decoded breaks DALI's pipeline for good: it goes to `mend`, and a new pipeline takes up
        the work that the old one had not returned. Without `mend` it raises EngineError.
        """
        works = (sound for work in works if len((sound := _known(work, mend)).ids))
        self._works, self.reusable = works, False
        self._fed.clear()
        self._pipe.reset()
        while True:
            try:
                *samples, targets, ids = self._pipe.run()
            except StopIteration:
                self.reusable = True
                return
            except RuntimeError as error:
                index = self._options["device_id"]
                again = [_without_broken(work, mend, device_id=index) for work in self._fed] if mend else []
                if all(new is old for new, old in zip(again, self._fed, strict=False)):
                    raise EngineError(_readable(error, [work for work, _ in self._alive])) from error
                self._works = chain([work for work in again if len(work.ids)], works)
                self._fed.clear()
                self._pipe = self._built()
                continue
            yield self._batch(self._fed.popleft(), samples, targets, ids)

    def _batch(self, work: Work, samples: Sequence[Any], targets: Any, ids: Any) -> ImageBatch:
        warped, made = [from_dlpack(sample.as_tensor()) for sample in samples], from_dlpack(targets.as_tensor())
        began = perf_counter()
        images = finish(warped, work.geometry, self._spec, dtype=self._dtype).permute(0, 3, 1, 2)
        self._spent["finish"] += perf_counter() - began
        if images.device.type == "cuda":
            # DALI takes its memory back when the last tensor over it goes, whatever torch's stream has still to do: so
            # it is held until an event says that the stream is past it, and nothing of it is handed on.
            lent, made = [*warped, made], made.clone()
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._lent.append((done, lent))
            while len(self._lent) > 1 and self._lent[0][0].query():  # type: ignore[no-untyped-call]
                self._lent.popleft()
        return ImageBatch(
            inputs=images,
            targets=made.squeeze(-1) if self._masks else made,
            ids=from_dlpack(ids.as_tensor()),
        )

    def close(self) -> None:
        """Let go of the pipeline's threads and memory."""
        del self._pipe


def _known(work: Work, mend: Mend | None) -> Work:
    """The work itself if each file begins as a format of DALI's does: a batch with any other may end the process."""
    while strange := [i for i, file in enumerate(work.encoded) if not known(file)]:
        work = _transcoded(work, strange, mend)
    return work


def _without_broken(work: Work, mend: Mend, *, device_id: int | None) -> Work:
    """The work itself if DALI can decode all of it; else mended, or read by Pillow where only DALI cannot."""
    while broken := {
        i: why for i, why in enumerate(decodable(work.encoded, device_id=device_id)) if isinstance(why, str)
    }:
        work = _transcoded(work, broken, mend)
    return work


def _transcoded(work: Work, broken: Iterable[int], mend: Mend | None) -> Work:
    """Those of the files read by Pillow; what it cannot read either goes to `mend`, or raises EngineError."""
    encoded, hopeless = list(work.encoded), dict[int, str]()
    for i in broken:
        try:
            encoded[i] = transcode(work.encoded[i], path=work.paths[i])
        except EngineError as error:
            if mend is None:
                raise
            hopeless[i] = str(error)
    return mend(work, hopeless) if hopeless and mend else replace(work, encoded=encoded)


def _readable(error: RuntimeError, works: Iterable[Work]) -> str:
    """DALI names operators, never files: find the first that cannot be decoded; failing that, give the cause."""
    files = [file for work in works for file in zip(work.encoded, work.paths, strict=True)]
    for why, (encoded, path) in zip(decodable([encoded for encoded, _ in files]), files, strict=True):
        if isinstance(why, str):
            try:
                decode(encoded, path=path)
            except EngineError as plain:  # Pillow's reasons are for people, DALI's are numbers
                return str(plain)
            return f"{path} cannot be decoded ({why}): the batch cannot be made; remove or mend it and index again"
    return (
        f"DALI failed while it rendered a batch ({cause(error)}): no further batch can be made; each of its last "
        f"{len(files)} files can be decoded, so try engine='reference'"
    )


def probe() -> str | None:
    """Render one tiny image on the CPU: None if DALI works here, else the reason why not."""
    try:
        black = np.zeros((8, 8, 3), np.uint8)
        pipe = Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipe:
            pipe.set_outputs(fn.resize(types.Constant(black, device="cpu"), size=[4, 4]))
        (out,) = pipe.run()
        shape = tuple(out.as_array().shape)
    except Exception as error:  # whatever it is, the answer is "not here", and doctor prints it
        return f"{type(error).__name__}: {error}"
    return None if shape == (1, 4, 4, 3) else f"a 4 x 4 resize came out as {shape}"
