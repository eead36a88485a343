"""How much fusion it takes to leave a given share of tokens or multiply-adds, or to be a number of times as fast."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.fusion.budgets import even_order, fused_layers
from fambav_training.fusion.multiply_adds import multiply_add_share
from fambav_training.fusion.settings import STRATEGIES, with_fusion
from fambav_training.fusion.speed import Speedup, measured_speedup
from modeling_fambav import FambaVConfig

# One number of tokens for all layers is simpler to read than a schedule, and good enough this near to the share
_TOLERANCE = 0.01


def token_share(config: FambaVConfig) -> float:
    """Tokens that a layer scans on average, as a share of those that it scans without fusion."""
    return statistics.mean(config.sequence_lengths) / (config.num_patches + 1)


# By name of what is left
_SHARES = {"tokens": token_share, "multiply-adds": multiply_add_share}


def most_tokens(config: FambaVConfig) -> int:
    """The largest number of tokens that a layer can remove; a larger one is clamped to it."""
    return config.num_patches // 2


def fusion_for_share(config: FambaVConfig, share: float, strategy: str, of: str = "tokens") -> dict[str, Any]:
    """Fusion that leaves this share of what the model has without fusion.

    Args:
        config: gives the number of tokens and layers; its own fusion does not matter.
        share: above 0 and below 1; 0.5 is half the tokens, or half of the multiply-adds.
        strategy: `"all"`, `"interleaved"`, `"lower"` or `"upper"`; their layers are fused.
        of: of what it is a share, `"tokens"` or `"multiply-adds"`.

    Returns:
        the strategy and its `fusion_tokens` if that comes within a hundredth of the share. Otherwise a custom
        schedule that comes nearer, whose layers differ by one token, except for late ones that have fewer left to
        give. At least one token is removed.

    Raises:
        ValueError: if the share or the strategy is none of these, or the strategy cannot remove so many tokens.
    """
    _check_strategy(strategy)
    if not 0 < share < 1:
        raise ValueError(f"share of the {of} {share:g}: expected a number above 0 and below 1")
    order = even_order(fused_layers(strategy, config.num_hidden_layers))
    most = most_tokens(config)

    def by_number(tokens: int) -> dict[str, Any]:
        return {"fusion_strategy": strategy, "fusion_tokens": tokens}

    def by_schedule(total: int) -> dict[str, Any]:
        tokens, rest = divmod(total, len(order))
        asked = [0] * config.num_hidden_layers
        for place, layer in enumerate(order):
            asked[layer] = tokens + (place < rest)
        fusion = {"fusion_strategy": "custom", "fusion_schedule": asked}
        return {**fusion, "fusion_schedule": with_fusion(config, fusion).tokens_removed}

    def share_of(fusion: dict[str, Any]) -> float:
        return _SHARES[of](with_fusion(config, fusion))

    def distance(fusion: dict[str, Any]) -> float:
        return abs(share_of(fusion) - share)

    def nearest(fusion_for: Callable[[int], dict[str, Any]], largest: int) -> dict[str, Any]:
        # The more is asked for, the fewer tokens in every layer: the share lies between two neighbours. Multiply-adds
        # fall nearly as steadily: with fewer tokens than layers, one more layer that compares can cost more than its
        # token saves.
        enough = _smallest(lambda number: share_of(fusion_for(number)) <= share, largest)
        return min((fusion_for(number) for number in (enough, max(1, enough - 1))), key=distance)

    least = share_of(by_number(most))
    if share < least:
        least = math.ceil(1000 * least) / 1000  # so that it can be asked for
        raise ValueError(f"share of the {of} {share:g}: {strategy!r} fusion of this model leaves at least {least:.3f}")
    fusion = nearest(by_number, most)
    if distance(fusion) <= _TOLERANCE:
        return fusion
    return min(fusion, nearest(by_schedule, most * len(order)), key=distance)


def fusion_for_speedup(
    model: PreTrainedModel,
    pixel_values: Tensor,
    speedup: float,
    strategy: str,
    measure: Callable[[PreTrainedModel, Tensor, dict[str, Any]], Speedup] = measured_speedup,
) -> dict[str, Any]:
    """The least fusion that makes the forward pass this many times as fast, measured here and now.

    A bisection, in which a single wrong measurement leads astray, and then steps of one token until what is found is
    fast enough by a fresh measurement, and one token less is not.

    Args:
        model: a Famba-V model; its configuration is afterwards what it was.
        pixel_values: a batch, on the model's device; speed depends on its size.
        speedup: above 1; 1.5 is two thirds of the time without fusion.
        strategy: `"all"`, `"interleaved"`, `"lower"` or `"upper"`.
        measure: how many times as fast the model is with some fusion fields as without fusion.

    Returns:
        the strategy and its `fusion_tokens`. Two runs may differ by as much as their measurements.

    Raises:
        ValueError: if the speedup or the strategy is none of these, or the strategy does not get so far.
    """
    _check_strategy(strategy)
    if not speedup > 1:
        raise ValueError(f"speedup {speedup}: expected a number above 1")

    def fusion_for(tokens: int) -> dict[str, Any]:
        return {"fusion_strategy": strategy, "fusion_tokens": tokens}

    def times_as_fast(tokens: int) -> float:
        return measure(model, pixel_values, fusion_for(tokens)).times

    most = most_tokens(model.config)
    reached = times_as_fast(most)
    if reached < speedup:
        share = token_share(with_fusion(model.config, fusion_for(most)))
        raise ValueError(
            f"speedup {speedup}: {strategy!r} fusion makes this model at most {reached:.2f} times as fast on this "
            f"machine, with {share:.0%} of the tokens at batch size {len(pixel_values)}"
        )
    tokens = _smallest(lambda tokens: times_as_fast(tokens) >= speedup, most)
    if times_as_fast(tokens) >= speedup:
        while tokens > 1 and times_as_fast(tokens - 1) >= speedup:
            tokens -= 1
    else:
        tokens += tokens < most
        while tokens < most and times_as_fast(tokens) < speedup:
            tokens += 1
    return fusion_for(tokens)


def _smallest(is_enough: Callable[[int], bool], largest: int) -> int:
    """The smallest number in [1, largest] that is enough, by bisection; the largest is known to be."""
    too_few, enough = 0, largest
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    return enough


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")
