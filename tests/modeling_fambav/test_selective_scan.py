"""The selective scan: every backend against golden numbers and against the float64 reference."""

import functools
import math
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import modeling_fambav.selective_scan as scan_module
from modeling_fambav import set_selective_scan_backend
from modeling_fambav.causal_conv1d import causal_conv1d
from modeling_fambav.selective_scan import scan_kernels, selective_scan, selective_scan_reference
from modeling_fambav.selective_scan_torch import recurrence
from support.helpers import (
    assert_results_close,
    assert_same_bits,
    conv_inputs,
    gradient_of,
    in_float64,
    non_contiguous,
    read_fixture,
    scan_in_child,
    scan_inputs,
    scan_with_gradients,
    tolerance,
)
from support.mamba_packages import stand_in_for_mamba_ssm


def reference(**inputs: Tensor | None) -> Tensor:
    return selective_scan_reference(**inputs)[0]


# ---- values and gradients ----


def golden_inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs as one direction of ours, and everything in the file. The file is (batch, channels or state, length)."""
    golden, _ = read_fixture("selective_scan")
    per_token = {
        name: golden[key].mT.unsqueeze(0) for name, key in (("x", "u"), ("dt", "delta"), ("B", "B"), ("C", "C"))
    }
    parameters = {name: golden[key].unsqueeze(0) for name, key in (("A", "A"), ("D", "D"), ("dt_bias", "delta_bias"))}
    return {**per_token, **parameters, "z": golden["z"].mT}, golden


def test_golden_selective_scan(backend):
    inputs, golden = golden_inputs()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = selective_scan(**leaves)
    torch.testing.assert_close(out, golden["out"].mT, rtol=1e-4, atol=1e-5)
    out.backward(golden["grad_out"].mT)
    keys = {"x": "u", "dt": "delta", "dt_bias": "delta_bias"}
    for name, leaf in leaves.items():
        expected = golden[f"grad.{keys.get(name, name)}"]
        expected = expected.unsqueeze(0) if name in ("A", "D", "dt_bias") else expected.mT.view_as(leaf)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4, msg=lambda msg: f"{name}: {msg}")


def test_golden_reference():
    inputs, golden = golden_inputs()
    out, last_state = selective_scan_reference(**inputs)
    torch.testing.assert_close(out, golden["out"].mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_state, golden["last_state"].unsqueeze(0), rtol=1e-4, atol=1e-5)


# (directions, batch, tokens, channels, state): around vectors of 16 channels, blocks of 64, of which the last one may
# overlap the one before, and chunks of 32 and 72 tokens.
SHAPES = [
    (1, 1, 1, 16, 1),
    (2, 3, 1, 33, 16),
    (2, 1, 2, 16, 4),
    (1, 3, 13, 33, 4),
    (2, 3, 13, 192, 16),
    (1, 3, 73, 64, 1),
    (2, 1, 65, 33, 16),
    (2, 1, 73, 33, 16),
    (2, 1, 144, 80, 4),
    (2, 2, 40, 65, 5),
    (1, 2, 9, 127, 4),
    (2, 1, 33, 240, 4),
    (2, 1, 197, 192, 16),
    (1, 1, 1024, 33, 4),
    (2, 1, 1024, 16, 1),
]


@functools.lru_cache(maxsize=1)  # the backends are compared with the same results
def reference_results(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return scan_with_gradients(reference, in_float64(scan_inputs(*shape, dtype=dtype)))


@pytest.mark.parametrize("name", ["torch", "numba"])  # varies fastest, both use one reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan_equals_the_reference(shape, dtype, name):
    set_selective_scan_backend(name)
    inputs = scan_inputs(*shape, dtype=dtype)
    results = scan_with_gradients(selective_scan, inputs)
    assert {tensor.dtype for tensor in results.values()} == {dtype, torch.float32}
    assert results["out"].dtype == results["dx"].dtype == dtype and results["out"].shape == shape[1:4]
    assert_results_close(results, reference_results(shape, dtype), **tolerance("scan", dtype))


@pytest.mark.parametrize("absent", [(), ("z",), ("dt_bias",), ("dt_scale",), ("z", "dt_bias", "dt_scale")], ids=str)
@pytest.mark.parametrize("num_directions", [1, 2])
def test_scan_without_optional_arguments(backend, num_directions, absent):
    inputs = scan_inputs(num_directions, 2, 9, 20, 3) | dict.fromkeys(absent)
    results = scan_with_gradients(selective_scan, inputs)
    assert_results_close(results, scan_with_gradients(reference, in_float64(inputs)), rtol=1e-4, atol=1e-4)


def test_scan_with_extreme_time_steps(backend):
    # softplus(dt) from 0 to 100: decays from 1 to 0
    inputs = scan_inputs(2, 1, 20, 16, 4) | {"dt_bias": None}
    inputs["dt"] = torch.linspace(-60, 100, 20).view(1, 1, 20, 1).expand(2, 1, 20, 16)
    results = scan_with_gradients(selective_scan, inputs)
    assert all(tensor.isfinite().all() for tensor in results.values())
    assert_results_close(
        results, scan_with_gradients(reference, in_float64(inputs)), **tolerance("scan", torch.float32)
    )


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "z"])
def test_a_nan_spreads_as_in_the_reference(backend, name):
    inputs = scan_inputs(2, 2, 9, 32, 4)
    inputs[name].view(-1)[5] = float("nan")
    is_nan = selective_scan(**inputs).isnan()
    assert is_nan.any() and torch.equal(is_nan, reference(**inputs).isnan())


def test_an_empty_batch(backend):
    results = scan_with_gradients(selective_scan, scan_inputs(2, 0, 9, 32, 4))
    assert results["out"].shape == (0, 9, 32) and results["dx"].shape == (2, 0, 9, 32)
    assert not results["dA"].any()


def test_all_arguments_in_bfloat16(backend):
    inputs = {name: tensor.bfloat16() for name, tensor in scan_inputs(2, 2, 13, 33, 4).items()}
    results = scan_with_gradients(selective_scan, inputs)
    assert {tensor.dtype for tensor in results.values()} == {torch.bfloat16}
    expected = scan_with_gradients(reference, in_float64(inputs))
    assert_results_close(results, expected, **tolerance("scan", torch.bfloat16))


@pytest.mark.parametrize("is_half", ["all", "x", "dt", "z"])
def test_numba_rounds_to_bfloat16_once(is_half):
    """Whichever of the tensors per token and channel are in bfloat16: exactly the results in float32, rounded."""
    set_selective_scan_backend("numba")
    inputs = scan_inputs(2, 2, 70, 33, 4)
    per_channel = ("x", "dt", "z")
    for name in per_channel if is_half == "all" else [is_half]:
        inputs[name] = inputs[name].bfloat16()
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    results = scan_with_gradients(selective_scan, inputs)
    expected = scan_with_gradients(lambda **wide: selective_scan(**wide).to(inputs["x"].dtype), wide)
    assert {results[name].dtype for name in ("out", "dx")} == {inputs["x"].dtype}
    assert_results_close(results, expected, rtol=0, atol=0)


def test_the_state_is_kept_in_float32(backend):
    # Ten thousand tokens each add 1 to the state; a sum in bfloat16 would stop at 256.
    ones = torch.ones(1, 1, 10_000, 1, dtype=torch.bfloat16)
    time_step_of_one = torch.full_like(ones, 0.54132485)  # softplus(.) = 1 up to the rounding of the input
    A, D = torch.full((1, 1, 1), -1e-9), torch.zeros(1, 1)
    out = selective_scan(ones, time_step_of_one, A, ones, ones, D)
    assert out[0, -1, 0].item() == pytest.approx(10_000, rel=1e-2)


def test_the_backward_direction_is_a_flipped_forward_one(backend):
    inputs = scan_inputs(2, 2, 21, 16, 4) | {"z": None}
    both = selective_scan(**inputs)
    forward = {name: tensor[:1] for name, tensor in inputs.items() if name not in ("z", "dt_scale")}
    backward = {name: tensor[1:] for name, tensor in inputs.items() if name not in ("z", "dt_scale")}
    flipped = {name: tensor.flip(2) if name in ("x", "dt", "B", "C") else tensor for name, tensor in backward.items()}
    forward_out = selective_scan(**forward, dt_scale=inputs["dt_scale"])
    backward_out = selective_scan(**flipped, dt_scale=inputs["dt_scale"].flip(1)).flip(1)
    torch.testing.assert_close(both, (forward_out + backward_out) / 2, rtol=1e-5, atol=1e-6)


def test_dt_scale_multiplies_the_time_step_and_gets_no_gradient(backend):
    inputs = scan_inputs(2, 2, 9, 16, 4)
    inputs["dt_scale"].requires_grad_()
    out = selective_scan(**inputs | {"x": inputs["x"].requires_grad_()})
    out.sum().backward()
    assert inputs["dt_scale"].grad is None and inputs["x"].grad is not None

    # A time step of k for one token is k time steps of 1 for k tokens that drive the state once: here, none does.
    silent = scan_inputs(1, 1, 4, 16, 4) | {"z": None, "dt_scale": torch.tensor([[1.0, 1.0, 3.0, 1.0]])}
    silent["B"][:, :, 1:] = 0
    silent["dt"][:] = 0.5
    silent["dt_bias"] = None
    repeated = silent | {"dt_scale": None}
    for name in ("x", "dt", "B", "C"):
        repeated[name] = silent[name][:, :, [0, 1, 2, 2, 2, 3]]
    torch.testing.assert_close(selective_scan(**silent)[:, 3], selective_scan(**repeated)[:, 5])


# ---- a fused token with its time step scaled, against the tokens that it stands for ----


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(1, 0), (72, 0), (73, 1), (144, 1), (197, 2)])
def test_the_cpu_keeps_states_of_all_chunks_but_the_first(num_tokens, num_kept):
    inputs = scan_inputs(2, 3, num_tokens, 64, 4)
    states = scan_kernels("numba").forward(**inputs, keep_states=True)[1]
    assert states.shape == (2 * 3 * num_kept * 4, 64)


def last_states(time_step: float, copies: int, input_size: float = 1.0) -> dict[str, Tensor]:
    """Last states (E, N) of the float64 scan of five tokens and then of a token that occurs `copies` times.

    Args:
        time_step: delta of the repeated token.
        copies: how often it occurs.
        input_size: factor of its input; 0 leaves nothing but the decay of the state before it.

    Returns:
        states at the end of the unfused sequence (`"repeated"`), and with one token in place of all copies, its time
        step times their number (`"scaled"`) and as it was (`"unscaled"`).
    """
    inputs = in_float64(scan_inputs(1, 1, 6, 3, 4))
    inputs.update(z=None, dt_bias=None, dt_scale=None)
    inputs["x"][:, :, -1] *= input_size
    inputs["dt"][:, :, -1] = math.log(math.expm1(time_step))  # before the softplus
    by_token = ("x", "dt", "B", "C")
    repeated = {
        name: torch.cat((tensor, tensor[:, :, -1:].expand(-1, -1, copies - 1, -1)), dim=2)
        if name in by_token
        else tensor
        for name, tensor in inputs.items()
    }
    scale = torch.ones(1, 6, dtype=torch.float64)
    scale[:, -1] = copies
    sequences = {"repeated": repeated, "scaled": {**inputs, "dt_scale": scale}, "unscaled": inputs}
    return {name: selective_scan_reference(**sequence)[1][0, 0] for name, sequence in sequences.items()}


@pytest.mark.parametrize("copies", [2, 5])
def test_a_scaled_time_step_decays_the_state_exactly_as_the_unfused_tokens_do(copies):
    # exp(delta A)^k = exp(k delta A), however long the step is
    for time_step in (0.01, 1.0, 10.0):
        states = last_states(time_step, copies, input_size=0)
        torch.testing.assert_close(states["scaled"], states["repeated"], rtol=1e-12, atol=1e-15)
    states = last_states(1.0, copies, input_size=0)
    assert (states["unscaled"] - states["repeated"]).abs().max() > 0.1 * states["repeated"].abs().max()


@pytest.mark.parametrize("copies", [2, 5])
def test_the_error_of_a_scaled_time_step_falls_with_its_square(copies):
    # Mamba discretises B by Euler's rule: k copies add delta B x (1 + a + ... + a^(k-1)), with a = exp(delta A), and
    # one scaled token adds k delta B x. They differ by about k (k - 1) / 2 |A| delta^2 B x. Without scaling k - 1 of
    # the k terms are missing, an error of the first order.
    def errors(time_step: float) -> tuple[float, float]:
        states = last_states(time_step, copies)
        return tuple((states[name] - states["repeated"]).abs().max().item() for name in ("scaled", "unscaled"))

    (scaled, unscaled), (scaled_half, unscaled_half) = errors(1e-3), errors(5e-4)
    assert scaled / scaled_half == pytest.approx(4, rel=0.02)
    assert unscaled / unscaled_half == pytest.approx(2, rel=0.02)
    assert scaled < 0.01 * unscaled


# ---- layouts and gradients ----


@pytest.mark.parametrize("kind", ["transposed", "every second", "part of wider rows"])
def test_non_contiguous_inputs(backend, kind):
    inputs = scan_inputs(2, 2, 13, 32, 4)
    views = {name: non_contiguous(tensor, kind) for name, tensor in inputs.items()}
    assert not any(views[name].is_contiguous() for name in ("x", "dt", "A", "B", "C", "z"))
    assert_results_close(
        scan_with_gradients(selective_scan, views), scan_with_gradients(selective_scan, inputs), rtol=1e-6, atol=1e-6
    )


def test_expanded_inputs_and_gradient(backend):
    inputs = scan_inputs(2, 2, 13, 32, 4)
    inputs["x"] = inputs["x"][:, :1].expand(-1, 2, -1, -1)
    inputs["D"] = inputs["D"][:, :1].expand(-1, 32)
    copies = {name: tensor.contiguous() for name, tensor in inputs.items()}

    def total(function):  # the gradient of a sum is one number, expanded
        return lambda **arguments: function(**arguments).sum()

    assert_results_close(
        scan_with_gradients(total(selective_scan), inputs),
        scan_with_gradients(total(selective_scan), copies),
        rtol=1e-6,
        atol=1e-6,
    )


def test_only_some_inputs_want_a_gradient(backend):
    inputs = scan_inputs(2, 2, 13, 16, 4)
    expected = scan_with_gradients(selective_scan, inputs)
    for name in ("x", "A", "z", "dt_bias"):
        leaf = inputs[name].clone().requires_grad_()
        out = selective_scan(**inputs | {name: leaf})
        out.backward(gradient_of(out))
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"])


def test_values_without_gradients_are_the_same(backend):
    inputs = scan_inputs(2, 2, 70, 16, 4)
    leaf = inputs["x"].clone().requires_grad_()
    with_gradients = selective_scan(**inputs | {"x": leaf}).detach()
    with torch.no_grad():
        assert torch.equal(selective_scan(**inputs), with_gradients)
    with torch.inference_mode():
        assert torch.equal(selective_scan(**inputs), with_gradients)


@pytest.mark.parametrize("shape", [(1, 2, 3, 2, 2), (2, 1, 34, 1, 2)], ids=str)  # 34 tokens are two chunks
def test_gradcheck_of_the_torch_backend(shape):
    set_selective_scan_backend("torch")
    inputs = scan_inputs(*shape, dtype=torch.float64)
    dt_scale = inputs.pop("dt_scale")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan(*tensors, dt_scale), leaves)


# ---- wrong arguments ----


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (2, 5, 16)),
        ("x", (3, 2, 5, 16)),
        ("x", (2, 2, 0, 16)),
        ("dt", (2, 2, 5, 17)),
        ("dt", (1, 2, 5, 16)),
        ("A", (2, 17, 4)),
        ("A", (16, 4)),
        ("B", (2, 2, 6, 4)),
        ("C", (2, 2, 5, 3)),
        ("D", (16,)),
        ("z", (2, 2, 5, 16)),
        ("dt_bias", (1, 16)),
        ("dt_scale", (2, 5, 1)),
    ],
)
def test_wrong_shapes_of_the_scan(backend, name, shape):
    inputs = scan_inputs(2, 2, 5, 16, 4) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"^{name} of shape \({', '.join(map(str, shape))},?\): expected"):
        selective_scan(**inputs)


# ---- threads and processes ----


@pytest.mark.parametrize("num_threads", [1, 2])
def test_numba_results_do_not_depend_on_threads_or_runs(num_threads):
    set_selective_scan_backend("numba")
    inputs = scan_inputs(2, 3, 70, 150, 4)
    torch.set_num_threads(1)
    expected = scan_with_gradients(selective_scan, inputs)
    torch.set_num_threads(num_threads)
    for _ in range(3):
        assert_same_bits(scan_with_gradients(selective_scan, inputs), expected)


def test_two_python_threads_at_the_same_time(backend):
    shapes = [(2, 2, 40, 150, 4), (2, 3, 25, 80, 3)]
    expected = [scan_with_gradients(selective_scan, scan_inputs(*shape)) for shape in shapes]

    def scan(index: int) -> bool:
        results = [scan_with_gradients(selective_scan, scan_inputs(*shapes[index])) for _ in range(10)]
        return all(torch.equal(result[name], expected[index][name]) for result in results for name in result)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(scan, [0, 1]))


def results_of_child(method: str, shape: tuple[int, ...], num_threads: int) -> dict[str, Tensor]:
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=scan_in_child, args=(sender, shape, num_threads))
    child.start()
    sender.close()
    try:
        assert receiver.poll(600), f"no result from the {method}ed process"
        return {name: torch.from_numpy(array) for name, array in receiver.recv().items()}
    finally:
        child.join(5)
        child.kill()


# torch's own operations may use one thread in a forked process, as in the workers of a DataLoader.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name, num_threads", [("numba", 2), ("numba", 1), ("torch", 1)])
def test_in_a_forked_process(name, num_threads):
    set_selective_scan_backend(name)
    torch.set_num_threads(2)
    shape = (2, 3, 20, 150, 4)
    expected = scan_with_gradients(selective_scan, scan_inputs(*shape))  # threads exist before the fork
    results = results_of_child("fork", shape, num_threads)
    assert_results_close(results, expected, rtol=1e-6, atol=1e-6)
    # and the parent's threads go on working
    assert_results_close(scan_with_gradients(selective_scan, scan_inputs(*shape)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_in_a_spawned_process():
    set_selective_scan_backend("numba")
    shape = (2, 3, 20, 150, 4)
    expected = scan_with_gradients(selective_scan, scan_inputs(*shape))
    results = results_of_child("spawn", shape, num_threads=2)
    assert_results_close(results, expected, rtol=0, atol=0)


# ---- as torch operators ----


# The second one keeps states, and its last two blocks of channels overlap
@pytest.mark.parametrize("shape", [(2, 2, 5, 20, 3), (2, 1, 80, 80, 3)], ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_scan(dtype, optional, shape):
    inputs = scan_inputs(*shape, dtype=dtype)
    leaves = [tensor.requires_grad_(name != "dt_scale") for name, tensor in inputs.items()]
    if not optional:
        leaves[-3:] = [None, None, None]
    torch.library.opcheck(scan_module._scan, (*leaves, True, "numba"))


def test_opcheck_of_the_recurrence():
    inputs = scan_inputs(2, 2, 5, 20, 3)
    leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if name in ("x", "dt", "A", "B", "C")]
    torch.library.opcheck(recurrence, leaves)


def test_compiled_functions_equal_eager_ones(backend):
    def mix(weight, bias, dt, A, B, C, D, z, dt_bias, dt_scale):
        return selective_scan(causal_conv1d(z, weight, bias), dt, A, B, C, D, z, dt_bias, dt_scale)

    conv = conv_inputs(2, 2, 20, 32, 4, torch.float32)
    inputs = scan_inputs(2, 2, 20, 32, 4) | {"weight": conv["weight"], "bias": conv["bias"]}
    del inputs["x"]
    torch.compiler.reset()
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    assert_results_close(scan_with_gradients(compiled, inputs), scan_with_gradients(mix, inputs), rtol=1e-6, atol=1e-6)


# ---- mamba-ssm, on the CPU by a stand-in for its kernel ----


@pytest.fixture
def fake_mamba_ssm(monkeypatch):
    stand_in_for_mamba_ssm(monkeypatch)
    scan_module._mamba_ssm_scan.cache_clear()
    monkeypatch.setattr(scan_module, "selective_scan_backend", lambda tensor: "mamba-ssm")


@pytest.mark.parametrize("absent", [(), ("z",), ("dt_bias",), ("dt_scale",), ("dt_bias", "dt_scale")], ids=str)
@pytest.mark.parametrize("num_directions", [1, 2])
def test_mamba_ssm_layout(fake_mamba_ssm, num_directions, absent):
    inputs = scan_inputs(num_directions, 3, 7, 10, 4) | dict.fromkeys(absent)
    results = scan_with_gradients(selective_scan, inputs)
    assert_results_close(results, scan_with_gradients(reference, in_float64(inputs)), rtol=1e-4, atol=1e-4)


def test_mamba_ssm_in_bfloat16(fake_mamba_ssm):
    inputs = scan_inputs(2, 3, 7, 10, 4, dtype=torch.bfloat16)
    results = scan_with_gradients(selective_scan, inputs)
    assert results["out"].dtype == torch.bfloat16
    expected = scan_with_gradients(reference, in_float64(inputs))
    assert_results_close(results, expected, **tolerance("scan", torch.bfloat16))
