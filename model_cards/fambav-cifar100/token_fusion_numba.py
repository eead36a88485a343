"""CPU kernels of token fusion, compiled by numba at first use: the same results as `token_fusion.py` in two calls.

Matching and merging are a few dozen small operations, each of which costs more to start than to run. A task is one
image, unless said otherwise. Names are those of `token_fusion.py`.
"""

import numpy as np
import torch
from torch import Tensor

from .numba_jobs import Operand, buffer, inlined, keep, kernel, launch, next_task, open_job, rows, scratch, sizes
from .numba_vectors import (
    LANES,
    full,
    load,
    load_index,
    load_scalar,
    store,
    store_index,
    store_scalar,
    where_greater,
)

_DOT, _COSINE, _EUCLIDEAN = 0, 1, 2
SIMILARITIES = {"dot": _DOT, "cosine": _COSINE, "euclidean": _EUCLIDEAN}
# Even tokens of one task when partners are sought
_EVEN_BLOCK = 64
_INDEX = (torch.int64,)
# As torch.nn.functional.normalize
_SMALLEST_NORM = np.float32(1e-12)


@inlined
def _scale(norm, similarity):
    """A score is product * scale * other scale + offset + other offset."""
    return np.float32(1.0) / max(norm, _SMALLEST_NORM) if similarity == _COSINE else np.float32(1.0)


@inlined
def _offset(norm, similarity):
    # Half of -|a - b|^2, which orders tokens as the whole does
    return np.float32(-0.5) * norm * norm if similarity == _EUCLIDEAN else np.float32(0.0)


@kernel
def _find_partners(address):
    """products (B*T_even, T_odd), norms (B, T), class_index (B, 1) -> worst, partner (B, T_even).

    `worst` is minus the best score of each even token. A task is one image and one block of even tokens."""
    job = open_job(address, 5)
    num_tokens, similarity = sizes(job)[0], sizes(job)[1]
    products, norms, class_index = rows(job, 0), rows(job, 1), rows(job, 2)
    worst, partner = rows(job, 3), rows(job, 4)
    num_even, num_odd = (num_tokens + 1) // 2, num_tokens // 2
    num_blocks = (num_even + _EVEN_BLOCK - 1) // _EVEN_BLOCK
    factor_array = np.empty((2, num_odd), np.float32)
    lane_array = np.empty((3, LANES), np.float32)
    for lane in range(LANES):
        lane_array[2, lane] = lane
    factors, lanes = scratch(factor_array), scratch(lane_array)
    while True:
        task = next_task(job)
        if task < 0:
            break
        b, first = task // num_blocks, task % num_blocks * _EVEN_BLOCK
        class_token = load_index(class_index, b, 0)
        for j in range(num_odd):
            norm = load_scalar(norms, b, 2 * j + 1)
            factor_array[0, j], factor_array[1, j] = _scale(norm, similarity), _offset(norm, similarity)
            if 2 * j + 1 == class_token:
                factor_array[0, j], factor_array[1, j] = np.float32(0.0), np.float32(-np.inf)
        for i in range(first, min(first + _EVEN_BLOCK, num_even)):
            row = b * num_even + i
            # Each lane looks at every 16th odd token; indices as float32, which is exact up to 2^24
            best_scores, best_indices = full(np.float32(-np.inf)), load(lanes, 2, 0)
            vectors = num_odd // LANES * LANES
            for j in range(0, vectors, LANES):
                scores = load(products, row, j) * load(factors, 0, j) + load(factors, 1, j)
                indices = load(lanes, 2, 0) + full(np.float32(j))
                best_indices = where_greater(scores, best_scores, indices, best_indices)
                best_scores = where_greater(scores, best_scores, scores, best_scores)
            store(lanes, 0, 0, best_scores)
            store(lanes, 1, 0, best_indices)
            best, best_odd = np.float32(-np.inf), 0
            for lane in range(LANES):
                score, j = lane_array[0, lane], int(lane_array[1, lane])
                if score > best or (score == best and score > np.float32(-np.inf) and j < best_odd):
                    best, best_odd = score, j
            for j in range(vectors, num_odd):
                score = load_scalar(products, row, j) * factor_array[0, j] + factor_array[1, j]
                if score > best:
                    best, best_odd = score, j
            if 2 * best_odd + 1 == class_token:  # nothing was better than minus infinity
                best_odd = 1 if best_odd == 0 else 0
            norm = load_scalar(norms, b, 2 * i)
            best = best * _scale(norm, similarity) + _offset(norm, similarity)
            # A class token, or a token that is not a number, comes last
            store_scalar(worst, b, i, -best if 2 * i != class_token and best == best else np.float32(np.inf))
            store_index(partner, b, i, 2 * best_odd + 1)
    keep((factor_array, lane_array))


@kernel
def _choose(address):
    """worst, partner (B, T_even), class_index (B, 1) -> new_index (B, T). A task is one image."""
    job = open_job(address, 4)
    num_tokens, r, is_appended, _, _ = sizes(job)
    worst_of, partner, class_index, new_index = rows(job, 0), rows(job, 1), rows(job, 2), rows(job, 3)
    num_even = (num_tokens + 1) // 2
    worst = np.empty(num_even, np.float32)
    is_fused = np.empty(num_even, np.bool_)
    while True:
        b = next_task(job)
        if b < 0:
            break
        class_token = load_index(class_index, b, 0)
        for i in range(num_even):
            worst[i] = load_scalar(worst_of, b, i)

        # The r even tokens with the best scores, the first ones among equals
        is_fused[:] = False
        if r > 0:
            threshold = np.partition(worst, r - 1)[r - 1]
            missing = r
            for i in range(num_even):
                if worst[i] < threshold:
                    is_fused[i] = True
                    missing -= 1
            for i in range(num_even):
                if missing > 0 and worst[i] == threshold and 2 * i != class_token:
                    is_fused[i] = True
                    missing -= 1

        place = 0
        if is_appended:
            store_index(new_index, b, class_token, place)
            place += 1
            for parity in range(2):
                for t in range(parity, num_tokens, 2):
                    if t != class_token and (parity == 1 or not is_fused[t // 2]):
                        store_index(new_index, b, t, place)
                        place += 1
        else:
            for t in range(num_tokens):
                if t % 2 == 1 or not is_fused[t // 2]:
                    store_index(new_index, b, t, place)
                    place += 1
        for i in range(num_even):
            if is_fused[i]:
                store_index(new_index, b, 2 * i, load_index(new_index, b, load_index(partner, b, i)))


@inlined
def _shares(shares, weights, new_index, b, num_tokens, num_kept):
    """Write the share of every token in its average, (T,), by way of the total weight of every place."""
    totals = np.zeros(num_kept, np.float32)
    for t in range(num_tokens):
        shares[t] = load_scalar(weights, b, t) if weights[0] != 0 else np.float32(1.0)
        totals[load_index(new_index, b, t)] += shares[t]
    for t in range(num_tokens):
        shares[t] /= totals[load_index(new_index, b, t)]


@kernel
def _merge(address):
    """values (B*T, D), new_index (B, T), weights (B, T) -> merged (B*(T - r), D), which starts as zeros."""
    job = open_job(address, 4)
    num_tokens, num_kept, width, _, _ = sizes(job)
    values, new_index, weights, merged = rows(job, 0), rows(job, 1), rows(job, 2), rows(job, 3)
    shares = np.empty(num_tokens, np.float32)
    while True:
        b = next_task(job)
        if b < 0:
            break
        _shares(shares, weights, new_index, b, num_tokens, num_kept)
        for t in range(num_tokens):
            source, target = b * num_tokens + t, b * num_kept + load_index(new_index, b, t)
            share = full(shares[t])
            vectors = width // LANES * LANES
            for d in range(0, vectors, LANES):
                store(merged, target, d, load(merged, target, d) + share * load(values, source, d))
            for d in range(vectors, width):
                total = load_scalar(merged, target, d) + shares[t] * load_scalar(values, source, d)
                store_scalar(merged, target, d, total)


@kernel
def _merge_backward(address):
    """dmerged (B*(T - r), D), new_index (B, T), weights (B, T) -> dvalues (B*T, D)."""
    job = open_job(address, 4)
    num_tokens, num_kept, width, _, _ = sizes(job)
    dmerged, new_index, weights, dvalues = rows(job, 0), rows(job, 1), rows(job, 2), rows(job, 3)
    shares = np.empty(num_tokens, np.float32)
    while True:
        b = next_task(job)
        if b < 0:
            break
        _shares(shares, weights, new_index, b, num_tokens, num_kept)
        for t in range(num_tokens):
            source, target = b * num_tokens + t, b * num_kept + load_index(new_index, b, t)
            share = full(shares[t])
            vectors = width // LANES * LANES
            for d in range(0, vectors, LANES):
                store(dvalues, source, d, share * load(dmerged, target, d))
            for d in range(vectors, width):
                store_scalar(dvalues, source, d, shares[t] * load_scalar(dmerged, target, d))


# ---- tensors in, tensors out ----


def match(products: Tensor, norms: Tensor, class_index: Tensor, r: int, similarity: str, order: str) -> Tensor:
    """Places of all tokens after a fusion.

    Args:
        products (`Tensor` of shape `(B, T_even, T_odd)`): dot products of even and odd tokens.
        norms (`Tensor` of shape `(B, T)`): lengths of the tokens.
        class_index (`Tensor` of shape `(B, 1)`): index of the class token (int64).
        r, similarity, order: as `match_tokens`.

    Returns:
        `Tensor` of shape `(B, T)` (int64): `Matching.new_index`.
    """
    batch_size, num_tokens = norms.shape
    num_even, num_odd = (num_tokens + 1) // 2, num_tokens // 2
    class_index = Operand("class_index", _indices("class_index", class_index, num_tokens), batch_size, 1, _INDEX)
    worst = buffer("worst", batch_size, num_even)
    partner = buffer("partner", batch_size, num_even, torch.int64)
    new_index = buffer("new_index", batch_size, num_tokens, torch.int64)
    launch(
        _find_partners,
        batch_size * -(-num_even // _EVEN_BLOCK),
        (num_tokens, SIMILARITIES[similarity]),
        [
            Operand("products", products.float().contiguous().flatten(0, 1), batch_size * num_even, num_odd),
            Operand("norms", norms.float().contiguous(), batch_size, num_tokens),
            class_index,
            worst,
            partner,
        ],
    )
    launch(_choose, batch_size, (num_tokens, r, order == "appended"), [worst, partner, class_index, new_index])
    return new_index.tensor


def merge(values: Tensor, new_index: Tensor, num_kept: int, weights: Tensor | None) -> Tensor:
    """Weighted average of the tokens that share a place: `(B, T, D)` to `(B, num_kept, D)`."""
    batch_size, num_tokens, width = values.shape
    rows_ = values.detach().float().contiguous().flatten(0, 1)
    merged = buffer("merged", batch_size * num_kept, width, fill=0)
    operands = [
        Operand("values", rows_, batch_size * num_tokens, width),
        *_places(new_index, num_kept, weights, batch_size, num_tokens),
        merged,
    ]
    launch(_merge, batch_size, (num_tokens, num_kept, width), operands)
    return merged.tensor.view(batch_size, num_kept, width).to(values.dtype)


def merge_backward(dmerged: Tensor, new_index: Tensor, weights: Tensor | None) -> Tensor:
    """Gradient of the values of `merge`."""
    batch_size, num_kept, width = dmerged.shape
    num_tokens = new_index.shape[1]
    rows_ = dmerged.float().contiguous().flatten(0, 1)
    dvalues = buffer("dvalues", batch_size * num_tokens, width)
    operands = [
        Operand("dmerged", rows_, batch_size * num_kept, width),
        *_places(new_index, num_kept, weights, batch_size, num_tokens),
        dvalues,
    ]
    launch(_merge_backward, batch_size, (num_tokens, num_kept, width), operands)
    return dvalues.tensor.view(batch_size, num_tokens, width).to(dmerged.dtype)


def _places(new_index: Tensor, num_kept: int, weights: Tensor | None, *shape: int) -> list[Operand]:
    """What both kernels of a merge know of the tokens: where each goes, and its weight."""
    weights = None if weights is None else weights.float().contiguous()
    return [
        Operand("new_index", _indices("new_index", new_index, num_kept), *shape, _INDEX),
        Operand("weights", weights, *shape),
    ]


def _indices(name: str, indices: Tensor, size: int) -> Tensor:
    """Contiguous indices, all of which a kernel can follow without leaving its memory."""
    if indices.numel() and indices.device.type != "meta":
        smallest, largest = indices.aminmax()
        if smallest < 0 or largest >= size:
            raise ValueError(f"{name} from {smallest} to {largest}: expected 0 to {size - 1}")
    return indices.contiguous()
