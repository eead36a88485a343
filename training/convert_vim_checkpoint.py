"""Convert an official Vim or Famba-V checkpoint into a folder that `from_pretrained` loads.

    python training/convert_vim_checkpoint.py vim_t_midclstok_76p1acc.pth vim-tiny --cls_token_position middle

The geometry is read off the tensors. Fusion is off unless a fusion flag is given, so that the converted model is the
model that was trained; `model.config.fusion_strategy = "upper"` switches it on at any time.
"""

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fambav_training.cli import add_model_flags, config_overrides, one_line_errors
from fambav_training.files import atomic_folder
from modeling_fambav import FambaVConfig, FambaVForImageClassification

_OFFICIAL_NAMES = {
    "fambav.embeddings.cls_token": "cls_token",
    "fambav.embeddings.position_embeddings": "pos_embed",
    "fambav.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "fambav.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "fambav.norm.weight": "norm_f.weight",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
}
_SCAN_PARAMETER = re.compile(r"(layers\.\d+\.mixer)\.(forward|backward)_scan\.(conv1d|x_proj|dt_proj|A|D)(.*)")


class ConversionError(ValueError):
    """A file that cannot be read, or is not an official Vim checkpoint."""


def convert(checkpoint: Path, output_folder: Path, **overrides: Any) -> FambaVForImageClassification:
    """Convert a checkpoint file into a folder with weights, configuration, code and image processor.

    Args:
        checkpoint: `.pth` or `.safetensors` with the official state-dict names.
        output_folder: must not exist yet, or be empty.
        overrides: fields of `FambaVConfig` that the tensors do not tell, such as `cls_token_position`.

    Returns:
        the converted model.

    Raises:
        ConversionError: if the file is damaged, foreign or would run code, or the folder is not empty. Nothing is
            written then.
    """
    if output_folder.exists() and (not output_folder.is_dir() or any(output_folder.iterdir())):
        raise ConversionError(f"{output_folder}: expected a folder that does not exist yet or is empty")
    official = read_state_dict(checkpoint)
    config = read_config(official, **overrides)
    model = FambaVForImageClassification(config)
    model.load_state_dict(_renamed(official, model.state_dict()))

    height, width = config.image_height_width
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    )
    with atomic_folder(output_folder) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their official names.

    A pickle is read by torch's restricted unpickler, which builds tensors and plain containers and calls nothing
    else; `argparse.Namespace`, in which the official script keeps its flags, is the one other class that is allowed.

    Raises:
        ConversionError: if the file is missing, damaged, or holds anything else.
    """
    try:
        if checkpoint.suffix == ".safetensors":
            content = load_file(checkpoint)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConversionError(f"{checkpoint}: cannot be read, {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        # Of torch's long message, which also advises to run the code, the one line that names what was found
        found = next((line for line in str(error).splitlines() if "GLOBAL" in line or "error:" in line), "")
        raise ConversionError(
            f"{checkpoint}: not a file of plain tensors, and nothing else is unpickled because it could run code. "
            f"{found.strip()}".strip()
        ) from error
    except Exception as error:  # damaged bytes make the unpickler fail in any way, such as a pop from an empty stack
        raise ConversionError(
            f"{checkpoint}: damaged or not a checkpoint ({type(error).__name__}: {error})"
        ) from error

    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # the official script's files
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{checkpoint}: expected a state dict, got {type(content).__name__} without tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConversionError(f"{checkpoint}: entry {name!r} is a {type(tensor).__name__}, expected a tensor")
    return content


def read_config(official: dict[str, Tensor], **overrides: Any) -> FambaVConfig:
    """Geometry of an official state dict; fusion is off unless `overrides` has a fusion field.

    Raises:
        ConversionError: if a tensor that tells the geometry is missing or has the wrong number of dimensions, or
            contradicts a field of `overrides`, or the fields make no valid configuration.
    """

    def shape(name: str, num_dimensions: int) -> tuple[int, ...]:
        if name not in official:
            raise ConversionError(f"{name!r} is missing: not a Vim checkpoint with official names")
        if official[name].dim() != num_dimensions:
            raise ConversionError(
                f"{name!r} of shape {tuple(official[name].shape)}: expected {num_dimensions} dimensions"
            )
        return tuple(official[name].shape)

    hidden_size, num_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    intermediate_size, state_size = shape("layers.0.mixer.A_log", 2)
    layers = {int(match[1]) for match in (re.match(r"layers\.(\d+)\.", name) for name in official) if match}
    if layers != set(range(len(layers))):
        raise ConversionError(f"layers {sorted(layers)[:30]}: expected all of 0, 1, 2, ...")
    geometry = {
        "num_channels": num_channels,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "state_size": state_size,
        "expand": intermediate_size // max(hidden_size, 1),
        "conv_kernel": shape("layers.0.mixer.conv1d.weight", 3)[2],
        "time_step_rank": shape("layers.0.mixer.dt_proj.weight", 2)[1],
    }
    for name, value in geometry.items():
        if overrides.setdefault(name, value) != value:
            raise ConversionError(f"{name}={overrides[name]}: the tensors of the checkpoint say {value}")

    num_patches = shape("pos_embed", 3)[1] - 1
    if "image_size" not in overrides:
        stride = overrides.get("patch_stride") or patch_size
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ConversionError(f"'pos_embed' has {num_patches} patches, which form no square: give --image_size")
        overrides["image_size"] = (side - 1) * stride + patch_size
    if not any(name.startswith("fusion") for name in overrides):
        overrides["fusion_strategy"] = "none"
    try:
        return FambaVConfig(num_labels=shape("head.weight", 2)[0], **overrides)
    except StrictDataclassError as error:
        raise ConversionError(str(error)) from error


def official_name(name: str) -> str:
    """The official name of one of our parameters. The backward direction is marked by a suffix: conv1d_b, A_b_log."""
    if name in _OFFICIAL_NAMES:
        return _OFFICIAL_NAMES[name]
    name = name.removeprefix("fambav.")
    if match := _SCAN_PARAMETER.fullmatch(name):
        mixer, direction, parameter, ending = match.groups()
        return f"{mixer}.{parameter}{'_b' if direction == 'backward' else ''}{ending}"
    return name


def _renamed(official: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official tensors under our names, which are those of `expected`; all must be there with the same shapes."""
    names = {official_name(name): name for name in expected}
    problems = [f"missing {name!r}" for name in names if name not in official]
    problems += [f"unexpected {name!r}" for name in official if name not in names]
    problems += [
        f"{name!r} of shape {tuple(official[name].shape)}, expected {tuple(expected[ours].shape)}"
        for name, ours in names.items()
        if name in official and official[name].shape != expected[ours].shape
    ]
    problems += [
        f"{name!r} of {tensor.dtype}, expected floating-point numbers"
        for name, tensor in official.items()
        if name in names and not tensor.is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConversionError(f"not a Vim checkpoint of one geometry: {'; '.join(problems[:5])}{more}")
    return {ours: official[name] for name, ours in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="official .pth or .safetensors file")
    parser.add_argument("output_folder", type=Path, help="folder to write; must not exist yet, or be empty")
    add_model_flags(parser)
    namespace = parser.parse_args()
    with one_line_errors():
        model = convert(namespace.checkpoint, namespace.output_folder, **config_overrides(namespace))
    config = model.config
    print(
        f"{namespace.output_folder}: {model.num_parameters():,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_labels} labels, image size {config.image_size}, class token at the {config.cls_token_position}, "
        f"fusion {config.fusion_strategy}, tokens per layer {config.sequence_lengths}"
    )


if __name__ == "__main__":
    main()
