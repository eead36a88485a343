"""The paper's budgets at its own size and at others."""

import pytest

from fambav_training.fusion.budgets import (
    PAPER_NUM_LAYERS,
    PAPER_NUM_TOKENS,
    coinciding_layers,
    fused_layers,
    fusion_fields,
    scaled_layer,
    spread,
)
from modeling_fambav import FambaVConfig

# Tokens per fused layer and in all (section 4.1 of the paper)
TABLE_1 = {"all": (7, 168), "interleaved": (14, 168), "lower": (9, 171), "upper": (9, 171)}
SMALL_SIZES = [(num_layers, num_tokens) for num_layers in (12, 24) for num_tokens in (50, 65)]


def removed(fields: dict, num_layers: int, num_tokens: int) -> list[int]:
    """What a model with these fields removes at each layer."""
    config = FambaVConfig(num_hidden_layers=num_layers, **fields)
    return config.fusion_schedule_for(num_tokens)


@pytest.mark.parametrize("strategy", TABLE_1)
def test_budgets_of_the_paper_stay_as_they_are(strategy):
    tokens, total = TABLE_1[strategy]
    fields = fusion_fields(strategy, tokens, PAPER_NUM_LAYERS, PAPER_NUM_TOKENS)
    assert fields == {"fusion_strategy": strategy, "fusion_tokens": tokens}
    assert sum(removed(fields, PAPER_NUM_LAYERS, PAPER_NUM_TOKENS)) == total


def test_schedules_of_the_paper():
    def schedule(strategy: str) -> list[int]:
        fields = fusion_fields(strategy, TABLE_1[strategy][0], PAPER_NUM_LAYERS, PAPER_NUM_TOKENS)
        return removed(fields, PAPER_NUM_LAYERS, PAPER_NUM_TOKENS)

    assert schedule("all") == [7] * 24
    assert schedule("interleaved") == [0, 14] * 12
    assert schedule("lower") == [9] * 19 + [0] * 5
    assert schedule("upper") == [0] * 5 + [9] * 19


def test_starting_layer_of_the_paper():
    fields = fusion_fields("upper", 15, PAPER_NUM_LAYERS, PAPER_NUM_TOKENS, start_layer=14)
    assert fields == {"fusion_strategy": "upper", "fusion_tokens": 15, "fusion_start_layer": 14}
    assert removed(fields, PAPER_NUM_LAYERS, PAPER_NUM_TOKENS) == [0] * 14 + [15] * 10


@pytest.mark.parametrize(("num_layers", "num_tokens"), SMALL_SIZES)
def test_strategies_remove_the_same_share_at_other_sizes(num_layers, num_tokens):
    totals = []
    for strategy, (tokens, paper_total) in TABLE_1.items():
        schedule = removed(fusion_fields(strategy, tokens, num_layers, num_tokens), num_layers, num_tokens)
        assert sum(schedule) == round(paper_total * num_tokens / PAPER_NUM_TOKENS)
        assert [layer for layer, r in enumerate(schedule) if r] == fused_layers(strategy, num_layers)
        totals.append(sum(schedule))
    assert max(totals) - min(totals) <= 1


def test_totals_at_65_tokens():
    for num_layers in (12, 24):
        totals = [
            sum(removed(fusion_fields(strategy, tokens, num_layers, 65), num_layers, 65))
            for strategy, (tokens, _) in TABLE_1.items()
        ]
        assert totals == [55, 55, 56, 56]


def test_a_strategy_keeps_its_name_where_one_number_fits_all_layers():
    assert fusion_fields("upper", 9, 24, 394) == {"fusion_strategy": "upper", "fusion_tokens": 18}
    assert fusion_fields("upper", 9, 24, 65)["fusion_strategy"] == "custom"


@pytest.mark.parametrize("num_layers", [3, 6, 8, 12, 18, 24, 32, 48])
def test_scaled_start_of_upper_is_that_of_the_configuration(num_layers):
    own = fused_layers("upper", num_layers)
    assert fused_layers("upper", num_layers, scaled_layer(5, num_layers)) == own


@pytest.mark.parametrize("total", range(1, 64))
def test_spread_is_exact_even_and_within_what_a_layer_can_remove(total):
    layers = list(range(3, 12))
    schedule = spread(total, layers, 12, 65)
    assert len(schedule) == 12 and sum(schedule) == total
    assert all(schedule[layer] == 0 for layer in range(12) if layer not in layers)
    level, num_tokens = max(schedule), 65
    for layer in layers:
        most = (num_tokens - 1) // 2
        assert schedule[layer] <= most
        assert schedule[layer] >= min(level - 1, most)
        num_tokens -= schedule[layer]


def test_layers_with_one_token_more_are_spread_over_the_stack():
    schedule = spread(55, list(range(24)), 24, 65)
    assert sorted(set(schedule)) == [2, 3]
    for layer in range(25):
        assert sum(schedule[:layer]) == pytest.approx(layer * 55 / 24, abs=1.5)


def test_late_layers_give_what_they_have():
    assert spread(14, [0, 1, 2], 3, 17) == [8, 4, 2]  # 17, 9, 5 and 3 tokens: half of the patches each time
    assert sorted(spread(13, [0, 1, 2], 3, 17)) == [3, 5, 5]


def test_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="2 layers cannot remove 13 of 17 tokens, at most 12"):
        spread(13, [0, 1], 3, 17)


def test_coinciding_layers():
    starts = list(range(14, 0, -1))
    assert coinciding_layers(starts, 24) == {start: start for start in starts}
    halved = coinciding_layers(starts, 12)
    # 13, 12 and 11 are 6.5, 6.0 and 5.5, which all round to 6
    assert halved[13] == halved[12] == halved[11] == 12
    assert halved[14] == 14 and halved[10] == 10
    assert sorted(set(halved.values())) == [1, 2, 4, 6, 8, 10, 12, 14]
    for layer, stands_for in halved.items():
        assert scaled_layer(layer, 12) == scaled_layer(stands_for, 12)
