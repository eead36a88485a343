"""A classifier in eight bits: ONNX Runtime's quantisers on its ONNX file, and torchao's on the model in torch.

Only products of activations with weights are in eight bits. Similarities of tokens, norms and scans stay in float32,
so that the order of similarities, which decides what fuses, is not rounded a second time.
"""

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

METHODS = ("dynamic", "static")
TORCHAO_METHODS = ("weight_only", "dynamic")
# The mixer's own operator takes the weights of the other projections as tensors, whatever module holds them
_TORCH_LAYERS = ("in_proj", "out_proj", "classifier")
_CALIBRATION_BATCH = 32


def quantize_onnx(source: Path, path: Path, method: str, pixel_values: Tensor | None = None) -> None:
    """Write an ONNX file in eight bits.

    Args:
        source: a file of `export_onnx`.
        path: the file to write.
        method: `"dynamic"`, scales of activations are those of each call, or `"static"`, they are constants.
        pixel_values: `(images, channels, height, width)`, float32, which the constants are made of; for `"static"`.

    Raises:
        ValueError: if there is no such method, or `"static"` has no images.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {METHODS}")
    if method == "static" and (pixel_values is None or len(pixel_values) == 0):
        raise ValueError("method 'static': expected images to calibrate with, got none")
    import onnx
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder, _quiet():
        model = onnx.load(source)
        del model.graph.value_info[:]  # shapes that the quantiser's own rewriting makes wrong
        if method == "dynamic":
            quantization.quantize_dynamic(
                model, path, op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True}
            )
            return
        prepared = Path(folder) / "model.onnx"
        onnx.save(model, prepared)
        quantization.quantize_static(
            prepared,
            path,
            _Calibration(pixel_values),
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=_products_of_activations(model),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )


def _products_of_activations(model) -> list[str]:
    """Names of the products without a weight: similarities of tokens, and what moves them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and not weights & {*node.input}]


class _Calibration:
    """Batches of images, as ONNX Runtime's `CalibrationDataReader` gives them."""

    def __init__(self, pixel_values: Tensor):
        self._batches = iter(pixel_values.split(_CALIBRATION_BATCH))

    def get_next(self) -> dict | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixel_values": batch.numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser recommends its own preprocessing, which this graph does not survive."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def quantize_torch(model: PreTrainedModel, method: str) -> PreTrainedModel:
    """A copy of a float32 classifier whose large matrices torchao holds in eight bits.

    Args:
        method: `"weight_only"`, products are of float32, or `"dynamic"`, they are of eight bits.

    Raises:
        ValueError: if there is no such method, or torchao is not installed.
    """
    if method not in TORCHAO_METHODS:
        raise ValueError(f"method {method!r}: expected one of {TORCHAO_METHODS}")
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("torchao: not installed, try `pip install torchao`") from error
    config = Int8WeightOnlyConfig() if method == "weight_only" else Int8DynamicActivationInt8WeightConfig()
    model = copy.deepcopy(model)
    quantize_(model, config, filter_fn=lambda module, name: name.rpartition(".")[2] in _TORCH_LAYERS)
    return model


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights as torch writes them."""
    with tempfile.TemporaryFile() as file:
        torch.save(model.state_dict(), file)
        return file.tell()
