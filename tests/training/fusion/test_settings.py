"""Other fusion on a configuration: checked together, all or nothing, and undone."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from fambav_training.fusion.settings import STRATEGIES, UNFUSED, fused, set_fusion, with_fusion
from support.helpers import tiny_config

SCHEDULE = {"fusion_strategy": "custom", "fusion_schedule": [0, 3, 3]}


def test_a_copy_leaves_the_configuration_as_it_is():
    config = tiny_config(**SCHEDULE, fusion_order="appended")
    before = config.to_dict()
    copy = with_fusion(config, {"fusion_strategy": "all", "fusion_tokens": 2})
    assert copy.sequence_lengths == [15, 13, 11] and copy.fusion_order == "appended"
    assert config.to_dict() == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_brings_its_own_layers(strategy):
    own = tiny_config(fusion_strategy=strategy).sequence_lengths
    for fields in (SCHEDULE, {"fusion_strategy": "all", "fusion_start_layer": 1, "fusion_end_layer": 2}):
        assert with_fusion(tiny_config(**fields), {"fusion_strategy": strategy}).sequence_lengths == own


def test_wrong_fields_change_nothing():
    config = tiny_config()
    before = config.to_dict()
    with pytest.raises(StrictDataclassError, match="fusion_tokens=0"):
        set_fusion(config, {"fusion_strategy": "all", "fusion_tokens": 0})
    assert config.to_dict() == before


def test_fusion_for_a_while_is_undone_whatever_happens():
    config = tiny_config(**SCHEDULE)
    before = config.to_dict()
    with pytest.raises(KeyboardInterrupt), fused(config, UNFUSED):
        assert config.sequence_lengths == [17, 17, 17]
        raise KeyboardInterrupt
    assert config.to_dict() == before
