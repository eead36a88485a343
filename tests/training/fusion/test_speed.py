"""The measurement of speed, by a clock that tests turn, and on a real model."""

import random

import pytest
import torch

from fambav_training.fusion import speed as forward_speed
from fambav_training.fusion.settings import UNFUSED
from fambav_training.fusion.speed import Speedup, measured_speedup
from modeling_fambav import FambaVForImageClassification
from support.helpers import tiny_config

HALF = {"fusion_strategy": "all", "fusion_tokens": 4}  # 13 + 9 + 5 of 3 x 17 tokens
RIGHT = 51 / 27


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeModel(torch.nn.Module):
    """Takes half a millisecond per token and times the load of the machine at that moment, and long at first."""

    def __init__(self, clock: Clock, load):
        super().__init__()
        self.config, self.clock, self.load = tiny_config(fusion_strategy="none"), clock, load
        self.passes = []  # tokens of each

    def forward(self, pixel_values):
        assert not self.training
        tokens = sum(self.config.sequence_lengths)
        self.clock.now += 0.0005 * tokens * self.load(self.clock.now) + (0.0 if self.passes else 0.5)
        self.passes.append(tokens)


@pytest.fixture
def fake_model(monkeypatch):
    """Makes a model of which each pass takes `load(time)` as long as on an idle machine."""

    def make(load=lambda now: 1.0) -> FakeModel:
        clock = Clock()
        monkeypatch.setattr(forward_speed, "time", clock)
        return FakeModel(clock, load)

    return make


def test_idle_machine_gives_the_exact_ratio_of_warm_passes(fake_model):
    model = fake_model()
    measured = measured_speedup(model, torch.zeros(1), HALF)
    assert (measured.times, measured.low, measured.high) == pytest.approx((RIGHT, RIGHT, RIGHT))
    assert measured.seconds == pytest.approx(0.0135)
    assert measured.uncertainty == pytest.approx(0) and not measured.is_noisy
    assert model.clock.now == pytest.approx(0.5 + 0.039 + 1.0, abs=0.04)  # the first pass, the warm-up, a second
    assert model.training and model.config.fusion_strategy == "none"


def test_passes_are_interleaved_in_rounds_without_a_favourite(fake_model):
    model = fake_model()
    measured = measured_speedup(model, torch.zeros(1), HALF)
    assert model.passes[:10] == [51, 27, 51, 27, 27, 51, 51, 27, 27, 51]
    assert len(model.passes) == 2 + 4 * measured.rounds


def test_slow_passes_have_five_rounds(fake_model):
    model = fake_model(lambda now: 1000.0)
    assert measured_speedup(model, torch.zeros(1), HALF).rounds == 5


@pytest.mark.parametrize(
    "load",
    [
        lambda now: 3.0 if now % 0.7 < 0.3 else 1.0,  # other work, three times in two seconds
        lambda now: 1.0 + now,  # ever more of it
        lambda now: 1.0 if now < 1.0 else 4.0,  # that begins in the middle and goes on
    ],
    ids=["bursts", "rising", "from now on"],
)
def test_other_work_on_the_machine_does_not_change_the_ratio(fake_model, load):
    measured = measured_speedup(fake_model(load), torch.zeros(1), HALF)
    assert measured.times == pytest.approx(RIGHT, rel=0.02)


def test_noise_takes_more_rounds_until_the_ratio_is_known(fake_model):
    noise = random.Random(0)
    model = fake_model(lambda now: noise.uniform(1.0, 1.2))
    measured = measured_speedup(model, torch.zeros(1), HALF)
    assert not measured.is_noisy and 1.5 < model.clock.now < 10
    assert measured.low < measured.times < measured.high
    assert measured.times == pytest.approx(RIGHT, rel=0.04)  # twice the precision that was waited for


def test_too_much_noise_is_reported(fake_model):
    noise = random.Random(0)
    model = fake_model(lambda now: noise.choice([1.0, 8.0]))
    measured = measured_speedup(model, torch.zeros(1), HALF)
    assert measured.is_noisy and model.clock.now == pytest.approx(10.5, abs=1)
    assert measured_speedup(model, torch.zeros(1), HALF, max_seconds=2.0).rounds < measured.rounds


def test_uncertainty_is_that_of_many_measurements():
    noise = random.Random(0)
    medians, uncertainties = [], []
    for _ in range(300):
        rounds = [(noise.gauss(1.5, 0.1), 1.0) for _ in range(25)]
        measured = forward_speed._speedup_of(rounds)
        medians.append(measured.times)
        uncertainties.append(measured.uncertainty)
    inside = sum(abs(median - 1.5) <= by for median, by in zip(medians, uncertainties))
    assert 0.9 < inside / 300 < 0.99


def test_more_rounds_are_surer():
    few, many = (Speedup(1.5, low=1.4, high=1.6, rounds=rounds, seconds=1.0) for rounds in (10, 1000))
    assert few.is_noisy and not many.is_noisy and few.uncertainty == pytest.approx(10 * many.uncertainty)


def test_a_real_model_is_timed_and_stays_as_it_is():
    model = FambaVForImageClassification(tiny_config()).eval()
    before = model.config.to_dict()
    for fusion in (HALF, {}, UNFUSED):
        measured = measured_speedup(model, torch.zeros(2, 3, 16, 16), fusion, max_seconds=0.0)
        assert measured.low <= measured.times <= measured.high and measured.seconds > 0
    assert model.config.to_dict() == before and not model.training
