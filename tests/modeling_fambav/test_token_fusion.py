"""Token fusion against golden numbers and against a slow, independent implementation of the design's equations."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from modeling_fambav import backends
from modeling_fambav.token_fusion import Matching, match_tokens, unmerge
from support.helpers import random_tensor, read_fixture, slow_match, slow_merge

SIMILARITIES = ("cosine", "dot", "euclidean")
ORDERS = ("raster", "appended")


@pytest.fixture(params=["torch", "numba"])
def backend(request, monkeypatch):
    """Fusion has the same two ways on a CPU as the scan."""
    monkeypatch.setattr(backends, "_chosen", request.param)


def max_tokens(num_tokens: int) -> int:
    return (num_tokens - 1) // 2


def random_tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype)


def random_weights(*shape: int) -> Tensor:
    return random_tensor(*shape, seed=2).abs() + 0.5


def class_indices(num_tokens: int, batch_size: int = 2):
    """Where the class token may stand: an index that all images share, and one per image."""
    yield 0
    yield (num_tokens - 1) // 2
    for first in range(0, num_tokens, 2):
        yield torch.tensor([[(first + b) % num_tokens] for b in range(batch_size)])


def per_image(class_index: int | Tensor, batch_size: int) -> list[int]:
    return [class_index] * batch_size if isinstance(class_index, int) else class_index.flatten().tolist()


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_of_tokens_that_are_alike_are_not_rounded(backend, similarity, dtype):
    # Cosines of about 0.98 to each other, as in deep layers
    metric = random_tensor(1, 1, 64, seed=0) + 0.15 * random_tensor(8, 65, 64, seed=1)
    exact = match_tokens(metric.double(), 20, similarity=similarity).new_index
    with torch.autocast("cpu", dtype):
        assert torch.equal(match_tokens(metric, 20, similarity=similarity).new_index, exact)
        assert torch.is_autocast_enabled("cpu")
    half = metric.to(dtype)
    exact = match_tokens(half.double(), 20, similarity=similarity).new_index
    assert torch.equal(match_tokens(half, 20, similarity=similarity).new_index, exact)


def test_similarities_of_float64_are_float64(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", "torch")
    # Token 4 is nearer to token 1 than token 2 is, by less than float32 tells apart
    metric = torch.tensor([[[0, 0], [1, 0], [1, 1e-5], [-1, 1], [1, 1e-6]]], dtype=torch.float64)
    places = match_tokens(metric, 1).new_index
    assert places.tolist() == [[0, 1, 2, 3, 1]]


# ---- values ----


def test_golden_token_merge(backend):
    golden, metadata = read_fixture("token_merge")
    matching = match_tokens(golden["metric"], int(metadata["r"]), class_index=0, order="appended")
    merged = matching.merge(golden["values"])
    torch.testing.assert_close(merged, golden["merged"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unmerge(merged, matching.new_index), golden["unmerged"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 6, 9, 12, 17])
def test_matching_and_merge_equal_the_slow_reference(num_tokens, similarity, order):
    batch_size = 2
    # With two dimensions many evens look the same way, so that several land on one odd token.
    metric, values = random_tokens(batch_size, num_tokens, 2), random_tokens(batch_size, num_tokens, 3, seed=1)
    sizes = torch.randint(1, 6, (batch_size, num_tokens), generator=torch.Generator().manual_seed(2)).double()
    for class_index, r in itertools.product(class_indices(num_tokens), range(max_tokens(num_tokens) + 1)):
        matching = match_tokens(metric, r, class_index, similarity, order)
        mean, weighted = matching.merge(values), matching.merge(values, sizes)
        assert mean.shape == weighted.shape == (batch_size, num_tokens - r, 3)
        for b, image_class_index in enumerate(per_image(class_index, batch_size)):
            _, new_index = slow_match(metric[b].tolist(), r, image_class_index, similarity, order)
            assert matching.new_index[b].tolist() == new_index
            for merged, weights in ((mean, [1.0] * num_tokens), (weighted, sizes[b].tolist())):
                expected = torch.tensor(slow_merge(values[b].tolist(), new_index, weights), dtype=torch.float64)
                torch.testing.assert_close(merged[b], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 99])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 5, 6, 9, 12, 17])
def test_a_window_equals_the_slow_reference(num_tokens, similarity, window):
    metric = random_tokens(2, num_tokens, 2)
    for class_index, r in itertools.product(class_indices(num_tokens), range(max_tokens(num_tokens) + 1)):
        matching = match_tokens(metric, r, class_index, similarity, window=window)
        for b, image_class_index in enumerate(per_image(class_index, 2)):
            _, new_index = slow_match(metric[b].tolist(), r, image_class_index, similarity, "raster", window)
            assert matching.new_index[b].tolist() == new_index


def test_several_evens_land_on_one_odd(backend):
    # Tokens 2, 4 and 6 look like token 3; the class token 0 looks like it most of all.
    metric = torch.tensor([[[1.0, 0.0], [0, 1], [1, 0.1], [1, 0], [1, 0.2], [-1, -1], [1, 0.3], [0, -1]]])
    values = torch.arange(8.0).view(1, 8, 1)
    sizes = torch.tensor([[1.0, 1, 2, 1, 3, 1, 4, 1]])

    matching = match_tokens(metric, 3, class_index=0, order="raster")
    assert matching.new_index.tolist() == [[0, 1, 2, 2, 2, 3, 2, 4]]
    assert matching.merge(values).flatten().tolist() == [0, 1, (2 + 3 + 4 + 6) / 4, 5, 7]
    weighted = (2 * 2 + 3 + 3 * 4 + 4 * 6) / 10
    torch.testing.assert_close(matching.merge(values, sizes).flatten(), torch.tensor([0, 1, weighted, 5, 7]))

    # Of two fused tokens, the least similar one (6) stays, and moves before the odd tokens if evens come first.
    assert match_tokens(metric, 2, order="raster").new_index.tolist() == [[0, 1, 2, 2, 2, 3, 4, 5]]
    assert match_tokens(metric, 2, order="appended").new_index.tolist() == [[0, 2, 3, 3, 3, 4, 1, 5]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("class_index", [0, 1, 2])
def test_three_tokens_leave_the_class_token_and_the_mean_of_the_patches(backend, class_index, order):
    values = random_tokens(4, 3, 5, dtype=torch.float32)
    matching = match_tokens(values, 1, class_index, order=order)
    merged = matching.merge(values)
    assert merged.shape == (4, 2, 5)
    place = matching.new_index[:, class_index].unique().item()
    assert place == (1 if order == "raster" and class_index == 2 else 0)
    patches = values[:, [i for i in range(3) if i != class_index]]
    assert torch.equal(merged[:, place], values[:, class_index])
    torch.testing.assert_close(merged[:, 1 - place], patches.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_tokens", [4, 5, 16, 17])
def test_the_class_token_is_never_fused_and_never_receives(backend, num_tokens, order, dtype):
    r = max_tokens(num_tokens)
    for class_position in range(num_tokens):
        # Everything resembles the class token more than anything else.
        metric = random_tokens(2, num_tokens, 4, dtype=dtype) * 0.1
        metric[:, class_position] = 0
        metric += 1
        values = random_tokens(2, num_tokens, 3, seed=1, dtype=dtype)
        matching = match_tokens(metric, r, torch.full((2, 1), class_position), order=order)
        place = matching.new_index[:, class_position]
        assert (matching.new_index == place.unsqueeze(1)).sum(1).tolist() == [1, 1]
        merged = matching.merge(values, random_weights(2, num_tokens))
        assert torch.equal(merged[torch.arange(2), place], values[:, class_position])  # to the last bit


def test_an_integer_and_a_tensor_say_the_same_class_index():
    metric = random_tokens(3, 11, 4)
    shared = match_tokens(metric, 4, 5, order="appended")
    tensor = match_tokens(metric, 4, torch.full((3, 1), 5), order="appended")
    assert torch.equal(shared.new_index, tensor.new_index)


@pytest.mark.parametrize("order", ORDERS)
def test_every_image_has_its_own_matching(order):
    metric, values = random_tokens(4, 13, 6), random_tokens(4, 13, 2, seed=1)
    class_index = torch.tensor([[0], [6], [7], [12]])
    together = match_tokens(metric, 5, class_index, order=order).merge(values)
    for b in range(4):
        alone = match_tokens(metric[b : b + 1], 5, class_index[b : b + 1], order=order).merge(values[b : b + 1])
        assert torch.equal(together[b : b + 1], alone)


def test_tokens_that_stay_alone_keep_every_bit(backend):
    values = random_tokens(2, 15, 4, dtype=torch.float32)
    matching = match_tokens(values, 3, 0)
    merged = matching.merge(values, random_weights(2, 15))
    for b, place in itertools.product(range(2), range(12)):
        landed = (matching.new_index[b] == place).nonzero().flatten()
        if len(landed) == 1:
            assert torch.equal(merged[b, place], values[b, landed[0]])


# ---- what is carried along ----


@pytest.mark.parametrize("order", ORDERS)
def test_sizes_keep_their_sum_and_weigh_every_patch_once(order):
    values = random_tokens(2, 20, 3)
    tokens, sizes = values, torch.ones(2, 20)
    for r in (5, 4, 3):
        matching = match_tokens(tokens, r, 0, order=order)
        tokens, sizes = matching.merge(tokens, sizes), matching.sum(sizes)
    assert sizes.shape == (2, 8) and sizes.sum(1).tolist() == [20, 20] and sizes.min() >= 1
    # Weighted by sizes, fusing step by step is the mean over all initial tokens.
    torch.testing.assert_close((tokens * sizes.unsqueeze(-1)).mean(1) * 8 / 20, values.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("class_position", [0, 9])
def test_token_maps_and_unmerge_equal_a_brute_force_map(class_position, order):
    tokens = random_tokens(2, 19, 4)
    class_index = torch.full((2, 1), class_position)
    token_map = torch.arange(19).expand(2, -1)
    carried = [[[i] for i in range(19)] for _ in range(2)]  # initial tokens in every current token
    for r in (7, 0, 3, 4):
        matching = match_tokens(tokens, r, class_index, order=order)
        for b in range(2):
            _, new_index = slow_match(tokens[b].tolist(), r, class_index[b].item(), "cosine", order)
            moved = [[] for _ in range(max(new_index) + 1)]
            for initial, place in zip(carried[b], new_index):
                moved[place] += initial
            carried[b] = moved
        tokens, token_map = matching.merge(tokens), matching.compose(token_map)
        class_index = matching.new_index.gather(1, class_index)

    assert token_map.dtype == torch.int64 and token_map.shape == (2, 19)
    dense = unmerge(tokens, token_map)
    assert dense.shape == (2, 19, 4)
    for b in range(2):
        for place, initial in enumerate(carried[b]):
            for i in initial:
                assert token_map[b, i] == place
                assert torch.equal(dense[b, i], tokens[b, place])
        assert carried[b][class_index[b]] == [class_position]


# ---- gradients ----


def test_gradients_flow_through_the_averaging_only():
    metric = random_tokens(2, 9, 4).requires_grad_()
    values = random_tokens(2, 9, 3, seed=1).requires_grad_()
    matching = match_tokens(metric, 3)
    matching.merge(values).sum().backward()
    assert metric.grad is None
    for b, i in itertools.product(range(2), range(9)):
        share = 1 / (matching.new_index[b] == matching.new_index[b, i]).sum()
        torch.testing.assert_close(values.grad[b, i], share.double().expand(3))


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck_of_merge(order):
    matching = match_tokens(random_tokens(2, 9, 2), 4, 4, order=order)
    values = random_tokens(2, 9, 3, seed=1).requires_grad_()
    weights = random_weights(2, 9)
    assert torch.autograd.gradcheck(matching.merge, values)
    assert torch.autograd.gradcheck(lambda values: matching.merge(values, weights), values)
    assert torch.autograd.gradcheck(lambda values: unmerge(matching.merge(values), matching.new_index), values)


# ---- degenerate input ----


def assert_valid(matching: Matching, num_tokens: int, r: int, class_position: int) -> None:
    """Every place is taken, and the class token stands alone."""
    new_index = matching.new_index
    assert new_index.shape == (len(new_index), num_tokens) and matching.num_kept == num_tokens - r
    for b in range(len(new_index)):
        assert sorted(set(new_index[b].tolist())) == list(range(num_tokens - r))
        assert new_index[b].tolist().count(new_index[b, class_position]) == 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("num_tokens", [3, 8, 9])
def test_ties_and_numbers_that_are_none(backend, num_tokens, value, similarity, order):
    for class_position, r in itertools.product(range(num_tokens), range(max_tokens(num_tokens) + 1)):
        metric = torch.full((2, num_tokens, 4), value)
        metric[1] = random_tokens(num_tokens, 4, dtype=torch.float32) * value
        matching = match_tokens(metric, r, class_position, similarity, order)
        assert_valid(matching, num_tokens, r, class_position)


def test_the_class_token_is_protected_when_every_similarity_overflows(backend):
    metric = torch.full((1, 9, 2), 1e30)
    metric[:, 1::2] *= -1  # every dot product of an even and an odd token is minus infinity
    for class_position, r in itertools.product(range(9), range(5)):
        matching = match_tokens(metric, r, class_position, "dot")
        assert_valid(matching, 9, r, class_position)


def test_one_image_of_nans_leaves_the_others_alone(backend):
    metric = random_tokens(3, 9, 4)
    expected = match_tokens(metric, 3)
    metric[1] = math.nan
    matching = match_tokens(metric, 3)
    assert torch.equal(matching.new_index[[0, 2]], expected.new_index[[0, 2]])


@pytest.mark.parametrize("order", ORDERS)
def test_bfloat16_values(backend, order):
    metric, values = random_tokens(2, 33, 8, dtype=torch.bfloat16), random_tokens(2, 33, 8, dtype=torch.bfloat16)
    matching = match_tokens(metric, 9, order=order)
    merged = matching.merge(values, random_weights(2, 33))
    assert merged.dtype == torch.bfloat16
    expected = matching.merge(values.double(), random_weights(2, 33))
    torch.testing.assert_close(merged.double(), expected, rtol=1e-2, atol=1e-2)


def test_the_bfloat16_mean_of_many_tokens(backend):
    # All 98 even patches land on token 1; a running sum in bfloat16 would lose what each of them adds.
    metric = torch.zeros(1, 197, 2)
    metric[:, :, 0] = 1
    metric[:, 3::2, 0] = -1
    values = torch.ones(1, 197, 1, dtype=torch.bfloat16)
    matching = match_tokens(metric, 98)
    assert (matching.new_index == matching.new_index[0, 1]).sum() == 99
    torch.testing.assert_close(matching.merge(values), torch.ones(1, 99, 1, dtype=torch.bfloat16))


# ---- wrong arguments ----


@pytest.mark.parametrize("num_tokens, r", [(9, 5), (8, 4), (3, 2), (2, 1), (9, -1)])
def test_r_out_of_range(num_tokens, r):
    with pytest.raises(ValueError, match=rf"r={r}: expected 0 <= r <= {max_tokens(num_tokens)}"):
        match_tokens(random_tokens(2, num_tokens, 4), r)


@pytest.mark.parametrize("num_tokens", [3, 9])
@pytest.mark.parametrize("name, value", [("similarity", "l2"), ("order", "sorted")])
def test_unknown_names(name, value, num_tokens):
    with pytest.raises(ValueError, match=f"{name}='{value}': expected"):
        match_tokens(random_tokens(2, num_tokens, 4), 1, **{name: value})
