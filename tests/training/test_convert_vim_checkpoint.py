"""Checkpoints of the official code, converted: same numbers as the official code, and clear refusals of bad files."""

import argparse
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from convert_vim_checkpoint import ConversionError, convert, main
from support.helpers import read_fixture

GOLDEN_NAMES = ["vim_micro", "fambav_micro_none", "fambav_micro_upper"]
FORMATS = [".safetensors", ".pth"]


@dataclass
class Golden:
    """What the official code computed with random weights, on the CPU in float32."""

    state: dict[str, Tensor]
    gradients: dict[str, Tensor]
    pixel_values: Tensor
    labels: Tensor
    logits: Tensor
    loss: Tensor
    sequence_lengths: list[int]
    config_fields: dict[str, Any]


def load_golden(name: str) -> Golden:
    tensors, metadata = read_fixture(name)

    def below(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    config_fields = {"cls_token_position": metadata["cls_token_position"]}
    schedule = json.loads(metadata["fusion_schedule"])
    if any(schedule):
        config_fields |= {"fusion_strategy": "custom", "fusion_schedule": schedule, "fusion_order": "appended"}
    return Golden(
        below("state."),
        below("grad."),
        *(tensors[key] for key in ("pixel_values", "labels", "logits", "loss")),
        json.loads(metadata["sequence_lengths"]),
        config_fields,
    )


def write_checkpoint(path: Path, state: dict[str, Any], **more: Any) -> Path:
    """A file as the official script writes it, or a bare state dict in `.safetensors`."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"model": state, "args": argparse.Namespace(model="vim_micro", epochs=300), "epoch": 3, **more}, path
        )
    return path


def our_name(official: str) -> str:
    """Where the model keeps what the golden files have gradients of."""
    if official == "cls_token":
        return "fambav.embeddings.cls_token"
    if official == "patch_embed.proj.weight":
        return "fambav.embeddings.patch_embeddings.projection.weight"
    layer, parameter = re.fullmatch(r"layers\.(\d)\.mixer\.(.+)", official).groups()
    inside_mixer = {
        "A_log": "forward_scan.A_log",
        "A_b_log": "backward_scan.A_log",
        "dt_proj.bias": "forward_scan.dt_proj.bias",
        "out_proj.weight": "out_proj.weight",
    }
    return f"fambav.layers.{layer}.mixer.{inside_mixer[parameter]}"


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Within 1e-4 of the largest entry: some of these gradients are smaller than 1e-4 altogether."""
    error = (actual - expected).abs().max().item()
    assert error <= 1e-4 * expected.abs().max().item(), f"{name}: off by {error}"


def assert_computes_golden_numbers(folder: Path, golden: Golden) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.sequence_lengths == golden.sequence_lengths
    outputs = model(pixel_values=golden.pixel_values, labels=golden.labels)
    outputs.loss.backward()
    assert_close(outputs.logits, golden.logits, "logits")
    assert_close(outputs.loss, golden.loss, "loss")
    parameters = dict(model.named_parameters())
    for name, gradient in golden.gradients.items():
        assert_close(parameters[our_name(name)].grad, gradient, name)


# ---- good files ----


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_converted_model_computes_the_official_numbers(tmp_path, name, suffix):
    golden = load_golden(name)
    checkpoint = write_checkpoint(tmp_path / f"{name}{suffix}", golden.state)
    convert(checkpoint, tmp_path / "out", **golden.config_fields)
    assert_computes_golden_numbers(tmp_path / "out", golden)


def test_command_line_converts_with_fusion_flags(tmp_path, monkeypatch, capsys):
    golden = load_golden("fambav_micro_upper")
    checkpoint = write_checkpoint(tmp_path / "fambav_micro_upper.pth", golden.state)
    flags = ["--cls_token_position", "head", "--fusion_strategy", "custom", "--fusion_order", "appended"]
    flags += ["--fusion_schedule", "0", "0", "3", "3"]
    monkeypatch.setattr("sys.argv", ["convert_vim_checkpoint.py", str(checkpoint), str(tmp_path / "out"), *flags])
    main()
    assert "[17, 17, 14, 11]" in capsys.readouterr().out
    assert_computes_golden_numbers(tmp_path / "out", golden)


def test_fusion_is_off_unless_asked_for(tmp_path):
    golden = load_golden("fambav_micro_none")
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", golden.state)
    convert(checkpoint, tmp_path / "plain")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").config
    assert (config.fusion_strategy, config.sequence_lengths) == ("none", [17] * 4)

    convert(checkpoint, tmp_path / "fused", fusion_tokens=2)  # any fusion field asks for fusion
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "fused").config
    assert (config.fusion_strategy, config.sequence_lengths) == ("upper", [17, 15, 13, 11])


def test_folder_prepares_images_as_vim_was_trained(tmp_path):
    golden = load_golden("vim_micro")
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", golden.state)
    convert(checkpoint, tmp_path / "out", cls_token_position="middle")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": 32, "width": 32}
    assert processor.resample == PILImageResampling.BICUBIC
    assert (list(processor.image_mean), list(processor.image_std)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def with_positions(state: dict[str, Tensor], num_patches: int) -> dict[str, Tensor]:
    return {**state, "pos_embed": torch.zeros(1, num_patches + 1, 32)}


def test_overlapping_patches_tell_another_image_size(tmp_path):
    state = with_positions(load_golden("vim_micro").state, 25)
    model = convert(write_checkpoint(tmp_path / "checkpoint.pth", state), tmp_path / "out", patch_stride=4)
    assert (model.config.image_size, model.config.patch_grid) == (24, (5, 5))  # 4 steps of 4 pixels and a patch of 8


def test_image_size_flag_settles_positions_that_form_no_square(tmp_path):
    state = with_positions(load_golden("vim_micro").state, 12)
    model = convert(write_checkpoint(tmp_path / "checkpoint.pth", state), tmp_path / "out", image_size=(24, 32))
    assert model.config.patch_grid == (3, 4)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": 24, "width": 32}


def test_output_folder_may_exist_if_it_is_empty(tmp_path):
    (tmp_path / "out").mkdir()
    convert(write_checkpoint(tmp_path / "checkpoint.pth", load_golden("vim_micro").state), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---- bad files: a clear error that names the file or the key, and nothing written ----


def assert_refused(checkpoint: Path, *words: str, **config_fields: Any) -> str:
    """Converting fails, with these words in the message, and leaves no trace in the checkpoint's folder."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(ConversionError) as error:
        convert(checkpoint, checkpoint.parent / "out", **config_fields)
    for word in words:
        assert word in str(error.value)
    assert sorted(checkpoint.parent.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_file(tmp_path, suffix):
    checkpoint = tmp_path / f"empty{suffix}"
    checkpoint.touch()
    assert_refused(checkpoint, str(checkpoint), "damaged")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, suffix, kept):
    checkpoint = write_checkpoint(tmp_path / f"truncated{suffix}", load_golden("vim_micro").state)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(kept * len(content))])
    assert_refused(checkpoint, str(checkpoint), "damaged")


@pytest.mark.parametrize("suffix", FORMATS)
def test_text_file(tmp_path, suffix):
    checkpoint = tmp_path / f"text{suffix}"
    checkpoint.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 28\n" * 10)
    assert_refused(checkpoint, str(checkpoint))


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_file_and_folder(tmp_path, suffix):
    assert_refused(tmp_path / f"missing{suffix}", f"missing{suffix}", "cannot be read")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert_refused(folder, str(folder), "cannot be read")


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, side_effect: Path):
        self.side_effect = side_effect

    def __reduce__(self):
        return Path.touch, (self.side_effect,)


class Foreign:
    """An object of a class that is not on the list of what a checkpoint may hold."""


def save_plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_old_format(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, save_old_format, save_plain_pickle])
def test_pickle_that_would_run_code(tmp_path, save: Callable[[Any, Path], None]):
    side_effect = tmp_path / "side_effect"
    (tmp_path / "files").mkdir()
    checkpoint = tmp_path / "files" / "checkpoint.pth"
    save({"model": load_golden("vim_micro").state, "args": RunsCode(side_effect)}, checkpoint)
    assert_refused(checkpoint, str(checkpoint), "could run code")
    assert not side_effect.exists()

    # It would have run if it had been unpickled without restrictions.
    if save is save_plain_pickle:
        pickle.loads(checkpoint.read_bytes())
    else:
        torch.load(checkpoint, weights_only=False)
    assert side_effect.exists()


def test_pickle_with_a_foreign_class(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", load_golden("vim_micro").state, optimizer=Foreign())
    message = assert_refused(checkpoint, str(checkpoint), "Foreign")
    assert "weights_only" not in message and "can still be loaded" not in message  # no advice to run the code


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def edit_copy(state: dict[str, Any]) -> dict[str, Any]:
        state = dict(state)
        edit(state)
        return state

    return edit_copy


def without_layer(state: dict[str, Any], layer: int) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"layers.{layer}.")}


# Every message must name what is wrong as it is called in the file.
BAD_STATES = {
    "missing geometry key": (edited(lambda state: state.pop("layers.0.mixer.A_log")), "layers.0.mixer.A_log"),
    "missing key": (edited(lambda state: state.pop("layers.2.mixer.D_b")), "layers.2.mixer.D_b"),
    "missing head": (edited(lambda state: state.pop("head.weight")), "head.weight"),
    "extra key": (edited(lambda state: state.update({"head_dist.weight": torch.zeros(2)})), "head_dist.weight"),
    "key of ours beside the official one": (
        edited(lambda state: state.update({"fambav.norm.weight": torch.zeros(32)})),
        "fambav.norm.weight",
    ),
    "wrong shape": (
        edited(lambda state: state.update({"layers.1.mixer.in_proj.weight": torch.zeros(128, 16)})),
        "layers.1.mixer.in_proj.weight",
    ),
    "wrong number of dimensions": (
        edited(lambda state: state.update({"patch_embed.proj.weight": torch.zeros(32, 192)})),
        "patch_embed.proj.weight",
    ),
    "oblong patches": (
        edited(lambda state: state.update({"patch_embed.proj.weight": torch.zeros(32, 3, 8, 4)})),
        "patch_embed.proj.weight",
    ),
    "gap in the layers": (lambda state: without_layer(state, 2), "[0, 1, 3]"),
    "no first layer": (lambda state: without_layer(state, 0), "layers.0"),
    "positions that form no square": (lambda state: with_positions(state, 12), "--image_size"),
    "no positions": (lambda state: with_positions(state, 0), "image_size"),
    "entry that is no tensor": (edited(lambda state: state.update({"epoch": 3})), "'epoch'"),
    "no entry": (lambda state: {}, "without tensors"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_state_dict_of_no_vim(tmp_path, case):
    edit, expected = BAD_STATES[case]
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", edit(load_golden("vim_micro").state))
    assert_refused(checkpoint, expected)


BAD_FIELDS = [
    ({"cls_token_position": "tail"}, ["cls_token_position", "tail", "head", "middle"]),
    ({"hidden_size": 64}, ["hidden_size", "64", "32"]),
    ({"num_hidden_layers": 24}, ["num_hidden_layers", "24", "4"]),
    ({"patch_size": 16}, ["patch_size", "16", "8"]),
    ({"image_size": 64}, ["pos_embed", "(1, 17, 32)"]),
    ({"patch_stride": 4, "image_size": 32}, ["pos_embed", "(1, 17, 32)"]),
    ({"fusion_strategy": "upper", "fusion_tokens": 0}, ["fusion_tokens", "0"]),
    ({"fusion_strategy": "custom", "fusion_schedule": [3, 3]}, ["fusion_schedule", "[3, 3]"]),
]


@pytest.mark.parametrize("config_fields, expected", BAD_FIELDS, ids=lambda value: next(iter(value)))
def test_flag_that_is_wrong_or_contradicts_the_tensors(tmp_path, config_fields, expected):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", load_golden("vim_micro").state)
    assert_refused(checkpoint, *expected, **config_fields)


def test_output_folder_that_is_not_empty_is_left_alone(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", load_golden("vim_micro").state)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert_refused(checkpoint, str(tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_output_folder_that_is_a_file_is_left_alone(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", load_golden("vim_micro").state)
    (tmp_path / "out").write_text("years of work")
    assert_refused(checkpoint, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "years of work"


def test_failing_to_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", load_golden("vim_micro").state)
    monkeypatch.setattr(ViTImageProcessorPil, "save_pretrained", fail)  # the model is saved before it
    with pytest.raises(OSError, match="no space left"):
        convert(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_command_line_error_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["convert_vim_checkpoint.py", str(tmp_path / "missing.pth"), str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as end:
        main()
    # Python prints a text and exits with 1.
    assert re.fullmatch(r"error: .*missing\.pth: cannot be read, .*", end.value.code)
