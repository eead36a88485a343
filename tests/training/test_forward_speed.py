"""The measurement of speed, on a model whose speed is known, and on a real one."""

import time

import pytest
import torch

from forward_speed import forward_seconds, measured_speedup
from fusion_settings import UNFUSED
from helpers import tiny_config
from modeling_fambav import FambaVForImageClassification

HALF = {"fusion_strategy": "all", "fusion_tokens": 4}  # 13 + 9 + 5 of 3 x 17 tokens


class SleepingModel(torch.nn.Module):
    """Takes half a millisecond per token, and half a second at its first call."""

    def __init__(self):
        super().__init__()
        self.config = tiny_config(fusion_strategy="none")
        self.was_called = False

    def forward(self, pixel_values):
        assert not self.training
        time.sleep(0.0005 * sum(self.config.sequence_lengths) + (0.0 if self.was_called else 0.5))
        self.was_called = True


def test_seconds_are_those_of_a_warm_pass():
    model = SleepingModel()
    seconds = forward_seconds(model, torch.zeros(1), [UNFUSED, HALF], min_seconds=0.0)
    assert seconds == pytest.approx([0.0255, 0.0135], rel=0.3)
    assert model.training and model.config.fusion_strategy == "none"


def test_speedup_is_that_of_the_seconds():
    assert measured_speedup(SleepingModel(), torch.zeros(1), HALF) == pytest.approx(51 / 27, rel=0.3)


def test_a_real_model_is_timed_and_stays_as_it_is():
    model = FambaVForImageClassification(tiny_config()).eval()
    before = model.config.to_dict()
    seconds = forward_seconds(model, torch.zeros(2, 3, 16, 16), [{}, UNFUSED, HALF], min_seconds=0.0)
    assert len(seconds) == 3 and min(seconds) > 0
    assert model.config.to_dict() == before and not model.training
