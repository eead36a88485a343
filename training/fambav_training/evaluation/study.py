"""What a trained classifier gets wrong, and how its accuracy changes with the strength of its fusion."""

from collections import Counter
from typing import Any

import torch

from fambav_training.evaluation.scoring import Scorer
from fambav_training.fusion.settings import STRATEGIES, UNFUSED, fused
from fambav_training.fusion.targets import most_tokens
from modeling_fambav import FambaVConfig

_STEPS = 4  # numbers of tokens up to twice the model's own


def study(scorer: Scorer, num_pairs: int = 10) -> dict[str, Any]:
    """Most confused pairs of classes and accuracy over fusion, on the images of `scorer`.

    Returns:
        `images`, their number; `confused_pairs`, see `most_confused`; and `fusion`, rows with `fusion_tokens` (0:
        without fusion), `top1` in percent and `tokens_left` at the last layer. There are no rows if the model's own
        strategy has not one number for all layers.
    """
    predicted, labels = scorer.predictions()
    names = scorer.model.config.id2label
    rows = []
    for fusion in robustness_settings(scorer.model.config):
        with fused(scorer.model.config, fusion):
            rows.append(
                {
                    "fusion_tokens": fusion.get("fusion_tokens", 0),
                    "top1": scorer.score()["top1"],
                    "tokens_left": scorer.model.config.sequence_lengths[-1],
                }
            )
    pairs = most_confused(predicted, labels, names, num_pairs)
    return {"images": len(labels), "confused_pairs": pairs, "fusion": rows}


def robustness_settings(config: FambaVConfig) -> list[dict[str, Any]]:
    """No fusion, and the model's own strategy with numbers of tokens up to twice its own, as far as tokens go."""
    if config.fusion_strategy not in STRATEGIES:
        return []
    largest = min(2 * config.fusion_tokens, most_tokens(config))
    numbers = {max(1, round(largest * step / _STEPS)) for step in range(1, _STEPS + 1)} | {config.fusion_tokens}
    strategy = {"fusion_strategy": config.fusion_strategy}
    return [UNFUSED, *({**strategy, "fusion_tokens": number} for number in sorted(numbers))]


def most_confused(
    predicted: torch.Tensor, labels: torch.Tensor, names: dict[int, str], num_pairs: int
) -> list[dict[str, Any]]:
    """Pairs of classes that are taken for each other most often, in either direction.

    Args:
        predicted, labels: `(B,)`, indices of classes.
        names: of the classes.
        num_pairs: at most so many; those that come first by name among equals.

    Returns:
        for each pair its two `classes`, and the number of `images` of one that were taken for the other.
    """
    wrong = predicted != labels
    counts = Counter(
        tuple(sorted((names[one], names[other])))
        for one, other in zip(predicted[wrong].tolist(), labels[wrong].tolist())
    )
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"classes": list(pair), "images": count} for pair, count in ranked[:num_pairs]]
