"""The release of a quantised model: a folder without code, whose card names the model that it was made of."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from fambav_training.files import atomic_folder
from fambav_training.release.model_card import LOCATION

QUANTIZED_FILE = "quantization.json"
# Stands for the owner of a model that is not published: that of the quantised one, once that is published
OWNER = "OWNER_OF_THIS_MODEL"
# The name by which transformers.js finds it for dtype q8
ONNX_FILE = "onnx/model_quantized.onnx"
TEMPLATE = Path(__file__).parents[3] / "model_cards" / "quantized_template.md"


def base_model_of(given: str | None, model: str) -> str:
    """The repository of the model that is quantised: what is given, the model itself if it is on the Hub, or its name.

    Raises:
        ValueError: if it is not OWNER/NAME.
    """
    if given is None:
        return f"{OWNER}/{Path(model).resolve().name}" if Path(model).exists() else model
    try:
        validate_repo_id(given)
        is_repository = "/" in given
    except ValueError:
        is_repository = False
    if not is_repository:
        raise ValueError(f"--base_model {given}: expected OWNER/NAME")
    return given


def write_quantized_release(
    path: Path,
    config: PreTrainedConfig,
    processor: BaseImageProcessor,
    onnx_file: Path,
    report: dict[str, Any],
    base_model: str,
    table: str,
) -> None:
    """Write a new folder, which appears whole or not at all.

    Args:
        onnx_file: the quantised model.
        report: what was measured, with `precisions`, `method`, `dataset` and `split`.
        base_model: OWNER/NAME of the model that was quantised, see `base_model_of`.
        table: of the precisions, in Markdown.
    """
    with atomic_folder(path) as folder:
        (folder / ONNX_FILE).parent.mkdir()
        shutil.copy(onnx_file, folder / ONNX_FILE)
        settings = config.to_dict()
        settings.pop("auto_map", None)  # there is no code here
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        processor.save_pretrained(folder)
        (folder / QUANTIZED_FILE).write_text(json.dumps(report, indent=2) + "\n")
        _create_card(report, base_model, table).save(folder / "README.md")


def _create_card(report: dict[str, Any], base_model: str, table: str) -> ModelCard:
    name = f"ONNX Runtime, int8 {report['method']}"
    row = next(row for row in report["precisions"] if row["name"] == name)
    dataset = report["dataset"]
    is_hub_id = dataset.count("/") == 1 and not Path(dataset).exists()
    data = ModelCardData(
        license="apache-2.0",
        library_name="onnx",
        pipeline_tag="image-classification",
        tags=["fambav", "vision-mamba", "token-fusion", "image-classification", "onnx", "int8"],
        datasets=[dataset] if is_hub_id else None,
        metrics=["accuracy"],
        base_model=base_model,
        model_name=f"{Path(report['model']).name}-int8",
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset if is_hub_id else Path(dataset).name,
                dataset_name=Path(dataset).name,
                dataset_split=report["split"],
                metric_type="accuracy",
                metric_name="accuracy",
                metric_value=round(row["top1"], 2),
            )
        ],
        base_model_relation="quantized",
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        report=report,
        row=row,
        table=table,
        location=LOCATION,
        file=ONNX_FILE,
        base=base_model,
    )
