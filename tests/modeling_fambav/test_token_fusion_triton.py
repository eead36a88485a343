"""The GPU kernels of token fusion against the torch operations: interpreted on a CPU, compiled with `-m gpu`."""

import itertools
import math

import pytest
import torch

from modeling_fambav import (
    FambaVConfig,
    FambaVForImageClassification,
    backends,
    match_tokens,
    set_selective_scan_backend,
    token_fusion,
)
from modeling_fambav.token_fusion import Matching, _fuse, _match, _merge
from support.helpers import random_tensor, slow_match

pytest.importorskip("triton")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rounding of the results in halves; places are equal always
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SOME = torch.tensor([[0], [1], [3]])
# (tokens, values, r, class token, similarity, order, whether there are weights), around blocks of 64 evens and odds
CASES = [
    (4, 5, 1, 0, "cosine", "raster", False),
    (5, 16, 0, 4, "dot", "appended", True),
    (9, 35, 4, 0, "cosine", "raster", False),
    (9, 35, 4, SOME, "euclidean", "appended", True),
    (16, 300, 7, 8, "euclidean", "raster", True),
    (17, 35, 8, SOME, "cosine", "appended", False),
    (70, 8, 20, 35, "cosine", "appended", True),
    (131, 8, 65, SOME, "cosine", "raster", True),
    (132, 8, 65, 66, "cosine", "appended", False),
]


@pytest.fixture(autouse=True)
def restored_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)


def fused(backend, metric, stream, r, class_index, similarity, order, weights, window=None):
    """Places, both merged, and the gradients of both."""
    set_selective_scan_backend(backend)
    leaves = [tensor.detach().requires_grad_() for tensor in (metric, stream)]
    *merged, matching = token_fusion.fuse(*leaves, r, class_index, similarity, order, weights, window)
    loss = sum((tensor.float() * random_tensor(*tensor.shape, seed=3).to(tensor)).sum() for tensor in merged)
    loss.backward()
    return matching.new_index, *(tensor.detach() for tensor in merged), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{case[4]}-{case[5]}")
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_equal_torch_operations(device, case, dtype):
    num_tokens, width, r, class_index, similarity, order, is_weighted = case
    metric = random_tensor(3, num_tokens, width, seed=num_tokens, dtype=dtype).to(device)
    stream = random_tensor(3, num_tokens, width, seed=1).to(device)  # wider than the metric in half precision
    weights = random_tensor(3, num_tokens, seed=2).abs().to(device) + 0.5 if is_weighted else None
    class_index = class_index.to(device) if isinstance(class_index, torch.Tensor) else class_index
    arguments = (metric, stream, r, class_index, similarity, order, weights)
    actual, expected = fused("triton", *arguments), fused("torch", *arguments)
    assert torch.equal(actual[0], expected[0])
    for one, other in zip(actual[1:], expected[1:]):
        assert one.dtype == other.dtype
        tolerance = TOLERANCES[one.dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    again = fused("triton", *arguments)
    assert all(torch.equal(one, other) for one, other in zip(actual, again))


@pytest.mark.parametrize(
    "order, dtype",
    [("raster", torch.float32), ("appended", torch.float32), ("raster", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("window", [1, 6, 64])
# Of the latter, three blocks each: the last block of evens skips the first block of odds, and the first one the last
@pytest.mark.parametrize("num_tokens", [12, 261])
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_in_a_window(device, num_tokens, window, order, dtype):
    metric = random_tensor(2, num_tokens, 8, seed=0, dtype=dtype).to(device)
    stream = random_tensor(2, num_tokens, 8, seed=1).to(device)
    for class_position, r in ((0, (num_tokens - 1) // 2), (1, (num_tokens - 1) // 2), (num_tokens // 2, 1)):
        arguments = (metric, stream, r, class_position, "cosine", order, None, window)
        for one, other in zip(fused("triton", *arguments), fused("torch", *arguments)):
            tolerance = TOLERANCES.get(one.dtype, 0)
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", ["raster", "appended"])
def test_the_first_of_equals(order):
    # Few different products: most evens have several best odds, and most are as similar as another
    metric = torch.randint(-1, 2, (4, 19, 2), generator=torch.Generator().manual_seed(0)).float()
    set_selective_scan_backend("triton")
    for r, class_position in itertools.product((1, 5, 9), (0, 9, 18)):
        new_index = match_tokens(metric, r, class_position, "dot", order).new_index
        for b in range(4):
            assert new_index[b].tolist() == slow_match(metric[b].tolist(), r, class_position, "dot", order)[1]


def assert_valid(new_index, r, class_position):
    for places in new_index.tolist():
        assert sorted(set(places)) == list(range(len(places) - r)) and places.count(places[class_position]) == 1


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, math.nan])
def test_numbers_that_are_none(value, similarity):
    set_selective_scan_backend("triton")
    metric = random_tensor(3, 9, 4, seed=0)
    others = match_tokens(metric, 4, 0, similarity).new_index[2]
    metric[0] = value
    metric[1] *= value
    for class_position, r in ((0, 4), (1, 4), (4, 3), (8, 4)):
        new_index = match_tokens(metric, r, class_position, similarity).new_index
        assert_valid(new_index, r, class_position)
    assert torch.equal(match_tokens(metric, 4, 0, similarity).new_index[2], others)


def test_the_class_token_is_protected_when_every_similarity_overflows():
    set_selective_scan_backend("triton")
    metric = torch.full((1, 9, 2), 1e30)
    metric[:, 1::2] *= -1  # every dot product of an even and an odd token is minus infinity
    for class_position in range(9):
        assert_valid(match_tokens(metric, 4, class_position, "dot").new_index, 4, class_position)


@pytest.mark.parametrize("token", [4, 5])
def test_a_token_that_is_no_number_comes_last_and_spoils_its_own_place_only(token):
    metric = random_tensor(2, 11, 8, seed=0)
    metric[0, token] = math.nan
    *actual, gradient, _ = fused("triton", metric, metric, 3, 0, "cosine", "raster", None)
    expected = fused("numba", metric, metric, 3, 0, "cosine", "raster", None)
    assert torch.equal(actual[0], expected[0]) and (actual[0][0] == actual[0][0, token]).sum() == 1
    assert actual[1].isnan().any(-1).nonzero().tolist() == [[0, int(actual[0][0, token])]]
    torch.testing.assert_close(actual[1], expected[1], equal_nan=True)
    assert gradient.isfinite().all()


def test_tokens_are_added_in_their_order():
    # 98 tokens on one place: another order would round differently
    set_selective_scan_backend("triton")
    values, new_index = random_tensor(1, 99, 3, seed=0) * 10.0 ** random_tensor(1, 99, 1, seed=1), torch.zeros(1, 99)
    new_index[0, 50] = 1
    matching = Matching(new_index.long(), 2)
    expected = torch.zeros(3)
    for t in range(99):
        expected = expected + torch.tensor(1 / 98) * values[0, t] if t != 50 else expected
    merged = matching.merge(values)
    assert torch.equal(merged[0, 0], expected) and torch.equal(merged[0, 1], values[0, 50])


@pytest.mark.parametrize("used", [(0,), (1,)])
def test_one_result_alone(used):
    first, second = (random_tensor(2, 9, 16, seed=seed).requires_grad_() for seed in (0, 1))
    gradients = []
    for backend in ("triton", "torch"):
        set_selective_scan_backend(backend)
        results = token_fusion.fuse(first, second, 3)
        # A gradient whose values are one number, as that of a sum
        loss = sum(results[i].sum() for i in used)
        gradients.append(torch.autograd.grad(loss, (first, second), materialize_grads=True))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_places_that_somebody_made_up_are_not_followed():
    set_selective_scan_backend("triton")
    values = random_tensor(1, 9, 16, seed=0).requires_grad_()
    new_index = match_tokens(values, 3).new_index
    new_index[0, 4], new_index[0, 5] = -1, 2**40
    merged = Matching(new_index, 6).merge(values)
    assert merged.shape == (1, 6, 16)
    merged.sum().backward()
    assert values.grad[0, 4:6].abs().max() == 0 and values.grad[0, 0].min() > 0


def test_wrong_shapes():
    set_selective_scan_backend("triton")
    values = random_tensor(2, 9, 16, seed=0)
    matching = match_tokens(values, 3)
    with pytest.raises(ValueError, match=r"^weights of shape \(2, 8\): expected \(2, 9\)"):
        matching.merge(values, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"^values of shape \(2, 8, 16\): expected \(2, 9, 16\)"):
        matching.merge(values[:, :8])


def test_opcheck_and_compile():
    set_selective_scan_backend("triton")
    values, stream = (random_tensor(1, 9, 16, seed=seed).requires_grad_() for seed in (1, 2))
    new_index = match_tokens(values, 3).new_index
    torch.library.opcheck(_merge, (values, new_index, 6, None))
    torch.library.opcheck(_fuse, (values, stream, 3, 4, None, "cosine", "raster", 9, None))
    torch.library.opcheck(_match, (values.detach(), 3, 0, torch.tensor([[2]]), "dot", "raster", 9))
    compiled = torch.compile(
        lambda one, other: token_fusion.fuse(one, other, 3)[:2], backend="aot_eager", fullgraph=True
    )
    for one, other in zip(compiled(values, stream), token_fusion.fuse(values, stream, 3)):
        assert torch.equal(one, other) and one.requires_grad


@pytest.mark.parametrize("reduction, order", [("mean", "raster"), ("size_weighted", "appended")])
def test_the_model_gives_the_same_token_maps_and_gradients(reduction, order):
    fusion = {"fusion_strategy": "all", "fusion_tokens": 3, "fusion_reduction": reduction, "fusion_order": order}
    size = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 2}
    model = FambaVForImageClassification(FambaVConfig(**size, **fusion, cls_token_position="middle"))
    images, results = random_tensor(2, 3, 8, 8, seed=0), []
    for backend in ("triton", "torch"):
        set_selective_scan_backend(backend)
        model.zero_grad()
        output = model(images, output_token_maps=True)
        output.logits.square().sum().backward()
        results.append((*output.token_maps, output.logits, *(parameter.grad for parameter in model.parameters())))
    assert [len(maps.unique()) for maps in results[0][:2]] == [14, 11]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
