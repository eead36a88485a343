"""Token fusion: which tokens are alike, and averaging them (paper section 3.2). Pure tensor maths, no parameters.

Glossary
    B, T, D         batch, tokens (class token included), width
    r               tokens removed from every image of the batch
    even, odd       tokens by index; each even token looks for its most similar odd token (its partner)
    fused           the r even tokens that join their partner
    size            number of initial tokens that a token stands for, 1 at first; shape (B, T)
    token map       index of the token that now carries each initial token; shape (B, T_0)

Two steps, so that one matching serves several tensors: `match_tokens` reads the similarities and returns a `Matching`
of indices; `Matching.merge` averages values along it. All shapes are static: T shrinks by exactly r. Where a backend
has kernels (token_fusion_numba.py, token_fusion_triton.py), the operations here are what those are tested against.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .backends import HAS_KERNELS, provides, selective_scan_backend
from .operators import define

# As torch.nn.functional.normalize
_SMALLEST_NORM = 1e-12


class Matching(NamedTuple):
    """Where every token of a batch goes when r tokens are fused.

    Attributes:
        new_index (`Tensor` of shape `(B, T)`): place of each token among the survivors, its partner's if it is fused.
        num_kept (`int`): T - r.
    """

    new_index: Tensor
    num_kept: int

    def merge(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Average all tokens that land on the same place.

        Args:
            values (`Tensor` of shape `(B, T, D)`): tokens.
            weights (`Tensor` of shape `(B, T)`, *optional*): weights of the average, all 1 if not given.

        Returns:
            `Tensor` of shape `(B, T - r, D)`. Gradients flow to `values`, not to the matching or the weights.
        """
        if _has_kernels(values):
            return _merge(values, self.new_index, self.num_kept, weights)
        if weights is None:
            weights = torch.ones_like(self.new_index, dtype=torch.float32)
        # Each token's share of its average, so that a token that stays alone is multiplied by exactly 1.
        share = (weights / self.sum(weights).gather(1, self.new_index)).detach()
        return self.sum(values * share.unsqueeze(-1).to(values.dtype))

    def sum(self, values: Tensor) -> Tensor:
        """Add up all tokens that land on the same place: `(B, T, ...)` to `(B, T - r, ...)`."""
        batch_size = values.shape[0]
        # Whole rows are moved by flat index, which copies D contiguous values at a time.
        first_row = torch.arange(0, batch_size * self.num_kept, self.num_kept, device=values.device)
        places = (self.new_index + first_row.unsqueeze(1)).flatten()
        totals = values.new_zeros(batch_size * self.num_kept, *values.shape[2:])
        return totals.index_add(0, places, values.flatten(0, 1)).unflatten(0, (batch_size, self.num_kept))

    def compose(self, token_map: Tensor) -> Tensor:
        """Carry a token map through this fusion: `(B, T_0)` indices into T tokens become indices into T - r."""
        return self.new_index.gather(1, token_map)


def fuse(
    metric: Tensor,
    stream: Tensor,
    r: int,
    class_index: int | Tensor = 0,
    similarity: str = "cosine",
    order: str = "raster",
    weights: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Matching]:
    """`match_tokens` of a metric, and `Matching.merge` of it and of another tensor `(B, T, D)`.

    With kernels this is one operator: for few tokens, operators take longer to start than to run.
    """
    if metric.shape[1] <= 3 or not _has_kernels(metric):
        matching = match_tokens(metric, r, class_index, similarity, order, window)
        return matching.merge(metric, weights), matching.merge(stream, weights), matching
    _check_matching(metric, r, similarity, order, window)
    place, index = _place_and_index(class_index)
    reach = _reach(window, metric)
    merged, merged_stream, new_index = _fuse(metric, stream, r, place, index, similarity, order, reach, weights)
    return merged, merged_stream, Matching(new_index, metric.shape[1] - r)


@torch.no_grad()
def match_tokens(
    metric: Tensor,
    r: int,
    class_index: int | Tensor = 0,
    similarity: str = "cosine",
    order: str = "raster",
    window: int | None = None,
) -> Matching:
    """Choose the r even tokens that are most similar to an odd token, and say where every token goes.

    The class token is never fused and never receives. With three tokens there is one pair of patches and nothing to
    choose: the first joins the second, also when the class token between them gives both an even index.

    Args:
        metric (`Tensor` of shape `(B, T, D)`): what is compared, the normed tokens.
        r (`int`): tokens to remove, 0 <= r <= (T - 1) // 2.
        class_index (`int` or `Tensor` of shape `(B, 1)`): index of the class token.
        similarity (`str`): `"cosine"`, `"dot"` or `"euclidean"` (the negative squared distance).
        order (`str`): `"raster"`, survivors keep their order and a fused token stands where its odd partner stood, or
            `"appended"`, the published one: class token, unfused even tokens, odd tokens.
        window (`int`, *optional*): compare only tokens at most this many places apart, at least 1; all if not given.

    Similarities are computed in float32 (float64 for a float64 metric), under autocast too: those of tokens that are
    alike differ by less than half precision tells apart.

    Raises:
        ValueError: if r or `window` is out of range, or `similarity` or `order` unknown.
    """
    batch_size, num_tokens = metric.shape[:2]
    _check_matching(metric, r, similarity, order, window)
    reach = _reach(window, metric)
    if num_tokens > 3 and _has_kernels(metric):
        new_index = _match(metric, r, *_place_and_index(class_index), similarity, order, reach)
    else:
        index = torch.arange(num_tokens, device=metric.device).expand(batch_size, -1)
        is_class = index == class_index
        if num_tokens > 3:
            fused, partner = _most_similar(_scores(*_products_and_norms(metric), similarity), r, is_class, reach)
        else:
            fused = index[:, :r] + is_class[:, :r].long()
            partner = index[:, num_tokens - r :] - is_class[:, num_tokens - r :].long()
        place = _places(fused, is_class, order)
        new_index = place.scatter(1, fused, place.gather(1, partner))
    return Matching(new_index, num_tokens - r)


def _check_matching(metric: Tensor, r: int, similarity: str, order: str, window: int | None) -> None:
    num_tokens = metric.shape[1]
    if not 0 <= r <= (num_tokens - 1) // 2:
        raise ValueError(f"r={r}: expected 0 <= r <= {(num_tokens - 1) // 2} for {num_tokens} tokens")
    if similarity not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"similarity={similarity!r}: expected 'cosine', 'dot' or 'euclidean'")
    if order not in ("raster", "appended"):
        raise ValueError(f"order={order!r}: expected 'raster' or 'appended'")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, or None")


def _reach(window: int | None, metric: Tensor) -> int:
    """How many places apart tokens are compared at most; as many as there are if no window is given."""
    return metric.shape[1] if window is None else window


def _place_and_index(class_index: int | Tensor) -> tuple[int, Tensor | None]:
    """The index of the class token as operators take it: the tensor is there if each image has its own."""
    return (0, class_index) if isinstance(class_index, Tensor) else (class_index, None)


def _products_and_norms(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products of even and odd tokens (B, T_even, T_odd), and lengths of all (B, T)."""
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    with maybe_autocast(metric.device.type, enabled=False):
        products = metric[:, ::2] @ metric[:, 1::2].mT
    return products, torch.linalg.vector_norm(metric, dim=-1)


def _scores(products: Tensor, norms: Tensor, similarity: str) -> Tensor:
    """Similarity of every even to every odd token, (B, T_even, T_odd), from dot products and lengths."""
    even, odd = norms[:, ::2, None], norms[:, None, 1::2]
    if similarity == "cosine":
        return products / (even.clamp(min=_SMALLEST_NORM) * odd.clamp(min=_SMALLEST_NORM))
    if similarity == "euclidean":
        # -|a - b|^2; the term |a|^2 must stay, because the best scores are compared between even tokens.
        return 2 * products - even.square() - odd.square()
    return products


def _most_similar(scores: Tensor, r: int, is_class: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Indices (B, r) of the even tokens with the best scores, and of their partners at most `reach` places away."""
    # Nothing is less similar than the class token, also where products overflow
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(is_class[:, ::2, None] | is_class[:, None, 1::2], -torch.inf)
    num_tokens = is_class.shape[1]
    if reach < num_tokens - 1:
        # Every even token has an odd neighbour other than the class token, except possibly one at an end, which no
        # allowed r needs
        index = torch.arange(num_tokens, device=is_class.device)
        scores = scores.masked_fill((index[::2, None] - index[None, 1::2]).abs() > reach, -torch.inf)
    best_score, best_odd = scores.max(dim=-1)
    fused_even = best_score.topk(r, dim=-1).indices
    return 2 * fused_even, 2 * best_odd.gather(1, fused_even) + 1


def _places(fused: Tensor, is_class: Tensor, order: str) -> Tensor:
    """Place of every survivor, (B, T); those of fused tokens mean nothing."""
    survives = torch.ones_like(is_class).scatter(1, fused, False)
    if order == "raster":
        return survives.cumsum(1) - 1
    # Rank within [class token | even | odd]; the survivors of one group follow those of the groups before it.
    is_odd = ~is_class
    is_odd[:, ::2] = False
    is_even = survives & ~is_odd & ~is_class
    place = torch.where(is_even, is_even.cumsum(1), is_even.sum(1, keepdim=True) + is_odd.cumsum(1))
    return place.masked_fill(is_class, 0)


def unmerge(hidden_states: Tensor, token_map: Tensor) -> Tensor:
    """Give every initial token the value of the token that now carries it.

    Args:
        hidden_states (`Tensor` of shape `(B, T, D)`): tokens after fusion.
        token_map (`Tensor` of shape `(B, T_0)`): index of the carrier of each initial token (int64).

    Returns:
        `Tensor` of shape `(B, T_0, D)`.
    """
    return hidden_states.gather(1, token_map.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


class FusionKernels(NamedTuple):
    """Functions that a backend in `HAS_KERNELS` provides, see token_fusion_triton.py."""

    match: Callable
    match_and_merge: Callable
    merge: Callable
    merge_backward: Callable


@provides("numba")
def _numba_kernels() -> FusionKernels:
    from .token_fusion_numba import match, match_and_merge, merge, merge_backward

    return FusionKernels(match, match_and_merge, merge, merge_backward)


@provides("triton")
def _triton_kernels() -> FusionKernels:
    from .token_fusion_triton import match, match_and_merge, merge, merge_backward

    return FusionKernels(match, match_and_merge, merge, merge_backward)


def _has_kernels(tensor: Tensor) -> bool:
    return selective_scan_backend(tensor) in HAS_KERNELS


def _kernels(tensor: Tensor) -> FusionKernels:
    """Kernels for this tensor's device, even if the backend has changed between forward and backward."""
    backend = selective_scan_backend(tensor)
    return _triton_kernels() if backend == "triton" or tensor.device.type != "cpu" else _numba_kernels()


# ---- kernels as torch operators ----


def _compute_match(
    metric: Tensor, r: int, class_place: int, class_index: Tensor | None, similarity: str, order: str, reach: int
) -> Tensor:
    """Where every token goes. `class_place` is the index of the class token unless each image has its own."""
    class_token = class_place if class_index is None else class_index
    return _kernels(metric).match(metric, class_token, r, similarity, order, reach)


def _match_shapes(metric, r, class_place, class_index, similarity, order, reach):
    return metric.new_empty(metric.shape[:2], dtype=torch.int64)


_match = define("match_tokens", _compute_match, _match_shapes)


def _compute_merge(values: Tensor, new_index: Tensor, num_kept: int, weights: Tensor | None) -> Tensor:
    return _kernels(values).merge([values], new_index, num_kept, weights)[0]


def _merge_shapes(values, new_index, num_kept, weights):
    return values.new_empty(values.shape[0], num_kept, values.shape[2])


def _compute_merge_backward(dmerged: Tensor, new_index: Tensor, weights: Tensor | None) -> Tensor:
    return _kernels(dmerged).merge_backward([dmerged], new_index, weights)[0]


def _merge_backward_shapes(dmerged, new_index, weights):
    return dmerged.new_empty(*new_index.shape, dmerged.shape[2])


_merge_backward = define("merge_backward", _compute_merge_backward, _merge_backward_shapes)


def _save_matching(ctx, inputs, output):
    _, new_index, _, weights = inputs
    ctx.save_for_backward(new_index, weights)


def _backward_of_merge(ctx, dmerged):
    return _merge_backward(dmerged, *ctx.saved_tensors), None, None, None


_merge = define("merge", _compute_merge, _merge_shapes, _save_matching, _backward_of_merge)


def _compute_fuse(
    metric: Tensor,
    stream: Tensor,
    r: int,
    class_place: int,
    class_index: Tensor | None,
    similarity: str,
    order: str,
    reach: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both merged, and where every token went, see `_compute_match`."""
    class_token = class_place if class_index is None else class_index
    values = [metric, stream]
    return _kernels(metric).match_and_merge(metric, class_token, r, similarity, order, reach, values, weights)


def _fuse_shapes(metric, stream, r, class_place, class_index, similarity, order, reach, weights):
    batch_size, num_tokens, _ = metric.shape
    merged = (tensor.new_empty(batch_size, num_tokens - r, tensor.shape[2]) for tensor in (metric, stream))
    return *merged, metric.new_empty(batch_size, num_tokens, dtype=torch.int64)


def _compute_fuse_backward(
    dmerged: Tensor, dmerged_stream: Tensor, new_index: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    dmetric, dstream = _kernels(dmerged).merge_backward([dmerged, dmerged_stream], new_index, weights)
    return dmetric, dstream


def _fuse_backward_shapes(dmerged, dmerged_stream, new_index, weights):
    return tuple(_merge_backward_shapes(gradient, new_index, weights) for gradient in (dmerged, dmerged_stream))


_fuse_backward = define("fuse_backward", _compute_fuse_backward, _fuse_backward_shapes)


def _save_fused(ctx, inputs, output):
    ctx.save_for_backward(output[2], inputs[8])
    ctx.mark_non_differentiable(output[2])


def _backward_of_fuse(ctx, dmerged, dmerged_stream, _):
    return *_fuse_backward(dmerged, dmerged_stream, *ctx.saved_tensors), *[None] * 7


_fuse = define("fuse", _compute_fuse, _fuse_shapes, _save_fused, _backward_of_fuse)
