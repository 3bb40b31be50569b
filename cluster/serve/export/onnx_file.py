"""How does a model become an ONNX file? By torch's exporter, which records it, and asked by ONNX Runtime.

The only file that imports onnx, onnxscript and onnxruntime, an extra. All of the model lies in one file.
"""

import json
import re
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from thawline.cluster.errors import ExportError, last_line
from thawline.cluster.serve.export.made import Made, Wish, description
from thawline.cluster.serve.export.network import Recorded, graph
from thawline.cluster.words import finite

FILE = "model.onnx"
OPSET = 20
_MOST_BYTES = (1 << 31) - 1
"""What protobuf holds in one file."""
_AXES = ("batch", "channels", "height", "width")


def make(wish: Wish) -> Made:
    """The file, its description under the key `thawline` of its metadata. Raises ExportError."""
    check()
    found = graph(wish)
    data = _converted(found, description(wish, inputs={found.input: found.images}, outputs=found.outputs))
    session = _session(data)

    def answers(images: Tensor) -> list[Tensor]:
        said = session.run(list(found.outputs), {found.input: images.numpy()})
        return [torch.from_numpy(each) for each in said]

    return Made({FILE: data}, answers, f"ONNX, opset {OPSET}: {found.words}")


def check() -> None:
    """Raises ExportError where what it needs is not installed."""
    _packages()


def _converted(found: Recorded, about: dict[str, Any]) -> bytes:
    """The bytes of the file. Raises ExportError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's and onnxscript's own, on their own code
            made = torch.onnx.export(
                found.program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[found.input],
                output_names=list(found.outputs),
                external_data=False,
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
    except Exception as error:  # an operator without a translation, or whatever else the exporter meets
        raise ExportError(
            f"the model cannot become ONNX ({last_line(error)[:160]}): export it as --to pt2, or its weights as --to "
            "safetensors"
        ) from error
    if model.ByteSize() > _MOST_BYTES:
        raise ExportError(
            f"the model has {model.ByteSize():,} bytes, and one ONNX file holds {_MOST_BYTES:,}: it cannot be written; "
            "export it as --to pt2, or its weights as --to safetensors"
        )
    _name_axes(model)
    model.metadata_props.add(key="thawline", value=json.dumps(finite(about), ensure_ascii=False))
    data: bytes = model.SerializeToString()
    return data


def _name_axes(model: Any) -> None:
    """Call what is open of the input's shape by its name, where torch numbers it."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    axes = _AXES if len(dims) == 4 else _AXES[2:]
    names = {}
    for dim, axis in zip(dims, axes, strict=False):
        if symbol := re.search(r"[a-z]\w*", dim.dim_param):
            names[symbol[0]] = axis
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[a-z]\w*", lambda found: names.get(found[0], found[0]), dim.dim_param)


def _session(data: bytes) -> Any:
    runtime = _packages()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _packages() -> ModuleType:
    """ONNX Runtime, where the others are there, too. Raises ExportError where one is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnx  # noqa: F401
            import onnxruntime
            import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExportError(
            f"ONNX needs {error.name}, which is not installed: no file can be made or compared; "
            'pip install "thawline[export]", or export it as --to pt2'
        ) from error
    module: ModuleType = onnxruntime
    return module
