"""The model's own operators in ONNX, for `torch.onnx.export`.

With them torch traces some fifty operations a layer instead of 260, which is most of what an export takes, and each
operator has a form that ONNX Runtime computes fast. Names are those of modeling_fambav; G, B, T, E, N, R
those of modeling_fambav/bidirectional_scan.py. Sizes but that of the batch are constants of the graph. These functions
are traced: what is not an operation of ONNX is computed at export.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from onnxscript import FLOAT, INT64, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from modeling_fambav.bidirectional_scan import _scan as bidirectional_scan_operator
from modeling_fambav.rms_norm import _rms_norm as rms_norm_operator
from modeling_fambav.token_fusion import _SMALLEST_NORM
from modeling_fambav.token_fusion import _fuse as fuse_operator
from modeling_fambav.token_fusion import _merge as merge_operator

_END = np.iinfo(np.int64).max


def translations() -> dict[torch._ops.OpOverload, Callable]:
    """By operator, for `custom_translation_table`."""
    return {
        rms_norm_operator: rms_norm,
        merge_operator: merge,
        fuse_operator: fuse,
        bidirectional_scan_operator: bidirectional_scan,
    }


def _ints(*values: int):
    return op.Constant(value_ints=values)


def _slice(values, start: int, end: int, axis: int, step: int = 1):
    return op.Slice(values, _ints(start), _ints(end), _ints(axis), _ints(step))


# ---- norm ----


def rms_norm(x: FLOAT, weight: FLOAT, eps: float) -> tuple[FLOAT, FLOAT]:
    """As `rms_norm`, in the pattern that ONNX Runtime makes one operation of."""
    root = op.Sqrt(op.Add(op.ReduceMean(op.Pow(x, 2.0), _ints(-1)), eps))
    return op.Mul(op.Div(x, root), weight), op.Squeeze(op.Reciprocal(root), _ints(-1))


# ---- fusion ----


def _matched(products, norms, class_index, r: int, similarity: str, order: str, reach: int, num_tokens: int):
    """Place of every token among the survivors, (B, T); the steps are those of `match_tokens` in token_fusion.py."""
    is_class = op.Equal(op.Constant(value_ints=list(range(num_tokens))), class_index)  # (B, T)
    even_class = op.Unsqueeze(_slice(is_class, 0, _END, 1, 2), _ints(2))
    odd_class = op.Unsqueeze(_slice(is_class, 1, _END, 1, 2), _ints(1))
    scores = op.Max(_scores(products, norms, similarity), float(np.finfo(np.float32).min))
    lowest = op.Constant(value_float=-math.inf)
    scores = op.Where(op.Or(even_class, odd_class), lowest, scores)
    if reach < num_tokens - 1:
        evens = op.Unsqueeze(op.Constant(value_ints=list(range(0, num_tokens, 2))), _ints(1))
        distance = op.Abs(op.Sub(evens, op.Constant(value_ints=list(range(1, num_tokens, 2)))))
        scores = op.Where(op.Greater(distance, op.Constant(value_int=reach)), lowest, scores)

    _, fused_even = op.TopK(op.ReduceMax(scores, _ints(2), keepdims=0), _ints(r), axis=1)
    best_odd = op.ArgMax(scores, axis=2, keepdims=0)
    two = _ints(2)
    fused = op.Mul(fused_even, two)
    partner = op.Add(op.Mul(op.GatherElements(best_odd, fused_even, axis=1), two), _ints(1))

    # Every token is 1 or, if it is fused, 0
    zeros = op.Mul(fused, _ints(0))
    survives = op.ScatterElements(op.Expand(_ints(1), op.Shape(is_class)), fused, zeros, axis=1)
    place = _places(survives, is_class, order, num_tokens)
    return op.ScatterElements(place, fused, op.GatherElements(place, partner, axis=1), axis=1)


def _scores(products, norms, similarity: str):
    """Similarity of every even to every odd token, (B, T_even, T_odd)."""
    if similarity == "dot":
        return products
    if similarity == "cosine":
        norms = op.Max(norms, _SMALLEST_NORM)
    even = op.Unsqueeze(_slice(norms, 0, _END, 1, 2), _ints(2))
    odd = op.Unsqueeze(_slice(norms, 1, _END, 1, 2), _ints(1))
    if similarity == "cosine":
        return op.Div(products, op.Mul(even, odd))
    return op.Sub(op.Sub(op.Mul(products, 2.0), op.Mul(even, even)), op.Mul(odd, odd))


def _places(survives, is_class, order: str, num_tokens: int):
    """Place of every survivor, (B, T); those of fused tokens mean nothing."""
    axis, one = op.Constant(value_int=1), _ints(1)
    if order == "raster":
        return op.Sub(op.CumSum(survives, axis), one)
    # Rank within [class token | even | odd]; the survivors of one group follow those of the groups before it.
    is_patch = op.Sub(one, op.Cast(is_class, to=INT64.dtype))
    is_odd = op.Mul(op.Constant(value_ints=[index % 2 for index in range(num_tokens)]), is_patch)
    is_even = op.Mul(survives, op.Sub(is_patch, is_odd))
    after_even = op.Add(op.ReduceSum(is_even, _ints(1)), op.CumSum(is_odd, axis))
    place = op.Where(op.Cast(is_even, to=9), op.CumSum(is_even, axis), after_even)
    return op.Mul(place, is_patch)


def merge(values: FLOAT, new_index: INT64, num_kept: int, weights: FLOAT | None = None) -> FLOAT:
    """Average all tokens that land on the same place: (B, T, D) to (B, T - r, D)."""
    return _merged(values, new_index, num_kept, weights, values.shape[2])


def _merged(values, new_index, num_kept: int, weights, channels: int):
    batch_size = op.Shape(new_index, start=0, end=1)
    if weights is None:
        weights = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(new_index))
    zeros = op.Expand(op.Constant(value_floats=[0.0]), op.Concat(batch_size, _ints(num_kept), axis=0))
    totals = op.ScatterElements(zeros, new_index, weights, axis=1, reduction="add")
    share = op.Div(weights, op.GatherElements(totals, new_index, axis=1))
    shared = op.Reshape(op.Mul(values, op.Unsqueeze(share, _ints(2))), _ints(-1, channels))

    # Whole rows are moved, by their index in the batch
    num_rows = op.Mul(batch_size, _ints(num_kept))
    first_rows = op.Range(op.Constant(value_int=0), op.Squeeze(num_rows), op.Constant(value_int=num_kept))
    rows = op.Reshape(op.Add(new_index, op.Unsqueeze(first_rows, _ints(1))), _ints(-1, 1))
    sums = op.Expand(op.Constant(value_floats=[0.0]), op.Concat(num_rows, _ints(channels), axis=0))
    return op.Reshape(op.ScatterND(sums, rows, shared, reduction="add"), _ints(-1, num_kept, channels))


def fuse(
    metric: FLOAT,
    stream: FLOAT,
    r: int,
    class_place: int,
    class_index: INT64 | None,
    similarity: str,
    order: str,
    reach: int,
    weights: FLOAT | None = None,
) -> tuple[FLOAT, FLOAT, INT64]:
    """Match by the metric, and merge it and the stream."""
    even, odd = _slice(metric, 0, _END, 1, 2), _slice(metric, 1, _END, 1, 2)
    products = op.MatMul(even, op.Transpose(odd, perm=[0, 2, 1]))
    norms = op.ReduceL2(metric, _ints(2), keepdims=0)
    if class_index is None:
        class_index = op.Expand(_ints(class_place), op.Concat(op.Shape(metric, start=0, end=1), _ints(1), axis=0))
    new_index = _matched(products, norms, class_index, r, similarity, order, reach, metric.shape[1])
    num_kept, channels = metric.shape[1] - r, metric.shape[2]
    merged, merged_stream = (_merged(values, new_index, num_kept, weights, channels) for values in (metric, stream))
    return merged, merged_stream, new_index


# ---- mixer ----


def bidirectional_scan(
    xz: FLOAT,
    conv_weight: FLOAT,
    conv_bias: FLOAT,
    x_proj: FLOAT,
    dt_proj: FLOAT,
    dt_bias: FLOAT,
    A: FLOAT,
    D: FLOAT,
    dt_scale: FLOAT | None,
    keep_states: bool,
    backend: str,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """As `bidirectional_scan`; outputs that only a backward pass needs are placeholders.

    Time comes first, because a loop runs over the first dimension. Nothing is turned round: the backward direction
    convolves the other way, and the loop reads its inputs from the end.
    """
    _, channels, state_size = A.shape
    by_time = op.Transpose(xz, perm=[1, 0, 2])  # (T, B, 2E)
    x, z = _slice(by_time, 0, channels, 2), _slice(by_time, channels, 2 * channels, 2)
    scanned, rates, skipped = [], [], []
    for direction, values in enumerate(_convolved(op.Unsqueeze(x, _ints(2)), conv_weight, conv_bias, xz.shape[1])):

        def own(parameter, direction=direction):
            return op.Gather(parameter, op.Constant(value_int=direction), axis=0)

        low_rank_dt, B, C = _chosen(values, own(x_proj), dt_proj.shape[2], state_size)
        delta = _softplus(op.Add(op.MatMul(low_rank_dt, op.Transpose(own(dt_proj), perm=[1, 0])), own(dt_bias)))
        if dt_scale is not None:
            delta = op.Mul(delta, op.Unsqueeze(op.Transpose(dt_scale, perm=[1, 0]), _ints(2, 3)))  # (T, B, 1, 1)
        scanned += [delta, op.Mul(delta, values), op.Transpose(B, perm=[0, 1, 3, 2]), C]
        rates.append(op.Transpose(own(A), perm=[1, 0]))
        # The mean of both directions is their sum, of halves
        skipped.append(op.Mul(values, op.Mul(own(D), 0.5)))
    forward, backward = recurrences(*scanned, *rates)
    y = op.Squeeze(op.Add(op.Add(forward, skipped[0]), op.Add(backward, skipped[1])), _ints(2))
    out = op.Transpose(op.Mul(y, op.Mul(z, op.Sigmoid(z))), perm=[1, 0, 2])
    # Values of their own, whose shapes the exporter sets
    return out, op.Identity(out), op.Identity(out)


def _convolved(x, weight, bias, num_tokens: int):
    """SiLU of the convolution of (T, B, 1, E) with earlier tokens, by the first direction, and with later ones.

    By shifted products, which are faster than a `Conv` of single channels.
    """
    width = weight.shape[2]
    padded = op.Pad(x, _ints(width - 1, 0, 0, 0, width - 1, 0, 0, 0))
    found = []
    for direction, step in enumerate((-1, 1)):
        y = op.Gather(bias, op.Constant(value_int=direction), axis=0)
        for distance in range(width):
            first = width - 1 + step * distance
            shifted = _slice(padded, first, first + num_tokens, 0) if distance else x
            tap = op.Gather(weight, op.Constant(value_int=width - 1 - distance), axis=2)
            y = op.Add(y, op.Mul(shifted, op.Gather(tap, op.Constant(value_int=direction), axis=0)))
        found.append(op.Mul(y, op.Sigmoid(y)))
    return found


def _chosen(x, x_proj, rank: int, state_size: int):
    """Low-rank dt (T, B, 1, R), B and half of C (T, B, 1, N)."""
    halves = op.Constant(value_floats=[1.0] * (rank + state_size) + [0.5] * state_size)
    chosen = op.MatMul(x, op.Mul(op.Transpose(x_proj, perm=[1, 0]), halves))
    return (
        _slice(chosen, 0, rank, 3),
        _slice(chosen, rank, rank + state_size, 3),
        _slice(chosen, rank + state_size, _END, 3),
    )


def _softplus(x):
    """log(1 + exp(x)), with an absolute error of 6e-8: ONNX Runtime's `Softplus` computes one value at a time."""
    # In float32 it is x from 20 on, where exp need not grow further
    return op.Max(x, op.Log(op.Add(op.Exp(op.Min(x, 20.0)), 1.0)))


# onnxscript reads the source of this function and never runs it.
@script(Opset("fambav", 1))
def recurrences(
    steps: FLOAT,
    drives: FLOAT,
    inputs: FLOAT,
    outputs: FLOAT,
    steps_back: FLOAT,
    drives_back: FLOAT,
    inputs_back: FLOAT,
    outputs_back: FLOAT,
    rates: FLOAT,
    rates_back: FLOAT,
) -> tuple[FLOAT, FLOAT]:
    """C_t h_t (T,B,1,E), with h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, and the same from the last token on.

    Arguments of a direction are delta and delta x (T,B,1,E), B (T,B,N,1), C (T,B,1,N) and A (N,E). A loop that the
    runtime runs: only one step of decays and states exists at a time, which stays in the cache. Channels come last, so
    that every operation runs over E contiguous values. B x is a product of matrices because ONNX Runtime computes that
    with wider vectors than `Mul`. One loop for both directions, because each step takes time to start.
    """
    state_shape = op.Concat(op.Shape(inputs, start=1, end=3), op.Shape(rates, start=1, end=2), axis=0)
    first_state = op.Expand(op.Constant(value_float=0.0), state_shape)  # (B,N,E)

    @graph()
    def advance(
        state: FLOAT[...],
        state_back: FLOAT[...],
        step: FLOAT[...],
        drive: FLOAT[...],
        input: FLOAT[...],
        output: FLOAT[...],
        step_back: FLOAT[...],
        drive_back: FLOAT[...],
        input_back: FLOAT[...],
        output_back: FLOAT[...],
    ):
        next_state = op.Exp(step * rates) * state + op.MatMul(input, drive)
        y = op.MatMul(output, next_state)
        next_state_back = op.Exp(step_back * rates_back) * state_back + op.MatMul(input_back, drive_back)
        y_back = op.MatMul(output_back, next_state_back)
        return next_state, next_state_back, y, y_back

    _last, _last_back, y, y_back = op.Scan(
        first_state,
        first_state,
        steps,
        drives,
        inputs,
        outputs,
        steps_back,
        drives_back,
        inputs_back,
        outputs_back,
        body=advance,
        num_scan_inputs=8,
        scan_input_directions=[0, 0, 0, 0, 1, 1, 1, 1],
        scan_output_directions=[0, 1],
    )
    return y, y_back
