"""Multiply-adds: against torch's own count of the products, by hand for the rest, and as fusion lowers them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fambav_training.fusion.multiply_adds import multiply_add_share, multiply_adds
from fambav_training.fusion.settings import STRATEGIES, with_fusion
from fambav_training.fusion.targets import fusion_for_share, token_share
from modeling_fambav import FambaVConfig, FambaVModel
from support.helpers import tiny_config


def of_scan_operators(config: FambaVConfig) -> int:
    """What torch does not see, because it happens inside our operators: x_proj, dt_proj, convolution and scan."""
    channels, states, rank = config.intermediate_size, config.state_size, config.time_step_rank
    of_a_token = 0
    for _ in ("forward", "backward"):
        of_a_token += channels * config.conv_kernel
        of_a_token += channels * (rank + states + states)
        of_a_token += rank * channels
        of_a_token += 3 * channels * states
    return of_a_token * sum(config.sequence_lengths)


@pytest.mark.parametrize("stem_channels", [None, [8]])
def test_it_is_torchs_count_and_that_of_the_scans(stem_channels):
    config = tiny_config(fusion_strategy="none", patch_size=4, stem_channels=stem_channels)
    model = FambaVModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *config.image_height_width))
    assert counter.get_total_flops() > 0
    assert multiply_adds(config) == counter.get_total_flops() // 2 + of_scan_operators(config)


@pytest.mark.parametrize("window", [None, 1, 4, 5, 15, 16, 99])
def test_a_layer_that_fuses_compares_even_with_odd_tokens(window):
    config = tiny_config(fusion_strategy="custom", fusion_schedule=[0, 3, 0], fusion_window=window)
    unfused = with_fusion(config, {"fusion_strategy": "none"})
    saved_tokens = sum(unfused.sequence_lengths) - sum(config.sequence_lengths)
    of_a_token = of_scan_operators(unfused) // sum(unfused.sequence_lengths)
    of_a_token += 3 * config.hidden_size * config.intermediate_size
    assert config.sequence_lengths == [17, 14, 14]
    distances = [abs(even - odd) for even in range(0, 17, 2) for odd in range(1, 17, 2)]
    compared = sum(window is None or distance <= window for distance in distances)
    assert multiply_adds(unfused) - multiply_adds(config) == saved_tokens * of_a_token - compared * config.hidden_size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_share_of_the_multiply_adds_is_met(strategy):
    config = FambaVConfig()
    for share in (0.9, 0.7):
        fused = with_fusion(config, fusion_for_share(config, share, strategy, of="multiply-adds"))
        assert multiply_add_share(fused) == pytest.approx(share, abs=0.01)
        assert token_share(fused) < share  # the patches' projection and the similarities are not saved
