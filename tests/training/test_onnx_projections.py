"""Projections around a scan give the same after the rewriting, from transposes of narrow tensors."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx_ir.passes import common

from fambav_training.export.onnx_projections import transpose_narrow_tensors

# 4 channels, 16 of in_proj, 8 of out_proj's input
_GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
layer (float[B, 3, 4] tokens, float[4, 16] in_proj, float[8, 4] out_proj) => (float[B, 3, 4] out) {
    xz = MatMul(tokens, in_proj)
    by_time = Transpose <perm = [1, 0, 2]> (xz)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    half = Constant <value_ints = [8]> ()
    end = Constant <value_ints = [16]> ()
    x = Slice(by_time, zero, half, two, one)
    z = Slice(by_time, half, end, two, one)
    y = Mul(x, z)
    by_image = Transpose <perm = [1, 0, 2]> (y)
    out = MatMul(by_image, out_proj)
}
"""


def test_only_narrow_tensors_are_transposed():
    before = onnx.parser.parse_model(_GRAPH)
    rewritten = onnx_ir.serde.deserialize_model(before)
    transpose_narrow_tensors(rewritten)
    common.RemoveUnusedNodesPass()(rewritten)
    after = onnx.shape_inference.infer_shapes(onnx_ir.serde.serialize_model(rewritten))
    widths = {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in after.graph.value_info}
    widths |= {value.name: value.type.tensor_type.shape.dim[-1].dim_value for value in after.graph.output}
    assert {widths[node.output[0]] for node in after.graph.node if node.op_type == "Transpose"} == {4}

    generator = np.random.default_rng(0)
    shapes = {"tokens": (2, 3, 4), "in_proj": (4, 16), "out_proj": (8, 4)}
    inputs = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    expected, found = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(["out"], inputs)[0] for model in (before, after)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
