"""How does DALI run the spec? One pipeline: decode, filter where needed, warp; colours.py does the colours.

DALI is imported here and in decoding.py alone, which decodes single files: it also runs as a script in a child process,
so it must import neither this file nor torch. `device` alone decides where the pipeline runs: "cpu" wholly on the CPU,
"cuda" with `mixed` decoding (the GPU's JPEG engines) and everything after it on the GPU. Randomness comes from
`geometry`, never from DALI, so both give the same stream.
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
from thawline.dataio.closing import Closing
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.colours import finish, sent
from thawline.dataio.pixels.decoding import cause, decodable, known
from thawline.dataio.pixels.geometry import SAMPLES
from thawline.dataio.pixels.pictures import VOID, decode, transcode
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Mend, Work

PREFETCH = 2
_REWRITTEN = "__autograph_generated_file"  # prefix of the Python modules that DALI generates
# The JPEG engines' share of a batch; CUDA cores and the host's threads decode the rest. DALI's default, to be swept
# on the GPU at hand: with few CPU cores beside a big GPU a higher share pays.
HW_DECODER_LOAD = 0.65

_KINDS: dict[str, tuple[Any, int]] = {  # input -> DALI type, dimensions of one sample
    "encoded": (types.UINT8, 1),
    "start": (types.INT32, 1),  # of the window to decode: y, x
    "shape": (types.INT32, 1),  # height, width
    "size": (types.FLOAT, 1),  # height, width of the output
    "filtered": (types.BOOL, 0),  # whether it needs a prefilter
    "filter_px": (types.FLOAT, 1),  # height, width
    "spread": (types.BOOL, 0),  # whether it needs more than one sample a pixel
    "homography0": (types.FLOAT, 2),  # at each of geometry.SAMPLES
    "homography1": (types.FLOAT, 2),
    "homography2": (types.FLOAT, 2),
    "mask": (types.UINT8, 3),  # class indices
    "to_mask": (types.FLOAT, 2),  # its homography
}


def _inputs(work: Work, *, windowed: bool) -> dict[str, Any]:
    """The pipeline's inputs, by name. windowed: decode only the region of each image that the warp reads."""
    geometry = work.geometry
    to_window = np.tile(np.eye(3), (len(work.ids), 1, 1))
    inputs: dict[str, Any] = {
        "encoded": work.encoded,
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
        return inputs
    sizes = np.array([mask.shape for mask in work.masks])
    inputs["mask"] = [mask[..., None] for mask in work.masks]
    return {**inputs, "to_mask": np.ascontiguousarray(geometry.onto(sizes), np.float32)}


@do_not_convert  # DALI rewrites a pipeline's Python for conditionals, and does not support a strict zip
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
    """kinds: of each input, in the order in which `source` returns them."""
    fed = _feed(source, kinds)
    if "start" in fed:
        window: dict[str, Any] = {"start": fed["start"], "shape": fed["shape"], "axis_names": "HW"}
        images = fn.decoders.image_slice(fed["encoded"], device="cpu", output_type=types.RGB, **window)
    else:
        mixed: dict[str, Any] = {"device": "mixed", "hw_decoder_load": HW_DECODER_LOAD}
        images = fn.decoders.image(fed["encoded"], output_type=types.RGB, **mixed)
        if "mask" in fed:
            fed["mask"] = fed["mask"].gpu()
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
        return first, second, third
    mask = fn.experimental.warp_perspective(
        fn.reinterpret(fed["mask"], layout="HWC"),
        matrix=fed["to_mask"],
        interp_type=types.INTERP_NN,
        fill_value=VOID,
        **warping,
    )
    return first, second, third, fn.cast(mask, dtype=types.INT64)


class DaliEngine(Closing):
    """Renders work with DALI on the CPU or the GPU; tensors are handed over without a copy.

    Targets, ids and the geometry that `finish` needs stay outside DALI, and are matched with their pixels first in,
    first out. If DALI broke that order it would show: in a batch of another size, or in one that is left at the end.
    """

    def __init__(
        self,
        spec: ImageSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        max_batch: int,
        masks: bool = False,
        spent: dict[str, float] | None = None,
    ) -> None:
        """masks: whether all work has masks, or none. spent: seconds by name; `finish` adds to its "finish"."""
        self._spec, self._dtype, self._device, self._masks = spec, dtype, device, masks
        index = device.index if device.type == "cuda" else None  # to DALI, no index means no GPU
        if device.type == "cuda" and index is None:  # torch's current one
            index = torch.cuda.current_device()
        # The hardware JPEG engines decode whole images; libjpeg-turbo is a quarter faster on the region that is needed.
        self._windowed = index is None
        kinds = _KINDS.copy()
        if not self._windowed:
            del kinds["start"], kinds["shape"]
        if not masks:
            del kinds["mask"], kinds["to_mask"]
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
        self._spent = {"finish": 0.0} if spent is None else spent
        self._works: Iterator[Work] = iter(())
        # no_copy: DALI reads our arrays in place, so they must outlive its queues.
        self._alive: deque[tuple[Work, Any]] = deque(maxlen=2 * PREFETCH + 2)
        self._lent: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
        self._fed: deque[Work] = deque()
        """Work that the pipeline has taken and not yet returned."""
        self._pipe: Pipeline | None = self._built()
        self._under_way = False

    def _built(self) -> Pipeline:
        pipe: Pipeline = _pipeline(self._next, **self._options)
        # DALI writes our rewritten Python to a file, and removes it at a regular exit only; workers may be killed.
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
        """One batch for each Work, in order; one run at a time, and a new one may follow one that was abandoned.

        A file that cannot be decoded breaks DALI's pipeline for good: it goes to `mend`, and a new pipeline continues
        with the work that the old one had not returned. Without `mend`, or once closed, this raises EngineError.
        """
        pipe = self._ready()
        works = (sound for work in works if len((sound := _known(work, mend)).ids))
        self._works, self._under_way = works, True
        try:
            while True:
                try:
                    outputs = pipe.run()
                except StopIteration:
                    self._under_way = False
                    self._check_returned()
                    return
                except RuntimeError as error:
                    self._works = chain(self._mended(error, mend), works)
                    self._fed.clear()
                    pipe = self._pipe = self._built()
                    continue
                yield self._batch(self._fed.popleft(), outputs)
        finally:
            self._works = iter(())  # lets its reading threads end

    def _ready(self) -> Pipeline:
        """The pipeline with empty queues: what an abandoned run left in them is dropped."""
        if self._pipe is None:
            raise EngineError("the engine is closed: it can render nothing more; make another loader")
        try:
            while self._under_way:
                self._pipe.run()
        except StopIteration:
            pass
        except RuntimeError:  # a file that cannot be decoded
            self._pipe = self._built()
        self._fed.clear()
        self._pipe.reset()
        return self._pipe

    def _mended(self, error: RuntimeError, mend: Mend | None) -> list[Work]:
        """The work that DALI had not returned when it failed, without the files that broke it. Raises EngineError."""
        index = self._options["device_id"]
        again = [_without_broken(work, mend, device_id=index) for work in self._fed] if mend else []
        if all(new is old for new, old in zip(again, self._fed, strict=False)):
            raise EngineError(_readable(error, [work for work, _ in self._alive])) from error
        return [work for work in again if len(work.ids)]

    def _check_returned(self) -> None:
        if self._fed:
            raise EngineError(
                f"DALI ended without returning {len(self._fed)} of its batches: images would get the wrong targets; "
                "give engine='reference', and report this"
            )

    def _batch(self, work: Work, outputs: Sequence[Any]) -> ImageBatch:
        made = [from_dlpack(output.as_tensor()) for output in outputs]
        if len(made[0]) != len(work.ids):
            raise EngineError(
                f"DALI returned {len(made[0])} images where the next batch has {len(work.ids)}: they would get wrong "
                "targets; give engine='reference', and report this"
            )
        began = perf_counter()
        warped = made[: len(SAMPLES)]
        images = finish(warped, work.geometry, self._spec, dtype=self._dtype).permute(0, 3, 1, 2)
        self._spent["finish"] += perf_counter() - began
        targets = made[-1].squeeze(-1) if self._masks else sent(torch.from_numpy(work.targets), self._device)
        if images.device.type == "cuda":
            # DALI reuses its memory once the last tensor over it is freed, even if torch's stream still has to read it.
            # So the tensors are held until an event says that the stream is past them, and none is handed on.
            targets = targets.clone() if self._masks else targets
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._lent.append((done, made))
            while len(self._lent) > 1 and self._lent[0][0].query():  # type: ignore[no-untyped-call]
                self._lent.popleft()
        return ImageBatch(inputs=images, targets=targets, ids=torch.from_numpy(work.ids))

    def close(self) -> None:
        """Release the pipeline's threads and memory."""
        self._pipe = None
        self._works = iter(())
        self._fed.clear()
        self._alive.clear()
        for done, _ in self._lent:
            done.synchronize()
        self._lent.clear()


def _known(work: Work, mend: Mend | None) -> Work:
    """The work with files that begin like none of DALI's formats transcoded: they may crash the process."""
    while strange := [i for i, file in enumerate(work.encoded) if not known(file)]:
        work = _transcoded(work, strange, mend)
    return work


def _without_broken(work: Work, mend: Mend, *, device_id: int | None) -> Work:
    """The work itself if DALI can decode all of it; else transcoded, or mended, where it cannot."""
    while broken := {
        i: why for i, why in enumerate(decodable(work.encoded, device_id=device_id)) if isinstance(why, str)
    }:
        work = _transcoded(work, broken, mend)
    return work


def _transcoded(work: Work, broken: Iterable[int], mend: Mend | None) -> Work:
    """The work with these files transcoded by Pillow; those that it cannot read go to `mend`, or raise EngineError."""
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
    """What to say of an error of DALI's, which names operators, never files: the first file that cannot be decoded."""
    files = [file for work in works for file in zip(work.encoded, work.paths, strict=True)]
    for why, (encoded, path) in zip(decodable([encoded for encoded, _ in files]), files, strict=True):
        if isinstance(why, str):
            try:
                decode(encoded, path=path)
            except EngineError as plain:  # Pillow gives its reason in words, DALI in numbers
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
    except Exception as error:  # whatever it is, DALI does not work here; the doctor prints it
        return f"{type(error).__name__}: {error}"
    return None if shape == (1, 4, 4, 3) else f"a 4 x 4 resize came out as {shape}"
