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
    """products (of `_products`, as rows), norms (B, T), class_index (B, 1) -> worst, partner (B, T_even).

    `worst` is minus the best score of each even token. A task is one image and one block of even tokens."""
    job = open_job(address, 5)
    num_tokens, similarity, reach, rows_per_image, is_banded = sizes(job)
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
        # In which column of the products the odd token 0 would stand
        column = (reach + 1) // 2 - first if is_banded else 0
        for i in range(first, min(first + _EVEN_BLOCK, num_even)):
            row = b * rows_per_image + i
            first_odd, end = max(0, i - (reach + 1) // 2), min(num_odd, i + (reach - 1) // 2 + 1)
            # Each lane looks at every 16th odd token; indices as float32, which is exact up to 2^24
            best_scores, best_indices = full(np.float32(-np.inf)), load(lanes, 2, 0)
            vectors = first_odd + (end - first_odd) // LANES * LANES
            for j in range(first_odd, vectors, LANES):
                scores = load(products, row, column + j) * load(factors, 0, j) + load(factors, 1, j)
                indices = load(lanes, 2, 0) + full(np.float32(j))
                best_indices = where_greater(scores, best_scores, indices, best_indices)
                best_scores = where_greater(scores, best_scores, scores, best_scores)
            store(lanes, 0, 0, best_scores)
            store(lanes, 1, 0, best_indices)
            best, best_odd = np.float32(-np.inf), first_odd
            for lane in range(LANES):
                score, j = lane_array[0, lane], int(lane_array[1, lane])
                if score > best or (score == best and score > np.float32(-np.inf) and j < best_odd):
                    best, best_odd = score, j
            for j in range(vectors, end):
                score = load_scalar(products, row, column + j) * factor_array[0, j] + factor_array[1, j]
                if score > best:
                    best, best_odd = score, j
            if 2 * best_odd + 1 == class_token:  # nothing was better than minus infinity
                best_odd += 1 if best_odd + 1 < num_odd else -1
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


@inlined
def _sources(first, following, new_index, b, num_tokens):
    """Write the first token of every place, (T - r,), and for every token the next one of its place, (T,), or -1."""
    first[:] = -1
    for t in range(num_tokens - 1, -1, -1):
        place = load_index(new_index, b, t)
        following[t] = first[place]
        first[place] = t


@kernel
def _merge(address):
    """new_index (B, T), weights (B, T), one or two pairs of values (B*T, D) -> merged (B*(T - r), D)."""
    job = open_job(address, 6)
    num_tokens, num_kept, width, num_pairs, _ = sizes(job)
    new_index, weights = rows(job, 0), rows(job, 1)
    shares = np.empty(num_tokens, np.float32)
    first, following = np.empty(num_kept, np.int64), np.empty(num_tokens, np.int64)
    vectors = width // LANES * LANES
    while True:
        b = next_task(job)
        if b < 0:
            break
        _shares(shares, weights, new_index, b, num_tokens, num_kept)
        _sources(first, following, new_index, b, num_tokens)
        for pair in range(num_pairs):
            values, merged = rows(job, 2 + 2 * pair), rows(job, 3 + 2 * pair)
            for place in range(num_kept):
                target = b * num_kept + place
                for d in range(0, vectors, LANES):
                    total, t = full(np.float32(0.0)), first[place]
                    while t >= 0:
                        total = total + full(shares[t]) * load(values, b * num_tokens + t, d)
                        t = following[t]
                    store(merged, target, d, total)
                for d in range(vectors, width):
                    rest, t = np.float32(0.0), first[place]
                    while t >= 0:
                        rest = rest + shares[t] * load_scalar(values, b * num_tokens + t, d)
                        t = following[t]
                    store_scalar(merged, target, d, rest)


@kernel
def _merge_backward(address):
    """new_index (B, T), weights (B, T), one or two pairs of dmerged (B*(T - r), D) -> dvalues (B*T, D)."""
    job = open_job(address, 6)
    num_tokens, num_kept, width, num_pairs, _ = sizes(job)
    new_index, weights = rows(job, 0), rows(job, 1)
    shares = np.empty(num_tokens, np.float32)
    vectors = width // LANES * LANES
    while True:
        b = next_task(job)
        if b < 0:
            break
        _shares(shares, weights, new_index, b, num_tokens, num_kept)
        for pair in range(num_pairs):
            dmerged, dvalues = rows(job, 2 + 2 * pair), rows(job, 3 + 2 * pair)
            for t in range(num_tokens):
                source, target = b * num_tokens + t, b * num_kept + load_index(new_index, b, t)
                share = full(shares[t])
                for d in range(0, vectors, LANES):
                    store(dvalues, source, d, share * load(dmerged, target, d))
                for d in range(vectors, width):
                    store_scalar(dvalues, source, d, shares[t] * load_scalar(dmerged, target, d))


# ---- tensors in, tensors out ----


def match(metric: Tensor, class_index: int | Tensor, r: int, similarity: str, order: str, reach: int) -> Tensor:
    """Places of all tokens after a fusion.

    Args:
        metric (`Tensor` of shape `(B, T, D)`): what is compared, T > 3.
        class_index (`int` or `Tensor` of shape `(B, 1)`): index of the class token.
        r, similarity, order: as `match_tokens`.
        reach (`int`): how many places apart tokens are compared at most.

    Returns:
        `Tensor` of shape `(B, T)` (int64): `Matching.new_index`.
    """
    return _match_operand(metric, class_index, r, similarity, order, reach).tensor


def _match_operand(metric, class_index: int | Tensor, r: int, similarity: str, order: str, reach: int) -> Operand:
    batch_size, num_tokens, _ = metric.shape
    num_even = (num_tokens + 1) // 2
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    products, is_banded = _products(metric, reach)
    _, rows_per_image, num_columns = products.shape
    class_operand = _class_operand(class_index, batch_size, num_tokens)
    worst = buffer("worst", batch_size, num_even)
    partner = buffer("partner", batch_size, num_even, torch.int64)
    new_index = buffer("new_index", batch_size, num_tokens, torch.int64)
    launch(
        _find_partners,
        batch_size * -(-num_even // _EVEN_BLOCK),
        (num_tokens, SIMILARITIES[similarity], min(reach, num_tokens), rows_per_image, is_banded),
        [
            Operand("products", products.flatten(0, 1), batch_size * rows_per_image, num_columns),
            Operand("norms", torch.linalg.vector_norm(metric, dim=-1).float(), batch_size, num_tokens),
            class_operand,
            worst,
            partner,
        ],
    )
    launch(_choose, batch_size, (num_tokens, r, order == "appended"), [worst, partner, class_operand, new_index])
    return new_index


def _products(metric: Tensor, reach: int) -> tuple[Tensor, bool]:
    """Dot products of even and odd tokens, by torch: on a CPU nothing multiplies matrices faster. Not under autocast.

    Returns:
        the products, and whether they are banded. All products are (B, T_even, T_odd). Banded ones are computed where
        that is less work: (B, rows, columns), where the rows are the even tokens, up to whole blocks, and the columns
        are the odd tokens in reach of the row's block. The columns of a block begin (reach + 1) // 2 odd tokens before
        the block, which for the first blocks is before the image; those outside of the image have no meaning.
    """
    even, odd = metric[:, ::2], metric[:, 1::2]
    num_even, num_odd = even.shape[1], odd.shape[1]
    num_blocks, before, after = -(-num_even // _EVEN_BLOCK), (reach + 1) // 2, (reach - 1) // 2
    in_reach = before + _EVEN_BLOCK + after
    with torch.autocast("cpu", enabled=False):
        if num_blocks * _EVEN_BLOCK * in_reach >= num_even * num_odd:
            return (even @ odd.mT).float(), False
        even = torch.nn.functional.pad(even, (0, 0, 0, num_blocks * _EVEN_BLOCK - num_even))
        end = (num_blocks - 1) * _EVEN_BLOCK + in_reach - before  # of the odd tokens that the last block asks for
        odd = torch.nn.functional.pad(odd, (0, 0, before, max(0, end - num_odd)))
        blocks = odd.unfold(1, in_reach, _EVEN_BLOCK)[:, :num_blocks]  # (B, blocks, D, in_reach)
        return (even.unflatten(1, (num_blocks, _EVEN_BLOCK)) @ blocks).float().flatten(1, 2), True


def _class_operand(class_index: int | Tensor, batch_size: int, num_tokens: int) -> Operand:
    if isinstance(class_index, int) and 0 <= class_index < num_tokens:
        return buffer("class_index", batch_size, 1, torch.int64, fill=class_index)
    class_index = torch.as_tensor(class_index, device="cpu").expand(batch_size, 1)
    return Operand("class_index", _indices("class_index", class_index, num_tokens), batch_size, 1, _INDEX)


def match_and_merge(
    metric: Tensor,
    class_index: int | Tensor,
    r: int,
    similarity: str,
    order: str,
    reach: int,
    values: list[Tensor],
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors merged as `merge` does along the places of `match`, and these places."""
    new_index = _match_operand(metric, class_index, r, similarity, order, reach)
    # The kernel made these places, so they need no check
    first, second = _merge_along(values, new_index, metric.shape[1] - r, weights)
    return first, second, new_index.tensor


def merge(values: list[Tensor], new_index: Tensor, num_kept: int, weights: Tensor | None) -> list[Tensor]:
    """Weighted averages of the tokens that share a place: one or two of `(B, T, D)` to `(B, num_kept, D)`."""
    places = Operand("new_index", _indices("new_index", new_index, num_kept), *values[0].shape[:2], _INDEX)
    return _merge_along(values, places, num_kept, weights)


def _merge_along(values: list[Tensor], new_index: Operand, num_kept: int, weights: Tensor | None) -> list[Tensor]:
    batch_size, num_tokens, width = values[0].shape
    operands = [new_index, _weights(weights, batch_size, num_tokens)]
    for tokens in values:
        rows_ = tokens.detach().float().contiguous().flatten(0, 1)
        operands.append(Operand("values", rows_, batch_size * num_tokens, width))
        operands.append(buffer("merged", batch_size * num_kept, width))
    launch(_merge, batch_size, (num_tokens, num_kept, width, len(values)), operands)
    return _tokens(operands, num_kept, values)


def merge_backward(dmerged: list[Tensor], new_index: Tensor, weights: Tensor | None) -> list[Tensor]:
    """Gradients of the values of `merge`."""
    batch_size, num_kept, width = dmerged[0].shape
    num_tokens = new_index.shape[1]
    places = Operand("new_index", _indices("new_index", new_index, num_kept), batch_size, num_tokens, _INDEX)
    operands = [places, _weights(weights, batch_size, num_tokens)]
    for gradient in dmerged:
        rows_ = gradient.float().contiguous().flatten(0, 1)
        operands.append(Operand("dmerged", rows_, batch_size * num_kept, width))
        operands.append(buffer("dvalues", batch_size * num_tokens, width))
    launch(_merge_backward, batch_size, (num_tokens, num_kept, width, len(dmerged)), operands)
    return _tokens(operands, num_tokens, dmerged)


def _tokens(operands: list[Operand], num_tokens: int, inputs: list[Tensor]) -> list[Tensor]:
    """The results among the operands of a merge, as tokens in the dtypes of what they were made from."""
    results = [result.tensor for result in operands[3::2]]
    return [rows_.view(-1, num_tokens, rows_.shape[1]).to(tensor.dtype) for rows_, tensor in zip(results, inputs)]


def _weights(weights: Tensor | None, batch_size: int, num_tokens: int) -> Operand:
    weights = None if weights is None else weights.float().contiguous()
    return Operand("weights", weights, batch_size, num_tokens)


def _indices(name: str, indices: Tensor, size: int) -> Tensor:
    """Contiguous indices, all of which a kernel can follow without leaving its memory."""
    if indices.numel() and indices.device.type != "meta":
        smallest, largest = indices.aminmax()
        smallest, largest = smallest.item(), largest.item()  # tensors take longer to compare
        if smallest < 0 or largest >= size:
            raise ValueError(f"{name} from {smallest} to {largest}: expected 0 to {size - 1}")
    return indices.contiguous()
