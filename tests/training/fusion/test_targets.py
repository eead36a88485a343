"""How much fusion it takes: near to the share of tokens, and the least that is fast enough."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from fambav_training.fusion.budgets import fused_layers
from fambav_training.fusion.settings import STRATEGIES, with_fusion
from fambav_training.fusion.speed import Speedup
from fambav_training.fusion.targets import fusion_for_share, fusion_for_speedup, most_tokens, token_share
from modeling_fambav import FambaVConfig
from support.helpers import tiny_config

PIXEL_VALUES = torch.zeros(2, 3, 16, 16)


def quickstart_config(**fields) -> FambaVConfig:
    """64 patches and a class token, six layers."""
    return FambaVConfig(image_size=32, patch_size=4, num_hidden_layers=6, **fields)


def with_number(config: FambaVConfig, strategy: str, tokens: int) -> FambaVConfig:
    return with_fusion(config, {"fusion_strategy": strategy, "fusion_tokens": tokens})


# ---- share of the tokens ----


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("config", [FambaVConfig(), quickstart_config()], ids=["paper", "quickstart"])
def test_share_is_met_on_the_layers_of_the_strategy(config, strategy):
    for share in (0.5, 0.6, 0.75, 0.9, 0.98):
        fused = with_fusion(config, fusion_for_share(config, share, strategy))
        assert token_share(fused) == pytest.approx(share, abs=0.01)
        layers = {layer for layer, removed in enumerate(fused.tokens_removed) if removed}
        assert layers <= set(fused_layers(strategy, config.num_hidden_layers))


@pytest.mark.parametrize("strategy, tokens", [("all", 7), ("interleaved", 14), ("lower", 9), ("upper", 9)])
def test_share_of_the_papers_budgets_gives_them_back(strategy, tokens):
    config = FambaVConfig(fusion_strategy="none")
    share = token_share(with_number(config, strategy, tokens))
    assert fusion_for_share(config, share, strategy) == {"fusion_strategy": strategy, "fusion_tokens": tokens}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_schedule_is_taken_only_where_one_number_rounds_badly(strategy):
    config = quickstart_config()
    shares = [token_share(with_number(config, strategy, tokens)) for tokens in range(1, most_tokens(config) + 1)]
    for share in (0.55, 0.61, 0.7, 0.83, 0.96):
        nearest = min(abs(of_number - share) for of_number in shares)
        fusion = fusion_for_share(config, share, strategy)
        if nearest <= 0.01:
            assert fusion["fusion_strategy"] == strategy
        else:
            assert fusion["fusion_strategy"] == "custom"
            assert abs(token_share(with_fusion(config, fusion)) - share) < nearest


def test_schedule_is_even():
    fusion = fusion_for_share(quickstart_config(), 0.82, "all")
    assert fusion["fusion_strategy"] == "custom"
    assert max(fusion["fusion_schedule"]) - min(fusion["fusion_schedule"]) == 1


def test_layers_that_run_out_of_tokens_do_not_stop_the_search():
    config = tiny_config(num_hidden_layers=24)
    least = token_share(with_number(config, "all", most_tokens(config)))
    for share in (least, least + 0.01, 0.3):
        fused = with_fusion(config, fusion_for_share(config, share, "all"))
        assert token_share(fused) == pytest.approx(share, abs=0.02)


def test_at_least_one_token_is_removed():
    fused = with_fusion(tiny_config(), fusion_for_share(tiny_config(), 0.999, "upper"))
    assert sum(fused.tokens_removed) == 1


def test_own_fusion_does_not_matter_and_stays():
    config = quickstart_config(fusion_strategy="custom", fusion_schedule=[0, 0, 0, 0, 0, 30])
    before = config.to_dict()
    assert fusion_for_share(config, 0.6, "lower") == fusion_for_share(quickstart_config(), 0.6, "lower")
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "share, strategy, expected",
    [
        (0.1, "upper", r"share of the tokens 0.1: 'upper' fusion of this model leaves at least 0\.\d\d\d"),
        (0.0, "all", "share of the tokens 0: expected a number above 0 and below 1"),
        (1.0, "all", "share of the tokens 1:"),
        (math.nan, "all", "share of the tokens nan"),
        (0.5, "custom", "strategy 'custom': expected one of all, interleaved, lower, upper"),
        (0.5, "none", "strategy 'none'"),
    ],
    ids=str,
)
def test_impossible_shares_are_refused(share, strategy, expected):
    with pytest.raises(ValueError, match=expected):
        fusion_for_share(tiny_config(), share, strategy)


def test_impossible_shares_of_the_multiply_adds_are_refused():
    with pytest.raises(ValueError, match="share of the multiply-adds 0.1: 'upper' fusion of this model leaves"):
        fusion_for_share(tiny_config(), 0.1, "upper", of="multiply-adds")


# ---- speed ----


def speedup_by_tokens(model, pixel_values, fusion) -> Speedup:
    """Stands for the measurement: a pass takes as long as its tokens, and a tenth of that for everything else."""
    times = 1.1 / (token_share(with_fusion(model.config, fusion)) + 0.1)
    return Speedup(times, low=times, high=times, rounds=7, seconds=1 / times)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("speedup", [1.001, 1.2, 1.5, 1.8])
def test_least_fusion_that_is_fast_enough(strategy, speedup):
    model = SimpleNamespace(config=quickstart_config(fusion_strategy="none"))
    calls = []

    def measure(*arguments) -> Speedup:
        calls.append(arguments)
        return speedup_by_tokens(*arguments)

    def is_fast_enough(tokens: int) -> bool:
        fusion = {"fusion_strategy": strategy, "fusion_tokens": tokens}
        return speedup_by_tokens(model, PIXEL_VALUES, fusion).times >= speedup

    fusion = fusion_for_speedup(model, PIXEL_VALUES, speedup, strategy, measure)
    least = next(tokens for tokens in range(1, 33) if is_fast_enough(tokens))
    assert fusion == {"fusion_strategy": strategy, "fusion_tokens": least}
    assert len(calls) <= 8  # bisection of 32 numbers, the largest one, what is found, and one token less
    assert model.config.fusion_strategy == "none"


@pytest.mark.parametrize("wrong_call", range(8))
@pytest.mark.parametrize("wrong_by", [0.8, 1.25])
def test_one_wrong_measurement_changes_little(wrong_call, wrong_by):
    model = SimpleNamespace(config=quickstart_config(fusion_strategy="none"))
    calls = []

    def measure(*arguments) -> Speedup:
        calls.append(arguments)
        right = speedup_by_tokens(*arguments)
        is_wrong = len(calls) - 1 == wrong_call
        return dataclasses.replace(right, times=right.times * wrong_by) if is_wrong else right

    right, fusion = (
        fusion_for_speedup(model, PIXEL_VALUES, 1.5, "upper", measure_) for measure_ in (speedup_by_tokens, measure)
    )
    # If it is the last one that is wrong, nothing tells: then it is off by a token
    assert fusion["fusion_tokens"] == pytest.approx(right["fusion_tokens"], abs=1 if wrong_call >= 6 else 0)


def test_what_never_measures_as_fast_enough_again_ends_at_the_most():
    model, calls = SimpleNamespace(config=quickstart_config()), []

    def measure(model, pixel_values, fusion) -> Speedup:
        calls.append(fusion["fusion_tokens"])
        right = speedup_by_tokens(model, pixel_values, fusion)
        return right if len(calls) <= 6 else dataclasses.replace(right, times=1.0)

    assert fusion_for_speedup(model, PIXEL_VALUES, 2.0, "upper", measure)["fusion_tokens"] == most_tokens(model.config)
    assert len(calls) == len(set(calls[6:])) + 6  # each is measured afresh once


def test_speedup_out_of_reach_says_how_far_it_gets():
    model = SimpleNamespace(config=quickstart_config())
    most = speedup_by_tokens(model, PIXEL_VALUES, {"fusion_strategy": "upper", "fusion_tokens": 32}).times
    expected = f"speedup 9: 'upper' fusion makes this model at most {most:.2f} times as fast"
    with pytest.raises(ValueError, match=expected):
        fusion_for_speedup(model, PIXEL_VALUES, 9, "upper", speedup_by_tokens)


@pytest.mark.parametrize("speedup", [1, 0.5, math.nan])
def test_only_faster_is_a_speedup(speedup):
    with pytest.raises(ValueError, match="expected a number above 1"):
        fusion_for_speedup(SimpleNamespace(config=tiny_config()), PIXEL_VALUES, speedup, "all", speedup_by_tokens)


def test_speedup_of_no_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy 'none'"):
        fusion_for_speedup(SimpleNamespace(config=tiny_config()), PIXEL_VALUES, 2, "none", speedup_by_tokens)
