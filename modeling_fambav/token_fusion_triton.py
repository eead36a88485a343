"""GPU kernels of token fusion, in Triton: the same results as `token_fusion.py` in two launches, and one backward.

Plain torch takes about 47 small kernels for a fusion and 8 for its gradients, which cost more to start than to run;
CONTRIBUTING.md has from how many tokens on a fusion pays. Names are those of `token_fusion.py`; in the kernels

    i, j            even and odd tokens by their rank: the tokens 2 i and 2 j + 1
    p               place among the survivors
    lands           (places, tokens), whether a token lands on a place

`new_index` is all that passes from one kernel to the next. Every result gathers what belongs to it, in the order of
the tokens, rather than to add up what others send: runs repeat their bits, as they do not with atomic additions.
Products of tokens in half precision are exact in float32, and those in float32 are computed as such, not in TF32:
tokens that are alike differ by less.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise

from .operators import check_shape
from .triton_launch import launch

_SIMILARITIES = {"dot": 0, "cosine": 1, "euclidean": 2}


@triton.jit
def _score(products, even_squares, odd_squares, SIMILARITY: tl.constexpr):
    """Similarities of evens and odds from their dot products and squared lengths, rounded as those of torch."""
    if SIMILARITY == 0:
        return products
    even, odd = tl.sqrt_rn(even_squares), tl.sqrt_rn(odd_squares)
    if SIMILARITY == 1:
        # As torch.nn.functional.normalize
        return tl.div_rn(products, tl.maximum(even, 1e-12)[:, None] * tl.maximum(odd, 1e-12)[None, :])
    return 2 * products - (even * even)[:, None] - (odd * odd)[None, :]


@triton.jit
def _find_partners(
    metric, best, partner, num_tokens, width, class_token, reach,
    SIMILARITY: tl.constexpr, IN_FLOAT32: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Best score of every even token of an image, and the odd token that has it."""
    num_even, num_odd = (num_tokens + 1) // 2, num_tokens // 2
    for first in range(0, num_even, BLOCK):
        i = first + tl.arange(0, BLOCK)
        best_score, best_odd = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
        # Only blocks with tokens in reach
        first_block = max(0, first - (reach + 1) // 2) // BLOCK
        end = min(num_odd, first + BLOCK + (reach - 1) // 2)
        for first_odd in range(first_block * BLOCK, end, BLOCK):
            j = first_odd + tl.arange(0, BLOCK)
            products = tl.zeros((BLOCK, BLOCK), tl.float32)
            even_squares, odd_squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for first_value in range(0, width, DEPTH):
                d = first_value + tl.arange(0, DEPTH)
                even_mask = (i < num_even)[:, None] & (d < width)[None, :]
                odd_mask = (d < width)[:, None] & (j < num_odd)[None, :]
                even = tl.load(metric + 2 * i[:, None] * width + d[None, :], even_mask, 0.0)
                odd = tl.load(metric + (2 * j[None, :] + 1) * width + d[:, None], odd_mask, 0.0)
                wide_even, wide_odd = even.to(tl.float32), odd.to(tl.float32)
                even_squares += tl.sum(wide_even * wide_even, 1)
                odd_squares += tl.sum(wide_odd * wide_odd, 0)
                if IN_FLOAT32:
                    even, odd = wide_even, wide_odd
                products = tl.dot(even, odd, products, input_precision="ieee")
            score = _score(products, even_squares, odd_squares, SIMILARITY)
            # The least of all scores: what is no number. Less than that: the class token, and what is no token.
            score = tl.where(score >= -3.4028234663852886e38, score, -3.4028234663852886e38)
            is_partner = (j < num_odd) & (2 * j + 1 != class_token)
            is_near = tl.abs(2 * i[:, None] - (2 * j[None, :] + 1)) <= reach
            score = tl.where(is_partner[None, :] & is_near, score, float("-inf"))
            block_score, block_odd = tl.max(score, 1, return_indices=True)
            best_odd = tl.where(block_score > best_score, first_odd + block_odd, best_odd)
            best_score = tl.maximum(best_score, block_score)
        best_score = tl.where(2 * i != class_token, best_score, float("-inf"))
        tl.store(best + i, best_score, i < num_even)
        tl.store(partner + i, best_odd, i < num_even)


@triton.jit
def _choose(best, is_fused, num_even, r, BLOCK: tl.constexpr):
    """Whether an even token is among the r best, the first ones among equals: by counting those ahead of it."""
    for first in range(0, num_even, BLOCK):
        i = first + tl.arange(0, BLOCK)
        score = tl.load(best + i, i < num_even, float("-inf"))
        rank = tl.zeros((BLOCK,), tl.int32)
        for first_other in range(0, num_even, BLOCK):
            other = first_other + tl.arange(0, BLOCK)
            other_score = tl.load(best + other, other < num_even, float("-inf"))
            is_first = (other_score[None, :] == score[:, None]) & (other[None, :] < i[:, None])
            rank += tl.sum(((other_score[None, :] > score[:, None]) | is_first).to(tl.int32), 1)
        tl.store(is_fused + i, (rank < r).to(tl.int32), i < num_even)


@triton.jit
def _place_of_odd(j, fused_before, num_even, r, class_token, IS_APPENDED: tl.constexpr):
    if IS_APPENDED:
        is_even_class = (class_token % 2 == 0).to(tl.int32)
        is_class_before = ((class_token % 2 == 1) & (class_token < 2 * j + 1)).to(tl.int32)
        place = 1 + num_even - r - is_even_class + j - is_class_before
        return tl.where(2 * j + 1 == class_token, 0, place)
    return 2 * j + 1 - fused_before


@triton.jit
def _place_of_even(i, fused_before, class_token, IS_APPENDED: tl.constexpr):
    """Of one that is not fused."""
    if IS_APPENDED:
        is_class_before = ((class_token % 2 == 0) & (class_token < 2 * i)).to(tl.int32)
        return tl.where(2 * i == class_token, 0, 1 + i - fused_before - is_class_before)
    return 2 * i - fused_before


@triton.jit
def _match(
    metric, class_index, best, partner, is_fused, new_index, num_tokens, width, r, reach, class_place,
    SIMILARITY: tl.constexpr, IS_APPENDED: tl.constexpr, HAS_INDEX: tl.constexpr, IN_FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """metric (B, T, D), class_index (B,) -> new_index (B, T), by way of best, partner, is_fused (B, T_even).

    A program is one image; what one of its threads leaves in memory, the others read behind a barrier."""
    b = tl.program_id(0).to(tl.int64)
    num_even, num_odd = (num_tokens + 1) // 2, num_tokens // 2
    class_token = class_place
    if HAS_INDEX:
        class_token = tl.load(class_index + b).to(tl.int32)
    best, partner, is_fused = best + b * num_even, partner + b * num_even, is_fused + b * num_even
    _find_partners(
        metric + b * num_tokens * width, best, partner, num_tokens, width, class_token, reach,
        SIMILARITY, IN_FLOAT32, BLOCK, DEPTH,
    )  # fmt: skip
    tl.debug_barrier()
    _choose(best, is_fused, num_even, r, BLOCK)
    tl.debug_barrier()
    new_index += b * num_tokens
    for first in range(0, num_even, BLOCK):
        i = first + tl.arange(0, BLOCK)
        odd = tl.load(partner + i, i < num_even, 0)
        fused_before, fused_before_odd = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
        for first_other in range(0, num_even, BLOCK):
            other = first_other + tl.arange(0, BLOCK)
            fused = tl.load(is_fused + other, other < num_even, 0)
            fused_before += tl.sum(tl.where(other[None, :] <= i[:, None], fused[None, :], 0), 1)
            fused_before_odd += tl.sum(tl.where(other[None, :] <= odd[:, None], fused[None, :], 0), 1)
        place = tl.where(
            tl.load(is_fused + i, i < num_even, 0) == 1,
            _place_of_odd(odd, fused_before_odd, num_even, r, class_token, IS_APPENDED),
            _place_of_even(i, fused_before, class_token, IS_APPENDED),
        )
        tl.store(new_index + 2 * i, place, i < num_even)
        odd_place = _place_of_odd(i, fused_before, num_even, r, class_token, IS_APPENDED)
        tl.store(new_index + 2 * i + 1, odd_place, i < num_odd)


@triton.jit
def _landing(new_index, weights, b, p, num_tokens, HAS_WEIGHTS: tl.constexpr, TOKENS: tl.constexpr):
    """Which tokens land on these places, and the total of their weights."""
    t = tl.arange(0, TOKENS)
    places = tl.load(new_index + b * num_tokens + t, t < num_tokens, -1)
    lands = places[None, :] == p[:, None]
    weight = tl.full((TOKENS,), 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights + b * num_tokens + t, t < num_tokens, 0.0)
    return lands, tl.sum(tl.where(lands, weight[None, :], 0.0), 1)


@triton.jit
def _merge(
    first, second, new_index, weights, merged_first, merged_second, num_tokens, num_kept, width,
    HAS_SECOND: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One or two tensors (B, T, D) -> (B, T - r, D). A program is some places and values of one image."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    lands, total = _landing(new_index, weights, b, p, num_tokens, HAS_WEIGHTS, TOKENS)
    t = tl.arange(0, TOKENS)
    first_sum, second_sum = tl.zeros((PLACES, BLOCK), tl.float32), tl.zeros((PLACES, BLOCK), tl.float32)
    # Of every place the next token, until all places have got theirs
    token = tl.min(tl.where(lands, t[None, :], TOKENS), 1)
    while tl.min(token, 0) < TOKENS:
        exists = token < TOKENS
        weight = tl.full((PLACES,), 1.0, tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights + b * num_tokens + token, exists, 0.0)
        # Each token's share of its average, so that a token that stays alone is multiplied by exactly 1
        share = tl.where(exists, tl.div_rn(weight, total), 0.0)[:, None]
        source = (b * num_tokens + token[:, None]) * width + d[None, :]
        mask = exists[:, None] & (d < width)[None, :]
        first_sum += share * tl.load(first + source, mask, 0.0).to(tl.float32)
        if HAS_SECOND:
            second_sum += share * tl.load(second + source, mask, 0.0).to(tl.float32)
        token = tl.min(tl.where(lands & (t[None, :] > token[:, None]), t[None, :], TOKENS), 1)
    target = (b * num_kept + p[:, None]) * width + d[None, :]
    mask = (p < num_kept)[:, None] & (d < width)[None, :]
    tl.store(merged_first + target, first_sum, mask)
    if HAS_SECOND:
        tl.store(merged_second + target, second_sum, mask)


@triton.jit
def _merge_backward(
    dfirst_merged, dsecond_merged, new_index, weights, dfirst, dsecond, num_tokens, num_kept, width,
    HAS_SECOND: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One or two gradients (B, T - r, D) -> (B, T, D). A program is as many tokens as there are places in `_merge`."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(new_index + b * num_tokens + t, t < num_tokens, -1)
    _, total = _landing(new_index, weights, b, p, num_tokens, HAS_WEIGHTS, TOKENS)
    weight = tl.full((PLACES,), 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights + b * num_tokens + t, t < num_tokens, 0.0)
    share = tl.div_rn(weight, total)[:, None]
    source = (b * num_kept + p[:, None]) * width + d[None, :]
    target = (b * num_tokens + t[:, None]) * width + d[None, :]
    here = (t < num_tokens)[:, None] & (d < width)[None, :]
    # Places that somebody else made up are not followed out of the tensor
    is_place = here & ((p >= 0) & (p < num_kept))[:, None]
    tl.store(dfirst + target, share * tl.load(dfirst_merged + source, is_place, 0.0).to(tl.float32), here)
    if HAS_SECOND:
        tl.store(dsecond + target, share * tl.load(dsecond_merged + source, is_place, 0.0).to(tl.float32), here)


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
    batch_size, num_tokens, width = metric.shape
    has_index = isinstance(class_index, Tensor)
    if has_index:
        class_index = class_index.to(metric.device).expand(batch_size, 1).contiguous()
    num_even = (num_tokens + 1) // 2
    best = torch.empty(batch_size, num_even, dtype=torch.float32, device=metric.device)
    partner, is_fused = torch.empty(2, batch_size, num_even, dtype=torch.int32, device=metric.device)
    new_index = torch.empty(batch_size, num_tokens, dtype=torch.int64, device=metric.device)
    block = min(64, max(16, triton.next_power_of_2(num_even)))
    # The interpreter has no products in half precision
    in_float32 = metric.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    launch(
        _match, (batch_size,),
        metric.contiguous(), class_index if has_index else new_index, best, partner, is_fused, new_index,
        num_tokens, width, r, min(reach, num_tokens), 0 if has_index else class_index,
        SIMILARITY=_SIMILARITIES[similarity], IS_APPENDED=order == "appended", HAS_INDEX=has_index,
        IN_FLOAT32=in_float32, BLOCK=block, DEPTH=16 if in_float32 else 32,
        # Without tensor cores, products of tokens that are fetched ahead do not fit the registers
        num_warps=4 if block < 64 else 8, num_stages=1 if in_float32 else 2,
    )  # fmt: skip
    return new_index


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
    new_index = match(metric, class_index, r, similarity, order, reach)
    first, second = merge(values, new_index, metric.shape[1] - r, weights)
    return first, second, new_index


def merge(values: list[Tensor], new_index: Tensor, num_kept: int, weights: Tensor | None) -> list[Tensor]:
    """Weighted averages of the tokens that share a place: one or two of `(B, T, D)` to `(B, num_kept, D)`."""
    return _launch_merge(_merge, values, new_index, new_index.shape[1], num_kept, num_kept, weights)


def merge_backward(dmerged: list[Tensor], new_index: Tensor, weights: Tensor | None) -> list[Tensor]:
    """Gradients of the values of `merge`."""
    num_kept, num_tokens = dmerged[0].shape[1], new_index.shape[1]
    return _launch_merge(_merge_backward, dmerged, new_index, num_kept, num_kept, num_tokens, weights)


def _launch_merge(kernel, inputs, new_index, rows_in, num_kept, rows_out, weights) -> list[Tensor]:
    """Launch a kernel that makes `rows_out` of `rows_in` rows of every image."""
    batch_size, num_tokens = new_index.shape
    width = inputs[0].shape[2]
    for tensor in inputs:
        check_shape("values", tensor, (batch_size, rows_in, width))
    check_shape("weights", weights, (batch_size, num_tokens))
    outputs = [tensor.new_empty(batch_size, rows_out, width) for tensor in inputs]
    inputs = [tensor.contiguous() for tensor in inputs]
    # (places, tokens) and (places, values) are tiles of at most 4096, as long as there are fewer tokens than that
    tokens, block = triton.next_power_of_2(num_tokens), min(256, triton.next_power_of_2(width))
    places = max(1, min(16, 4096 // tokens))
    launch(
        kernel, (batch_size, triton.cdiv(rows_out, places), triton.cdiv(width, block)),
        inputs[0], inputs[-1],
        new_index.contiguous(), new_index if weights is None else weights.float().contiguous(),
        outputs[0], outputs[-1], num_tokens, num_kept, width,
        HAS_SECOND=len(inputs) == 2, HAS_WEIGHTS=weights is not None,
        TOKENS=tokens, PLACES=places, BLOCK=block,
    )  # fmt: skip
    return outputs
