"""A static site that classifies images on the visitor's device, with token fusion and without, and shows what fuses.

The page itself is in `site/`. What depends on the model is in `site.json`, which the page reads.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from fambav_training.export.onnx_file import export_checked
from fambav_training.export.onnxruntime_web import FILES as RUNTIME_FILES
from fambav_training.files import atomic_folder
from fambav_training.fusion.settings import UNFUSED, fused
from fambav_training.pictures.fusion_pictures import layers_that_fuse

_PAGE = Path(__file__).parent / "site"
_WORKER = "service_worker.js"
_RESAMPLING = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_SPACE_CARD = """---
title: {title}
sdk: static
app_file: index.html
---

Token fusion in Vision Mamba, on the visitor's device. Made by `training/export_web.py`.
"""


def write_site(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    name: str,
    examples: Sequence[Path],
    runtime: Path,
    site: Path,
) -> None:
    """Write a new folder of static files, which appears whole or not at all.

    Args:
        model: a classifier in evaluation mode and float32, with its fusion.
        processor: its image processor.
        name: of the model, for readers.
        examples: images to choose from.
        runtime: folder with the files of onnxruntime-web.
        site: the folder to write.

    Raises:
        ValueError: if the folder exists, or the page cannot prepare images as the processor does, or a logit of an
            ONNX file is not the model's.
    """
    if site.exists():
        raise ValueError(f"{site}: exists already; remove it or name another folder")
    description = {"title": f"Token fusion in Vision Mamba: {name}", **_describe(model, processor)}
    with atomic_folder(site) as folder:
        shutil.copytree(_PAGE, folder, dirs_exist_ok=True)
        _copy(folder / "onnxruntime", [runtime / file for file in RUNTIME_FILES])
        _copy(folder / "examples", examples)
        description["examples"] = [f"examples/{path.name}" for path in examples]
        description["models"] = _export_models(model, folder)
        (folder / "site.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
        (folder / "README.md").write_text(_SPACE_CARD.format(title=json.dumps(name)))
        _list_files(folder)


def _describe(model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, Any]:
    """What the page needs to know of a model and of the images that it takes."""
    config = model.config
    if config.num_channels != 3:
        raise ValueError(f"num_channels={config.num_channels}: the page makes images of 3 channels")
    if processor.resample not in _RESAMPLING:
        allowed = " or ".join(f"{int(mode)} ({name})" for mode, name in _RESAMPLING.items())
        raise ValueError(f"resample={processor.resample!r} of the image processor: the page resizes by {allowed}")
    height, width = processor.size["height"], processor.size["width"]
    if (height, width) != config.image_height_width:
        raise ValueError(f"the image processor makes images of {height} x {width} pixels, {config.image_size=}")
    return {
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "image": {
            "height": height,
            "width": width,
            "resample": _RESAMPLING[processor.resample],
            "rescale_factor": processor.rescale_factor,
            "image_mean": list(processor.image_mean),
            "image_std": list(processor.image_std),
        },
        "grid": list(config.patch_grid),
        "class_index": model.fambav.embeddings.class_index_of(config.num_patches),
        "tokens_before_fusion": config.num_patches + 1,
    }


def _export_models(model: PreTrainedModel, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the model with its fusion, if it has any, and without."""
    fusions = {"fused": {}, "unfused": UNFUSED} if layers_that_fuse(model.config) else {"unfused": {}}
    (folder / "models").mkdir()
    models = {}
    for name, fusion in fusions.items():
        with fused(model.config, fusion):
            export_checked(model, folder / "models" / f"{name}.onnx", token_maps=True)
            models[name] = {"file": f"models/{name}.onnx", "tokens": model.config.sequence_lengths}
    return models


def _copy(folder: Path, files: Sequence[Path]) -> None:
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _list_files(folder: Path) -> None:
    """Tell the worker of the page which files it keeps for use without a network, and a version that names them."""
    digest, names = hashlib.sha256(), ["./"]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in ("README.md", _WORKER):
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
            names.append(name)
    worker = (folder / _WORKER).read_text()
    worker = worker.replace("{version}", digest.hexdigest()[:16]).replace("{files}", json.dumps(names))
    (folder / _WORKER).write_text(worker)
