"""FambaVConfig: defaults, budgets of the fusion strategies, checks of wrong values, saving and loading."""

import copy
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_fambav import FambaVConfig
from support.helpers import tiny_config

INVALID = (ValueError, StrictDataclassError)


def test_defaults_are_the_contract():
    config = FambaVConfig()
    expected = {
        "model_type": "fambav",
        "image_size": 224,
        "patch_size": 16,
        "patch_stride": 16,
        "num_channels": 3,
        "hidden_size": 192,
        "num_hidden_layers": 24,
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "time_step_rank": 12,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "cls_token_position": "head",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": True,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "fusion_strategy": "upper",
        "fusion_tokens": 9,
        "fusion_start_layer": None,
        "fusion_end_layer": None,
        "fusion_schedule": None,
        "fusion_metric": "cosine",
        "fusion_window": None,
        "fusion_reduction": "mean",
        "fusion_order": "raster",
        "fusion_scale_time_step": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_derived_sizes():
    config = FambaVConfig()
    assert (config.intermediate_size, config.patch_grid, config.num_patches) == (384, (14, 14), 196)

    config = FambaVConfig(image_size=(32, 48), patch_size=16, patch_stride=8, hidden_size=36, expand=3)
    assert (config.intermediate_size, config.patch_grid, config.num_patches) == (108, (3, 5), 15)
    assert (config.time_step_rank, config.patch_grid_of(48, 64)) == (3, (5, 7))


@pytest.mark.parametrize("name", ["intermediate_size", "num_patches", "tokens_removed", "sequence_lengths"])
def test_derived_values_are_read_only(name):
    with pytest.raises(AttributeError):
        setattr(FambaVConfig(), name, 1)


# ---- where to fuse ----


@pytest.mark.parametrize(
    "strategy, fusion_tokens, expected, total",
    [
        ("none", 9, [0] * 24, 0),
        ("all", 7, [7] * 24, 168),
        ("interleaved", 14, [0, 14] * 12, 168),
        ("lower", 9, [9] * 19 + [0] * 5, 171),
        ("upper", 9, [0] * 5 + [9] * 19, 171),
    ],
)
def test_budgets_of_the_paper(strategy, fusion_tokens, expected, total):
    config = FambaVConfig(fusion_strategy=strategy, fusion_tokens=fusion_tokens)
    assert config.tokens_removed == expected
    assert sum(config.tokens_removed) == total
    assert config.sequence_lengths[-1] == 197 - total


def test_sequence_lengths():
    lengths = FambaVConfig(fusion_strategy="upper", fusion_tokens=9).sequence_lengths
    assert lengths == [197] * 5 + list(range(188, 25, -9))
    assert sum(lengths) / len(lengths) == 125.75
    # Tokens are removed on entry to a layer, so its own scans are the first to see fewer.
    assert FambaVConfig(fusion_strategy="all", fusion_tokens=7).sequence_lengths[0] == 190
    assert FambaVConfig(fusion_strategy="none").sequence_lengths == [197] * 24


@pytest.mark.parametrize(
    "num_layers, lower, upper",
    [
        (1, [1], [1]),
        (2, [1, 1], [1, 1]),
        (4, [1, 1, 1, 0], [0, 1, 1, 1]),
        (12, [1] * 10 + [0] * 2, [0] * 2 + [1] * 10),
    ],
)
def test_other_depths_fuse_the_same_fraction_of_layers(num_layers, lower, upper):
    # round(19/24 * L) and round(5/24 * L); Python rounds 9.5 to 10 and 2.5 to 2.
    for strategy, expected in (("lower", lower), ("upper", upper)):
        config = FambaVConfig(num_hidden_layers=num_layers, fusion_strategy=strategy, fusion_tokens=1)
        assert config.tokens_removed == expected


def test_a_layer_removes_at_most_half_of_its_patch_tokens():
    config = tiny_config(num_hidden_layers=6, fusion_strategy="all", fusion_tokens=1000)
    assert config.tokens_removed == [8, 4, 2, 1, 0, 0]  # of 16 patches
    assert config.sequence_lengths == [9, 5, 3, 2, 2, 2]

    config = tiny_config(num_hidden_layers=4, fusion_strategy="custom", fusion_schedule=[0, 7, 99, 1])
    assert config.tokens_removed == [0, 7, 4, 1]
    assert config.fusion_schedule == [0, 7, 99, 1]  # what was asked for stays


def test_schedule_of_another_sequence_length():
    config = tiny_config(num_hidden_layers=3, fusion_strategy="all", fusion_tokens=5)
    assert config.fusion_schedule_for(101) == [5, 5, 5]
    assert config.fusion_schedule_for(10) == [4, 2, 1]
    assert config.fusion_schedule_for(2) == [0, 0, 0]


@pytest.mark.parametrize(
    "strategy, start, end, fused_layers",
    [
        ("all", 2, None, [2, 3, 4, 5, 6, 7]),
        ("all", None, 3, [0, 1, 2]),
        ("all", 2, 3, [2]),
        ("interleaved", 2, None, [2, 4, 6]),
        ("interleaved", None, 4, [1, 3]),
        ("interleaved", 0, 8, [0, 2, 4, 6]),
        ("lower", None, None, [0, 1, 2, 3, 4, 5]),
        ("lower", 3, None, [3, 4, 5]),
        ("lower", None, 2, [0, 1]),
        ("upper", None, None, [2, 3, 4, 5, 6, 7]),
        ("upper", 6, None, [6, 7]),
        ("upper", None, 4, [2, 3]),
        ("upper", 0, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_layer_range(strategy, start, end, fused_layers):
    config = FambaVConfig(
        num_hidden_layers=8,
        fusion_strategy=strategy,
        fusion_tokens=3,
        fusion_start_layer=start,
        fusion_end_layer=end,
    )
    assert config.tokens_removed == [3 if layer in fused_layers else 0 for layer in range(8)]


def test_custom_schedule():
    config = FambaVConfig(num_hidden_layers=4, fusion_strategy="custom", fusion_schedule=[0, 5, 0, 40])
    assert config.tokens_removed == [0, 5, 0, 40]
    assert config.sequence_lengths == [197, 192, 192, 152]


def test_a_returned_list_is_not_the_config():
    config = FambaVConfig(num_hidden_layers=2, fusion_strategy="custom", fusion_schedule=[1, 2])
    config.tokens_removed.append(3)
    config.sequence_lengths.clear()
    assert config.fusion_schedule == config.tokens_removed == [1, 2]
    assert config.sequence_lengths == [196, 194]


# ---- wrong values ----


def invalid(expected: str, **fields):
    """A case whose message must name the last field, its value, and `expected`: what is allowed."""
    name, value = list(fields.items())[-1]
    return pytest.param(fields, name, value, expected, id=f"{name}={value}")


INVALID_FIELDS = [
    # each field on its own
    *(invalid(">= 1", **{name: 0}) for name in ("patch_size", "patch_stride", "num_channels", "hidden_size")),
    *(invalid(">= 1", **{name: 0}) for name in ("num_hidden_layers", "state_size", "expand", "conv_kernel")),
    *(invalid(">= 1", **{name: -2}) for name in ("hidden_size", "time_step_rank")),
    *(invalid("int", **{name: True}) for name in ("hidden_size", "fusion_tokens", "fusion_start_layer", "image_size")),
    *(invalid("int", **{name: 4.0}) for name in ("hidden_size", "fusion_tokens", "fusion_end_layer", "image_size")),
    *(invalid("int", **{name: "4"}) for name in ("state_size", "fusion_tokens", "image_size")),
    *(invalid("int", **{name: None}) for name in ("hidden_size", "fusion_tokens", "image_size")),
    invalid("positive integer", image_size=0),
    invalid("positive integer", image_size=(32, -32)),
    invalid("2", image_size=(32,)),
    invalid("auto", time_step_rank="Auto"),
    invalid("finite number", time_step_min=0),
    invalid("finite number", time_step_max=float("nan")),
    invalid("finite number", time_step_floor=-1.0),
    invalid("finite number", layer_norm_epsilon=-1e-5),
    *(invalid("[0.0, 1.0)", drop_path_rate=value) for value in (float("nan"), -0.1, 1.0, 2)),
    *(invalid("float", drop_path_rate=value) for value in (True, "0.1")),
    *(invalid("[0.0, 1.0]", hidden_dropout_prob=value) for value in (float("nan"), -0.1, 1.5)),
    *(invalid("finite number", initializer_range=value) for value in (float("inf"), -0.02)),
    invalid("bool", residual_in_fp32=1),
    invalid("bool", fusion_scale_time_step="yes"),
    *(invalid("('head', 'middle')", cls_token_position=value) for value in ("centre", None, 0)),
    *(invalid("('cosine', 'dot', 'euclidean')", fusion_metric=value) for value in ("l2", None)),
    *(invalid("integer >= 1", fusion_window=value) for value in (0, -1)),
    *(invalid("('mean', 'size_weighted')", fusion_reduction=value) for value in ("sum", None)),
    *(invalid("('raster', 'appended')", fusion_order=value) for value in ("sorted", None)),
    *(
        invalid("('upper', 'none', 'all', 'interleaved', 'lower', 'custom')", fusion_strategy=value)
        for value in ("uper", "Upper", None)
    ),
    invalid(">= 0", fusion_tokens=-1),
    invalid(">= 0", fusion_start_layer=-1),
    invalid(">= 1", fusion_end_layer=0),
    invalid("list[int]", fusion_schedule=5),
    invalid("list[int]", fusion_strategy="custom", fusion_schedule=[1.0] * 24),
    invalid("list[int]", fusion_strategy="custom", fusion_schedule=[True] * 24),
    # fields against each other
    invalid("patch_size=16 plus a multiple of patch_stride=16", image_size=225),
    invalid("patch_size=16 plus a multiple of patch_stride=16", image_size=(224, 230)),
    invalid("patch_size=16 plus a multiple of patch_stride=5", patch_stride=5, image_size=224),
    invalid("at most the height of image_size=224", patch_size=225),
    invalid("at most the width of image_size=(32, 8)", image_size=(32, 8), patch_size=16),
    invalid("at most time_step_max=0.1", time_step_min=0.2),
    *(
        invalid("fusion_tokens >= 1, or fusion_strategy='none'", fusion_strategy=strategy, fusion_tokens=0)
        for strategy in ("all", "interleaved", "lower", "upper")
    ),
    invalid("less than fusion_end_layer=5", fusion_end_layer=5, fusion_start_layer=5),
    invalid("less than fusion_end_layer=5", fusion_end_layer=5, fusion_start_layer=7),
    invalid("num_hidden_layers=24", fusion_start_layer=24),
    invalid("num_hidden_layers=24", fusion_end_layer=25),
    invalid("fusion_strategy='none'", fusion_end_layer=3, fusion_strategy="upper"),  # starts at 5
    invalid("fusion_strategy='none'", fusion_start_layer=19, fusion_strategy="lower"),  # ends at 19
    invalid("fusion_strategy='none'", num_hidden_layers=1, fusion_strategy="interleaved"),  # starts at 1
    invalid("fusion_strategy='none'", image_size=16, fusion_strategy="all"),  # a single patch
    invalid("24 of them", fusion_strategy="custom", fusion_schedule=None),
    invalid("24 of them", fusion_strategy="custom", fusion_schedule=[1, 2]),
    invalid("24 of them", fusion_strategy="custom", fusion_schedule=[]),
    invalid(">= 0", fusion_strategy="custom", fusion_schedule=[3] * 23 + [-1]),
    invalid("one of them positive", fusion_strategy="custom", fusion_schedule=[0] * 24),
    invalid("fusion_strategy='custom'", fusion_strategy="upper", fusion_schedule=[1] * 24),
    invalid("expected None", fusion_strategy="custom", fusion_schedule=[1] * 24, fusion_start_layer=2),
    invalid("expected None", fusion_strategy="custom", fusion_schedule=[1] * 24, fusion_end_layer=2),
    # fields that do not exist
    invalid("fusion_tokens", fusion_token=3),
    invalid("fusion_strategy", fusion_startegy="all"),
]


@pytest.mark.parametrize("fields, name, value, expected", INVALID_FIELDS)
def test_an_invalid_value_is_refused_with_field_value_and_what_is_allowed(fields, name, value, expected):
    with pytest.raises(INVALID) as error:
        FambaVConfig(**fields)
    message = str(error.value)
    assert re.search(rf"\b{name}\b", message)
    assert str(value) in message
    assert expected in message


def test_no_fusion_needs_no_valid_number_of_tokens():
    assert FambaVConfig(fusion_strategy="none", fusion_tokens=0).tokens_removed == [0] * 24
    assert FambaVConfig(fusion_strategy="none", image_size=16).sequence_lengths == [2] * 24


@pytest.mark.parametrize(
    "name, value",
    [("fusion_tokens", -1), ("fusion_strategy", "uper"), ("hidden_size", 4.0), ("drop_path_rate", float("nan"))],
)
def test_assignment_is_checked(name, value):
    config = FambaVConfig()
    before = getattr(config, name)
    with pytest.raises(INVALID, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == before


def test_assignment_takes_effect():
    config = FambaVConfig()
    config.fusion_tokens = 12
    assert config.tokens_removed == [0] * 5 + [12] * 15 + [8, 4, 2, 1]
    config.fusion_strategy = "none"
    assert config.tokens_removed == [0] * 24
    config.fusion_strategy = "custom"
    config.fusion_schedule = [4] * 24
    assert config.tokens_removed == [4] * 24


def test_assigned_fields_are_checked_against_each_other(tmp_path):
    config = FambaVConfig()
    config.fusion_start_layer = 30
    for use in (lambda: config.tokens_removed, lambda: config.sequence_lengths):
        with pytest.raises(INVALID, match="fusion_start_layer=30"):
            use()
    with pytest.raises(INVALID, match="fusion_start_layer=30"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_an_image_size_as_in_json_can_be_assigned():
    config = FambaVConfig()
    config.image_size = [32, 48]
    assert config.patch_grid == (2, 3)


# ---- saving and loading ----

SAVED = {
    "defaults": {},
    "rectangular": {"image_size": (32, 48), "patch_size": 16, "patch_stride": 8, "fusion_tokens": 2},
    "custom": {"num_hidden_layers": 3, "fusion_strategy": "custom", "fusion_schedule": [0, 4, 2]},
    "everything": {
        "hidden_size": 64,
        "time_step_rank": 5,
        "cls_token_position": "middle",
        "drop_path_rate": 0.1,
        "fusion_strategy": "lower",
        "fusion_start_layer": 2,
        "fusion_end_layer": 9,
        "fusion_metric": "dot",
        "fusion_window": 32,
        "fusion_reduction": "size_weighted",
        "fusion_order": "appended",
        "fusion_scale_time_step": True,
        "num_labels": 100,
    },
}


def assert_same_config(loaded: FambaVConfig, config: FambaVConfig, fields: dict) -> None:
    assert type(loaded) is FambaVConfig
    for name, value in fields.items():
        assert getattr(loaded, name) == value, name
    for name in type(config).__dataclass_fields__:
        if name not in ("transformers_version", "_name_or_path"):
            assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.sequence_lengths == config.sequence_lengths


@pytest.mark.parametrize("fields", SAVED.values(), ids=SAVED)
def test_round_trips(fields, tmp_path):
    config = FambaVConfig(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (
        FambaVConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        FambaVConfig.from_dict(config.to_dict()),
        FambaVConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        FambaVConfig(**json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ):
        assert_same_config(loaded, config, fields)


def test_a_copy_is_independent():
    config = FambaVConfig(num_hidden_layers=2, fusion_strategy="custom", fusion_schedule=[1, 2])
    duplicate = copy.deepcopy(config)
    duplicate.fusion_schedule[0] = 5
    duplicate.fusion_reduction = "size_weighted"
    assert (config.fusion_schedule, config.fusion_reduction) == ([1, 2], "mean")


def test_fields_can_be_replaced_while_loading(tmp_path):
    FambaVConfig().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, fusion_strategy="all", fusion_tokens=7)
    assert config.tokens_removed == [7] * 24
    assert FambaVConfig.from_pretrained(tmp_path, image_size=[32, 48]).patch_grid == (2, 3)
    with pytest.raises(INVALID, match="fusion_metric"):
        FambaVConfig.from_pretrained(tmp_path, fusion_metric="l2")


def test_a_misspelt_fusion_field_is_refused_while_loading(tmp_path):
    FambaVConfig().save_pretrained(tmp_path)
    with pytest.raises(INVALID, match="fusion_token=3"):
        FambaVConfig.from_pretrained(tmp_path, fusion_token=3)


def test_an_invalid_file_is_refused(tmp_path):
    FambaVConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fusion_tokens": 0}))
    with pytest.raises(INVALID, match="fusion_tokens=0"):
        FambaVConfig.from_pretrained(tmp_path)


def test_a_misspelt_fusion_field_cannot_be_assigned():
    with pytest.raises(INVALID, match="fusion_token=3"):
        FambaVConfig().fusion_token = 3


# ---- presets ----


def test_presets_are_the_sizes_of_vim():
    assert FambaVConfig.from_preset("vim-ti").to_dict() == FambaVConfig().to_dict()
    widths = [FambaVConfig.from_preset(name).hidden_size for name in ("vim-ti", "vim-s", "vim-b")]
    assert widths == [192, 384, 768]


def test_fields_given_with_a_preset_win():
    config = FambaVConfig.from_preset("vim-s", fusion_tokens=5, hidden_size=400, num_labels=7)
    assert (config.fusion_tokens, config.hidden_size, config.num_labels) == (5, 400, 7)
    with pytest.raises(INVALID, match="fusion_strategy"):
        FambaVConfig.from_preset("vim-s", fusion_strategy="upwards")


def test_unknown_preset():
    with pytest.raises(ValueError, match=re.escape("preset 'vim-xl': expected one of ['vim-ti', 'vim-s', 'vim-b']")):
        FambaVConfig.from_preset("vim-xl")
