"""What test files share: configurations, golden numbers, tolerances, images, slow fusion, inputs of the scan."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_fambav import FambaVConfig, FambaVForImageClassification, FambaVModel
from modeling_fambav.selective_scan import selective_scan

FIXTURES = Path(__file__).parents[1] / "fixtures"

# (rtol, atol) of an operation in a dtype against its float64 reference.
TOLERANCES = {
    ("scan", "float32"): (6e-4, 2e-3),
    ("scan", "bfloat16"): (3e-2, 5e-2),
    ("conv", "float32"): (3e-4, 1e-3),
    ("conv", "bfloat16"): (1e-2, 5e-2),
}


def tolerance(operation: str, dtype: torch.dtype) -> dict[str, float]:
    """Keyword arguments of `torch.testing.assert_close`."""
    rtol, atol = TOLERANCES[operation, str(dtype).removeprefix("torch.")]
    return {"rtol": rtol, "atol": atol}


def tiny_config(**fields) -> FambaVConfig:
    """16 patches and a class token, three layers, two tokens removed by the last two of them."""
    return FambaVConfig(
        **{
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 4,
            "fusion_tokens": 2,
            **fields,
        }
    )


def make_model(model_class=FambaVModel, **fields):
    """A tiny model whose every parameter matters: none is zero, one, or very small."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("norm.weight"):  # otherwise all normed tokens have about the same length
                parameter.mul_(torch.randn_like(parameter).exp())
    return model


def gradients(model, pixel_values: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(pixel_values, labels=torch.zeros(len(pixel_values), dtype=torch.long)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def save_classifier(folder: Path, **fields) -> Path:
    """A random `tiny_config` classifier with its processor; returns the folder."""
    torch.manual_seed(0)
    model = FambaVForImageClassification(tiny_config(**fields))
    model.save_pretrained(folder)
    height, width = model.config.image_height_width
    ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
    return folder


def read_fixture(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of golden numbers, made with the official code."""
    with safe_open(FIXTURES / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers whatever torch's default dtype and device are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


# ---- images ----


def images(batch_size: int = 3, config: FambaVConfig | None = None, seed: int = 0) -> Tensor:
    """Random pixel values that fit a configuration."""
    config = config or tiny_config()
    return random_tensor(batch_size, config.num_channels, *config.image_height_width, seed=seed)


def noise(mode: str = "RGB", width: int = 8, height: int = 8, seed: int = 0) -> Image.Image:
    """A random image of any mode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


# ---- token fusion of one image with Python numbers, from the equations of the paper ----


def slow_similarity(a: list[float], b: list[float], similarity: str) -> float:
    dot = sum(x * y for x, y in zip(a, b))
    if similarity == "dot":
        return dot
    if similarity == "cosine":
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return -math.dist(a, b)


def slow_match(
    metric: list[list[float]], r: int, class_index: int, similarity: str, order: str, window: int | None = None
) -> tuple[list[int], list[int]]:
    """The survivors in their new order, and for every token the place of the token that now carries it."""
    num_tokens = len(metric)
    evens = [i for i in range(0, num_tokens, 2) if i != class_index]
    odds = [j for j in range(1, num_tokens, 2) if j != class_index]
    partner, best = {}, {}
    for i in evens:
        for j in odds if window is None else [j for j in odds if abs(i - j) <= window]:
            score = slow_similarity(metric[i], metric[j], similarity)
            if i not in best or score > best[i]:
                best[i], partner[i] = score, j
    if num_tokens == 3:  # a single pair of patches, which may both have an even index: the first joins the second
        first, second = (i for i in range(3) if i != class_index)
        partner, best = {first: second}, {first: 0.0}
    fused = sorted(best, key=best.get, reverse=True)[:r]

    survivors = [i for i in range(num_tokens) if i not in fused]
    if order == "appended":
        survivors = [class_index] + [i for i in evens + odds if i not in fused]
    return survivors, [survivors.index(partner[i] if i in fused else i) for i in range(num_tokens)]


def slow_merge(values: list[list[float]], new_index: list[int], weights: list[float]) -> list[list[float]]:
    merged = []
    for place in range(max(new_index) + 1):
        landed = [i for i, index in enumerate(new_index) if index == place]
        total = sum(weights[i] for i in landed)
        merged.append([sum(weights[i] * values[i][d] for i in landed) / total for d in range(len(values[0]))])
    return merged


# ---- the selective scan ----


def scan_inputs(
    num_directions: int, batch_size: int, num_tokens: int, channels: int, state_size: int, dtype=torch.float32
) -> dict[str, Tensor]:
    """Arguments of `selective_scan`, time steps and decays as a Mamba layer starts with; parameters in float32."""
    per_token = (num_directions, batch_size, num_tokens)
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    spread = 1 + 0.1 * random_tensor(num_directions, channels, state_size, seed=3).abs()
    return {
        "x": random_tensor(*per_token, channels, seed=1, dtype=dtype),
        "dt": random_tensor(*per_token, channels, seed=2, dtype=dtype),
        "A": -(spread * torch.arange(1, state_size + 1, device="cpu")).to(parameter_dtype),
        "B": random_tensor(*per_token, state_size, seed=4, dtype=dtype),
        "C": random_tensor(*per_token, state_size, seed=5, dtype=dtype),
        "D": random_tensor(num_directions, channels, seed=6, dtype=parameter_dtype),
        "z": random_tensor(batch_size, num_tokens, channels, seed=7, dtype=dtype),
        "dt_bias": random_tensor(num_directions, channels, seed=8, dtype=parameter_dtype) - 3,
        "dt_scale": 1 + random_tensor(batch_size, num_tokens, seed=9).abs().floor(),
    }


def gradient_of(out: Tensor) -> Tensor:
    """A fixed gradient, the same numbers in every dtype, on its device."""
    return random_tensor(*out.shape, seed=0, dtype=torch.bfloat16).to(out)


def scan_with_gradients(function, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The output, and the gradient of every input that has one, for a fixed gradient of the output."""
    leaves = {
        name: tensor.detach().requires_grad_() if tensor is not None and name != "dt_scale" else tensor
        for name, tensor in inputs.items()
    }
    out = function(**leaves)
    out.backward(gradient_of(out))
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    return {"out": out.detach(), **gradients}


def in_float64(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tensor if tensor is None else tensor.double() for name, tensor in inputs.items()}


def assert_results_close(actual: dict, expected: dict, rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        expected_tensor = expected[name].to(tensor.dtype)
        torch.testing.assert_close(tensor, expected_tensor, rtol=rtol, atol=atol, msg=lambda msg: f"{name}: {msg}")


def non_contiguous(tensor: Tensor, kind: str) -> Tensor:
    """The same values in another memory layout: "transposed", "every second" or "part of wider rows"."""
    if kind == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    columns = tensor.repeat_interleave(2, dim=-1) if kind == "every second" else torch.cat((tensor, tensor), dim=-1)
    return columns[..., ::2] if kind == "every second" else columns[..., : tensor.shape[-1]]


def conv_inputs(num_directions: int, batch_size: int, num_tokens: int, channels: int, kernel_size: int, dtype):
    return {
        "x": random_tensor(batch_size, num_tokens, channels, seed=1, dtype=dtype),
        "weight": random_tensor(num_directions, channels, kernel_size, seed=2, dtype=torch.float32),
        "bias": random_tensor(num_directions, channels, seed=3, dtype=torch.float32),
    }


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def scan_in_child(connection, shape: tuple[int, ...], num_threads: int) -> None:
    """Body of a child process: send the results of a scan, as arrays, through a pipe."""
    torch.set_num_threads(num_threads)
    results = scan_with_gradients(selective_scan, scan_inputs(*shape))
    connection.send({name: tensor.numpy() for name, tensor in results.items()})
