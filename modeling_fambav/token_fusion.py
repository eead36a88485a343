"""Token fusion: which tokens are alike, and averaging them (paper section 3.2). Pure tensor maths, no parameters.

Glossary
    B, T, D         batch, tokens (class token included), width
    r               tokens removed from every image of the batch
    even, odd       tokens by index; each even token looks for its most similar odd token (its partner)
    fused           the r even tokens that join their partner
    size            number of initial tokens that a token stands for, 1 at first; shape (B, T)
    token map       index of the token that now carries each initial token; shape (B, T_0)

Two steps, so that one matching serves several tensors: `match_tokens` reads the similarities and returns a `Matching`
of indices; `Matching.merge` averages values along it. All shapes are static: T shrinks by exactly r.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Where every token of a batch goes when r tokens are fused.

    Attributes:
        new_index (`Tensor` of shape `(B, T)`): place of each token among the survivors, its partner's if it is fused.
        kept (`Tensor` of shape `(B, T - r)`): indices of the survivors, in their new order.
        fused (`Tensor` of shape `(B, r)`): indices of the tokens that join another.
    """

    new_index: Tensor
    kept: Tensor
    fused: Tensor

    def merge(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Average all tokens that land on the same place.

        Args:
            values (`Tensor` of shape `(B, T, D)`): tokens.
            weights (`Tensor` of shape `(B, T)`, *optional*): weights of the average, all 1 if not given.

        Returns:
            `Tensor` of shape `(B, T - r, D)`. Gradients flow to `values`, not to the matching.
        """
        if weights is None:
            weights = torch.ones_like(self.new_index, dtype=torch.float32)
        # Each token's share of its average, so that a token that stays alone is multiplied by exactly 1.
        share = weights / self.sum(weights).gather(1, self.new_index)
        return self.sum(values * share.unsqueeze(-1).to(values.dtype))

    def sum(self, values: Tensor) -> Tensor:
        """Add up all tokens that land on the same place: `(B, T, ...)` to `(B, T - r, ...)`."""
        batch_size, num_tokens = self.new_index.shape
        num_kept = self.kept.shape[1]
        # Whole rows are moved by flat index, which copies D contiguous values at a time.
        first_row = torch.arange(batch_size, device=values.device).unsqueeze(1)
        rows = values.flatten(0, 1)
        survivors = rows.index_select(0, (self.kept + first_row * num_tokens).flatten())
        joining = rows.index_select(0, (self.fused + first_row * num_tokens).flatten())
        destination = (self.new_index.gather(1, self.fused) + first_row * num_kept).flatten()
        return survivors.index_add(0, destination, joining).unflatten(0, (batch_size, num_kept))

    def compose(self, token_map: Tensor) -> Tensor:
        """Carry a token map through this fusion: `(B, T_0)` indices into T tokens become indices into T - r."""
        return self.new_index.gather(1, token_map)


@torch.no_grad()
def match_tokens(
    metric: Tensor, r: int, class_index: int | Tensor = 0, similarity: str = "cosine", order: str = "raster"
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

    Raises:
        ValueError: if r is out of range, or `similarity` or `order` unknown.
    """
    num_tokens = metric.shape[1]
    if not 0 <= r <= (num_tokens - 1) // 2:
        raise ValueError(f"r={r}: expected 0 <= r <= {(num_tokens - 1) // 2} for {num_tokens} tokens")

    index = torch.arange(num_tokens, device=metric.device).expand(metric.shape[0], -1)
    is_class = index == class_index
    if num_tokens == 3:
        first_patch, last_patch = index[:, :1] + is_class[:, :1].long(), index[:, 2:] - is_class[:, 2:].long()
        fused, partner = first_patch[:, :r], last_patch[:, :r]
    else:
        scores = _similarity(metric[:, ::2], metric[:, 1::2], similarity)
        scores = scores.masked_fill(is_class[:, ::2, None] | is_class[:, None, 1::2], -torch.inf)
        best_score, best_odd = scores.max(dim=-1)
        fused_even = best_score.topk(r, dim=-1).indices
        fused, partner = 2 * fused_even, 2 * best_odd.gather(1, fused_even) + 1

    survives = torch.ones_like(index, dtype=torch.bool).scatter(1, fused, False)
    if order == "raster":
        place = survives.cumsum(1) - 1
    elif order == "appended":
        # Rank within [class token | even | odd]; the survivors of one group follow those of the groups before it.
        is_odd = (index % 2 == 1) & ~is_class
        is_even = survives & ~is_odd & ~is_class
        place = torch.where(is_even, is_even.cumsum(1), is_even.sum(1, keepdim=True) + is_odd.cumsum(1))
        place = place.masked_fill(is_class, 0)
    else:
        raise ValueError(f"order={order!r}: expected 'raster' or 'appended'")
    new_index = place.scatter(1, fused, place.gather(1, partner))

    # Invert the survivors' places without sorting. Fused tokens write to a spare last column that is cut off.
    num_kept = num_tokens - r
    kept = index.new_zeros(index.shape[0], num_kept + 1)
    kept = kept.scatter(1, place.masked_fill(~survives, num_kept), index)[:, :num_kept]
    return Matching(new_index, kept, fused)


def _similarity(even: Tensor, odd: Tensor, similarity: str) -> Tensor:
    """Similarity of every even to every odd token: (B, T_even, D), (B, T_odd, D) -> (B, T_even, T_odd)."""
    if similarity == "cosine":
        even, odd = torch.nn.functional.normalize(even, dim=-1), torch.nn.functional.normalize(odd, dim=-1)
    elif similarity not in ("dot", "euclidean"):
        raise ValueError(f"similarity={similarity!r}: expected 'cosine', 'dot' or 'euclidean'")
    scores = even @ odd.mT
    if similarity == "euclidean":
        # -|a - b|^2; the term |a|^2 must stay, because the best scores are compared between even tokens.
        scores = 2 * scores - even.square().sum(-1).unsqueeze(-1) - odd.square().sum(-1).unsqueeze(-2)
    return scores


def unmerge(hidden_states: Tensor, token_map: Tensor) -> Tensor:
    """Give every initial token the value of the token that now carries it.

    Args:
        hidden_states (`Tensor` of shape `(B, T, D)`): tokens after fusion.
        token_map (`Tensor` of shape `(B, T_0)`): index of the carrier of each initial token (int64).

    Returns:
        `Tensor` of shape `(B, T_0, D)`.
    """
    return hidden_states.gather(1, token_map.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))
