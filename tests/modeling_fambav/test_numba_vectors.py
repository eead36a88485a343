"""The functions that the CPU kernels are made of, against float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from modeling_fambav.numba_functions import exp2, exp2_of_negative, sigmoid, softplus, softplus_and_sigmoid
from modeling_fambav.numba_jobs import Operand, buffer, kernel, launch, next_task, open_job, rows, sizes
from modeling_fambav.numba_vectors import (
    LANES,
    WIDE,
    add_products,
    full,
    load,
    load_wide,
    prefetch,
    reduce_sum,
    store,
    store_scalar,
    store_sums,
)

# Multiples of WIDE, so that every kernel of this file reads whole vectors
_NUM_VALUES = 64 * 1024


@kernel
def _apply(address):
    """x (1, width) -> a row of results per function."""
    job = open_job(address, 2)
    width = sizes(job)[0]
    x, results = rows(job, 0), rows(job, 1)
    while next_task(job) >= 0:
        for column in range(0, width, WIDE):
            x_ = load_wide(x, 0, column)
            delta, slope = softplus_and_sigmoid(x_)
            store(results, 0, column, exp2(x_))
            store(results, 1, column, exp2_of_negative(x_))
            store(results, 2, column, sigmoid(x_))
            store(results, 3, column, softplus(x_))
            store(results, 4, column, delta)
            store(results, 5, column, slope)


def _results(values: torch.Tensor) -> dict[str, torch.Tensor]:
    width = len(values)
    results = buffer("results", 6, width)
    launch(_apply, 1, (width,), [Operand("x", values.view(1, -1), 1, width), results])
    return dict(zip(("exp2", "exp2_of_negative", "sigmoid", "softplus", "delta", "slope"), results.tensor))


def _expected(values: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = values.double()
    softplus_ = torch.logaddexp(wide, torch.zeros_like(wide))
    return {
        "exp2": torch.exp2(wide),
        "exp2_of_negative": torch.exp2(wide),
        "sigmoid": torch.sigmoid(wide),
        "softplus": softplus_,
        "delta": softplus_,
        "slope": torch.sigmoid(wide),
    }


@pytest.mark.parametrize("largest", [1.0, 80.0])
def test_functions_are_accurate_to_a_few_roundings(largest):
    """Relative errors, also where the values are tiny: a time step of 1e-4 is as exact as one of 1."""
    values = torch.linspace(-largest, largest, _NUM_VALUES)
    expected = _expected(values)
    for name, result in _results(values).items():
        chosen = values <= 0 if name == "exp2_of_negative" else slice(None)
        error = (result[chosen].double() / expected[name][chosen] - 1).abs().max()
        # sigmoid(-80) is 1 / (1 + 2^115.4), whose exponent has 17 bits behind the point
        bound = 1e-5 if largest == 80.0 and name not in ("exp2", "exp2_of_negative") else 6e-7
        assert error < bound, f"{name}: relative error {error:.2g}"


def test_functions_of_extreme_values():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 200.0, -200.0, 0.0]).repeat(
        WIDE // 8
    )
    expected = _expected(values)
    for name, result in _results(values).items():
        if name == "exp2_of_negative":
            result, expected[name] = result[values <= 0], expected[name][values <= 0]
        if name == "exp2":  # clamped to 2^126
            expected[name] = expected[name].clamp(max=2.0**126)
        torch.testing.assert_close(result, expected[name].float(), rtol=1e-6, atol=1e-36, equal_nan=True)


@kernel
def _reduce(address):
    """x (5, WIDE), y (1, WIDE) -> sums of the 16 lanes of the first vectors of x, one way (0) and the other (1), and
    the sum of x * y over all lanes of row 4."""
    job = open_job(address, 3)
    x, y, results = rows(job, 0), rows(job, 1), rows(job, 2)
    while next_task(job) >= 0:
        for row in range(4):
            store_scalar(results, 0, row, reduce_sum(load(x, row, 0)))
        store_sums(results, 1, 0, load(x, 0, 0), load(x, 1, 0), load(x, 2, 0), load(x, 3, 0))
        products = add_products(full(np.float32(1.0)), load_wide(x, 4, 0), load_wide(y, 0, 0))
        store_scalar(results, 2, 0, reduce_sum(products))


def test_sums_of_lanes():
    # Small whole numbers: exact in any order
    x = torch.randint(-50, 50, (5, WIDE), generator=torch.Generator().manual_seed(0)).float()
    y = torch.arange(WIDE).float().view(1, -1)
    results = buffer("results", 3, 4, fill=0.0)
    launch(_reduce, 1, (), [Operand("x", x, 5, WIDE), Operand("y", y, 1, WIDE), results])
    results = results.tensor
    assert torch.equal(results[0], x[:4, :LANES].sum(1))
    assert torch.equal(results[1], x[:4, :LANES].sum(1))
    assert results[2, 0] == LANES + (x[4] * y).sum()


@kernel
def _fetch(address):
    """result (1, 1): 1, after fetching rows that do not exist."""
    job = open_job(address, 1)
    result = rows(job, 0)
    while next_task(job) >= 0:
        for row in range(-2, 3):
            prefetch((np.int64(0), np.int64(1 << 40), np.int64(4)), row, 0)
        store_scalar(result, 0, 0, np.float32(1.0))


def test_rows_that_do_not_exist_can_be_fetched():
    """Kernels fetch rows ahead of those they work on, beyond the last one too; a load there would end the process."""
    result = buffer("result", 1, 1, fill=0.0)
    launch(_fetch, 1, (), [result])
    assert result.tensor.item() == 1
