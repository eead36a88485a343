"""The recurrence of the selective scan in ONNX, for `torch.onnx.export`.

torch knows it as one operator, `recurrence` of modeling_fambav/selective_scan_torch.py, which ONNX lacks. Here it is
an ONNX `Scan`: a loop over the tokens that the runtime runs, six nodes whatever the number of tokens. Only one step of
decays and states exists at a time; to compute those of all tokens before the loop takes longer, because they leave the
cache.

G, B, T, E, N are those of modeling_fambav/selective_scan.py. Channels come last inside the loop, so that every
operation runs over E contiguous values.
"""

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset


# onnxscript reads the source of this function and never runs it.
@script(Opset("fambav", 1))
def recurrence(x: FLOAT, delta: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT) -> FLOAT:
    """C_t h_t (G,B,T,E), with h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t; arguments as the torch operator's."""
    rates = op.Unsqueeze(op.Transpose(A, perm=[0, 2, 1]), op.Constant(value_ints=[1]))  # (G,1,N,E)
    # Time first, because a Scan runs over the first dimension
    steps = op.Unsqueeze(op.Transpose(delta, perm=[2, 0, 1, 3]), op.Constant(value_ints=[3]))  # (T,G,B,1,E)
    drives = op.Unsqueeze(op.Transpose(delta * x, perm=[2, 0, 1, 3]), op.Constant(value_ints=[3]))  # (T,G,B,1,E)
    inputs = op.Unsqueeze(op.Transpose(B, perm=[2, 0, 1, 3]), op.Constant(value_ints=[4]))  # (T,G,B,N,1)
    outputs = op.Unsqueeze(op.Transpose(C, perm=[2, 0, 1, 3]), op.Constant(value_ints=[3]))  # (T,G,B,1,N)
    state_shape = op.Concat(
        op.Shape(x, start=0, end=2), op.Shape(A, start=2, end=3), op.Shape(A, start=1, end=2), axis=0
    )
    first_state = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), state_shape)  # (G,B,N,E)

    @graph()
    def advance(state: FLOAT[...], step: FLOAT[...], drive: FLOAT[...], input: FLOAT[...], output: FLOAT[...]):
        next_state = op.Exp(step * rates) * state + drive * input
        y = op.MatMul(output, next_state)
        return next_state, y

    _last_state, y = op.Scan(first_state, steps, drives, inputs, outputs, body=advance, num_scan_inputs=4)
    return op.Transpose(op.Squeeze(y, op.Constant(value_ints=[3])), perm=[1, 2, 0, 3])
