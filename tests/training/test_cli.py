"""Flags and YAML files: the same names and the same reading of values, and clear errors for what is wrong."""

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fambav_training import cli
from fambav_training.cli import ArgumentError, one_line_errors, parse_arguments
from modeling_fambav import FambaVConfig
from train import TrainingArguments

CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.yaml"))

# A valid value for every field of the contract, as words on the command line and as what the model receives.
CONFIG_FIELDS = {
    "image_size": ("64 48", (64, 48)),
    "patch_size": ("8", 8),
    "patch_stride": ("4", 4),
    "num_channels": ("1", 1),
    "hidden_size": ("32", 32),
    "num_hidden_layers": ("4", 4),
    "state_size": ("8", 8),
    "expand": ("3", 3),
    "conv_kernel": ("2", 2),
    "time_step_rank": ("auto", "auto"),
    "time_step_min": ("0.01", 0.01),
    "time_step_max": ("1", 1.0),
    "time_step_floor": ("1e-3", 0.001),
    "cls_token_position": ("middle", "middle"),
    "layer_norm_epsilon": ("1e-6", 1e-6),
    "residual_in_fp32": ("false", False),
    "drop_path_rate": ("0.1", 0.1),
    "hidden_dropout_prob": ("0.2", 0.2),
    "initializer_range": ("0.01", 0.01),
    "fusion_strategy": ("lower", "lower"),
    "fusion_tokens": ("12", 12),
    "fusion_start_layer": ("1", 1),
    "fusion_end_layer": ("3", 3),
    "fusion_schedule": ("0 2 0 2", [0, 2, 0, 2]),
    "fusion_metric": ("dot", "dot"),
    "fusion_window": ("16", 16),
    "fusion_reduction": ("size_weighted", "size_weighted"),
    "fusion_order": ("appended", "appended"),
    "fusion_scale_time_step": ("true", True),
}


@dataclass
class Arguments:
    """One flag of every kind that a script has."""

    output_dir: Path = dataclasses.field(default=Path("outputs"), metadata={"help": "a folder"})
    dataset_name: str = dataclasses.field(default="digits", metadata={"help": "a word, 100 % of the time"})
    seed: int = dataclasses.field(default=0, metadata={"help": "an integer"})
    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "a number"})
    max_train_steps: int | None = dataclasses.field(default=None, metadata={"help": "an integer or nothing"})
    mixed_precision: str | None = dataclasses.field(default=None, metadata={"help": "a word or nothing"})
    cpu: bool = dataclasses.field(default=False, metadata={"help": "a switch"})


def parse(command_line: str, arguments_class: type = Arguments):
    return parse_arguments(arguments_class, "a script", command_line.split())


@pytest.fixture
def write_yaml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


# ---- flags ----


def test_without_flags_all_is_default():
    assert parse("") == (Arguments(), {})


def test_flags_of_every_kind():
    command_line = "--output_dir a/b --dataset_name cats --seed 7 --learning_rate 2e-4 --max_train_steps 5 --cpu"
    args, overrides = parse(f"{command_line} --mixed_precision no")
    assert args == Arguments(Path("a/b"), "cats", 7, 2e-4, 5, "no", True)
    assert overrides == {}


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_every_config_field_is_a_flag_and_a_key(name, write_yaml):
    words, value = CONFIG_FIELDS[name]
    assert parse(f"--{name} {words}")[1] == {name: value}
    in_yaml = words.split() if isinstance(value, (list, tuple)) else words
    assert parse(f"--config {write_yaml(yaml.safe_dump({name: in_yaml}))}")[1] == {name: value}


def test_config_fields_have_the_types_that_the_model_wants():
    # `strict` refuses an int as a string, a list as a tuple of strings, and so on.
    values = {name: value for name, (_, value) in CONFIG_FIELDS.items()}
    values |= {"fusion_strategy": "custom", "fusion_start_layer": None, "fusion_end_layer": None}
    assert FambaVConfig(**values).tokens_removed == [0, 2, 0, 2]


def test_image_size_is_one_side_or_two():
    assert parse("--image_size 64")[1] == {"image_size": 64}
    assert parse("--image_size 64 32")[1] == {"image_size": (64, 32)}


def test_time_step_rank_is_an_integer_or_auto():
    assert parse("--time_step_rank 4")[1] == {"time_step_rank": 4}


@pytest.mark.parametrize("words, value", [("", True), ("true", True), ("True", True), ("false", False)])
def test_booleans(words, value):
    assert parse(f"--cpu {words}")[0].cpu is value
    assert parse(f"--fusion_scale_time_step {words}")[1] == {"fusion_scale_time_step": value}


@pytest.mark.parametrize(
    "command_line, expected",
    [
        ("--learning_rat 1", ["--learning_rat", "'--learning_rate'"]),
        ("--learning_rat=1", ["--learning_rat=1", "'--learning_rate'"]),
        ("--fusion_token 9", ["--fusion_token", "'--fusion_tokens'"]),
        ("--xyz 9", ["--xyz", "known names", "--seed"]),
        ("--seed 1 2", ["2"]),
        ("somewhere", ["somewhere", "flag"]),
    ],
)
def test_unknown_flag_names_the_nearest(command_line, expected):
    assert_refused(command_line, *expected)


@pytest.mark.parametrize(
    "command_line, expected",
    [
        ("--seed one", ["--seed", "one", "int"]),
        ("--seed 1.5", ["--seed", "1.5", "int"]),
        ("--learning_rate fast", ["--learning_rate", "fast", "float"]),
        ("--cpu 1", ["--cpu", "1", "bool"]),
        ("--seed", ["--seed", "expected one argument"]),
        ("--image_size big", ["--image_size", "big", "int"]),
        ("--fusion_schedule 1 two", ["--fusion_schedule", "two", "int"]),
        ("--residual_in_fp32 maybe", ["--residual_in_fp32", "maybe", "bool"]),
    ],
)
def test_wrong_type(command_line, expected):
    assert_refused(command_line, *expected)


def assert_refused(command_line: str, *words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        parse(command_line)
    for word in words:
        assert word in str(error.value)


# ---- YAML files ----


def test_yaml_values_of_every_kind(write_yaml):
    path = write_yaml(
        "output_dir: a/b\ndataset_name: cats\nseed: 7\nlearning_rate: 2e-4\nmax_train_steps: 5\ncpu: true\n"
        "image_size: [64, 32]\nfusion_schedule:\n  - 0\n  - 3\nfusion_scale_time_step: true\ntime_step_rank: auto\n"
    )
    args, overrides = parse(f"--config {path}")
    assert args == Arguments(Path("a/b"), "cats", 7, 2e-4, 5, None, True)
    assert overrides == {
        "image_size": (64, 32),
        "fusion_schedule": [0, 3],
        "fusion_scale_time_step": True,
        "time_step_rank": "auto",
    }


def test_flag_wins_over_file(write_yaml):
    path = write_yaml("seed: 7\ncpu: true\nlearning_rate: 0.5\nfusion_tokens: 3\nimage_size: [64, 32]\n")
    for command_line in (f"--config {path} --seed 0", f"--seed 0 --config {path}"):  # also if it is the default
        assert parse(command_line)[0] == Arguments(seed=0, cpu=True, learning_rate=0.5)
    args, overrides = parse(f"--config {path} --cpu false --fusion_tokens 9 --image_size 8")
    assert args == Arguments(seed=7, cpu=False, learning_rate=0.5)
    assert overrides == {"fusion_tokens": 9, "image_size": 8}


def test_null_means_not_given(write_yaml):
    path = write_yaml("max_train_steps: null\nseed:\nfusion_schedule: null\n")
    assert parse(f"--config {path}") == (Arguments(), {})


def test_empty_file_changes_nothing(write_yaml):
    assert parse(f"--config {write_yaml('# nothing yet')}") == (Arguments(), {})


def test_mixed_precision_no_is_not_a_boolean(write_yaml):
    # YAML 1.1 reads an unquoted `no` as false, and "no" is the name of a precision.
    assert parse(f"--config {write_yaml('mixed_precision: no')}")[0].mixed_precision == "no"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("learning_rat: 1", ["'learning_rat'", "'learning_rate'"]),
        ("fusion_token: 1", ["'fusion_token'", "'fusion_tokens'"]),
        ("config: other.yaml", ["'config'"]),
        ("3: 4", ["3"]),
    ],
)
def test_unknown_key_names_the_nearest(text, expected, write_yaml):
    path = write_yaml(text)
    assert_refused(f"--config {path}", str(path), *expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed: one", ["seed", "one"]),
        ("seed: 1.5", ["seed", "1.5"]),
        ("seed: [1, 2]", ["seed"]),
        ("seed: true", ["seed", "rue"]),
        ("cpu: 1", ["cpu", "1"]),
        ("cpu: []", ["cpu"]),
        ("dataset_name: {a: b}", ["dataset_name"]),
        ("fusion_schedule: [1, two]", ["fusion_schedule", "two"]),
        ("fusion_schedule: []", ["fusion_schedule"]),
        ("image_size: big", ["image_size", "big"]),
    ],
)
def test_wrong_type_in_yaml_names_file_and_key(text, expected, write_yaml):
    path = write_yaml(text)
    assert_refused(f"--config {path}", str(path), *expected)


@pytest.mark.parametrize("text", ["- seed\n- 7", "seed", "7", "[]", "seed: [", "\t- a: : b", "a: &x [*x"])
def test_file_that_holds_no_mapping(text, write_yaml):
    path = write_yaml(text)
    assert_refused(f"--config {path}", str(path))


def test_missing_or_unreadable_file(tmp_path):
    assert_refused(f"--config {tmp_path / 'missing.yaml'}", "missing.yaml", "cannot be read")
    assert_refused(f"--config {tmp_path}", str(tmp_path), "cannot be read")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe\x00")
    assert_refused(f"--config {tmp_path / 'image.yaml'}", "image.yaml")


# ---- the files in training/configs ----


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_parses_and_makes_a_model(path):
    _, overrides = parse(f"--config {path}", TrainingArguments)
    FambaVConfig(**overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_opens_with_its_command(path):
    # Its lines end with a backslash, all but the last one
    command = path.read_text().replace("\\\n#", "").splitlines()[0]
    assert command.startswith("# accelerate launch training/train.py ")
    words = shlex.split(command.removeprefix("# accelerate launch training/train.py "))
    assert words[:2] == ["--config", f"training/configs/{path.name}"]
    parse_arguments(TrainingArguments, "a script", ["--config", str(path), *words[2:]])


def test_there_are_shipped_configs():
    assert CONFIGS


@pytest.mark.parametrize(
    "fail, expected",
    [
        (lambda: parse_arguments(TrainingArguments, "a script", ["--sed", "1"]), "error: --sed: no such name"),
        (lambda: FambaVConfig(fusion_tokens=0), "error: .*fusion_tokens=0"),
        (lambda: Path("missing", "file").read_text(), "error: .*No such file or directory: 'missing/file'"),
    ],
    ids=["flag", "field", "file"],
)
def test_what_users_can_put_right_ends_the_process_with_a_line(fail, expected):
    with pytest.raises(SystemExit) as end, one_line_errors():
        fail()
    assert re.match(expected, end.value.code, re.DOTALL)


def test_a_mistake_of_the_code_keeps_its_trace():
    with pytest.raises(KeyError), one_line_errors():
        {}["missing"]


def test_help_says_what_every_field_of_the_model_is(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "--fusion_tokens INT Tokens r removed at each fused layer, clamped to what" in printed
    assert "(default: 9)" in printed
    described = cli._field_descriptions()
    assert all(len(described[name]) > 15 for name in cli.model_fields())
