"""The CPU kernels of token fusion against the torch operations: places, values, gradients."""

import itertools

import pytest
import torch

from modeling_fambav import backends, match_tokens, set_selective_scan_backend, token_fusion, token_fusion_numba
from modeling_fambav.token_fusion import _fuse, _match, _merge
from support.helpers import random_tensor


@pytest.fixture(autouse=True)
def restored_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)


def fuse(backend, metric, r, class_index, similarity, order, weights, window=None):
    set_selective_scan_backend(backend)
    values = metric.detach().requires_grad_()
    matching = match_tokens(values, r, class_index, similarity, order, window)
    merged = matching.merge(values, weights)
    merged.backward(random_tensor(*merged.shape, seed=3, dtype=merged.dtype))
    return matching.new_index, merged.detach(), values.grad


@pytest.mark.parametrize("order", ["raster", "appended"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 12, 17])
def test_kernels_equal_torch_operations(num_tokens, similarity, order):
    # 35 values per token are two vectors of 16 and a rest
    metric = random_tensor(3, num_tokens, 35, seed=num_tokens)
    sizes = random_tensor(3, num_tokens, seed=1).abs() + 0.5
    for class_position, r in itertools.product(range(num_tokens), range((num_tokens - 1) // 2 + 1)):
        for class_index, weights in ((class_position, None), (torch.full((3, 1), class_position), sizes)):
            arguments = (metric, r, class_index, similarity, order, weights)
            for actual, expected in zip(fuse("numba", *arguments), fuse("torch", *arguments)):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("class_index", [0, 8, torch.tensor([[3], [4]])])
def test_both_are_merged_as_each_alone(used, dtype, class_index):
    first, second = (random_tensor(2, 17, 35, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
    second = second.detach().float().requires_grad_()  # the residual stream may be wider
    weights = random_tensor(2, 17, seed=2).abs() + 0.5
    *both, matching = token_fusion.fuse(first, second, 5, class_index, "dot", "appended", weights)
    assert torch.equal(matching.new_index, match_tokens(first, 5, class_index, "dot", "appended").new_index)
    alone = matching.merge(first, weights), matching.merge(second, weights)
    assert [merged.dtype for merged in both] == [dtype, torch.float32]
    assert all(torch.equal(one, other) for one, other in zip(both, alone))
    gradients = []
    for results in (both, alone):
        loss = sum((results[i].float() * random_tensor(2, 12, 35, seed=3 + i)).sum() for i in used)
        gradients.append(torch.autograd.grad(loss, (first, second), materialize_grads=True))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("num_tokens", [4, 5, 12, 17, 200, 513])  # up to five blocks of 64 even tokens, whole or not
def test_tokens_in_a_window(num_tokens, similarity):
    metric = random_tensor(2, num_tokens, 35, seed=num_tokens)
    places = sorted({0, 1, num_tokens // 2, num_tokens - 2, num_tokens - 1})
    for class_position, window in itertools.product(places, (1, 2, 3, 8, 31, 64, 2 * num_tokens)):
        for r in (1, (num_tokens - 1) // 2):
            arguments = (metric, r, class_position, similarity, "raster", None, window)
            for actual, expected in zip(fuse("numba", *arguments), fuse("torch", *arguments)):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_window_computes_only_what_is_in_reach(monkeypatch):
    multiplied = []
    products = token_fusion_numba._products
    monkeypatch.setattr(
        token_fusion_numba, "_products", lambda *arguments: multiplied.append(products(*arguments)) or multiplied[-1]
    )
    set_selective_scan_backend("numba")
    metric = random_tensor(1, 1025, 16, seed=0)
    for window in (None, 64):
        match_tokens(metric, 9, window=window)
    (all_products, is_banded), (in_window, is_banded_in_window) = multiplied
    assert not is_banded and all_products.shape == (1, 513, 512)
    assert is_banded_in_window and in_window.shape == (1, 9 * 64, 32 + 64 + 31)


@pytest.mark.parametrize("window", [None, 8])
def test_an_empty_batch(window):
    set_selective_scan_backend("numba")
    metric = torch.zeros(0, 513, 16, requires_grad=True)
    assert match_tokens(metric, 100, window=window).new_index.shape == (0, 513)
    *merged, matching = token_fusion.fuse(metric, metric, 100, window=window)
    assert matching.new_index.shape == (0, 513)
    for values in (*merged, matching.merge(metric)):
        assert values.shape == (0, 413, 16)
        (gradient,) = torch.autograd.grad(values.sum(), metric, retain_graph=True)
        assert gradient.shape == metric.shape


def test_class_tokens_at_different_places():
    metric, class_index = random_tensor(4, 13, 16, seed=0), torch.tensor([[0], [3], [6], [12]])
    for order, window in itertools.product(("raster", "appended"), (None, 3)):
        arguments = (metric, 5, class_index, "cosine", order, None, window)
        for actual, expected in zip(fuse("numba", *arguments), fuse("torch", *arguments)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, float("inf"), float("nan")])
def test_ties_and_numbers_that_are_none(value):
    set_selective_scan_backend("numba")
    metric = random_tensor(2, 9, 4, seed=0)
    metric[0] = value
    similarities, windows = ("cosine", "dot", "euclidean"), (None, 1, 2)
    for class_position, r, similarity, window in itertools.product(range(9), range(5), similarities, windows):
        new_index = match_tokens(metric, r, class_position, similarity, window=window).new_index
        for places in new_index.tolist():
            assert sorted(set(places)) == list(range(9 - r)) and places.count(places[class_position]) == 1


@pytest.mark.parametrize("index", [-1, 6, 2**40])
def test_places_outside_of_the_result_are_refused(index):
    set_selective_scan_backend("numba")
    values = random_tensor(2, 9, 16, seed=0)
    matching = match_tokens(values, 3)
    matching.new_index[1, 4] = index
    with pytest.raises(ValueError, match="^new_index from .*: expected 0 to 5"):
        matching.merge(values)
    with pytest.raises(ValueError, match="^class_index from .*: expected 0 to 8"):
        match_tokens(values, 3, torch.tensor([[0], [index if index != 6 else 9]]))


def test_weights_and_places_of_another_shape_are_refused():
    set_selective_scan_backend("numba")
    values = random_tensor(2, 9, 16, seed=0)
    matching = match_tokens(values, 3)
    with pytest.raises(ValueError, match="^weights of the kernel _merge"):
        matching.merge(values, torch.ones(2, 8))
    with pytest.raises(ValueError, match="^new_index of the kernel _merge"):
        matching.merge(values[:, :8])


def test_bfloat16():
    metric = random_tensor(2, 33, 20, seed=0, dtype=torch.bfloat16)
    new_index, merged, gradient = fuse("numba", metric, 9, 0, "cosine", "raster", None)
    assert merged.dtype == gradient.dtype == torch.bfloat16
    expected = fuse("torch", metric.float(), 9, 0, "cosine", "raster", None)
    assert torch.equal(new_index, expected[0])  # similarities are float32
    set_selective_scan_backend("numba")
    matching = match_tokens(metric.float(), 9)
    torch.testing.assert_close(matching.merge(metric).float(), matching.merge(metric.float()), rtol=1e-2, atol=1e-2)


def test_results_do_not_depend_on_threads():
    num_threads, results = torch.get_num_threads(), []
    metric = random_tensor(5, 65, 32, seed=0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(fuse("numba", metric, 20, 0, "cosine", "raster", None))
    torch.set_num_threads(num_threads)
    assert all(torch.equal(one, two) for one, two in zip(*results))


def test_opcheck():
    new_index = match_tokens(random_tensor(2, 9, 16, seed=0), 3).new_index
    values = random_tensor(2, 9, 16, seed=1).requires_grad_()
    torch.library.opcheck(_merge, (values, new_index, 6, None))
    stream = random_tensor(2, 9, 16, seed=2).requires_grad_()
    torch.library.opcheck(_fuse, (values, stream, 3, 4, None, "cosine", "raster", 9, None))
    torch.library.opcheck(_match, (values.detach(), 3, 0, None, "dot", "raster", 9))
