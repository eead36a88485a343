"""A trained classifier as an ONNX file for any batch size, and how far its answers are from the model's."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from fambav_training.evaluation.scoring import load_classifier
from fambav_training.files import atomic_file
from modeling_fambav import set_selective_scan_backend

TOLERANCE = 1e-4  # of a logit, in float32
TOKEN_MAPS = "token_maps"
HUB_FILE = "onnx/model.onnx"  # where transformers.js looks
_BATCH_SIZES = (1, 2, 5)
_FOLDED = 2**26  # values of a constant, at most; the matrices of all sizes of Vim have fewer
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(model: PreTrainedModel, path: Path, token_maps: bool = False) -> None:
    """Write a classifier in evaluation mode, as its configuration now fuses, to an ONNX file for any batch size.

    The file takes `pixel_values` (batch, channels, height, width), float32, and gives `logits` (batch, labels). With
    `token_maps` it also gives `token_maps`, int64 (batch, layers, T_0): the token that carries each initial token.
    """
    from fambav_training.export.onnx_operators import translations

    config = model.config
    pixel_values = torch.zeros(2, config.num_channels, *config.image_height_width)
    with torch.no_grad(), _own_operators(), _quiet():
        program = torch.onnx.export(
            _WithTokenMaps(model) if token_maps else model,
            (pixel_values,),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits", TOKEN_MAPS] if token_maps else ["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            custom_translation_table=translations(),
            optimize=False,  # its patterns find nothing here, and looking for them takes two thirds of the time
            verbose=False,
        )
        _simplify(program.model)
        program.save(path)


def _simplify(model) -> None:
    """Compute what does not depend on the input, and remove what is not used or there twice."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    from fambav_training.export.onnx_projections import transpose_narrow_tensors

    common.InlinePass()(model)
    transpose_narrow_tensors(model)
    fold_constants(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        # Stack traces with the paths of this machine, more bytes than the weights of a small model
        common.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)


class _WithTokenMaps(nn.Module):
    """A classifier whose outputs are its logits and, as one tensor, its token maps."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values, output_token_maps=True)
        return outputs.logits, torch.stack(outputs.token_maps, dim=1)


@contextmanager
def _own_operators() -> Iterator[None]:
    """The model runs on the operators that onnx_operators.py translates."""
    own = set_selective_scan_backend("numba")
    try:
        yield
    finally:
        set_selective_scan_backend(own)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that it does not need and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def open_session(path: Path):
    """An `onnxruntime.InferenceSession` on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def differences(model: PreTrainedModel, path: Path) -> dict[int, float]:
    """Largest absolute difference of a logit between an ONNX file and the model, by batch size, on random images."""
    session = open_session(path)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for batch_size in _BATCH_SIZES:
        shape = (batch_size, model.config.num_channels, *model.config.image_height_width)
        pixel_values = torch.randn(shape, generator=generator)
        (logits,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        found[batch_size] = np.abs(logits - model(pixel_values).logits.numpy()).max().item()
    return found


def export_checked(model: PreTrainedModel, path: Path, token_maps: bool = False) -> dict[int, float]:
    """`export_onnx`, and the `differences` of what it wrote.

    Raises:
        ValueError: if a logit of the file is not within `TOLERANCE` of the model's.
    """
    export_onnx(model, path, token_maps)
    found = differences(model, path)
    if not _agree(found):
        raise ValueError(
            f"the ONNX file is not kept: its logits differ from the model's by {max(found.values()):.1e}, expected at "
            f"most {TOLERANCE}; if this is rare, two tokens were equally similar up to rounding, and "
            "--fusion_strategy none tells"
        )
    return found


def _agree(found: dict[int, float]) -> bool:
    # Not `>`, which a NaN would pass
    return all(difference <= TOLERANCE for difference in found.values())


def export_for_hub(folder: Path) -> Path:
    """Write the classifier of a folder as `HUB_FILE` in it; returns the file.

    A file that is there and gives the model's logits stays.

    Raises:
        ValueError: as `check_packages` and `export_checked`.
    """
    check_packages()
    model, _ = load_classifier(str(folder), {})
    model = model.eval().float()
    path = folder / HUB_FILE
    if not path.is_file() or not _agree(differences(model, path)):
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as file:
            export_checked(model, file)
    return path


def exported_file(model: PreTrainedModel, source: Path, folder: Path) -> Path:
    """An ONNX file of this model: the one in its folder `source` if there is one and it is right, or a new one.

    A new one is written into `folder`.

    Raises:
        ValueError: as `export_checked`.
    """
    path = source / HUB_FILE
    if not path.is_file() or not _agree(differences(model, path)):
        path = folder / "model.onnx"
        export_checked(model, path)
    return path


def check_packages() -> None:
    """Raises ValueError if a package is missing that export needs."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)}: not installed; pip install -e '.[onnx]' provides what export needs")
