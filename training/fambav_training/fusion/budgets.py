"""The paper's token budgets, carried over to other numbers of tokens and layers.

A budget is what a strategy removes in all: tokens per layer times fused layers. With fewer tokens the same share of
them is removed, on the same part of the stack. Layers are counted from 0; the paper counts from 1.
"""

import math
from typing import Any

from modeling_fambav import FambaVConfig

PAPER_NUM_LAYERS = 24
PAPER_NUM_TOKENS = 197
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def scaled_layer(layer: int, num_layers: int) -> int:
    """The layer of a stack of `num_layers` that stands where `layer` does in the paper's."""
    return round(layer / PAPER_NUM_LAYERS * num_layers)


def fused_layers(strategy: str, num_layers: int, start_layer: int | None = None) -> list[int]:
    """Layers that a strategy fuses, as the configuration has it.

    Args:
        strategy: a value of `fusion_strategy`, not `"none"` or `"custom"`.
        num_layers: layers of the model.
        start_layer: first layer that fuses; the strategy's own if None.

    Returns:
        indices of layers, in order.
    """
    config = FambaVConfig(
        num_hidden_layers=num_layers,
        fusion_strategy=strategy,
        fusion_tokens=1,
        fusion_start_layer=start_layer,
    )
    # So many tokens that no layer runs out of them
    schedule = config.fusion_schedule_for(4 * num_layers)
    return [layer for layer, tokens in enumerate(schedule) if tokens > 0]


def even_order(layers: list[int]) -> list[int]:
    """Order layers so that every prefix is spread evenly over the stack."""
    # As the smallest of the multiples of the golden ratio, modulo 1, do
    return [layer for _, layer in sorted((place * _GOLDEN_RATIO % 1, layer) for place, layer in enumerate(layers))]


def spread(total: int, layers: list[int], num_layers: int, num_tokens: int) -> list[int]:
    """Share the tokens to remove among layers, as evenly as the shrinking sequence allows.

    Two layers differ by at most one token, except for late ones that have fewer left to give. Those with one token
    more are themselves spread over the stack, because a token that goes early saves more.

    Args:
        total: tokens to remove, at least 1.
        layers: indices of the layers that fuse.
        num_layers: layers of the model.
        num_tokens: tokens that the first layer receives, class token included.

    Returns:
        tokens removed per layer, a list of length `num_layers`.

    Raises:
        ValueError: if these layers cannot remove so many tokens.
    """
    order = even_order(layers)
    requested = [0] * num_layers
    config = FambaVConfig(num_hidden_layers=num_layers, fusion_strategy="custom", fusion_schedule=[1] * num_layers)
    for _ in range(num_tokens):
        for layer in order:
            # One token more is asked for, so that the total rises by one, or by none where a layer has no more
            requested[layer] += 1
            config.fusion_schedule = requested
            removed = config.fusion_schedule_for(num_tokens)
            if sum(removed) == total:
                return removed
    raise ValueError(f"{len(layers)} layers cannot remove {total} of {num_tokens} tokens, at most {sum(removed)}")


def fusion_fields(
    strategy: str, tokens: int, num_layers: int, num_tokens: int, start_layer: int | None = None
) -> dict[str, Any]:
    """Fields of `FambaVConfig` for a budget of the paper in a model of another size.

    Args:
        strategy: a value of `fusion_strategy`, not `"none"` or `"custom"`.
        tokens: tokens per fused layer in the paper, of 197 and 24 layers.
        num_layers: layers of the model.
        num_tokens: tokens that its first layer receives, class token included.
        start_layer: first layer that fuses in the paper; the strategy's own if None.

    Returns:
        the strategy by its name where all its layers remove the same number, a custom schedule otherwise.

    Raises:
        ValueError: if the strategy's layers cannot remove this share of the tokens.
    """
    paper_total = tokens * len(fused_layers(strategy, PAPER_NUM_LAYERS, start_layer))
    total = round(paper_total * num_tokens / PAPER_NUM_TOKENS)
    start = None if start_layer is None else scaled_layer(start_layer, num_layers)
    layers = fused_layers(strategy, num_layers, start)
    schedule = spread(total, layers, num_layers, num_tokens)

    per_layer = schedule[layers[0]]
    if any(schedule[layer] != per_layer for layer in layers):
        return {"fusion_strategy": "custom", "fusion_schedule": schedule}
    fields = {"fusion_strategy": strategy, "fusion_tokens": per_layer}
    is_own_start = start is None or layers == fused_layers(strategy, num_layers)
    return fields if is_own_start else {**fields, "fusion_start_layer": start}


def coinciding_layers(layers: list[int], num_layers: int) -> dict[int, int]:
    """Which of the paper's layers are the same one in a stack of `num_layers`.

    Args:
        layers: layers of the paper.
        num_layers: layers of the model.

    Returns:
        for each of them the one that stands for all that coincide with it: that whose place changes least.
    """
    groups: dict[int, list[int]] = {}
    for layer in layers:
        groups.setdefault(scaled_layer(layer, num_layers), []).append(layer)
    return {
        layer: min(group, key=lambda member: abs(member * num_layers - scaled * PAPER_NUM_LAYERS))
        for scaled, group in groups.items()
        for layer in group
    }
